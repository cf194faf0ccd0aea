"""Perturbed weights: the step's gradient is taken where the weights have been moved, and applied where they were.

SAM, Foret et al., arXiv 2010.01412; ASAM, Kwon et al., arXiv 2102.11600; AWP, Wu et al., arXiv 2004.05884. Stacked on
adversarial inputs the inputs are crafted first, at the untouched weights, as AWP does it.

Where the released codes differ from this:

* AWP (csdongxian) steps at the perturbed weights and subtracts the perturbation after the step, so that weight decay
  acts on the perturbed weights; what is added and subtracted leaves rounding that differs between ranks. Here a saved
  copy is put back before the step, as SAM's code does.
* SAM's codes move the running statistics of batch norm twice a step; here they move once.
* MAIR's AWP has one ratio for all parameters, batch norm and biases included: ``norm: global``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.perturbation import Batch, Perturbation, crafting, trained_weights
from callbacks.sharded import needs_whole_weights

Named = list[tuple[str, Tensor]]
Tensors = list[Tensor]

# ---------------------------------------------------------------------- directions


def _norm(tensors: Tensors) -> Tensor:
    return torch.stack(list(torch._foreach_norm(tensors))).norm()


def sam_ascent(weights: Tensors, gradients: Tensors, rho: float) -> Tensors:
    """rho g / |g|, of length rho over all weights together (arXiv 2010.01412, eq. 2)."""
    scale = rho / (_norm(gradients) + 1e-12)
    return list(torch._foreach_mul(gradients, scale))


def asam_ascent(
    weights: Tensors, gradients: Tensors, rho: float, eta: float = 0.01, scaled: list[bool] | None = None
) -> Tensors:
    """rho T^2 g / |T g| with T = |w| + eta (arXiv 2102.11600, eq. 6); T = 1 where not ``scaled``."""
    scaled = [True] * len(weights) if scaled is None else scaled
    t = [w.abs() + eta if s else torch.ones_like(w) for w, s in zip(weights, scaled, strict=True)]
    tg = list(torch._foreach_mul(t, gradients))
    return list(torch._foreach_mul(list(torch._foreach_mul(t, tg)), rho / (_norm(tg) + 1e-12)))


def awp_ascent(
    weights: Tensors, gradients: Tensors, gamma: float, norm: Literal["layer", "global"] = "layer"
) -> Tensors:
    """gamma |w| g / |g|, of each tensor by itself or of all together (arXiv 2004.05884, eq. 9 and 10)."""
    if norm == "global":
        return list(torch._foreach_mul(gradients, gamma * _norm(weights) / (_norm(gradients) + 1e-20)))
    lengths = zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
    return [g * (gamma * w_norm / (g_norm + 1e-20)) for g, (w_norm, g_norm) in zip(gradients, lengths, strict=True)]


# ---------------------------------------------------------------------- the techniques


class _Weights(Perturbation):
    """Adds to the weights for one step and puts the saved ones back."""

    site: ClassVar[str] = "weights"

    def __init__(self, **schedule: Any) -> None:
        super().__init__(**schedule)
        self._saved: list[tuple[Tensor, Tensor]] = []

    def chosen(self, module: LightningModule) -> Named:
        """The weights that move: those that are trained, other techniques' own left out."""
        found = trained_weights(module)
        needs_whole_weights(self, [p for _, p in found])
        return [*found]

    def move(self, named: Named, by: Tensors) -> None:
        weights = [p for _, p in named]
        self._saved = [(p, p.detach().clone()) for p in weights]
        with torch.no_grad():
            torch._foreach_add_(weights, by)

    def restore(self, module: LightningModule) -> None:
        with torch.no_grad():
            for weight, saved in self._saved:
                weight.copy_(saved)
        self._saved = []


class _Ascent(_Weights):
    """Moves the weights to where the loss is larger."""

    def __init__(self, ascent: Literal["synced", "per_rank"] = "synced", **schedule: Any) -> None:
        super().__init__(**schedule)
        if ascent not in ("synced", "per_rank"):
            raise ValueError(f"ascent must be synced or per_rank, not '{ascent}'")
        self.ascent = ascent

    def direction(self, names: list[str], weights: Tensors, gradients: Tensors) -> Tensors:
        """What is added to the weights."""
        raise NotImplementedError

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        named = self.chosen(module)
        with crafting(module, "train", parameters=True):
            loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
            found = torch.autograd.grad(loss(batch), [p for _, p in named], allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for (_, p), g in zip(named, found, strict=True)]
        if self.ascent == "synced" and self._world > 1:
            flat = torch.cat([g.flatten() for g in gradients])  # one message for all
            dist.all_reduce(flat)
            parts = flat.div_(self._world).split([g.numel() for g in gradients])
            gradients = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        with torch.no_grad():
            by = self.direction([n for n, _ in named], [p.detach() for _, p in named], gradients)
        del found, gradients  # of the weights' size, as are the copies that are kept now
        self.move(named, by)


