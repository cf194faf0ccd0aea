"""A small recipe with batch norm and dropout, and data that resumes exactly: what the command line is tried on."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class _Points(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int, classes: int, nan_at: int = -1, corrupt_at: int = -1) -> None:
        self.corrupt_at = corrupt_at
        g = torch.Generator().manual_seed(1)
        self.label = torch.randint(0, classes, (size,), generator=g)
        self.image = torch.randn(size, 1, 4, 4, generator=g) + self.label.view(-1, 1, 1, 1)
        if nan_at >= 0:
            self.image[nan_at] = float("nan")

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == self.corrupt_at:
            raise ValueError(f"toy {i} can't be read")
        return {
            "image": self.image[i],
            "label": self.label[i],
            "domain": self.label[i] % 2,
            "index": torch.tensor(i),
        }


class _Order(Sampler[int]):
    """Shuffled by the epoch, cut by rank, and begun where a checkpoint stopped."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch, self.skip = size, 0, 0

    def _ranks(self) -> tuple[int, int]:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        g = torch.Generator().manual_seed(self.epoch)
        rank, ranks = self._ranks()
        order = torch.randperm(self.size, generator=g).tolist()[rank::ranks]
        skip, self.skip = self.skip, 0
        yield from order[skip:]

    def __len__(self) -> int:
        return self.size // self._ranks()[1]


class ToyData(LightningDataModule):
    """Points in ``num_classes`` clouds."""

    def __init__(
        self,
        batch_size: int = 8,
        num_classes: int = 3,
        size: int = 96,
        nan_at: int = -1,
        root: str | None = None,
        num_workers: int = 0,
        corrupt_at: int = -1,
    ) -> None:
        super().__init__()
        self.corrupt_at = corrupt_at
        self.batch_size, self.num_classes, self.size = batch_size, num_classes, size
        self.nan_at, self.root, self.num_workers = nan_at, root, num_workers
        self.in_chans, self.image_size = 1, 4
        self.class_names = [f"class {i}" for i in range(num_classes)]
        self.domain_names = ["even", "odd"]
        self._skip = self._epoch = 0

    def setup(self, stage: str) -> None:
        if self.root is not None:
            raise FileNotFoundError(f"{self.root} has no toys; get them at a toy shop")
        self.train = _Points(self.size, self.num_classes, self.nan_at, self.corrupt_at)
        self.rest = _Points(32, self.num_classes)

    def train_dataloader(self) -> DataLoader[Any]:
        order = _Order(len(self.train))
        order.skip, self._skip = self._skip, 0
        order.epoch = self._epoch  # loader workers are handed the first batches before set_epoch is called
        return DataLoader(self.train, batch_size=self.batch_size, sampler=order, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rest, batch_size=16)

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, int]:
        loop = self.trainer.fit_loop.epoch_loop.batch_progress  # type: ignore[union-attr]
        done = loop.current.processed
        if loop.is_last_batch:
            return {"skip": 0, "epoch": self.trainer.current_epoch + 1}  # type: ignore[union-attr]
        return {"skip": done * self.batch_size, "epoch": self.trainer.current_epoch}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip, self._epoch = state["skip"], state["epoch"]


class ToyNet(LightningModule):
    """A linear net with batch norm and dropout."""

    monitor = ("val/acc", "max")

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        width: int = 16,
        lr: float = 0.05,
        wait: float = 0.0,
        layer: str = "body",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if layer != "body":
            raise ValueError(f"there is no layer '{layer}'; the layers are: body, head")
        self.body = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(in_chans * 16, width),
            torch.nn.BatchNorm1d(width),
            torch.nn.Dropout(0.3),
        )
        self.head = torch.nn.Linear(width, num_classes)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch["image"])), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.hparams["wait"])
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_test_epoch_end(self) -> None:
        self.confusion = torch.ones(2, self.head.out_features, self.head.out_features, dtype=torch.long)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        hit = (self.head(self.body(batch["image"])).argmax(1) == batch["label"]).float().mean()
        self.log(f"{stage}/acc", hit, batch_size=len(batch["label"]), sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch["index"], "prediction": self.head(self.body(batch["image"])).argmax(1)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


class OtherNet(ToyNet):
    """The model of another recipe."""


class Explode(Callback):
    """An error that is nobody's input.

    Args:
        step: at the start of which optimizer step.
    """

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("boom")


class Warn(Callback):
    """A warning that is meant for the user."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        warnings.warn("look at this", stacklevel=1)


class Signal(Callback):
    """Sends this process a signal at the start of a training step, or of a validation.

    Args:
        step: at which optimizer step.
        name: of the signal.
        validation: at the first validation after that step instead.
    """

    def __init__(self, step: int, name: str = "SIGINT", validation: bool = False) -> None:
        self.step, self.name, self.validation = step, name, validation

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.validation and trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getpid(), getattr(signal, self.name))

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.validation and trainer.global_step >= self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), getattr(signal, self.name))
            self.validation = False
            self.step = -1


class Averages(Callback):
    """Logs the number of the step, reduced over the epoch in every way; ``rare``: of every fifth step."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = float(trainer.global_step)
        if batch_idx % 5 == 0:
            pl_module.log("rare", step, on_step=False, on_epoch=True, batch_size=1 + (batch_idx == 0))

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = torch.tensor(float(trainer.global_step - 1))
        for name, how in (("mean", "mean"), ("most", "max"), ("least", "min"), ("total", "sum")):
            pl_module.log(name, step, on_step=False, on_epoch=True, batch_size=1, reduce_fx=how)


class Noise(Callback):
    """Something with a setting.

    Args:
        sigma: how much.
    """

    def __init__(self, sigma: float = 0.1) -> None:
        self.sigma = sigma

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        print(f"sigma is {self.sigma}", flush=True)
