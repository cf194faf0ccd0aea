"""The noise of SGD: how large it is, what it does to the weights, and adding that of a smaller batch.

Sclocchi, Geiger and Wyart, arXiv 2301.13703: beside the scale of the predictor it is the temperature T = lr / (h B)
that decides what SGD does (h the width, B the batch size). :class:`SGDTemperature` logs it with what it is said to
govern: the noise of a step's gradient, how far the weights have moved, the margins, and the time until all examples are
fitted. :class:`SGDNoiseInjection` gives the gradient of a large batch the noise of a small one, so that noise can be
told apart from whatever else a batch size changes.

Where we differ from the released code:

* Its descent with noise (``gd_sde``) takes the whole training set and draws through single examples' features. Here it
  is the covariance of the gradients, exactly, of any network and any batch, at the price of one more pass.
* Noise is measured by the unbiased estimate of the covariance's trace, from gradients of small groups of examples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.diagnostic import (
    Diagnostic,
    effective_batch,
    fetch,
    gathered,
    label_of,
    log_steps,
    logits_of,
    losses_of,
    squared_length,
    summed,
    total_steps,
)
from callbacks.perturbation import Batch, Perturbation, crafting, device_of, trained_weights
from callbacks.report import new_figure
from callbacks.sharded import needs_whole_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

__all__ = ["SGDNoiseInjection", "SGDTemperature", "margins_of", "noise_trace", "noise_weights"]
#: Groups of examples below which the noise isn't estimated from groups but from single examples.
GROUPS = 16
#: How often a measurement goes through vectors as long as the weights: for each group the layers read and write them
#: and the sum is taken, and w_0 is compared.
SWEEPS = (3, 2)
#: Quantiles of the margins that are logged.
QUANTILES = (0.1, 0.5, 0.9)

# ---------------------------------------------------------------------- functions


def margins_of(logits: Tensor, label: Tensor) -> Tensor:
    """By how much each example is on its label's side, (B,), in float32.

    Of logits (B, K) the label's logit less the largest other one; of a single one (B, 1), y F with y = -1 for label 0.
    """
    logits = logits.float()
    if logits.shape[1] == 1:
        return (2.0 * label - 1.0) * logits[:, 0]
    own = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -math.inf)
    return own[:, 0] - others.amax(1)


def noise_trace(
    sum_of_squares: float, square_of_sum: float, groups: int, size: int, population: float = math.inf
) -> tuple[float, float]:
    """The trace of the covariance of single examples' gradients, and the squared length of their mean.

    Both are unbiased. With the mean gradients G_1..G_k of k groups of m examples, drawn at random::

        trace  = m / (k - 1) * (sum_j |G_j|^2 - |sum_j G_j|^2 / k)
        square = |sum_j G_j / k|^2 - trace * (1 / (k m) - 1 / N)

    The second one may be negative where noise hides the gradient.

    Args:
        sum_of_squares: sum of |G_j|^2.
        square_of_sum: |sum of G_j|^2.
        groups: k, at least 2.
        size: m.
        population: N, how many examples they were drawn from without replacement; the trace is then that over N - 1,
            and the mean that of all N.
    """
    trace = size / (groups - 1) * (sum_of_squares - square_of_sum / groups)
    return trace, square_of_sum / groups**2 - trace * (1 / (groups * size) - 1 / population)


def noise_weights(normal: Tensor, batch: int, emulated: int, accumulated: int = 1) -> Tensor:
    """Weights c (M,) of a batch's gradients g_i, such that sum_i c_i g_i is the noise that a smaller batch has more.

    With standard normal xi_i and their mean, c_i = sqrt((1/b - 1/B) / (k (M - 1))) (xi_i - mean). Given the batch, the
    sum has mean 0 and the covariance (1/b - 1/B) / k * S, where S is the sample covariance of the g_i (over M - 1). S
    is an unbiased estimate of C, the covariance of single examples' gradients, so over all batches the covariance is
    (1/b - 1/B) / k * C exactly, and those of k accumulated batches add up to (1/b - 1/B) C. Given the batch the noise
    is gaussian and lies in the span of the centred gradients: its rank is at most k (M - 1). Over all batches it has
    the full rank of C, but is a mixture of gaussians.

    Args:
        normal: xi, (M,), of a batch over all ranks.
        batch: B, examples of the optimizer step.
        emulated: b.
        accumulated: k.

    Raises:
        ValueError: for b above B (noise can't be taken away), b below 1, or fewer than two examples.
    """
    if not 1 <= emulated <= batch:
        raise ValueError(
            f"a step of {batch} examples can't have the noise of one of {emulated}: batch_size must lie in 1..{batch}"
        )
    if emulated == batch:
        return torch.zeros_like(normal)
    if len(normal) < 2:
        raise ValueError("noise is drawn from the differences between a batch's examples: it needs at least two")
    scale = math.sqrt((1 / emulated - 1 / batch) / (accumulated * (len(normal) - 1)))
    return scale * (normal - normal.mean())


# ---------------------------------------------------------------------- the technique


class SGDNoiseInjection(Perturbation):
    """Adds gaussian noise to the gradient, so that a step has the noise of a smaller batch.

    The step's mean gradient over B examples has the covariance C / B, if C is that of single examples' gradients. What
    is added has mean 0 and the covariance (1/b - 1/B) C, and together they have that of a batch of b: see
    :func:`noise_weights`. No example's gradient is computed by itself: the noise is the gradient of the examples'
    weighted losses, which costs one more forward and backward pass (twice the step). It joins the step's gradient where
    that is accumulated, before ranks exchange it, so accumulation, clipping, ranks and loss scaling see one gradient.

    What is drawn depends on the example's place in the batch of all ranks, so two ranks do what one process does.
    Under batch norm in training mode an example's loss depends on its batch: the noise is then that of the losses at
    the statistics of the large batch, and a smaller batch's noisier statistics aren't emulated. The last, incomplete
    window of accumulated batches has a little less noise than it should. Stacked on what moves the weights (SAM), list
    it behind, so that it takes its gradients where the step does.

    Args:
        batch_size: b, how many examples in a step, over all ranks and accumulated batches, the noise stands for; null:
            as many as there are, so no noise.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a batch size below 1 or above the step's own, or a module whose loss isn't the mean of the
            losses of its examples (``example_losses(batch)``, or else the cross-entropy of its logits).
    """

    site: ClassVar[str] = "weights"
    zero: ClassVar[Mapping[str, Any]] = {"batch_size": None}
    per_example: ClassVar[Mapping[str, Any] | None] = {}
    adds_gradients: ClassVar[bool] = True

    def __init__(self, batch_size: int | None, **schedule: Any) -> None:
        super().__init__(**schedule)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or null for no noise, not {batch_size}")
        self.batch_size = batch_size
        self._checked = False
        self._hooks: list[tuple[Any, Any]] = []

    def attach(self, module: LightningModule) -> None:
        self._checked = False

    def detach(self, module: LightningModule) -> None:
        self._unhook()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        if self.batch_size is None:
            return
        trainer = module.trainer
        weights = [p for p in module.parameters() if p.requires_grad]
        needs_whole_weights(self, weights)
        with crafting(module, "train", parameters=True):  # the dropout that the step will draw
            losses = self._losses(module, batch)
            size, accumulated = len(losses) * self._world, trainer.accumulate_grad_batches
            normal = torch.randn(size, generator=self.generator("noise", shared=True))  # on the CPU: alike everywhere
            c = noise_weights(normal, size * accumulated, self.batch_size, accumulated)[self._rank :: self._world]
            found = torch.autograd.grad((c.to(losses.device) * losses).sum(), weights, allow_unused=True)
        self._check(module, batch, losses)
        self._add(module, weights, found)

    def _losses(self, module: LightningModule, batch: Batch) -> Tensor:
        try:
            losses = losses_of(module, batch)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(self._refusal(module)) from error
        if losses.dim() != 1:
            raise ValueError(self._refusal(module))
        return losses

    def _check(self, module: LightningModule, batch: Batch, losses: Tensor) -> None:
        """Once a fit: whether it is these losses whose mean is trained on."""
        if self._checked:
            return
        if not callable(getattr(module, "loss", None)):
            raise ValueError(self._refusal(module))
        loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
        with crafting(module, "train"), torch.no_grad():
            trained = float(loss(batch))
        mean = float(losses.detach().float().mean())
        if not math.isclose(mean, trained, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError(self._refusal(module))
        self._checked = True

    @staticmethod
    def _refusal(module: LightningModule) -> str:
        return (
            "the noise of a smaller batch needs each example's own loss, whose mean is trained on, and "
            f"{type(module).__name__} has none: give it example_losses(batch) -> (B,), or leave SGDNoiseInjection out"
        )

    def _add(self, module: LightningModule, weights: Sequence[nn.Parameter], noise: Sequence[Tensor | None]) -> None:
        """Where the step's gradients are accumulated. Ranks take the mean of theirs, and the noise is a sum."""
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) * self._world
        for weight, own in zip(weights, noise, strict=True):
            if own is None:
                continue
            node: Any = weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # it has one

            def add(gradients: tuple[Tensor, ...], own: Tensor = own) -> tuple[Tensor, ...]:
                return (gradients[0] + factor * own,)

            self._hooks.append((node, node.register_prehook(add)))  # the node lives as long as someone holds it

    def _unhook(self) -> None:
        for _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    def restore(self, module: LightningModule) -> None:
        self._unhook()


