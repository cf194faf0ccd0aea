"""The cache of decoded images: the same batches as without it, built once, and nothing half-built taken for whole."""

from __future__ import annotations

import fcntl
import inspect
import logging
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

import datamodules
from datamodules import Folders, cache
from datamodules.cache import Mapped, cached
from datamodules.images import ImageSet, Window, decode

# ---------------------------------------------------------------------- what is read


def picture(file: Path, seed: int, width: int = 20, height: int = 15) -> Path:
    """A JPEG, or a PNG by its name, of smooth noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


def pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(count)
    return [
        picture(folder / f"{i:03}.{('jpg', 'png')[i % 2]}", i, *map(int, rng.integers(9, 40, 2))) for i in range(count)
    ]


def tree(root: Path, train: int = 12, rest: int = 4) -> Path:
    """A tree for :class:`Folders`, of two classes."""
    for part, count in (("train", train), ("val", rest), ("test", rest)):
        for name in ("a", "b"):
            for i in range(count // 2):
                picture(root / part / name / f"{i}.jpg", zlib.crc32(f"{part}{name}{i}".encode()))
    return root


def images(files: list[Path], size: tuple[int, int], crop: float | Window = 0.0, **options: Any) -> ImageSet:
    label = torch.arange(len(files))
    return ImageSet(files, {"label": label, "domain": torch.zeros_like(label)}, size, crop=crop, **options)


def reader(files: list[Path], size: tuple[int, int], asked: list[int] | None = None) -> Callable[[int], Tensor | None]:
    def read(i: int) -> Tensor | None:
        if asked is not None:
            asked.append(i)
        return decode(files[i], size)

    return read


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.is_dir() else []


# ---------------------------------------------------------------------- the same batches


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 7), st.integers(1, 33), st.integers(1, 33), st.sampled_from([0.0, 1.0, 8 / 7, (1, 2, 8, 7)]))
def test_images_of_a_cache_are_those_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, count: int, height: int, width: int, crop: float | Window
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    files = pictures(folder / "files", count)
    plain = images(files, (height, width), crop)
    for _ in range(2):  # as it is built, and as it is found
        other = images(files, (height, width), crop, cache=folder / "kept")
        assert isinstance(other.images, Mapped) and other.images.shape == (count, 3, height, width)
        order = torch.randperm(count).tolist()
        assert same(plain.plain(order), other.plain(order)) and same(plain[0], other[0])
    assert len(kept(folder / "kept")) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_of_cached_images_sees_what_it_sees_of_files(workers: int, tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")

    class Watch(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(3 * 16 * 16, 2), []  # type: ignore[var-annotated]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.seen.append(batch)
            return self.layer(batch["image"].flatten(1)).square().mean()

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.seen.append(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(**options: Any) -> Watch:
        data = Folders(
            str(root), 16, batch_size=4, seed=3, translate=0.2, crop_scale=(0.5, 1.0), num_workers=workers, **options
        )
        torch.manual_seed(0)
        module = Watch()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer(max_epochs=2, accelerator="cpu", use_distributed_sampler=False, **quiet).fit(module, datamodule=data)  # type: ignore[arg-type]
        return module

    plain, other = fit(memory_gb=0.0), fit(cache=str(tmp_path / "kept"))
    assert len(plain.seen) == len(other.seen) > 6 and all(map(same, plain.seen, other.seen))
    assert torch.equal(plain.layer.weight, other.layer.weight)
    assert len(kept(tmp_path / "kept")) == 2, "training and validation"


def test_workers_share_the_file_however_they_start(tmp_path: Path) -> None:
    files = pictures(tmp_path / "files", 6)
    examples = images(files, (50, 50), cache=tmp_path / "kept")
    assert len(pickle.dumps(examples)) < 5000, "the images travel to each worker"
    other = pickle.loads(pickle.dumps(examples))
    assert same(examples.plain(range(6)), other.plain(range(6)))
    assert not np.asarray(examples.images._array).flags.writeable  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", [n for n in datamodules.__all__ if "memory_gb" in str(inspect.getsource(getattr(datamodules, n)))]
)
def test_what_keeps_decoded_images_in_memory_can_keep_them_on_the_disk(name: str) -> None:
    cls: Any = getattr(datamodules, name)
    taken = [p for c in cls.__mro__ if "__init__" in vars(c) for p in inspect.signature(c.__init__).parameters]
    assert "cache" in taken


# ---------------------------------------------------------------------- the key


def test_a_cache_is_of_these_files_this_size_and_this_crop(tmp_path: Path) -> None:
    files, folder = pictures(tmp_path / "files", 4), tmp_path / "kept"

    def count(files: list[Path] = files, size: tuple[int, int] = (8, 8), crop: float | Window = 0.0) -> int:
        found = images(files, size, crop, cache=folder)
        assert same(found.plain(range(len(files))), images(files, size, crop).plain(range(len(files))))
        return len(kept(folder))

    assert count() == count() == 1
    assert count(size=(8, 9)) == 2 and count(crop=1.0) == 3 and count(crop=(0, 0, 8, 8)) == 4
    assert count(files[:3]) == 5 and count(files[::-1]) == 6 and count([*files, files[0]]) == 7
    before = files[0].stat()
    changed = files[0].read_bytes()[:-2] + b"\0\0"
    files[0].write_bytes(changed)  # of the same length, at another time
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert count() == 8 and count() == 8
    moved = (tmp_path / "files").rename(tmp_path / "elsewhere")  # the same tree on another disk has the same cache...
    (tmp_path / "files").mkdir()
    assert images([moved / file.name for file in files], (8, 8), cache=folder).images is not None
    names = {file.name.partition("-")[2] for file in kept(folder)}
    assert len(names) == 8, "...but for the folder's name, which is there for people"


def test_another_decoder_makes_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, folder = pictures(tmp_path / "files", 2), tmp_path / "kept"
    images(files, (8, 8), cache=folder)
    monkeypatch.setattr("PIL.__version__", "0.1")
    images(files, (8, 8), cache=folder)
    monkeypatch.setattr(cache, "VERSION", 0)
    images(files, (8, 8), cache=folder)
    assert len(kept(folder)) == 3


# ---------------------------------------------------------------------- built once, whole or not at all


def test_of_many_that_come_at_once_one_builds(tmp_path: Path) -> None:
    files, folder = pictures(tmp_path / "files", 40), tmp_path / "kept"
    asked: list[int] = []
    found: list[Any] = [None] * 4
    plain = reader(files, (8, 8), asked)

    def slow(i: int) -> Tensor | None:
        time.sleep(0.005)
        return plain(i)

    def come(k: int) -> None:
        found[k] = cached(files, (8, 8), 0.0, folder, slow)

    threads = [threading.Thread(target=come, args=(k,)) for k in range(4)]  # locks are of open files, not of processes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(asked) == list(range(40))
    wanted = torch.stack([decode(file, (8, 8)) for file in files])
    assert all(torch.equal(mapped[torch.arange(40)], wanted) for mapped, _ in found)
    assert [file.suffix for file in kept(folder)] == [".npy"]


def test_what_a_killed_build_leaves_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pictures(tmp_path / "files", 40)
    plain, fork = reader(files, (64, 64)), multiprocessing.get_context("fork")
    there = fork.Event()

    def read(i: int) -> Tensor | None:
        if i == 30:
            there.set()
            time.sleep(60)
        return plain(i)

    monkeypatch.setattr(cache, "CHUNK", 10)
    child = fork.Process(target=cached, args=(files, (64, 64), 0.0, tmp_path / "kept", read))
    child.start()
    assert there.wait(30)
    [part] = kept(tmp_path / "kept")
    assert part.name.endswith(".npy.part") and part.stat().st_size > 100_000
    child.kill()
    child.join(10)
    begun = time.monotonic()
    examples = images(files, (64, 64), cache=tmp_path / "kept")
    assert time.monotonic() - begun < 10, "it waits for a process that is gone"
    assert isinstance(examples.images, Mapped)
    assert same(examples.plain(range(40)), images(files, (64, 64)).plain(range(40)))
    assert [file.suffix for file in kept(tmp_path / "kept")] == [".npy"]


def test_a_builder_that_fails_while_another_one_asks_leaves_it_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, lock = pictures(tmp_path / "files", 3), cache._lock
    failing = ["the first one"]

    def late(opened: Any) -> bool:
        if failing:  # between opening and locking, the one who had the lock removed its file
            failing.pop()
            Path(opened.name).unlink()
        return lock(opened)

    monkeypatch.setattr(cache, "_lock", late)
    examples = images(files, (8, 8), cache=tmp_path / "kept")
    assert isinstance(examples.images, Mapped) and not failing
    assert same(examples.plain(range(3)), images(files, (8, 8)).plain(range(3)))


@pytest.mark.parametrize("cut", [0, 1, 60, 127, 128, 500, -5, -1])
def test_a_cache_that_was_cut_short_is_built_again(cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, folder = pictures(tmp_path / "files", 5), tmp_path / "kept"
    images(files, (8, 8), cache=folder)
    [file] = kept(folder)
    content = file.read_bytes()
    file.write_bytes(content[:cut] if cut else b"")
    with caplog.at_level(logging.WARNING):
        examples = images(files, (8, 8), cache=folder)
    assert "isn't whole" in caplog.text and len(caplog.records) == 1
    assert file.read_bytes() == content and isinstance(examples.images, Mapped)
    assert same(examples.plain(range(5)), images(files, (8, 8)).plain(range(5)))


# ---------------------------------------------------------------------- disks


def test_on_a_full_disk_there_is_one_line_and_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, folder = pictures(tmp_path / "files", 40), tmp_path / "kept"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a file that grows is refused in the middle
    try:
        with caplog.at_level(logging.WARNING):
            examples = images(files, (64, 64), cache=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r.getMessage() for r in caplog.records] == [
        f"decoded images can't be kept in {folder} (File too large): this run decodes them itself; name another folder "
        "with --data.cache"
    ]
    assert kept(folder) == [] and examples.images is None
    assert same(examples.plain(range(40)), images(files, (64, 64)).plain(range(40)))


def test_what_cannot_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder, asked = pictures(tmp_path / "files", 3), tmp_path / "kept", list[int]()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3 * 192})())
    assert cached(files, (8, 8), 0.0, folder, reader(files, (8, 8), asked)) is None
    assert "they take 0.0 GB" in caplog.text and asked == [] and kept(folder) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = pictures(tmp_path / "files", 3)
    (tmp_path / "kept").write_text("no folder")
    examples = images(files, (8, 8), cache=tmp_path / "kept", memory_gb=1.0)
    assert len(caplog.records) == 1 and "can't be kept" in caplog.text
    assert isinstance(examples.images, Tensor), "memory is still there"


def test_a_builder_that_stands_still_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder = pictures(tmp_path / "files", 3), tmp_path / "kept"
    images(files, (8, 8), cache=folder)
    [file] = kept(folder)
    file.unlink()
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    with file.with_name(f"{file.name}.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        examples = images(files, (8, 8), cache=folder)
        assert examples.images is None and "has written nothing" in caplog.text
        assert other.name in map(str, kept(folder)), "it isn't ours to remove"
    assert images(files, (8, 8), cache=folder).images is not None, "the lock went with the one who held it"


def test_caches_that_nobody_uses_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, folder = pictures(tmp_path / "files", 3), tmp_path / "kept"
    images(files, (8, 8), cache=folder)
    images(files, (8, 9), cache=folder)
    old = next(file for file in kept(folder) if "x8x8-" in file.name)
    for file in kept(folder):
        os.utime(file, (0, 0))
    images(files, (8, 9), cache=folder)  # is used now
    with caplog.at_level(logging.INFO):
        images(files, (8, 10), cache=folder)
    [line] = [r.getMessage() for r in caplog.records if "weren't used" in r.getMessage()]
    assert line.startswith("1 caches") and line.endswith(f"rm '{old}'")


# ---------------------------------------------------------------------- files that are no images


def test_files_that_cannot_be_read_are_treated_as_without_a_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder = pictures(tmp_path / "files", 9), tmp_path / "kept"
    for i in (2, 7):
        files[i].write_bytes(files[i].read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{files[2]} can't be read as an image"):
        images(files, (8, 8), cache=folder)
    assert kept(folder) == []
    plain = images(files, (8, 8), on_corrupt="skip")
    said = [r.getMessage() for r in caplog.records]
    for _ in range(2):
        caplog.clear()
        examples = images(files, (8, 8), on_corrupt="skip", cache=folder)
        assert [r.getMessage() for r in caplog.records] == said and "left out 2 files" in said[0]
        assert len(examples) == 7 and examples.files == plain.files and len(kept(folder)) == 1
        assert same(examples.plain(range(7)), plain.plain(range(7)))
        assert same(examples.plain([6, 1]), pickle.loads(pickle.dumps(examples)).plain([6, 1]))
    with pytest.raises(ValueError, match=f"{files[2]} can't be read as an image"):
        images(files, (8, 8), cache=folder)


def test_what_was_unreadable_for_a_moment_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder = pictures(tmp_path / "files", 5), tmp_path / "kept"
    with monkeypatch.context() as patch:

        def faulty(file: Path, *args: Any) -> Tensor:
            if file == files[3]:
                raise ValueError("the disk had a hiccup")
            return decode(file, *args)

        patch.setattr("datamodules.images.decode", faulty)
        assert len(images(files, (8, 8), on_corrupt="skip", cache=folder)) == 4
    assert len(images(files, (8, 8), cache=folder)) == 5 and "can be read now" in caplog.text
    assert len(images(files, (8, 8), cache=folder)) == 5 and len(kept(folder)) == 1


# ---------------------------------------------------------------------- ranks

RANKS = """
import sys, logging
from lightning.pytorch import LightningModule, Trainer
import torch, datamodules.images
logging.basicConfig(level="INFO", format="%(message)s")
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch["image"].flatten(1)).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
data = datamodules.Folders(sys.argv[1], 16, batch_size=2, seed=3, memory_gb=0.0, cache=sys.argv[2] or None)
torch.manual_seed(0)
module = Module()
trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
    limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, datamodule=data)
if trainer.global_rank == 0:
    print("sum", module.layer.weight.double().sum().item())
"""


@pytest.mark.slow
def test_of_two_ranks_one_decodes(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    found = []
    for folder in (str(tmp_path / "kept"), ""):
        done = subprocess.run(
            [sys.executable, str(script), str(root), folder],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(next(line for line in done.stdout.splitlines() if line.startswith("sum")))
        assert (done.stderr + done.stdout).count("decoding 12 images") == bool(folder)
    assert found[0] == found[1]
