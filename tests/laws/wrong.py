"""Techniques that are wrong on purpose, each against one law: the laws must find them out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from callbacks.layers import backbone_of
from callbacks.perturbation import Batch, Perturbation, crafting


class LeaksGradient(Perturbation):
    """FGSM with ``backward()`` in place of ``autograd.grad``: parameter gradients of crafting stay."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        image = batch["image"].clone().requires_grad_()
        module.loss({**batch, "image": image}).backward()
        assert image.grad is not None
        batch["image"] = (batch["image"] + 0.01 * image.grad.sign()).detach()


class MovesBatchNorm(Perturbation):
    """Crafts in plain training mode: the running statistics move twice."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        with torch.no_grad():
            module.loss(batch)


class ChangesTheBatch(Perturbation):
    """Changes the batch's tensor in place."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"].add_(0.1)


class ForgetsToRestore(Perturbation):
    """Adds to the weights and leaves it there."""

    site = "weights"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        with torch.no_grad():
            for parameter in backbone_of(module).parameters():
                parameter.add_(0.01)


class RestoresOnlyAfterTheBackwardPass(Perturbation):
    """Hooks into the step by itself, so a step that fails keeps its perturbation."""

    site = "weights"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.saved = [p.detach().clone() for p in backbone_of(module).parameters()]
        with torch.no_grad():
            for parameter in backbone_of(module).parameters():
                parameter.add_(0.01)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter, saved in zip(backbone_of(pl_module).parameters(), self.saved, strict=True):
                parameter.copy_(saved)


class NotNothingAtZero(Perturbation):
    """Clips to [0, 1] after adding, scaled by nothing."""

    zero = {"sigma": 0.0}

    def __init__(self, sigma: float = 0.1, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.sigma = sigma

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"] = (batch["image"] + self.sigma).clamp(0.1, 1.0)


class OnAtEvaluation(Perturbation):
    """A hook that doesn't ask whether the network trains."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        self.handle = backbone_of(module).register_forward_hook(lambda layer, args, output: output + torch.randn(()))

    def detach(self, module: LightningModule) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        """The hook is always on."""


class WeightsOfItsOwnRank(Perturbation):
    """Noise on the weights, drawn by rank and left there."""

    site = "weights"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        with torch.no_grad():
            next(backbone_of(module).parameters()).add_(0.01 * (rank + 1))


class LooksAtItsRank(Perturbation):
    """Noise of each example depends on where in its rank's batch it stands, so two ranks are not one process."""

    per_example = {}

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        noise = torch.linspace(0, 1, len(batch["image"])).view(-1, 1, 1, 1)
        batch["image"] = batch["image"] + noise


class ForgetsWhenResumed(Perturbation):
    """Counts steps in Python, outside the checkpoint."""

    count = 0

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.count += 1
        batch["image"] = batch["image"] * (1 - 0.05 * self.count)


class DrawsGlobally(Perturbation):
    """Draws from a generator that lives as long as the process."""

    generator_of_its_own = torch.Generator().manual_seed(3)

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"] = batch["image"] + 0.1 * torch.randn(batch["image"].shape, generator=self.generator_of_its_own)


class RestoresInListOrder(RestoresOnlyAfterTheBackwardPass):
    """Two of them: the second saved what the first had perturbed, and puts that back last."""


class DropsAccumulated(Perturbation):
    """Clears gradients before it crafts, also those of the micro-batches before."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        module.zero_grad()
        with crafting(module):
            image = batch["image"].clone().requires_grad_()
            [gradient] = torch.autograd.grad(module.loss({**batch, "image": image}), image)
        batch["image"] = batch["image"] + 0.01 * gradient.sign()


class Float64(Perturbation):
    """Makes a double of the image: mixed precision stops."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"] = batch["image"].double()
