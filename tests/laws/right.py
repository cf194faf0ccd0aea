"""Techniques that keep every law, at the sites where callbacks/ may have none: the laws must let them pass.

They are held to the laws on the classifier like the techniques of callbacks/, so that pairs of an input, a feature and
a weight perturbation are always among what is tried. ``Nothing`` is tried on every recipe.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule

from callbacks.layers import backbone_of
from callbacks.perturbation import Batch, Perturbation, crafting


class Nothing(Perturbation):
    """The recipe alone: what it does in its own ``loss`` has to keep the laws too."""

    zero: ClassVar = {"every_n_steps": 1}
    per_example: ClassVar = {}

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass


class AscendInput(Perturbation):
    """A step of length ``size`` per image along the gradient of the loss, and noise of the same size."""

    zero: ClassVar = {"size": 0.0}
    per_example: ClassVar = {}

    def __init__(self, size: float = 0.5, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.size = size

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        with crafting(module):
            image = batch["image"].detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(module.loss({**batch, "image": image}), image)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        noise = self.normal("noise", len(image)).view(-1, 1, 1, 1)
        batch["image"] = batch["image"] + self.size * (gradient / length + noise)


class AscendWeights(Perturbation):
    """Sharpness-aware ascent by ``radius``, along the gradient averaged over ranks; the saved copy is put back."""

    site: ClassVar[str] = "weights"
    zero: ClassVar = {"radius": 0.0}
    per_example: ClassVar = {}

    def __init__(self, radius: float = 0.05, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.radius = radius

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.saved = [(p, p.detach().clone()) for p in backbone_of(module).parameters() if p.requires_grad]
        weights = [p for p, _ in self.saved]
        with crafting(module, "train", parameters=True):
            gradients = torch.autograd.grad(module.loss(batch), weights)
        for gradient in gradients if dist.is_initialized() else ():
            dist.all_reduce(gradient)
        length = torch.stack([g.norm() for g in gradients]).norm().clamp_min(1e-12)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient / length, alpha=self.radius)

    def restore(self, module: LightningModule) -> None:
        with torch.no_grad():
            for weight, saved in self.saved:
                weight.copy_(saved)
