"""Delayed generalization and delayed robustness, watched: three accuracies over the logarithm of the steps.

Power et al.: Grokking (arXiv 2201.02177): accuracy on held-out examples arrives long after that on training examples.
Humayun et al.: Deep Networks Always Grok and Here is Why (ICML 2024, arXiv 2402.15555): so does, in ordinary training
of ordinary networks, accuracy under attack. Both are claims on *when* a curve arrives, so it is what is measured here:
the step at which each accuracy first reaches a level, and the delays between them.

Where the released code of the second paper differs: it attacks CIFAR-10 with a radius in normalised units (50/255,
where its comment says 8/255). Here a radius is of the input as the batch has it, so of pixels where normalisation sits
inside the network. The attack ascends the cross-entropy of the logits, whatever loss the network is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.adversary import classification, pgd
from callbacks.balls import Bounds
from callbacks.diagnostic import (
    STEP,
    Diagnostic,
    dataset_of,
    label_of,
    log_steps,
    logits_of,
    losses_of,
    summed,
    take,
    total_steps,
)
from callbacks.local_complexity import inputs_of
from callbacks.perturbation import device_of, fill_rows, trained_weights
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Where no level is given: an accuracy has arrived when it first reaches this part of what it has at the end.
ARRIVED = 0.95


def first_reached(curve: Sequence[Sequence[float]], level: float) -> float:
    """The first step of a curve of (step, value) at which it reaches a level; nan if it never does."""
    return next((float(step) for step, value in curve if value >= level), math.nan)


def value_at(curve: Sequence[Sequence[float]], step: float) -> float:
    """The last value of a curve of (step, value) no later than a step; nan if there is none."""
    return next((float(value) for s, value in reversed(curve) if s <= step), math.nan)


class Grokking(Diagnostic):
    """Accuracy and loss on training and held-out (``val``) examples, accuracy under PGD, and the weights' length.

    Logged: ``train_acc``, ``train_loss``, ``val_acc``, ``val_loss``, ``robust_acc`` (of the held-out examples, those
    that are right also where PGD has moved them), ``weight_norm`` (of all trained weights). The loss is the module's
    ``example_losses``, or the cross-entropy. At the end:

    * ``train_step``, ``val_step``, ``robust_step``: when each accuracy first reaches the level, among the steps that
      are measured; nan if it never does. ``val_delay`` and ``robust_delay``: so many steps after ``train_step``.
    * ``robust_peak``, ``robust_peak_step``, ``robust_end``: the highest robust accuracy, when, and the last one.
    * ``robust_late_gain``: ``robust_end`` less robust accuracy at ``train_step``; above 0 where robustness is delayed.

    Args:
        eps: radius of the attack in linf, in units of the input; 0: robustness isn't measured.
        alpha: length of its step; ``eps / 4`` if omitted.
        steps: of it. It starts at random, at the same place each time.
        bounds: smallest and largest value of the input; null: any.
        points: examples of each part, at most; fewer where they would cost more than ``share``.
        measurements: at so many steps, evenly spaced in their logarithm: ``LocalComplexity``'s, if it has as many.
        level: accuracy that counts as having arrived; null: 0.95 of what the same curve has at the end.

    Other arguments: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range, a module without logits, or, unless ``eps`` is 0, inputs that aren't
            floats.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        bounds: Bounds = (0.0, 1.0),
        points: int = 512,
        measurements: int = 50,
        level: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= eps < math.inf or (alpha is not None and not alpha > 0):
            raise ValueError(f"eps must not be negative and alpha must be positive, not {eps} and {alpha}")
        for name, value in {"steps": steps, "points": points}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if level is not None and not 0 < level <= 1:
            raise ValueError(f"level must lie in (0, 1], not {level}")
        log_steps(measurements, 1)  # says what is wrong with it
        self.eps, self.alpha, self.attack_steps, self.bounds = eps, alpha, steps, bounds
        self.points, self.measurements, self.level = points, measurements, level
        #: Examples of each part; chosen once, and kept where a run goes on.
        self.count: int | None = None
        self._trained: list[str] = []

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        return log_steps(self.measurements, total_steps(trainer))

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        batch = take(*dataset_of(trainer, "train"), [0])
        label_of(batch)
        self._trained = [name for name, _ in trained_weights(module)]
        passes = 4  # logits and losses of both parts
        if self.eps > 0:
            try:
                inputs_of(batch)
            except ValueError as error:
                raise ValueError(f"Grokking attacks inputs, but {error}; or set eps 0") from None
            passes += STEP * self.attack_steps + 1
        self.count = self.affordable(trainer, self.points, passes)

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert self.count is not None
        device = device_of(module)
        values: dict[str, float] = {}
        for part in ("train", "val"):
            positions = self.positions(trainer, part, self.count)
            sums = torch.zeros(4, dtype=torch.float64)  # right, loss, right under attack, examples
            first = 0
            for batch in self.examples(trainer, part, positions):
                label = label_of(batch)
                with torch.no_grad():
                    right = logits_of(module, batch).argmax(1) == label
                    loss = losses_of(module, batch).double().sum()
                held = 0.0
                if part == "val" and self.eps > 0:
                    held = float((right & self._holds(module, batch, positions[first : first + len(label)])).sum())
                sums += torch.tensor([float(right.sum()), float(loss), held, len(label)], dtype=torch.float64)
                first += len(label)
            right_, loss_, held_, count = summed(sums, device).tolist()
            values |= {f"{part}_acc": right_ / max(count, 1), f"{part}_loss": loss_ / max(count, 1)}
            if part == "val" and self.eps > 0:
                values["robust_acc"] = held_ / max(count, 1)
        parameters = dict(module.named_parameters())
        squares = (parameters[name].detach().cpu().double().square().sum() for name in self._trained)
        values["weight_norm"] = math.sqrt(math.fsum(map(float, squares)))
        return values

    def _holds(self, module: LightningModule, batch: Any, positions: Sequence[int]) -> Tensor:
        """Which examples are right where PGD has moved them, bool (B,); where it starts is decided by their places."""
        x, label = inputs_of(batch), label_of(batch)
        seeds = [self.generator("start", position).initial_seed() for position in positions]
        start = 2 * fill_rows(torch.empty(x.shape), seeds, "uniform") - 1
        moved = pgd(
            classification(module),
            x,
            label,
            eps=self.eps,
            alpha=self.alpha,
            steps=self.attack_steps,
            start=(self.eps * start).to(x),
            bounds=self.bounds,
        )
        with torch.no_grad():
            right: Tensor = module(moved).argmax(1) == label
        return right

    def conclude(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        names = ("train", "val", "robust") if self.eps > 0 else ("train", "val")
        curves = {name: self.history[f"{self.name}/{name}_acc"] for name in names}
        steps = {
            name: first_reached(curve, ARRIVED * curve[-1][1] if self.level is None else self.level)
            for name, curve in curves.items()
        }
        found = {f"{name}_step": step for name, step in steps.items()}
        found |= {f"{name}_delay": step - steps["train"] for name, step in steps.items() if name != "train"}
        if "robust" in curves:
            robust = curves["robust"]
            when, peak = max(robust, key=lambda point: point[1])  # the first of equal ones
            end, then = robust[-1][1], value_at(robust, steps["train"])
            found |= {"robust_peak": peak, "robust_peak_step": when, "robust_end": end, "robust_late_gain": end - then}
        return found

    def draw(self) -> Figure | None:
        """The accuracies over the steps, with what has arrived when; losses and the weights' length beside them."""
        curves = {key.removeprefix(f"{self.name}/"): points for key, points in self.history.items()}
        shown = [("train", "train_acc", "C0"), ("val", "val_acc", "C1")]
        shown += [(f"val, PGD within {self.eps:.3g}", "robust_acc", "C2")] if "robust_acc" in curves else []
        if not all(curves.get(key) for _, key, _ in shown):
            return None
        figure = new_figure(9.2, 3.6)
        left, right = figure.subplots(1, 2)
        for label, key, color in shown:
            steps, values = zip(*curves[key], strict=True)
            left.plot(steps, values, "o-", markersize=3, color=color, label=label)
            arrived = first_reached(curves[key], ARRIVED * values[-1] if self.level is None else self.level)
            if math.isfinite(arrived):
                left.axvline(arrived, color=color, linewidth=0.8, linestyle="--")
        left.set_ylim(-0.02, 1.02)
        left.set_ylabel("accuracy")
        level = f"{ARRIVED:g} of its end" if self.level is None else f"{self.level:g}"
        left.set_title(f"accuracy (dashed: first at {level})", fontsize=10)
        for key, color in (("train_loss", "C0"), ("val_loss", "C1")):
            steps, values = zip(*curves[key], strict=True)
            right.plot(steps, values, "-", color=color, label=key.replace("_", " "))
        right.set_yscale("log")
        right.set_ylabel("loss")
        other = right.twinx()
        other.plot(*zip(*curves["weight_norm"], strict=True), "-", color="grey", linewidth=1, label="weights' length")
        other.set_ylabel("length of the weights", color="grey")
        other.spines[["top"]].set_visible(False)
        right.set_title("loss, and length of the weights", fontsize=10)
        for axis in (left, right):
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=0)
            axis.set_xlabel("optimizer step")
            axis.legend(frameon=False, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        return figure
