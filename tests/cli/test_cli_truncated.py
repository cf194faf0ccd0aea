"""Checkpoints that are cut, garbled or hostile, disks that are full, and what a run that was killed left behind."""

from __future__ import annotations

import ast
import errno
import os
import pickle
import random
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HOME, Result, checkpoint, metrics, same
from test_cli_stop import FIT, GO_ON, SIGNAL, assert_equal_runs

from recipes import _atomic, _checkpoints
from recipes._checkpoints import CheckpointError, Damaged
from recipes._stop import LastCheckpoint
from tests.cli.toy import ToyNet

Run = Callable[..., Result]
ME = (ToyNet, "tests.cli.toy.ToyNet", "fit")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def whole(cli: Run, kept: Path) -> Path:
    """The run that wasn't stopped, of three epochs, trained once; its folder."""
    if not (kept / "whole").exists():
        result = cli(*FIT, "--trainer.default_root_dir", kept / "whole")
        assert result.code == 0, result.err
    (run,) = (kept / "whole" / "toy").iterdir()
    return run


@pytest.fixture
def stopped(cli: Run, kept: Path, tmp_path: Path) -> Path:
    """A run that was stopped in the second of three epochs: its last.ckpt is of step 18, its best.ckpt of step 12.

    It is trained once, and copied to the same place for each test: a checkpoint knows where it lies.
    """
    shutil.rmtree(kept / "runs", ignore_errors=True)
    (kept / "runs").mkdir()
    (tmp_path / "runs").symlink_to(kept / "runs")
    if not (kept / "stopped").exists():
        result = cli(*FIT, *SIGNAL, 17)
        assert result.code == 130, result.err
        assert [checkpoint(result.run, name)["global_step"] for name in ("last", "best")] == [18, 12]
        shutil.copytree(kept / "runs", kept / "stopped")
    else:
        shutil.copytree(kept / "stopped", kept / "runs", dirs_exist_ok=True)
    (run,) = (tmp_path / "runs" / "toy").iterdir()
    return run


def last(root: Path) -> _checkpoints.Saved | None:
    return _checkpoints.find_and_read("last", root, "toy", *ME)


def spoil(file: Path, content: bytes) -> None:
    """Other content, the time of the file as it was."""
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---------------------------------------------------------------------- cut and garbled


def test_cut_at_any_length_another_of_that_run_is_taken_and_named(stopped: Path) -> None:
    file = stopped / "checkpoints" / "last.ckpt"
    content = file.read_bytes()
    lengths = [round(i * (len(content) - 1) / 49) for i in range(50)]
    assert len(set(lengths)) == 50 and lengths[0] == 0
    for length in lengths:
        spoil(file, content[:length])
        with pytest.raises(Damaged, match="is not a checkpoint that can be read"):
            _checkpoints.find_and_read(str(file), stopped.parent.parent, "toy", *ME)
        saved = last(stopped.parent.parent)
        assert saved is not None and saved.file.name == "best.ckpt" and saved.run_folder == stopped
        assert saved.warning.startswith(f"{file} can't be read (") and "best.ckpt, of step 12" in saved.warning
    spoil(file, content)
    saved = last(stopped.parent.parent)
    assert saved is not None and saved.file == file and not saved.warning and saved.run_folder == stopped


