"""A network of a few hundred weights, its data and a trainer that writes nothing: what the contract is tried on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.perturbation import Batch, Perturbation, accept_other_techniques, parameter_groups


class Net(LightningModule):
    """Convolution, batch norm, dropout, linear, on images (B, 1, 4, 4); two classes."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        accept_other_techniques(self)
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)
        )

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.backbone(batch["image"]), batch["label"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self, lr=0.1, weight_decay=0.01)
        if self.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
        else:
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 ** (epoch + 1))
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [2])]


class Learned(Perturbation):
    """Bends the image by a learned number: something with tensors in the checkpoint."""

    def __init__(self, size: int = 1, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.size = size

    def attach(self, module: LightningModule) -> None:
        own = self.own(module)
        if self.name not in own:
            own[self.name] = nn.ParameterDict({"offset": nn.Parameter(torch.full((self.size,), 0.5))})

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        offset = module.perturbations[self.name]["offset"].sum()  # type: ignore[index,union-attr]
        batch["image"] = batch["image"] + offset * batch["image"].square()


class Notes(Perturbation):
    """Perturbs nothing and notes what it is asked for, in a list that several share."""

    def __init__(self, notes: list[Any] | None = None, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.notes: list[Any] = notes if notes is not None else []
        self.steps: list[tuple[int, int]] = []

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.notes.append(("perturb", self.name))
        self.steps.append(self._step)

    def restore(self, module: LightningModule) -> None:
        self.notes.append(("restore", self.name))


def images(batches: int = 4, size: int = 4) -> DataLoader[Any]:
    """The same batches each time."""
    g = torch.Generator().manual_seed(5)
    rows = [{"image": torch.randn(1, 4, 4, generator=g), "label": torch.tensor(i % 2)} for i in range(batches * size)]
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]  # a list is a dataset


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    usual = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, "enable_model_summary": False}
    return Trainer(**{**quiet, **usual, **options}, callbacks=list(callbacks))