class SAM(_Ascent):
    """Sharpness-aware minimisation: the gradient is taken at a distance ``rho`` up the slope.

    Args:
        rho: length of the move, over all weights together.
        ascent: of several ranks, ``synced``: along the gradient of all, so that ranks together do what one process
            does; ``per_rank``: each along its own (m-SAM, as the paper's own runs), which costs no message.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Of accumulated batches each has a move of its own.
    """

    zero: ClassVar = {"rho": 0.0}
    per_example: ClassVar = {}

    def __init__(self, rho: float = 0.05, ascent: Literal["synced", "per_rank"] = "synced", **schedule: Any) -> None:
        super().__init__(ascent, **schedule)
        if not rho >= 0:
            raise ValueError(f"rho must not be negative, but is {rho}")
        self.rho = rho

    def direction(self, names: list[str], weights: Tensors, gradients: Tensors) -> Tensors:
        return sam_ascent(weights, gradients, self.rho)


class ASAM(SAM):
    """Adaptive SAM: the move of a weight grows with its size, so that rescaling a layer changes nothing.

    Args:
        rho: length of the move, in the adapted norm.
        eta: what is added to a weight's size.

    Other arguments: see :class:`SAM`. As in the released code, biases aren't scaled.
    """

    def __init__(
        self, rho: float = 0.5, eta: float = 0.01, ascent: Literal["synced", "per_rank"] = "synced", **schedule: Any
    ) -> None:
        super().__init__(rho, ascent, **schedule)
        if not eta >= 0:
            raise ValueError(f"eta must not be negative, but is {eta}")
        self.eta = eta

    def direction(self, names: list[str], weights: Tensors, gradients: Tensors) -> Tensors:
        return asam_ascent(weights, gradients, self.rho, self.eta, ["weight" in n for n in names])


class AWP(_Ascent):
    """Adversarial weight perturbation: each layer's weights move by ``gamma`` of their own length.

    Published: 0.01 with adversarial training, 0.005 with TRADES, from epoch 0 and 10 (``start_epoch``).

    Args:
        gamma: relative length of the move.
        norm: ``layer``: each weight matrix and filter bank by itself, no batch norm and no biases; ``global``: one
            ratio for all parameters (MAIR's, 0.005).
        ascent: see :class:`SAM`.
        schedule: see :class:`callbacks.perturbation.Perturbation`.
    """

    zero: ClassVar = {"gamma": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self,
        gamma: float = 0.01,
        norm: Literal["layer", "global"] = "layer",
        ascent: Literal["synced", "per_rank"] = "synced",
        **schedule: Any,
    ) -> None:
        super().__init__(ascent, **schedule)
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative, but is {gamma}")
        if norm not in ("layer", "global"):
            raise ValueError(f"norm must be layer or global, not '{norm}'")
        self.gamma, self.norm = gamma, norm

    def chosen(self, module: LightningModule) -> Named:
        found = super().chosen(module)
        return found if self.norm == "global" else [(n, p) for n, p in found if p.dim() > 1 and "weight" in n]

    def direction(self, names: list[str], weights: Tensors, gradients: Tensors) -> Tensors:
        return awp_ascent(weights, gradients, self.gamma, self.norm)


class WeightNoise(_Weights):
    """The control: each weight matrix moves by ``gamma`` of its own length in a random direction, alike on all ranks.

    Args:
        gamma: relative length of the move.
        schedule: see :class:`callbacks.perturbation.Perturbation`.
    """

    zero: ClassVar = {"gamma": 0.0}
    per_example: ClassVar = {}

    def __init__(self, gamma: float = 0.01, **schedule: Any) -> None:
        super().__init__(**schedule)
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative, but is {gamma}")
        self.gamma = gamma

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        named = [(n, p) for n, p in self.chosen(module) if p.dim() > 1 and "weight" in n]
        weights = [p.detach() for _, p in named]
        generator = self.generator("noise", shared=True, device=weights[0].device)
        noise = [torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype) for w in weights]
        self.move(named, awp_ascent(weights, noise, self.gamma))