def test_no_changed_byte_is_trained_on(stopped: Path) -> None:
    """A byte of what was stored is changed, or 4096 are lost to zeros: it is seen, or is of no importance."""
    file = stopped / "checkpoints" / "last.ckpt"
    content, was = file.read_bytes(), checkpoint(stopped)
    draw, seen = random.Random(0), 0
    for i in range(60):
        at = draw.randrange(len(content))
        there = content[at : at + 1] if i % 2 else content[at : at + 4096]
        other = bytes([there[0] ^ (1 << draw.randrange(8))]) if i % 2 else bytes(len(there))
        spoil(file, content[:at] + other + content[at + len(there) :])
        try:
            _checkpoints.read(file, *ME)
            assert same(torch.load(file, weights_only=True), was), (at, len(there))
        except CheckpointError:
            seen += 1
    assert seen > 30
    numbers = was["state_dict"]["body.1.weight"].numpy().tobytes()
    at = content.index(numbers)  # torch itself would load these
    spoil(file, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    torch.load(file, weights_only=True)
    with pytest.raises(Damaged, match="is not what was written"):
        _checkpoints.read(file, *ME)


@pytest.mark.parametrize("content", [b"", bytes(20_000), random.Random(1).randbytes(20_000), b"PK\x03\x04 hello"])
def test_run_with_a_spoilt_last_goes_on_from_its_best(cli: Run, whole: Path, stopped: Path, content: bytes) -> None:
    file = stopped / "checkpoints" / "last.ckpt"
    spoil(file, content)
    refused = cli("fit", "--ckpt_path", file)
    assert refused.code == 2 and len(refused.error_lines) == 1 and "can be read" in refused.err
    result = cli(*GO_ON)
    assert result.code == 0, result.err
    (warning,) = result.err.strip().splitlines()
    assert warning.startswith(f"warning: {file} can't be read") and "best.ckpt, of step 12" in warning
    assert warning.removeprefix("warning: ") in (stopped / "run.log").read_text()
    assert_equal_runs(whole, result.run)  # one folder, each step once


def test_nothing_whole_in_the_newest_run_is_an_error_and_no_older_run_is_taken(cli: Run, stopped: Path) -> None:
    older = stopped.parent / "20200101-000000-abcdef"
    shutil.copytree(stopped, older)
    for file in (older / "checkpoints").iterdir():
        os.utime(file, (1, 1))
    for file in (stopped / "checkpoints").iterdir():
        spoil(file, b"garbage")
    for wanted in ("last", "last?"):
        result = cli(*GO_ON[:2], wanted)
        assert result.code == 2 and len(result.error_lines) == 1
        assert f"{stopped / 'checkpoints' / 'last.ckpt'} is not a checkpoint that can be read" in result.err
        assert "no other checkpoint of that run is whole" in result.err
    assert len(result.runs) == 2  # nothing was begun
    assert cli("test", "--ckpt_path", "best").code == 2


# ---------------------------------------------------------------------- hostile


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """A file that is there if a payload was run."""
    file = tmp_path / "payload was run"
    yield file
    assert not file.exists()


def hostile(good: Path, payload: Payload, how: str) -> bytes:
    """A checkpoint that is a good one but for what runs a command."""
    file = good.with_name("hostile.partial")
    content = torch.load(good, weights_only=True)
    if how == "entry":
        torch.save({**content, "extra": payload}, file)
    elif how == "settings":
        content["recipe"]["config"]["model"]["lr"] = payload
        torch.save(content, file)
    elif how == "optimizer":
        content["optimizer_states"][0]["state"][0]["momentum_buffer"] = payload
        torch.save(content, file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps({**content, "extra": payload}, protocol=2))
    elif how == "legacy":
        torch.save({**content, "extra": payload}, file, _use_new_zipfile_serialization=False)
    elif how == "second":  # two entries of one name: which one is read is the reader's choice
        shutil.copyfile(good, file)
        with zipfile.ZipFile(file, "a") as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(name, pickle.dumps({"state_dict": {}, "extra": payload}, protocol=2))
    elif how == "script":  # a TorchScript archive, which torch.load would hand on
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(file))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("archive/extra.pkl", pickle.dumps(payload, protocol=2))
    read = file.read_bytes()
    file.unlink()
    return read


HOW = ("entry", "settings", "optimizer", "pickle", "legacy", "second", "script")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("how", HOW)
def test_payload_is_refused_in_one_line_and_not_run(cli: Run, stopped: Path, marker: Path, how: str) -> None:
    file = stopped / "checkpoints" / "last.ckpt"
    bad = stopped / "checkpoints" / "bad.ckpt"
    bad.write_bytes(hostile(file, Payload(marker), how))
    verbs = ("fit", "validate", "test", "predict") if how == "entry" else ("fit",)
    for verb in verbs:
        result = cli(verb, "--ckpt_path", bad)
        assert result.code == 2 and len(result.error_lines) == 1 and "Traceback" not in result.err, result.err
        assert str(bad) in result.error_lines[0]
        if how in ("entry", "settings", "optimizer"):
            assert "holds objects that torch will not load safely (posix.system)" in result.err


