"""Adversarial training for free (Shafahi et al., arXiv 1904.12843): one backward pass for weights and input.

Each batch is trained on ``replays`` times in a row. The step's own backward pass gives the gradient of the input, which
moves the perturbation for the next replay; the perturbation is carried over to the next batch. So adversarial
training costs what plain training of as many steps costs.

What is sound here and not in the released code (locuslab/fast_adversarial): a carried perturbation is cut to the box of
the images that it meets, not of those it comes from; the perturbation is in the checkpoint; radii are of pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.balls import Ball, Bounds, Norm, check, length
from callbacks.perturbation import Batch, Perturbation


class FreeAdversary(Perturbation):
    """Trains on inputs with a perturbation that is carried from step to step.

    Args:
        eps: radius, in units of the entry, and length of a step, as published.
        replays: m: how often each batch is trained on, of DataModules made of ``datamodules.images``. An epoch then is
            m passes over the data, and schedules by step count replays.
        norm: ``linf`` or ``l2``.
        entry: which entry of the batch: float, (B, ...).
        bounds: its smallest and largest value; null: any.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, or data that can't be replayed.
    """

    zero: ClassVar = {"eps": 0.0}
    per_example: ClassVar = {"norm": "l2", "eps": 0.5}

    def __init__(
        self,
        eps: float = 8 / 255,
        replays: int = 8,
        norm: Norm = "linf",
        entry: str = "image",
        bounds: Bounds = (0.0, 1.0),
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        check(eps, norm)
        if replays < 1:
            raise ValueError(f"replays must be at least 1, not {replays}")
        self.eps, self.replays, self.norm, self.entry, self.bounds = eps, replays, norm, entry, bounds
        #: (B, ...) of this rank; None before the first step.
        self.carried: Tensor | None = None
        self._open: tuple[Ball, Tensor] | None = None

    def attach(self, module: LightningModule) -> None:
        data = getattr(module.trainer, "datamodule", None)
        if self.replays == 1 or not module.trainer.training:
            return
        if not isinstance(getattr(data, "replays", None), int):
            raise ValueError(
                f"{type(self).__name__} can't replay the batches of {type(data).__name__}: take a DataModule that has "
                "'replays', or replays: 1"
            )
        data.replays = self.replays  # type: ignore[union-attr]  # checked above; its loaders are made later

    def detach(self, module: LightningModule) -> None:
        data = getattr(getattr(module, "_trainer", None), "datamodule", None)
        if data is not None and self.replays > 1 and hasattr(data, "replays"):
            data.replays = 1

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        x = batch.get(self.entry)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            known = ", ".join(k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point())
            raise ValueError(f"the batch has no entry '{self.entry}' of floats to attack; it has: {known or 'none'}")
        x = x.detach()
        ball = Ball(x, self.eps, self.norm, self.bounds)
        if self.carried is not None and self.carried.shape[1:] == x.shape[1:] and len(self.carried) >= len(x):
            moved = ball.exact(x + self.carried[: len(x)].to(x))
        else:
            moved = x.clone()
        self._open = ball, moved.requires_grad_()
        batch[self.entry] = moved

    def restore(self, module: LightningModule) -> None:
        if self._open is None:
            return
        (ball, moved), self._open = self._open, None
        with torch.no_grad():
            if moved.grad is None:  # the step failed, or its loss doesn't look at the entry
                return
            gradient = moved.grad.float()
            step = gradient.sign() if self.norm == "linf" else gradient / length(gradient).clamp_min(1e-30)
            delta = ball.exact(moved.detach() + self.eps * step) - ball.x
            if self.carried is None or self.carried.shape[1:] != delta.shape[1:]:
                self.carried = delta
            else:  # a smaller batch leaves the rest as it is
                self.carried = torch.cat([delta, self.carried[len(delta) :].to(delta)])

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The perturbations of all ranks, in the order in which examples are dealt to them."""
        if self._world == 1 or self.carried is None:
            return {"carried": None if self.carried is None else self.carried.cpu()}
        parts = [torch.empty_like(self.carried) for _ in range(self._world)]
        dist.all_gather(parts, self.carried.contiguous())
        return {"carried": torch.stack(parts, 1).flatten(0, 1).cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        whole = state_dict["carried"]
        self.carried = None if whole is None else whole[self._rank :: self._world].clone()
