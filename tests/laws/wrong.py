"""Techniques that are wrong on purpose, each against one law: the laws must find them out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn

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


class MovesRunningMeans(Perturbation):
    """Crafts in plain training mode and turns the count of batches back: only the statistics tell."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            module.loss(batch)
            for norm in norms:
                norm.num_batches_tracked.sub_(1)  # type: ignore[union-attr]


class LeavesEvaluationMode(Perturbation):
    """Crafts in evaluation mode, and puts all of the network in training mode afterwards."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        module.eval()
        with torch.no_grad():
            module.loss(batch)
        module.train()


class FreezesParameters(Perturbation):
    """Turns gradients off to craft, and all of them on again."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        module.requires_grad_(False)
        module.requires_grad_(True)


class LeavesAHook(Perturbation):
    """Hangs a hook on the network in each step and doesn't take it off."""

    site = "features"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        backbone_of(module).register_full_backward_hook(lambda *_: None)


class KeepsItsHookAfterAnError(Perturbation):
    """Takes its hook off only at the regular end."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        self.handle = backbone_of(module).register_forward_hook(lambda *_: None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass


class AddsToTheGradient(Perturbation):
    """Adds a gradient of its own after the backward pass."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass

    def restore(self, module: LightningModule) -> None:
        for parameter in backbone_of(module).parameters():
            if parameter.grad is not None:
                parameter.grad += 0.01


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


class DrawsAtZero(Perturbation):
    """Draws from torch's own stream at any strength: the step's dropout is another than without it."""

    zero = {"sigma": 0.0}

    def __init__(self, sigma: float = 0.1, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.sigma = sigma

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"] = batch["image"] + self.sigma * torch.randn_like(batch["image"])


class OnAtEvaluation(Perturbation):
    """A hook that doesn't ask whether the network trains."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        self.handle = backbone_of(module).register_forward_hook(lambda layer, args, output: output + torch.randn(()))

    def detach(self, module: LightningModule) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        """The hook is always on."""


class MovesWeightsAtEvaluation(Perturbation):
    """Perturbs in validation's hooks too, where nothing restores; and by so little that no result tells."""

    site = "weights"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            next(backbone_of(pl_module).parameters())[0, 0, 0, 0] += 1e-6


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


class LeavesAParameterUnused(Perturbation):
    """Its parameter takes part in every other step's graph only: plain DDP stops."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        own = self.own(module)
        if self.name not in own:
            own[self.name] = nn.ParameterDict({"gain": nn.Parameter(torch.ones(()))})

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        if self._step[1] % 2:
            batch["image"] = batch["image"] * module.perturbations[self.name]["gain"]  # type: ignore[index,union-attr]


class ForgetsWhenResumed(Perturbation):
    """Counts steps in Python, outside the checkpoint."""

    count = 0

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.count += 1
        batch["image"] = batch["image"] * (1 - 0.05 * self.count)


class ForgetsThatItBegan(LeavesAParameterUnused):
    """Sets its parameter from the first batch, and keeps in Python that it did: a resumed run sets it again."""

    begun = False

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        gain = module.perturbations[self.name]["gain"]  # type: ignore[index,union-attr]
        if not self.begun:
            with torch.no_grad():
                gain.copy_(1 + batch["image"].mean())
            self.begun = True
        batch["image"] = batch["image"] * gain


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


class BranchesOnData(Perturbation):
    """Asks in the forward pass for a number that a compiler can't know."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        layer = backbone_of(module).layer1
        self.handle = layer.register_forward_hook(lambda *a: 2 * a[2] if a[2].mean() > 0 else a[2])  # type: ignore[operator,union-attr]

    def detach(self, module: LightningModule) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass


class ViewsItsFeatures(Perturbation):
    """Takes features to lie in memory as (B, C, H, W)."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        layer = backbone_of(module).layer1
        self.handle = layer.register_forward_hook(lambda *a: a[2].view(-1).view(a[2].shape))  # type: ignore[operator,union-attr]

    def detach(self, module: LightningModule) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass


class NeedsAttention(Perturbation):
    """Plugs into nothing without attention, and says so."""

    site = "attention"

    def attach(self, module: LightningModule) -> None:
        raise ValueError(f"{type(backbone_of(module)).__name__} has no attention to perturb")
