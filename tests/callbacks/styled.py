"""A small network for the style techniques, and what they did to it, worked out from what its layers were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.perturbation import Batch, Perturbation, parameter_groups
from callbacks.style import DSU, AdvStyle, EFDMix, MixStyle

EPS = 1e-6
B, C, SIDE = 8, 6, 8
TECHNIQUES = [MixStyle, EFDMix, DSU, AdvStyle]
#: Arguments with which every layer is moved in every step.
ALWAYS: dict[type, dict[str, Any]] = {
    MixStyle: {"p": 1.0, "alpha": 2.0},
    EFDMix: {"p": 1.0, "alpha": 2.0},
    DSU: {"p": 1.0},
    AdvStyle: {"p_identity": 0.0, "p_dsu": 0.0},
}


class Net(LightningModule):
    """Two convolutions and a linear layer, without batch norm and dropout, so that examples are independent."""

    def __init__(self, decay: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decay, self.lr = decay, lr
        self.backbone = nn.Sequential()
        self.backbone.add_module("first", nn.Conv2d(3, C, 3, padding=1))
        self.backbone.add_module("second", nn.Conv2d(C, C, 3, padding=1))
        self.backbone.add_module("pool", nn.MaxPool2d(2))
        self.backbone.add_module("head", nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(C * SIDE * SIDE // 4, 2)))
        self.example_input_array = torch.zeros(2, 3, SIDE, SIDE)

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone(image)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(parameter_groups(self, lr=self.lr, weight_decay=self.decay))


def theta_of(module: nn.Module, layer: str = "first") -> nn.Parameter:
    return module.get_parameter(f"perturbations.adv_style.{layer}.theta")


def batch_of(size: int = B, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(size, 3, 1, 1, generator=g) + 0.5  # examples differ in style
    image = torch.randn(size, 3, SIDE, SIDE, generator=g) * scale + scale
    return {"image": image, "label": torch.arange(size) % 2}


def data(batches: int = 2, size: int = B) -> DataLoader[Any]:
    """The batches ``batch_of(size, 0)``, ``batch_of(size, 1)``, ..."""
    rows = [{k: v[i] for k, v in batch_of(size, s).items()} for s in range(batches) for i in range(size)]
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]  # a list is a dataset


def begin(
    technique: Perturbation,
    module: LightningModule,
    step: int = 0,
    batch: Batch | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Begin a training step as the trainer of one of several ranks does."""
    stub: Any = SimpleNamespace(
        callbacks=[technique], current_epoch=0, global_step=step, global_rank=rank, world_size=ranks
    )
    technique.setup(stub, module, "fit")
    technique.on_train_batch_start(stub, module, batch_of() if batch is None else batch, step)


def begun(technique: Perturbation, step: int = 0, batch: Batch | None = None, rank: int = 0, ranks: int = 1) -> Net:
    """A new network in a training step."""
    module = Net().train()
    begin(technique, module, step, batch, rank, ranks)
    return module


def flow(module: Net, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each convolution gave, worked out from its weights, and what the next layer got in its place."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            seen[name] = args[0]

        return hook

    handles = [child.register_forward_pre_hook(note(name)) for name, child in module.backbone.named_children()]
    module(image)
    for handle in handles:
        handle.remove()
    found = {}
    for name, following in (("first", "second"), ("second", "pool")):
        conv: Any = module.backbone.get_submodule(name)
        found[name] = (F.conv2d(seen[name], conv.weight, conv.bias, padding=1), seen[following])
    return found


def statistics(x: Tensor) -> np.ndarray:
    """Mean and deviation in float64 NumPy, (2, B, C)."""
    a = x.detach().double().numpy()
    return np.stack((a.mean((2, 3)), np.sqrt(a.var((2, 3), ddof=1) + EPS)))


def spread(x: Tensor) -> np.ndarray:
    """How far the styles of a batch spread, (2, C)."""
    return np.sqrt(statistics(x).var(1, ddof=1) + EPS)


def shift_of(x: Tensor, y: Tensor) -> np.ndarray:
    """By how much the two statistics were moved, signed, (2, B, C); fails if more than the style was."""
    (mean, std), a, b = statistics(x), x.detach().double().numpy(), y.detach().double().numpy()
    normal = (a - mean[..., None, None]) / std[..., None, None]
    offset = b.mean((2, 3))
    slope = ((b - offset[..., None, None]) * normal).sum((2, 3)) / np.maximum((normal**2).sum((2, 3)), 1e-12)
    scale = np.abs(b).max() + 1
    np.testing.assert_allclose(
        (normal * slope[..., None, None] + offset[..., None, None]) / scale, b / scale, atol=1e-5, err_msg="content"
    )
    return np.stack((offset - mean, slope - std))
