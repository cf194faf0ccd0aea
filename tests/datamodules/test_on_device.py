"""Images that travel as uint8 and are drawn where the network is: the module sees what the loader would give."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchvision.transforms import v2

from callbacks.diagnostic import fetch
from datamodules import EmojiCaptions
from datamodules.images import BARE, Augmentation, ImageDataModule, ImageSet, scaled


class Noise(ImageDataModule):
    def __init__(self, views: int = 1, **options: Any) -> None:
        super().__init__(batch_size=4, seed=5, **options)
        self.image_size, self.num_classes, self.class_names, self.domain_names = 8, 2, ["a", "b"], ["d"]
        self.views = views

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        images = torch.randint(0, 256, (14, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        return ImageSet(images, {"label": torch.arange(14) % 2, "domain": torch.zeros(14, dtype=torch.int64)})


class There(Noise):
    """The same as on a GPU."""

    def draws_on_device(self) -> bool:
        return True


class Watch(LightningModule):
    """Notes what it is fed, and what its own hook of the transfer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[dict[str, Tensor]] = []
        self.hooked: list[str] = []
        self.fetched: list[Any] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.hooked.append(f"{batch['image'].dtype} {BARE in batch}")
        return {**batch, "drawn": batch["image"] + 1}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        self.fetched.append([fetch(self.trainer, part, [3, 0]) for part in ("train", "val")])
        return self.layer(batch["image"].flatten()[:1]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def run(data: ImageDataModule, **options: Any) -> Watch:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, use_distributed_sampler=False, **quiet, **options)
    module = Watch()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    return module


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(alike, a, b)) if isinstance(a, list) else a == b


@pytest.mark.parametrize(
    "options",
    [{}, {"translate": 0.25, "views": 2}, {"flip": False}, {"num_workers": 2, "translate": 0.25}],
    ids=lambda o: ", ".join(f"{k}={v}" for k, v in o.items()) or "flip",
)
def test_the_module_sees_the_very_same_batches(options: dict[str, Any]) -> None:
    usual, there = run(Noise(**options)), run(There(**options))
    assert len(usual.seen) > 10 and alike(usual.seen, there.seen) and alike(usual.fetched, there.fetched)
    assert set(there.hooked) == {"torch.float32 False"} and usual.hooked == there.hooked


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_batches_have_the_precision_of_the_module(precision: Any) -> None:
    usual, there = (run(cls(translate=0.25), precision=precision) for cls in (Noise, There))
    assert alike(usual.seen, there.seen)
    wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert usual.seen[0]["image"].dtype == wanted


def test_a_batch_travels_in_a_quarter_of_the_bytes() -> None:
    class Loaded(There):
        moved: list[tuple[torch.dtype, int]] = []

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            self.moved.append((batch["image"].dtype, batch["image"].nbytes))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    module = Watch()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_steps=1, limit_val_batches=1, num_sanity_val_steps=0, **quiet).fit(  # type: ignore[arg-type]
        module, datamodule=Loaded(views=2)
    )
    assert Loaded.moved[0] == (torch.uint8, 4 * 3 * 8 * 8)


def test_a_transform_of_the_users_stays_where_its_random_state_is() -> None:
    options = {"transform": v2.ColorJitter(0.5, 0.5), "translate": 0.25}
    usual, there = run(Noise(**options)), run(There(**options))
    assert alike(usual.seen, there.seen)


def test_captions_come_along() -> None:
    def seen(there: bool) -> list[Any]:
        data = EmojiCaptions(batch_size=200, seed=0)
        data.draws_on_device = lambda: there  # type: ignore[method-assign]
        module = Watch()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer(accelerator="cpu", max_steps=3, limit_val_batches=1, **quiet).fit(module, datamodule=data)  # type: ignore[arg-type]
        return module.seen

    usual, there = seen(False), seen(True)
    assert len(usual) > 3 and alike(usual, there) and isinstance(usual[-1]["text"], list)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.02, 0.3, 1.0]), st.booleans())
def test_windows_scaled_at_once_are_those_scaled_one_by_one(
    seed: int, height: int, width: int, least: float, hard: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=generator)
    images = (images > 127).to(torch.uint8) * 255 if hard else images
    augment, index = Augmentation(seed, 5, False, 0.0, crop_scale=(least, 1.0)), torch.arange(5)
    windows = augment._windows(augment._draws(1, index)[:, 5:], height, width)
    one_by_one, at_once = augment(images, 1, index), scaled(images, windows)
    assert at_once.dtype == torch.uint8 and at_once.shape == images.shape
    assert (one_by_one.int() - at_once.int()).abs().max() <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.0, 0.1, 0.9]), st.booleans())
def test_images_moved_one_by_one_are_those_moved_at_once(
    seed: int, height: int, width: int, translate: float, flip: bool
) -> None:
    images = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8)
    augment = Augmentation(seed, 6, flip, translate)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for least in (0, 10**9):
            patch.setattr("datamodules.images.LARGE", least)
            found.append(augment(images, 2, torch.arange(6)))
    assert torch.equal(*found) and torch.equal(augment(images, 2, torch.arange(6)), found[0])


def test_nothing_of_it_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without memory: an operation of images there with numbers of the CPU would raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which that device hasn't
    images = torch.empty(6, 3, 32, 48, dtype=torch.uint8, device="meta")
    for crop in (None, (0.1, 1.0)):
        drawn = Augmentation(0, 6, True, 0.1, crop_scale=crop)(images, 0, torch.arange(6))
        assert drawn.device.type == "meta" and drawn.shape == images.shape and drawn.dtype == torch.uint8


def test_a_single_example_is_a_picture_whoever_draws() -> None:
    data = There()
    module = Watch()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_steps=1, **quiet).fit(module, datamodule=data)  # type: ignore[arg-type]
    for part in ("train", "val"):
        one = data.part(part)[3]
        assert one["image"].dtype == torch.float32 and one["image"].shape == (3, 8, 8) and BARE not in one