# ---------------------------------------------------------------------- the diagnostic


class SGDTemperature(Diagnostic):
    """SGD's temperature, the noise of its gradient, how far the weights have gone, and how many examples are fitted.

    At steps evenly spaced in the logarithm, over a fixed sample of training examples:

    * ``temperature``: T = lr / (h B), B being the examples of an optimizer step over all ranks and accumulated batches.
      Momentum isn't counted.
    * ``noise``: trace of the covariance of a step's gradient, tr C (1/B - 1/N), where C is the covariance of the
      gradients of the N examples (:func:`noise_trace`); ``gradient_sq``: the squared length of the mean gradient. Both
      are of the module's ``example_losses(batch)``, or else of the cross-entropy of its logits, whatever else it is
      trained on; in evaluation mode, without what techniques perturb.
    * ``distance``: |w - w_0|, w_0 being the trained weights before the first step; ``weight_change``: that over |w_0|.
    * ``margin_min``, ``margin_10``, ``margin_50``, ``margin_90``: the least margin and quantiles (see
      :func:`margins_of`); ``unfitted``: the share of the sample with a margin below ``threshold``, or not above 0.
    * ``fit_steps``, at the end: the first measured step at which all of the sample were fitted, if there is one.

    The price is that of four passes over the sample, and w_0 is in every checkpoint.

    Args:
        width: h; 1 if omitted, as for the perceptron.
        threshold: margin from which on an example counts as fitted; 1 for hinge losses with that margin.
        examples: of the sample; fewer where ``share`` doesn't allow as many.
        group: examples of one gradient. Larger groups are faster; single examples are taken where there would be few.
        measurements: how often it is measured.
        options: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range; in a fit, where batches have no labels or the module gives no logits.
    """

    by_weights: ClassVar[bool] = True

    def __init__(
        self,
        width: int | None = None,
        threshold: float = 0.0,
        examples: int = 256,
        group: int = 8,
        measurements: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (width is not None and width < 1) or examples < 2 or group < 1 or measurements < 3:
            raise ValueError(
                "width and group must be at least 1, examples at least 2, measurements at least 3: "
                f"{width}, {group}, {examples} and {measurements}"
            )
        self.width, self.threshold = width, threshold
        self.sample, self.group, self.measurements = examples, group, measurements
        #: w_0 by name.
        self.start: dict[str, Tensor] = {}
        self._groups: list[list[int]] = []
        self._count, self._size, self._population = 0, 1, 1

    # ------------------------------------------------------------------ what is kept

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.start = state_dict["start"]

    # ------------------------------------------------------------------ when and of what

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        return log_steps(self.measurements, total_steps(trainer))

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.start:
            self.start = {name: p.detach().cpu().clone() for name, p in trained_weights(module)}
        order = self.drawn(trainer, "train").tolist()
        size = self._population = len(order)
        each, once = SWEEPS
        most = max(GROUPS, math.ceil(self.sample / self.group))
        count = min(self.affordable(trainer, self.sample, 4, each * most + once), size)
        if count < 2:
            raise ValueError("SGD's noise is the difference between examples: there must be at least two to train on")
        self._size = max(1, min(self.group, count // GROUPS))
        self._count = count // self._size
        groups = [order[i * self._size : (i + 1) * self._size] for i in range(self._count)]
        self._groups = groups[
            trainer.global_rank :: trainer.world_size
        ]  # whole groups, so ranks have those of one process

    # ------------------------------------------------------------------ what is measured

    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        named = trained_weights(module)
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        step = effective_batch(trainer)
        found = {"temperature": lr / ((self.width or 1) * step)}
        found |= self._moved(named)
        trace, square = self._noise(trainer, module, [p for _, p in named])
        left = max(1 / step - 1 / self._population, 0.0)  # a batch of all examples has no noise
        found |= {"noise": trace * left, "gradient_sq": square}
        return found | self._fitted(trainer, module)

    def _moved(self, named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
        moved = length = 0.0
        for name, parameter in named:
            if name in self.start:  # not what was frozen when training began
                start = self.start[name].to(parameter.device)
                moved += float(squared_length(parameter.detach() - start))
                length += float(squared_length(start))
        found = {"distance": math.sqrt(moved)}
        return found | ({"weight_change": math.sqrt(moved / length)} if length else {})

    def _noise(self, trainer: Trainer, module: LightningModule, weights: Sequence[nn.Parameter]) -> tuple[float, float]:
        where = device_of(module)
        total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in weights]
        squares: Tensor = torch.zeros((), dtype=torch.float64, device=where)
        for members in self._groups:
            batch = fetch(trainer, "train", members)
            gradients = torch.autograd.grad(losses_of(module, batch).mean(), weights, allow_unused=True)
            for place, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    place += gradient
                    squares += squared_length(gradient)
        if trainer.world_size > 1:
            flat = torch.cat([part.flatten() for part in total])  # one message for all
            dist.all_reduce(flat)
            total = [flat]
        of_sum = sum(float(squared_length(part)) for part in total)
        return noise_trace(float(summed(squares, where)), of_sum, self._count, self._size, self._population)

    @torch.no_grad()
    def _fitted(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        own = [position for members in self._groups for position in members]
        batches = self.examples(trainer, "train", own)
        margins = [margins_of(logits_of(module, batch), label_of(batch)) for batch in batches]
        where = device_of(module)
        most = -(-self._count // trainer.world_size) * self._size  # on the rank that has most; others are filled up
        rows = torch.zeros(most, 2, device=where)
        if margins:
            rows[: len(own)] = torch.stack([torch.cat(margins), torch.ones(len(own), device=where)], 1)
        every = gathered(rows, where).double()
        every = every[every[:, 1] == 1, 0]
        unfitted = ~((every >= self.threshold) & (every > 0))  # also what isn't a number
        found = {"margin_min": float(every.min())}
        for q in QUANTILES:
            found[f"margin_{round(100 * q)}"] = float(every.quantile(q))
        return {**found, "unfitted": float(unfitted.double().mean())}

    def conclude(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        fitted = [step for step, share in self.history.get(f"{self.name}/unfitted", []) if share == 0]
        return {"fit_steps": fitted[0]} if fitted else {}

    # ------------------------------------------------------------------ the picture

    def draw(self) -> Figure | None:
        """Noise and gradient, the weights' way, margins, and the share that isn't fitted, over the steps."""
        history = {key.removeprefix(f"{self.name}/"): points for key, points in self.history.items()}
        if "noise" not in history:
            return None
        figure = new_figure(13.6, 3.4)
        noise, way, margin, unfitted = figure.subplots(1, 4)

        def line(axis: Any, key: str, label: str, **style: Any) -> None:
            steps, values = zip(*history[key], strict=True)
            axis.plot(steps, values, "o-", markersize=2.5, label=label, **style)

        line(noise, "noise", "covariance's trace")
        line(noise, "gradient_sq", "mean gradient, squared (where above 0)")
        noise.set_yscale("log", nonpositive="mask")
        noise.set_title("gradient of a step", fontsize=10)
        relative = "weight_change" in history
        line(way, "weight_change" if relative else "distance", "")
        way.set_title("$|w - w_0|" + (" / |w_0|$" if relative else "$"), fontsize=10)
        way.set_yscale("log", nonpositive="mask")
        for key, label, style in (
            ("margin_90", "90 %", {"color": "C0", "alpha": 0.5}),
            ("margin_50", "median", {"color": "C0"}),
            ("margin_10", "10 %", {"color": "C0", "alpha": 0.5}),
            ("margin_min", "least", {"color": "C3"}),
        ):
            line(margin, key, label, **style)
        margin.axhline(self.threshold, color="0.5", linewidth=0.8, linestyle="--")
        margin.set_title("margins", fontsize=10)
        line(unfitted, "unfitted", "")
        unfitted.set_ylim(-0.03, 1.03)
        unfitted.set_title("share not fitted", fontsize=10)
        for axis in (noise, way, margin, unfitted):
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=-0.3)
            axis.set_xticks([t for t in axis.get_xticks() if t >= 0])
            axis.set_xlabel("step")
            axis.spines[["top", "right"]].set_visible(False)
        for axis in (noise, margin):
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(f"SGD at temperature {history['temperature'][-1][1]:.3g}", fontsize=9)
        return figure
