"""Latent adversarial training: PGD on what comes out of a layer, in place of the input.

The idea is that of layer-wise adversarial training (Sankaranarayanan et al., arXiv 1705.07819) and latent adversarial
training (Singh et al., arXiv 1905.05186; Casper et al., arXiv 2403.05030); there is no released code that all follow.
A perturbation of h = g(x), no longer than ``eps`` times h, is crafted against the part of the network behind g.

Crafting costs that part only: what lies before the layer runs once and is replayed, and the gradient ends at the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.adversary import pgd
from callbacks.balls import Norm, check, length, per_example
from callbacks.embeddings import moving_tokens
from callbacks.layers import Added, Behind, backbone_of, find_layers, stages
from callbacks.perturbation import Batch, Mode, Perturbation, crafting


def latent_pgd(
    head: Callable[[Tensor], Tensor],
    h: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    norm: Norm,
    start: Tensor,
    entries: Tensor | None = None,
) -> Tensor:
    """A perturbation (B, ...) of h that makes the loss large.

    Args:
        head: from h (B, ...) to a loss, one for each example or their sum.
        h: (B, ...) features.
        eps: radius as a share of h: of its l2 length, or in linf of its root mean square.
        alpha: length of a step, in the same units.
        steps: at least 1.
        norm: ``linf`` or ``l2``.
        start: (B, ...) within the unit ball, times ``eps`` where the attack begins.
        entries: (B,) how many of an example's features are no padding; all if omitted.
    """
    h = h.float()
    unit = length(h).clamp_min(torch.finfo(h.dtype).tiny)
    if norm == "linf":
        unit = unit / (h[0].numel() ** 0.5 if entries is None else per_example(entries.to(h.dtype).sqrt(), h))
    scaled = h / unit
    moved = pgd(
        lambda z: head(z * unit),
        scaled,
        eps=eps,
        alpha=alpha,
        steps=steps,
        norm=norm,
        start=eps * start,
        bounds=None,
    )
    return (moved - scaled) * unit


class LatentAdversarial(Perturbation):
    """Trains on adversarial features: PGD at the output of a layer.

    Args:
        layer: its name in the backbone; the stage in the middle if omitted.
        eps: radius as a share of the features: of their l2 length, or in linf of their root mean square.
        alpha: length of a step, in the same units; ``eps / 4`` if omitted.
        steps: of PGD.
        norm: ``linf`` or ``l2``.
        attack_mode: mode of the network while the attack runs; see :func:`callbacks.perturbation.crafting`.
        mask: entry of the batch, (B, T), that is 0 for padding, which doesn't move; of features (B, T, D).
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, or a layer that isn't there.
    """

    site: ClassVar[str] = "features"
    zero: ClassVar = {"eps": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self,
        layer: str | None = None,
        eps: float = 0.1,
        alpha: float | None = None,
        steps: int = 5,
        norm: Norm = "l2",
        attack_mode: Mode = "eval",
        mask: str = "attention_mask",
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        check(eps, norm)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.layer, self.eps, self.alpha, self.steps = layer, eps, eps / 4 if alpha is None else alpha, steps
        self.norm, self.attack_mode, self.mask = norm, attack_mode, mask
        self._added: Added | None = None

    def attach(self, module: LightningModule) -> None:
        if self.layer is None:
            names = stages(backbone_of(module))
            self.layer = names[(len(names) - 1) // 2]
        self._layer = find_layers(module, [self.layer])[self.layer]
        self._added = Added(self._layer)

    def detach(self, module: LightningModule) -> None:
        if self._added is not None:
            self._added.remove()
            self._added = None

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        assert self._added is not None
        loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
        with crafting(module, self.attack_mode):
            behind = Behind(module, self._layer)
            h = behind.reach(lambda: loss(batch))
            mask = batch.get(self.mask)
            mask = mask if h.dim() == 3 and mask is not None and mask.shape == h.shape[:2] else None
            moving = moving_tokens(h, mask).float()
            entries = moving.expand_as(h).flatten(1).sum(1)
            if self.norm == "linf":
                start = (2 * self.rows("start", h) - 1) * moving
            else:
                radius = self.uniform("radius", len(h), device=h.device).pow(1 / entries)
                direction = self.rows("start", h, "normal") * moving
                start = direction / length(direction).clamp_min(1e-12) * per_example(radius, h)

            def head(z: Tensor) -> Tensor:
                behind.again(z.to(h.dtype))
                return loss(batch) * len(z)

            with behind.replaying():
                delta = latent_pgd(
                    head,
                    h,
                    eps=self.eps,
                    alpha=self.alpha,
                    steps=self.steps,
                    norm=self.norm,
                    start=start,
                    entries=entries,
                )
        self._added.delta = delta

    def restore(self, module: LightningModule) -> None:
        if self._added is not None:
            self._added.delta = None
