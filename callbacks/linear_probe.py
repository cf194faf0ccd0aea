"""How well frozen features carry over: a linear probe on images that the network wasn't trained on, after the test."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from callbacks.perturbation import crafting, fold_seed

if TYPE_CHECKING:
    from datamodules.images import ImageSet

log = logging.getLogger(__name__)
#: Largest entry of the gradient at which the regression counts as solved; its features have deviation 1.
TOLERANCE = 1e-6
#: How often the coordinates are chosen anew in which it is solved.
ROUNDS = 20
#: One in so many training images decides on the penalty.
HELD_OUT = 5

# ---------------------------------------------------------------------- the regression


def penalised_loss(solution: Tensor, features: Tensor, label: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy plus ``l2 / 2`` times the squared weights; the biases, the last row, aren't penalised."""
    logits = features @ solution[:-1] + solution[-1]
    return F.cross_entropy(logits, label) + 0.5 * l2 * solution[:-1].square().sum()


def solve(features: Tensor, label: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """The minimum of :func:`penalised_loss`, by LBFGS over all examples at once: (features + 1, classes).

    Args:
        features: (N, D), float64, of deviation 1.
        label: (N,), in 0..classes-1.
        classes: their number.
        l2: the penalty.
        start: where to begin; it decides how long this takes. Zero if omitted.
    """
    found = features.new_zeros(features.shape[1] + 1, classes) if start is None else start
    left = math.inf
    for _ in range(ROUNDS):
        found = _nearer(found, features, label, l2).requires_grad_()
        (gradient,) = torch.autograd.grad(penalised_loss(found, features, label, l2), found)
        found, left = found.detach(), float(gradient.abs().max())
        if left <= TOLERANCE:
            return found
    log.warning("the linear probe's regression isn't solved: its gradient is still %.1e at l2 %g", left, l2)
    return found


def _nearer(begin: Tensor, features: Tensor, label: Tensor, l2: float) -> Tensor:
    """A hundred steps of LBFGS, or as many as it takes.

    Features of a network are so correlated that it takes thousands. So the steps are made in coordinates in which the
    curvature, as it is where they begin and in the mean over the classes, is the same in all directions.
    """
    chance = (features @ begin[:-1] + begin[-1]).softmax(1)
    weight = (chance * (1 - chance)).mean(1) / len(label)
    curvature = features.T @ (features * weight[:, None])
    curvature.diagonal().add_(max(l2, 1e-8))
    factor, bend = torch.linalg.cholesky(curvature).T, weight.sum().clamp_min(1e-6).sqrt()
    free = torch.cat([factor @ begin[:-1], begin[-1:] * bend]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=100,
        tolerance_grad=TOLERANCE / 30,  # in these coordinates gradients are smaller
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def back() -> Tensor:
        return torch.cat([torch.linalg.solve_triangular(factor, free[:-1], upper=True), free[-1:] / bend])

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = penalised_loss(back(), features, label, l2)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]  # declared for closures that return a float
    return back().detach()


def held_out(label: Tensor) -> Tensor:
    """Which examples choose the penalty, bool (N,): one in five, of each class alike, and the same in each run."""
    generator = torch.Generator().manual_seed(fold_seed("linear probe"))
    order = torch.randperm(len(label), generator=generator)
    order = order[label[order].argsort(stable=True)]
    held = torch.zeros(len(label), dtype=torch.bool)
    held[order[HELD_OUT - 1 :: HELD_OUT]] = True
    return held


def choose_l2(features: Tensor, label: Tensor, classes: int, grid: Sequence[float]) -> tuple[float, Tensor | None]:
    """The penalty with the least cross-entropy on the held-out fifth after fitting the others, and that fit.

    Not the highest accuracy: of a few held-out images that is the same at several penalties. Penalties are tried from
    the strongest on, until the cross-entropy grows.
    """
    if len(grid) == 1:
        return grid[0], None
    held = held_out(label)
    best, least, fit = max(grid), math.inf, None
    for l2 in sorted(grid, reverse=True):
        tried = solve(features[~held], label[~held], classes, l2, fit)
        value = float(penalised_loss(tried, features[held], label[held], 0.0))
        if value > least:
            break
        best, least, fit = l2, value, tried
    return best, fit


def standardised(features: Tensor, by: Tensor) -> Tensor:
    """Features less the mean of ``by``'s and over their deviation; those that are constant there become zero."""
    mean, deviation = by.mean(0), by.std(0, correction=0)
    constant = deviation <= 1e-7 * by.abs().amax(0)  # but for rounding
    return ((features - mean) / deviation.where(~constant, 1.0)).where(~constant, 0.0)


# ---------------------------------------------------------------------- the callback


class LinearProbe(Callback):
    """Logs ``test/probe_acc``, the accuracy of a logistic regression on the tested network's frozen features.

    The DataModule has the images: ``probe_sets()`` gives two :class:`ImageSet`, to fit and to test the regression.
    Features are what the head of the module's timm ``backbone`` takes, standardised by the first set. Also logged:
    ``test/probe_chance``, the share of the second set's most frequent class. Nothing of it reaches the network, the
    optimizer or a random state; and all ranks log the same numbers.

    Args:
        l2: penalties of the squared weights, of which a held-out fifth of the first set chooses one; then it is fitted
            on all of the set.
        batch_size: images whose features are computed at a time.

    Raises:
        ValueError: for a setting out of range, data without ``probe_sets``, or a module without a timm backbone.
    """

    def __init__(self, l2: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0), batch_size: int = 256) -> None:
        if not l2 or not all(0 < value < math.inf for value in l2):
            raise ValueError(f"l2 must be one or more positive numbers, not {list(l2)}")
        if batch_size < HELD_OUT:
            raise ValueError(f"batch_size must be at least {HELD_OUT}, not {batch_size}")
        self.l2, self.batch_size = tuple(l2), batch_size
        #: Of the last test: accuracy, chance, the penalty, and how many images and classes there were.
        self.result: dict[str, float] = {}
        self._sets: tuple[ImageSet, ImageSet] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "test"):  # before a training, too: what is wrong needn't wait for its end
            _check(trainer, pl_module)
            with isolate_rng():
                self._sets = trainer.datamodule.probe_sets()  # type: ignore[attr-defined]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sets is not None  # see setup
        with isolate_rng(), crafting(pl_module, "eval"):
            # All ranks compute all features: the same batches as in one process, and weights may be spread over ranks.
            (x, y), (test_x, test_y) = (self._features(trainer, pl_module, part) for part in self._sets)
            if len(y) < HELD_OUT or len(test_y) < 1:
                raise ValueError(
                    f"LinearProbe needs {HELD_OUT} images to fit and one to test, not {len(y)} and {len(test_y)}"
                )
            found = torch.zeros(2, dtype=torch.float64)
            if trainer.is_global_zero:
                found = torch.tensor(self._measure(x, y, test_x, test_y), dtype=torch.float64)
        if dist.is_available() and dist.is_initialized():
            found = found.to(pl_module.device)
            dist.broadcast(found, 0)
        accuracy, l2 = found.tolist()
        chance = float(test_y.bincount().max()) / len(test_y)
        sizes = {"train": len(y), "test": len(test_y), "classes": int(y.max()) + 1}
        self.result = {"accuracy": accuracy, "chance": chance, "l2": l2, **sizes}
        pl_module.log("test/probe_acc", accuracy, sync_dist=False)
        pl_module.log("test/probe_chance", chance, sync_dist=False)
        if trainer.is_global_zero:
            words = "linear probe: accuracy %.3f of %d images (chance %.3f), fitted on %d with l2 %g"
            log.info(words, accuracy, len(test_y), chance, len(y), l2)

    def _features(self, trainer: Trainer, module: LightningModule, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Features (N, D), float64, and labels (N,) of a set; in a dry run of its first batch. On the CPU."""
        backbone: Any = module.backbone
        mean: Any = module.mean
        size = min(len(images), self.batch_size) if getattr(trainer, "fast_dev_run", False) else len(images)
        features, labels = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.long)]
        for first in range(0, size, self.batch_size):
            batch = images.plain(range(first, min(first + self.batch_size, size)))
            with torch.no_grad():
                image = batch["image"].to(mean.device, mean.dtype)
                found = backbone.forward_features((image - mean) / module.std)
                found = backbone.forward_head(found, pre_logits=True).flatten(1)
            features.append(found.cpu().double())  # there, as not every accelerator has float64
            labels.append(batch["label"].cpu())
        return torch.cat(features[1:] or features), torch.cat(labels)

    def _measure(self, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[float, float]:
        """Accuracy and penalty."""
        if not (x.isfinite().all() and test_x.isfinite().all()):
            log.warning("the linear probe has no accuracy: the network's features aren't finite")
            return math.nan, math.nan
        x, test_x, classes = standardised(x, x), standardised(test_x, x), int(y.max()) + 1
        l2, start = choose_l2(x, y, classes, self.l2)
        solution = solve(x, y, classes, l2, start)
        predicted = (test_x @ solution[:-1] + solution[-1]).argmax(1)
        return float((predicted == test_y).double().mean()), l2


def _check(trainer: Trainer, module: LightningModule) -> None:
    """ValueError if there is nothing to probe, or nothing to probe it with."""
    data = getattr(trainer, "datamodule", None)
    if not callable(getattr(data, "probe_sets", None)):
        raise ValueError(
            f"LinearProbe needs data with probe_sets(), which {'these' if data is None else type(data).__name__} "
            "haven't: take a DataModule that has them, such as Modalities, or leave the callback out"
        )
    backbone = getattr(module, "backbone", None)
    timm = all(callable(getattr(backbone, name, None)) for name in ("forward_features", "forward_head"))
    if not timm or not all(isinstance(getattr(module, name, None), Tensor) for name in ("mean", "std")):
        raise ValueError(
            f"LinearProbe needs a module with a timm backbone and its mean and std, which {type(module).__name__} "
            "hasn't: take the classifier's or one like it, or leave the callback out"
        )
