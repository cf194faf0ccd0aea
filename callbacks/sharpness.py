"""Sharpness: the largest eigenvalue of the training loss's Hessian, against the step size's limit of stability.

Gradient descent on a quadratic with curvature lambda comes closer to its minimum only where the learning rate is below
2 / lambda. Networks trained by full-batch gradient descent sharpen until the largest eigenvalue of the Hessian
stands at about that limit and stay there: progressive sharpening and the edge of stability (Cohen et al., arXiv
2103.00065). What drives it, Rosenfeld & Risteski (arXiv 2311.04163) say, are outliers with opposing signals.

The eigenvalue comes from the Lanczos iteration with Hessian-vector products, so the Hessian itself is never there. The
iteration approaches it from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from callbacks.diagnostic import Diagnostic, inner, log_steps, losses_of, summed, total_steps
from callbacks.perturbation import device_of, trained_weights
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Forward passes that a Hessian-vector product costs (a backward pass through a backward pass), and its beginning.
PRODUCT, BEGINNING = 4, 3
#: How often a product, its arithmetic with it, and a beginning go through vectors as long as the weights.
SWEEPS = (18, 10)

# ---------------------------------------------------------------------- the mathematics


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Approximate eigenvalues of a symmetric matrix that is given by its products, the extreme ones best.

    The three-term recurrence, without orthogonalising anew: rounding gives copies of eigenvalues that have been found,
    which does the largest no harm, and three vectors are all that is kept.

    Args:
        product: (n,) to (n,), linear and symmetric.
        start: (n,), not zero; best drawn at random.
        iterations: products, at most; fewer where the space that the start vector spans is exhausted.

    Returns:
        Ritz values (k,), ascending, float64, and how far the nearest eigenvalue may be from each, (k,).

    Raises:
        ValueError: for fewer than one iteration or a start vector of zeros.
    """
    if iterations < 1:
        raise ValueError(f"take at least 1 iteration, not {iterations}")
    length = float(start.double().norm())
    if not length > 0:
        raise ValueError("the start vector must not be zero")
    vector, before = start / length, torch.zeros_like(start)
    diagonal: list[float] = []
    beside: list[float] = [0.0]
    for _ in range(iterations):
        found = product(vector)
        along = inner(found, vector)
        diagonal.append(along)
        found = found.sub(vector, alpha=along).sub_(before, alpha=beside[-1])
        beside.append(inner(found, found) ** 0.5)
        scale = max(map(abs, [*diagonal, *beside[:-1]]))
        if not math.isfinite(beside[-1]) or beside[-1] <= 100 * torch.finfo(start.dtype).eps * scale:
            break  # what is left is rounding
        before, vector = vector, found.div_(beside[-1])
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[1:-1], dtype=torch.float64)
    matrix += torch.diag(off, 1) + torch.diag(off, -1)
    if not bool(torch.isfinite(matrix).all()) or not math.isfinite(beside[-1]):
        return matrix.new_full((1,), math.nan), matrix.new_full((1,), math.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values, beside[-1] * vectors[-1].abs()


def stability_limit(optimizer: Optimizer) -> float | None:
    """The curvature above which gradient descent on a quadratic diverges, 2 / lr with plain SGD; None for others.

    With momentum beta (no dampening) it is 2 (1 + beta) / lr, with Nesterov's 2 (1 + beta) / ((1 + 2 beta) lr). Weight
    decay adds to every eigenvalue of what is descended, so it is taken off the limit. Of several groups of parameters
    the first counts; optimizers that divide by the gradient's size have no such limit.
    """
    group = optimizer.param_groups[0]
    if not isinstance(optimizer, torch.optim.SGD) or not group["lr"] > 0:
        return None
    beta, lr = float(group["momentum"]), float(group["lr"])
    limit = 2 * (1 + beta) / lr
    if group["nesterov"]:
        limit /= 1 + 2 * beta
    return limit - float(group["weight_decay"])


# ---------------------------------------------------------------------- the diagnostic


class Sharpness(Diagnostic):
    """The largest eigenvalue of the Hessian of the training loss on a fixed sample, while a network trains.

    The sample's examples are taken as they are and the network in evaluation mode; the loss is the mean of
    :func:`callbacks.diagnostic.losses_of`, without weight decay and label smoothing. In float32 also where training is
    in mixed precision. As ``sharpness/...``:

    * ``top``, the largest eigenvalue, and ``lowest``, the smallest one found (negative: the loss is not convex there);
    * ``error``, how far an eigenvalue may be from ``top``: where it isn't small beside it, take more ``iterations``;
    * ``limit``, 2 / lr, or what stands for it with momentum (:func:`stability_limit`), and ``edge``, ``top`` over it:
      above 1 gradient descent is unstable. Of SGD alone.

    At the end also ``top_max`` and ``edge_max``, the largest of the training.

    Args:
        measurements: how many, evenly in the logarithm of the step.
        every_n_steps: measure at the multiples of this instead.
        examples: training examples of the sample; fewer where ``share`` doesn't allow them.
        iterations: Hessian-vector products of each measurement, at most.
        options: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range, or for examples without labels and logits.
    """

    by_weights: ClassVar[bool] = True

    def __init__(
        self,
        measurements: int = 10,
        every_n_steps: int | None = None,
        examples: int = 512,
        iterations: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if measurements < 3 or examples < 1 or iterations < 1:
            words = "measurements must be at least 3, examples and iterations at least 1"
            raise ValueError(f"{words}: {measurements}, {examples} and {iterations}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.measurements, self.every_n_steps = measurements, every_n_steps
        self.wanted, self.iterations = examples, iterations
        self._mine: list[int] = []

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        if self.every_n_steps is not None:
            return range(0, total_steps(trainer) + 1, self.every_n_steps)
        return log_steps(self.measurements, total_steps(trainer))

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        sweeps = SWEEPS[0] * self.iterations + SWEEPS[1]
        count = self.affordable(trainer, self.wanted, PRODUCT * self.iterations + BEGINNING, sweeps)
        self._mine = self.positions(trainer, "train", count)

    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        weights: list[Tensor] = [p for _, p in trained_weights(module)]
        if not weights:
            raise ValueError("sharpness needs weights that are trained, and all are frozen")
        where = device_of(module)
        number = sum(p.numel() for p in weights)
        kind = torch.promote_types(weights[0].dtype, torch.float32)
        drawn = torch.randn(number, generator=self.generator("start"), dtype=kind)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(where.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fast kernels of attention have no second derivative
            product = self._product(trainer, module, weights)
            values, errors = lanczos(product, drawn.to(where, kind), self.iterations)
        found = {"top": float(values[-1]), "lowest": float(values[0]), "error": float(errors[-1])}
        limit = stability_limit(trainer.optimizers[0])
        if limit is not None and limit > 0:
            found |= {"limit": limit, "edge": found["top"] / limit}
        return found

    def _product(self, trainer: Trainer, module: LightningModule, weights: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """The Hessian of the mean loss of the whole sample times a vector (n,); the same on all ranks."""
        count = float(summed(torch.tensor(float(len(self._mine))), device_of(module)))
        # the graph of one part is kept for all products; of more it is built anew, to save memory
        kept = (
            [self._gradient(module, b, weights) for b in self._parts(trainer)]
            if len(self._mine) <= self.chunk(trainer, "train")
            else None
        )

        def product(vector: Tensor) -> Tensor:
            parts = [
                p.view_as(w).to(w.dtype)
                for p, w in zip(vector.split([w.numel() for w in weights]), weights, strict=True)
            ]
            total = torch.zeros_like(vector)
            places = [t.view_as(w) for t, w in zip(total.split([w.numel() for w in weights]), weights, strict=True)]
            batches = kept if kept is not None else (self._gradient(module, b, weights) for b in self._parts(trainer))
            for gradient in batches:
                pairs = [(g, p) for g, p in zip(gradient, parts, strict=True) if g is not None and g.requires_grad]
                if not pairs:
                    continue  # a loss that is linear in the weights
                rows = torch.autograd.grad(
                    [g for g, _ in pairs],
                    weights,
                    [p for _, p in pairs],
                    retain_graph=kept is not None,
                    allow_unused=True,
                )
                for place, row in zip(places, rows, strict=True):
                    if row is not None:
                        place += row
            total /= count
            if trainer.world_size > 1:
                dist.all_reduce(total)
            return total

        return product

    def _parts(self, trainer: Trainer) -> Any:
        return self.examples(trainer, "train", self._mine)

    @staticmethod
    def _gradient(module: LightningModule, batch: Any, weights: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Of the sum of a batch's losses, with the graph by which it can be differentiated again."""
        return torch.autograd.grad(losses_of(module, batch).sum(), weights, create_graph=True, allow_unused=True)

    def conclude(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        found = {}
        for key in ("top", "edge"):
            points = self.history.get(f"{self.name}/{key}")
            if points:
                found[f"{key}_max"] = max(value for _, value in points)
        return found

    def draw(self) -> Figure | None:
        """The eigenvalue over the steps, below or above the limit."""
        points = self.history.get(f"{self.name}/top")
        if not points:
            return None
        figure = new_figure(4.8, 3.4)
        axis = figure.subplots()
        axis.plot(*zip(*points, strict=True), "o-", color="C0", markersize=3, label="largest eigenvalue")
        limits = self.history.get(f"{self.name}/limit")
        if limits:
            axis.plot(*zip(*limits, strict=True), "--", color="C3", linewidth=1.2, label="limit of stability (2 / lr)")
        if min(value for _, value in points) > 0:
            axis.set_yscale("log")
        if self.every_n_steps is None:
            axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, None)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("curvature of the training loss")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        return figure