def test_payload_where_last_and_best_are_looked_for(cli: Run, stopped: Path, marker: Path) -> None:
    folder = stopped / "checkpoints"
    spoil(folder / "last.ckpt", hostile(folder / "last.ckpt", Payload(marker), "entry"))
    refused = cli("fit", "--ckpt_path", "last")  # somebody put it there: no other is taken in its place
    assert refused.code == 2 and "could run code" in refused.err
    shutil.copyfile(folder / "best.ckpt", folder / "best-v1.ckpt")
    refused = cli("test", "--ckpt_path", "best")  # of several, last.ckpt says which
    assert refused.code == 2 and "could run code" in refused.err and len(refused.error_lines) == 1


@pytest.mark.parametrize("place", ["listing", "value", "rest"])
def test_payload_in_a_checkpoint_in_shards(cli: Run, stopped: Path, marker: Path, tmp_path: Path, place: str) -> None:
    """torch unpickles the list of the shards and what isn't a tensor, whatever is in it; so ours looks first."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "shards.ckpt"
    state: dict[str, Any] = {"state_dict": {"w": torch.zeros(3)}, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.99)}}
    rest = {k: v for k, v in checkpoint(stopped).items() if k not in ("state_dict", "optimizer_states")}

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        torch.save(rest, folder / "meta.pt")

    write()
    assert _checkpoints.read(folder, *ME).step == 18  # a good one opens
    if place == "listing":
        with (folder / ".metadata").open("wb") as opened:
            pickle.dump(Payload(marker), opened)
    elif place == "value":
        state["optimizer_0"]["lr"] = Payload(marker)
        write()
    else:
        rest["extra"] = Payload(marker)
        write()
    result = cli("fit", "--ckpt_path", folder)
    assert result.code == 2 and "will not load safely (posix.system)" in result.err and len(result.error_lines) == 1
    listing = dcp.FileSystemReader(folder).read_metadata() if place != "listing" else None
    for entry in listing.storage_data.values() if listing else ():
        entry.transform_descriptors = ["zstd"]
    if listing:  # what a reader would unpickle isn't what lies there
        (folder / ".metadata").write_bytes(pickle.dumps(listing))
        with pytest.raises(CheckpointError, match="its entries are compressed"):
            _checkpoints.read(folder, *ME)
    (folder / ".metadata").write_bytes(b"cut")
    with pytest.raises((Damaged, CheckpointError)):
        _checkpoints.read(folder, *ME)


def test_payload_wherever_else_a_checkpoint_is_opened(stopped: Path, marker: Path) -> None:
    from callbacks.heatmap import opened
    from recipes.classifier.pretrained import create_offline
    from recipes.noise_mask.module import NoiseMaskPolicy
    from recipes.scalelong.quality import InceptionFeatures, export

    bad = stopped / "bad.ckpt"
    bad.write_bytes(hostile(stopped / "checkpoints" / "last.ckpt", Payload(marker), "entry"))
    for call in (
        lambda: opened(bad, ToyNet()),
        lambda: NoiseMaskPolicy.load_heated(SimpleNamespace(), bad),  # type: ignore[arg-type]
        lambda: export(bad, stopped / "out.npz"),
        lambda: InceptionFeatures(str(bad)).build(),
    ):
        with pytest.raises(ValueError, match="bad.ckpt"):
            call()
    with pytest.raises(pickle.UnpicklingError):  # a package's file, not a user's
        create_offline(str(bad), num_classes=2, in_chans=3)


def test_nothing_here_unpickles_without_care() -> None:
    """Every torch.load has weights_only=True, written out; nothing calls pickle, nor NumPy with pickles allowed."""
    found = 0
    for package in ("recipes", "callbacks", "datamodules"):
        for file in (HOME / package).rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call):
                    continue
                name = ast.unparse(call.func)
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                where = f"{file}:{call.lineno}"
                if name == "torch.load" or name.endswith("load_from_checkpoint"):
                    found += 1
                    assert given.get("weights_only") == "True", where
                assert name not in ("pickle.load", "pickle.loads"), where
                assert given.get("allow_pickle", "False") == "False", where
    assert found >= 7


# ---------------------------------------------------------------------- full disks


@pytest.mark.parametrize("fault", ["size", "sync"])
def test_full_disk_ends_the_run_with_one_line_and_what_was_saved_stays(
    cli: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The third last.ckpt can't be written: files may not grow so large, or the disk is full as it is flushed."""
    save, saved = LastCheckpoint.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fsync = os.fsync

    def full(opened: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(self: LastCheckpoint, trainer: Any) -> None:
        if len(saved) == 2:
            before = self.file.read_bytes()
            try:
                if fault == "size":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
                else:
                    monkeypatch.setattr(os, "fsync", full)
                save(self, trainer)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                monkeypatch.setattr(os, "fsync", fsync)
        saved.append(trainer.global_step)
        save(self, trainer)

    with monkeypatch.context() as patched:
        patched.setattr(LastCheckpoint, "save", failing)
        result = cli(*FIT, "--last_every_n_steps", 5)
    assert saved == [5, 10] and result.code != 0
    assert len(result.error_lines) == 1 and "Traceback" not in result.err, result.err
    message = "file too large" if fault == "size" else "no space left on device"
    file = result.run / "checkpoints" / "last.ckpt"
    assert result.code == 1 and f"{file} can't be written: {message} (it takes" in result.err
    assert "are free there; the one before is kept)" in result.err and "fit --ckpt_path last?" in result.err
    assert checkpoint(result.run)["global_step"] == 10
    names = sorted(f.name for f in (result.run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt"]  # and no half file
    result = cli(*GO_ON)
    assert result.code == 0, result.err
    assert_equal_runs(whole, result.run)


@pytest.mark.parametrize("where", ["this rank", "another rank", "flush"])
def test_full_disk_while_shards_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """torch tells all ranks of the failure of one, in an error that is none of Exception."""
    from lightning.pytorch import Trainer
    from torch.distributed.checkpoint.api import CheckpointException

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self: Trainer, place: Path, *args: Any) -> None:
        place.mkdir()
        (place / "meta.pt").write_bytes(b"half")
        if where == "this rank":
            raise full
        if where == "another rank":
            raise CheckpointException("write", {1: (full, None)})  # type: ignore[dict-item]

    def no_room(opened: int) -> None:
        raise full

    trainer = _atomic.AtomicTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    vars(trainer.strategy)["_save_distributed_checkpoint"] = True
    monkeypatch.setattr(Trainer, "save_checkpoint", write)
    if where == "flush":
        monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(_atomic.NotWritten, match=r"last.ckpt can't be written: no space left on device \(\d"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_full_file_system(cli: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without a free byte: run.log and metrics.csv can't be written, either. Mounts one, as root may."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2> /dev/null") != 0:
        pytest.skip("mounting isn't allowed")
    save = LastCheckpoint.save

    def filling(self: LastCheckpoint, trainer: Any) -> None:
        if trainer.global_step == 24:
            with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
                while True:
                    filler.write(bytes(4096))
        save(self, trainer)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(LastCheckpoint, "save", filling)
            result = cli(*FIT, "--trainer.default_root_dir", disk)
        assert result.code == 1 and len(result.error_lines) == 1 and "Traceback" not in result.err, result.err
        assert "no space left on device" in result.err and "0 kB are free" in result.err
        (run,) = (disk / "toy").iterdir()
        assert checkpoint(run)["global_step"] == 12 and not list(run.rglob("*.partial"))
        (disk / "filler").unlink()
        result = cli(*GO_ON, "--trainer.default_root_dir", disk)
        assert result.code == 0, result.err
        assert_equal_runs(whole, run)
    finally:
        os.system(f"umount {disk}")


def test_metrics_that_cant_be_written_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes._loggers import MetricsCSV

    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.csv").stat().st_size + 3, limits[1]))
        for step in (1, 2):
            log.log_metrics({"loss": 2.0}, step)
            log.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.log_metrics({"loss": 3.0}, 3)
    log.save()
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path)] == [
        ("0", "1.0"), ("1", "2.0"), ("2", "2.0"), ("3", "3.0")
    ]  # fmt: skip


def test_rows_written_ahead_of_a_checkpoint_are_there_once(tmp_path: Path) -> None:
    from recipes._loggers import MetricsCSV

    log = MetricsCSV(tmp_path)
    log.log_ahead({"epoch": 0, "loss": 1.0}, 4)
    assert [row["step"] for row in metrics(tmp_path)] == ["4"]  # on the disk already
    log.log_metrics({"val": 5.0}, 4)  # of something else
    log.log_metrics({"epoch": 0, "loss": 1.0, "late": 2.0}, 4)
    log.log_metrics({"epoch": 0, "loss": 1.0}, 5)
    log.save()
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == ["4", "4", "5"]
    assert rows[0] == {"epoch": "0", "step": "4", "loss": "1.0", "late": "2.0"} and rows[1]["val"] == "5.0"
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes() + b"0,1")  # a row cut by a kill
    again = MetricsCSV(tmp_path)
    again.forget_from(100)
    assert metrics(tmp_path) == rows


# ---------------------------------------------------------------------- what a kill leaves


def test_what_is_half_written_is_no_checkpoint_and_is_removed_at_the_next_start(cli: Run, stopped: Path) -> None:
    half, older, own = (stopped / "checkpoints" / name for name in ("7-ab.partial", "8-cd.partial", "mine.txt"))
    half.write_bytes((stopped / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    older.mkdir()
    (older / "meta.pt").write_bytes(b"half")
    own.write_text("stays")
    saved = last(stopped.parent.parent)
    assert saved is not None and saved.file.name == "last.ckpt" and not saved.warning
    result = cli(*GO_ON)
    assert result.code == 0, result.err
    assert not half.exists() and not older.exists() and own.exists()


def test_folders_are_replaced_without_a_moment_with_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed between the two renames: the checkpoint before stands aside, is found, and is put back."""
    checkpoints = tmp_path / "toy" / "run" / "checkpoints"
    place, new = checkpoints / "last.ckpt", checkpoints / "new"
    for folder, text in ((place, "old"), (new, "new")):
        folder.mkdir(parents=True)
        (folder / "meta.pt").write_text(text)
    replace, calls = os.replace, []

    def killed(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _atomic.put_in_place(new, place)
    assert not place.exists()
    found = _checkpoints.find("last", tmp_path, "toy")
    assert found is not None and (found / "meta.pt").read_text() == "old"
    _atomic.remove_partial(checkpoints)
    assert (place / "meta.pt").read_text() == "old"
    _atomic.put_in_place(new, place)
    assert (place / "meta.pt").read_text() == "new" and [f.name for f in checkpoints.iterdir()] == ["last.ckpt"]


def test_best_is_whole_at_every_moment(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that touches the disk while best.ckpt is replaced finds a whole one, once there was one."""
    looked: list[int] = []

    def look(path: Any) -> None:
        best = Path(path).parent / "best.ckpt"
        if looked or best.exists():
            looked.append(torch.load(best, weights_only=True)["global_step"])

    replace, save, unlink = os.replace, torch.save, Path.unlink
    monkeypatch.setattr(os, "replace", lambda a, b: (look(a), replace(a, b), look(b)) if "ckpt" in str(b) else replace(a, b))  # fmt: skip # noqa: E501
    monkeypatch.setattr(torch, "save", lambda a, b, *c, **d: (look(b.name), save(a, b, *c, **d), look(b.name)))
    monkeypatch.setattr(Path, "unlink", lambda self, **k: (look(self), unlink(self, **k))[1])
    result = cli(*FIT, "--model.lr", 0.002)
    assert result.code == 0, result.err
    assert len(set(looked)) > 1 and looked == sorted(looked)


def test_users_own_checkpoint_io_stays(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = AsyncCheckpointIO()
    assert _atomic.AtomicTrainer(plugins=[own], accelerator="cpu", **quiet).strategy.checkpoint_io is own
    ours = _atomic.AtomicTrainer(accelerator="cpu", **quiet).strategy.checkpoint_io
    assert isinstance(ours, _atomic.AtomicCheckpointIO)
    umask = os.umask(0o027)
    try:
        ours.save_checkpoint({"state_dict": {}}, tmp_path / "deep" / "a.ckpt")
    finally:
        os.umask(umask)
    file = tmp_path / "deep" / "a.ckpt"
    assert file.stat().st_mode & 0o777 == 0o640  # a group reads it, as any other file
    ours.remove_checkpoint(file)
    assert not list(file.parent.iterdir())
