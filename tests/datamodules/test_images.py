"""Decoding, augmentation and the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from datamodules.images import Augmentation, ImageDataModule, ImageSet, decode
from datamodules.sampling import EvalBatches, TrainBatches

# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1"])
def test_every_kind_of_file_becomes_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.tiff" if mode in ("CMYK", "I;16") else "x.png")
    image = Image.new("RGB", (6, 4), (255, 255, 255))
    (Image.new("I;16", (6, 4), 255) if mode == "I;16" else image.convert(mode)).save(file)
    found = decode(file, (8, 10))
    assert found.shape == (3, 8, 10) and found.dtype == torch.uint8
    assert found.unique().tolist() == [255]


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    file.write_text("no image")
    with pytest.raises(ValueError, match=f"{file} can't be read as an image"):
        decode(file, (8, 8))
    with pytest.raises(FileNotFoundError, match="the dataset is incomplete"):
        decode(tmp_path / "none.jpg", (8, 8))


def test_a_large_jpeg_is_decoded_as_if_whole(tmp_path: Path) -> None:
    gradient = torch.linspace(0, 255, 400).byte().expand(3, 300, 400).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(gradient).save(tmp_path / "x.jpg", quality=95)
    whole = Image.open(tmp_path / "x.jpg").convert("RGB").resize((20, 15), Image.Resampling.BICUBIC)
    wanted = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(15, 20, 3).permute(2, 0, 1)
    assert (decode(tmp_path / "x.jpg", (15, 20)).int() - wanted.int()).abs().max() <= 6


# ---------------------------------------------------------------------- augmentation


def plain_augmentation(image: Tensor, u: Tensor, flip: bool, translate: float) -> Tensor:
    """One image at a time, pixel by pixel: mirrored, then shifted with the border repeated."""
    channels, height, width = image.shape
    mirrored = flip and u[0] < 0.5
    reach = (max(1, round(translate * height)), max(1, round(translate * width))) if translate else (0, 0)
    moved = translate and u[1] < 0.5
    down = int(u[2] * (2 * reach[0] + 1)) - reach[0] if moved else 0
    right = int(u[3] * (2 * reach[1] + 1)) - reach[1] if moved else 0
    out = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            sy, sx = min(max(y + down, 0), height - 1), min(max(x + right, 0), width - 1)
            out[:, y, x] = image[:, sy, width - 1 - sx if mirrored else sx]
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.sampled_from([0.0, 0.1, 0.3]), st.integers(3, 9), st.integers(3, 9))
def test_augmentation_against_a_loop_over_pixels(
    seed: int, flip: bool, translate: float, height: int, width: int
) -> None:
    images = torch.randint(
        0, 256, (7, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    augment = Augmentation(seed, 20, flip, translate)
    index = torch.tensor([3, 19, 0, 5, 6, 7, 8])
    found = augment(images, 4, index)
    for image, u, out in zip(images, augment._draws(4, index), found, strict=True):
        assert torch.equal(out, plain_augmentation(image, u, flip, translate))


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    index = torch.arange(6)
    make = lambda seed=1: Augmentation(seed, 6, True, 0.2, v2.ColorJitter(0.5, 0.5))  # noqa: E731
    whole = make()(images, 2, index)
    torch.manual_seed(123)
    one_by_one = torch.cat([make()(images[i : i + 1], 2, index[i : i + 1]) for i in (5, 4, 3, 2, 1, 0)]).flip(0)
    assert torch.equal(whole, one_by_one)
    assert not torch.equal(whole, make()(images, 3, index)) and not torch.equal(whole, make(2)(images, 2, index))
    state = torch.get_rng_state()
    make()(images, 2, index)
    assert torch.equal(state, torch.get_rng_state()), "a user's transform moved the global random state"


def test_flips_and_shifts_come_half_of_the_time() -> None:
    u = Augmentation(0, 20_000, True, 0.1)._draws(0, torch.arange(20_000))
    assert (u < 0.5).double().mean(0).tolist() == pytest.approx([0.5] * 5, abs=0.02)


# ---------------------------------------------------------------------- the order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_ranks_share_what_one_process_would_take(size: int, batch: int, world: int, epoch: int, seed: int) -> None:
    if size < batch * world:
        with pytest.raises(ValueError, match="lower --data.batch_size"):
            TrainBatches(size, batch, seed, 0, world)
        return
    ranks = [TrainBatches(size, batch, seed, rank, world) for rank in range(world)]
    one = TrainBatches(size, batch * world, seed, 0, 1)
    for order in (*ranks, one):
        order.set_epoch(epoch)
    steps = [list(order) for order in ranks]
    assert {len(s) for s in steps} == {len(one)} and all(len(b) == batch for s in steps for b in s)
    for k, whole in enumerate(one):
        for rank in range(world):
            assert steps[rank][k] == whole[rank::world]
    drawn = [d.position for s in steps for b in s for d in b]
    assert len(set(drawn)) == len(drawn) and all(d.epoch == epoch for s in steps for b in s for d in b)


def test_an_order_is_skipped_into_once() -> None:
    order = TrainBatches(50, 4, 3, 1, 2)
    whole = list(order)
    order.consumed = 3 * 8
    assert list(order) == whole[3:] and list(order) == whole
    order.set_epoch(1)
    assert list(order) != whole


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_sees_every_example_once(size: int, batch: int, world: int) -> None:
    if size < world:
        with pytest.raises(ValueError, match="evaluate on fewer"):
            EvalBatches(size, batch, 0, world)
        return
    ranks = [list(EvalBatches(size, batch, rank, world)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1, "a rank would wait for another"
    assert sorted(d.position for r in ranks for b in r for d in b) == list(range(size))
    assert all(1 <= len(b) <= max(batch, 2 if world > 1 else 1) for r in ranks for b in r)


# ---------------------------------------------------------------------- resuming


class Noise(ImageDataModule):
    def __init__(self, workers: int = 0, batch_size: int = 4) -> None:
        super().__init__(batch_size, workers, seed=5, translate=0.2)
        self.image_size, self.num_classes, self.class_names, self.domain_names = 8, 2, ["a", "b"], ["d"]

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        images = torch.randint(0, 256, (22, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        return ImageSet(images, {"label": torch.arange(22) % 2, "domain": torch.zeros(22, dtype=torch.int64)})


class Watch(LightningModule):
    """Notes what it is fed; stops where it is told to, with a checkpoint."""

    def __init__(self, stop: int = -1, file: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(192, 2)
        self.seen: list[tuple[list[int], float]] = []
        self.stop, self.file = stop, file

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((batch["index"].tolist(), float(batch["image"].double().sum())))
        return self.layer(batch["image"].flatten(1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) == self.stop and not self.trainer.is_last_batch:
            self.end()

    def on_train_epoch_end(self) -> None:
        if len(self.seen) == self.stop:
            self.end()

    def end(self) -> None:
        self.trainer.save_checkpoint(self.file)  # type: ignore[arg-type]
        raise KeyError("stopped on purpose")


def run(module: Watch, data: Noise, **options: Any) -> Watch:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=3, accelerator="cpu", limit_val_batches=0, use_distributed_sampler=False, **quiet)
    trainer.fit(module, datamodule=data, **options)
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10], ids=lambda s: f"after {s} of 15 batches")
def test_a_run_goes_on_with_the_very_next_batch(workers: int, stop: int, tmp_path: Path) -> None:
    whole = run(Watch(), Noise()).seen
    assert len(whole) == 15 and len({i for seen, _ in whole[:5] for i in seen}) == 20
    assert whole[:5] != whole[5:10]
    first = Watch(stop, tmp_path / "x.ckpt")
    with pytest.raises(KeyError):
        run(first, Noise(workers))
    assert first.seen == whole[:stop], "loader workers change what is seen"
    second = run(Watch(), Noise(workers), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert second.seen == whole[stop:]


def test_the_run_seed_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free(Noise):
        def __init__(self) -> None:
            super().__init__()
            self._seed = None

    orders = []
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append([b["index"].tolist() for b in Free().train_dataloader()])
    assert orders[0] == orders[2] != orders[1]


def test_a_second_view_is_another_draw_of_the_same_transform() -> None:
    """The first view is the same with and without it; both are functions of (seed, epoch, index)."""

    class Squares(ImageDataModule):
        def load(self, part: str) -> ImageSet:  # type: ignore[override]
            images = torch.arange(64 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
            return ImageSet(images, {"label": torch.zeros(64, dtype=torch.int64), "domain": torch.zeros(64).long()})

    def batches(views: int) -> list[Any]:
        data = Squares(batch_size=16, seed=3, translate=0.25)
        data.views = views
        return list(data.train_dataloader())

    one, two, again = batches(1), batches(2), batches(2)
    differ = 0
    for a, b, c in zip(one, two, again, strict=True):
        assert "view" not in a and torch.equal(a["image"], b["image"])
        assert torch.equal(b["view"], c["view"]) and b["view"].shape == b["image"].shape
        differ += int((b["view"] != b["image"]).flatten(1).any(1).sum())
        for image, view in zip(b["image"], b["view"], strict=True):  # of the same image: its pixels are all from it
            assert set((255 * view).round().int().flatten().tolist()) <= set(range(251))
            assert image.shape == view.shape
    assert differ > 40, "flips and shifts are drawn independently"
    data = Squares(batch_size=16, seed=3)
    data.views = 2
    assert "view" not in next(iter(data.val_dataloader()))
