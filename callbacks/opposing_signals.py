"""Opposing signals (Rosenfeld & Risteski, Outliers with Opposing Signals, arXiv 2311.04163), seen, planted and removed.

Two small groups of examples share a strong feature and carry opposite labels, so their gradients are large and point
against each other. The claim: training balances them until it becomes unstable along that feature; then one group's
loss jumps while the other's falls, and the whole loss has a spike.

* :class:`OpposingSignals`, a diagnostic: finds the two groups where the loss rises, measures how they oppose each
  other, shows their images and follows them.
* :class:`PlantOpposingOutliers`, a perturbation of the data: puts such groups into it.
* :class:`DropGroups`, a perturbation of the data: trains without the groups from the first rise on. If they cause the
  rises, these vanish.

We know the paper from its abstract and found no code of it, so the definitions are ours. The groups are the examples
whose losses changed most in one optimizer step, up and down, as in the paper. That their gradients oppose each other
proves little by itself: early in training the two groups are simply two classes. Hence ``warmup``, and the
random groups beside them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from callbacks.diagnostic import (
    LEAST,
    STEP,
    Diagnostic,
    dataset_of,
    diagnostics_of,
    fetch,
    gathered,
    inner,
    label_of,
    losses_of,
    squared_length,
    total_steps,
)
from callbacks.perturbation import (
    Batch,
    Perturbation,
    device_of,
    fold_seed,
    run_seed,
    techniques_of,
    trained_weights,
)
from callbacks.report import new_figure, wanted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

#: So many pairs of steps are looked at, or all, before ``share`` makes the probe larger.
LOOKS = 20
#: How often a look at a pair goes through vectors as long as the weights: five gradients, two cosines, norms.
SWEEPS = 24
#: What is counted: pairs of steps, and how often the mean loss rose in them; see the class.
COUNTS = ("pairs", "rises", "rises_late", "rises_after", "rises_others")
#: Images of each group in the picture.
SHOWN = 12

# ---------------------------------------------------------------------- the mathematics


def extreme_groups(change: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Positions of the ``q`` largest and of the ``q`` smallest of the changes (N,), the most extreme first.

    Equal ones go by their position, so that every machine and every rank finds the same.

    Raises:
        ValueError: if N is less than 2 q, or q less than 1.
    """
    if q < 1 or 2 * q > len(change):
        raise ValueError(f"two groups of {q} don't fit into {len(change)} examples")
    return change.argsort(descending=True, stable=True)[:q], change.argsort(stable=True)[:q]


def loss_mass(change: Tensor, up: Tensor, down: Tensor) -> float:
    """The groups' part of all that the losses (N,) changed, in [0, 1]; 0 where nothing changed."""
    whole = float(change.abs().double().sum())
    return float(change[torch.cat([up, down])].abs().double().sum()) / whole if whole > 0 else 0.0


def class_separation(up: Tensor, down: Tensor) -> float:
    """How far the groups' labels (q,) are apart: the total variation distance of their classes, in [0, 1].

    Of two classes it is ``|P(y = 1 | up) - P(y = 1 | down)|``.
    """
    classes = int(torch.cat([up, down]).max()) + 1
    parts = [torch.bincount(labels, minlength=classes).double() / len(labels) for labels in (up, down)]
    return 0.5 * float((parts[0] - parts[1]).abs().sum())


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The cosine of two vectors that are given as lists of tensors; 0 where one of them is 0. Summed in float64."""
    length = norm(a) * norm(b)
    along = sum(inner(x, y) for x, y in zip(a, b, strict=True))
    return max(-1.0, min(1.0, along / length)) if length > 0 else 0.0


def norm(a: Sequence[Tensor]) -> float:
    """The length of a vector that is given as a list of tensors. Summed in float64."""
    return math.sqrt(sum(float(squared_length(x)) for x in a))


def odd_period(pair: float, steps: int, allowed: float) -> int:
    """Every how many steps a pair of neighbouring ones is looked at, that all of them cost no more than is allowed.

    1 means every step. Odd, since losses often go up and down by turns at the edge of stability: with an even period
    one would see only their rises, or only their falls.

    Args:
        pair: what the look at a pair costs.
        steps: of the training.
        allowed: what all looks may cost.
    """
    n = 1
    while n < steps and math.ceil(steps / n) * pair > allowed:
        n += 2
    return n


# ---------------------------------------------------------------------- the diagnostic


class OpposingSignals(Diagnostic):
    """Finds the groups of examples that pull training apart, where the loss of a fixed probe set rises.

    It looks at pairs of neighbouring optimizer steps: every step where ``share`` allows it, else every n-th one and the
    one before it (n is odd and said at the start). Of the probe's examples, as they are, it takes the losses. Where
    their mean rose after ``warmup`` steps, the two *groups* are the ``q`` examples whose loss rose most and the ``q``
    whose loss fell most. As ``opposing_signals/...`` it logs then, at the parameters after the step:

    * ``cosine`` of the groups' mean gradients: near -1 they oppose each other; ``cosine_random``: of two random
      disjoint groups of the same size, the control;
    * ``norm_up``, ``norm_down``, lengths of the groups' mean gradients, and ``ratio``, of ``norm_up`` to the length of
      the whole probe's;
    * ``separation`` of the groups' classes (:func:`class_separation`); ``mass``, their part of all change of losses;
    * ``precision``, the part of both groups that was planted, where techniques say what they planted.

    At every look: ``loss``, and from the first rise on ``up`` and ``down``, the mean losses of the first groups; these
    are kept. At the end: ``rises``, how many of the pairs rose, ``rises_late`` after ``warmup``, ``rises_after`` the
    groups were found, and ``rises_others`` of these, of the mean over all examples but the groups; and
    ``largest_...``, the numbers above at the pair after ``warmup`` whose mean loss changed most in proportion, up or
    down: defined also for a training that never rises. The groups are written to ``opposing_signals.json`` in the run's
    folder, which :class:`DropGroups` reads, and their images are shown.

    Examples that :class:`DropGroups` keeps from training count in none of these but ``up`` and ``down``.

    Args:
        probe: training examples that are looked at, at most 2000.
        q: examples of each group; a fiftieth of the probe, at least 4, if omitted.
        warmup: optimizer steps before which a rise is no trigger.
        which: ``extreme``, the groups as above, or ``random``: all numbers of random groups, for a run to compare with.
        options: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range, or for training examples without labels and logits.
    """

    by_weights: ClassVar[bool] = True

    def __init__(
        self,
        probe: int = 512,
        q: int | None = None,
        warmup: int = 40,
        which: Literal["extreme", "random"] = "extreme",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 8 <= probe <= 2000:
            raise ValueError(f"probe must lie in 8..2000, not {probe}")
        if q is not None and not 1 <= q <= probe // 4:
            raise ValueError(f"q must lie in 1..{probe // 4} (a quarter of the probe), not {q}")
        if warmup < 0:
            raise ValueError(f"warmup must not be negative, but is {warmup}")
        if which not in ("extreme", "random"):
            raise ValueError(f"which must be extreme or random, not '{which}'")
        self.probe, self.q, self.warmup, self.which = probe, q, warmup, which
        #: ``up`` and ``down``: dataset indices of the first groups; none before the first rise.
        self.groups: dict[str, list[int]] = {}
        #: Their positions in the dataset, which the indices needn't be.
        self.places: dict[str, list[int]] = {}
        #: The step at which they were found, and the losses' change of each.
        self.found: int | None = None
        self.changes: dict[str, list[float]] = {}
        #: The numbers at the largest change so far.
        self.largest: dict[str, float] = {}
        #: Pairs that were looked at, those whose loss rose, those after warm-up, those after the groups were found.
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._before: tuple[int, list[float]] | None = None
        self._count, self._size, self._period = 0, 0, 1
        self._mine: list[int] = []
        self._rows: list[dict[str, Any]] = []
        self._pictures: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        own = {
            "groups": self.groups,
            "places": self.places,
            "found": self.found,
            "changes": self.changes,
            "largest": self.largest,
        }
        return {**super().state_dict(), **own, "counts": self.counts, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.groups, self.places = state_dict["groups"], state_dict["places"]
        self.found, self.changes = state_dict["found"], state_dict["changes"]
        self.largest, self.counts, self._before = (state_dict[k] for k in ("largest", "counts", "before"))

    # ------------------------------------------------------------------ when, and of which examples

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        """All steps, or each n-th with the one before it."""
        steps, examples = total_steps(trainer), len(dataset_of(trainer, "train")[0])
        if examples < 8:
            raise ValueError(f"opposing signals need at least 8 training examples, not {examples}")
        self._count = self.afforded or min(self.probe, examples)
        pair = 2.0 + STEP * 1.5  # two passes for losses; gradients of the probe, and of four groups, each an eighth
        allowed = self.allowance(trainer)
        if allowed is not None:
            fixed = SWEEPS * self.sweep(trainer)
            fits = int((allowed / min(LOOKS, max(steps, 1)) - fixed) / pair)
            self._count = self.afforded or min(self._count, max(fits, LEAST))
            self._period = odd_period(pair * self._count + fixed, steps, allowed)
        else:
            self._period = 1
        self.afforded = self._count
        self._size = min(self.q or max(4, self._count // 50), self._count // 4)
        if self._period > 1 or self._count < min(self.probe, examples):
            words = "%s: looks at every step" if self._period == 1 else f"%s: looks at steps {self._period} apart"
            log.info(
                f"{words}, each with the one before it, at %d examples (share %g)", self.name, self._count, self.share
            )
        looks = range(self._period, steps + 1, self._period)
        return range(steps + 1) if self._period <= 2 else sorted({s for look in looks for s in (look - 1, look)})

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._mine = self.positions(trainer, "train", self._count)

    # ------------------------------------------------------------------ one look

    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        where = device_of(module)
        parts: list[tuple[Tensor, ...]] = []
        first = 0
        with torch.no_grad():
            for batch in self.examples(trainer, "train", self._mine):
                label, losses = label_of(batch), losses_of(module, batch)
                if losses.shape != label.shape:
                    raise ValueError(f"{type(module).__name__}.example_losses must give a loss for each example (B,)")
                place = torch.tensor(self._mine[first : first + len(label)])
                first += len(label)
                own = batch.get("index") if isinstance(batch, Mapping) else None
                index = own if isinstance(own, Tensor) else place
                parts.append((losses.double().cpu(), label.cpu(), index.cpu(), place))
        if parts:
            mine = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        else:  # a rank without examples
            mine = [torch.zeros(0, dtype=kind) for kind in (torch.float64, *[torch.long] * 3)]
        losses, label, index, place = (gathered(rows, where) for rows in mine)
        kept = torch.ones(len(losses), dtype=torch.bool)
        for technique in techniques_of(trainer):
            if isinstance(technique, DropGroups):
                kept &= ~torch.isin(index, torch.tensor(technique.dropped(trainer), dtype=torch.long))
        if int(kept.sum()) < 2 * self._size:
            kept[:] = True
        values = {"loss": float(losses[kept].mean())}
        step, before, self._before = trainer.global_step, self._before, (trainer.global_step, losses.tolist())
        if before is not None and before[0] == step - 1 and len(before[1]) == len(losses):
            values |= self._pair(trainer, module, torch.tensor(before[1]).double(), losses, label, index, kept, place)
        for name, members in self.groups.items():
            values[name] = float(losses[torch.isin(index, torch.tensor(members))].mean())
        return values

    def _pair(
        self,
        trainer: Trainer,
        module: LightningModule,
        before: Tensor,
        losses: Tensor,
        label: Tensor,
        index: Tensor,
        kept: Tensor,
        place: Tensor,
    ) -> dict[str, float]:
        """What a pair of neighbouring steps shows: losses before and after, all (N,), in the probe's order."""
        step = trainer.global_step
        old, new = float(before[kept].mean()), float(losses[kept].mean())
        late, rose = step > self.warmup, new > old
        self.counts["pairs"] += 1
        self.counts["rises"] += rose
        self.counts["rises_late"] += rose and late
        self.counts["rises_after"] += rose and self.found is not None
        if self.found is not None:  # of the same examples, whether or not the groups are trained on
            members = [i for group in self.groups.values() for i in group]
            others = kept & ~torch.isin(index, torch.tensor(members))
            self.counts["rises_others"] += bool(losses[others].mean() > before[others].mean())
        relative = abs(new - old) / max(old, 1e-300)
        record = late and math.isfinite(relative) and relative > self.largest.get("change", -1.0)
        if not (late and math.isfinite(new) and (rose or record)):
            return {}
        among = kept.nonzero().flatten()
        change = (losses - before)[among]
        if self.which == "random":
            draw = torch.randperm(len(among), generator=self.generator("groups", step))[: 2 * self._size]
            up, down = among[draw].split(self._size)
        else:
            up, down = (among[group] for group in extreme_groups(change, self._size))
        draw = torch.randperm(len(among), generator=self.generator("random", step))[: 2 * self._size]
        groups = [up, down, *among[draw].split(self._size), among]
        g_up, g_down, g_one, g_other, g_full = (self._mean_gradient(trainer, module, group) for group in groups)
        values = {"cosine": cosine(g_up, g_down), "cosine_random": cosine(g_one, g_other)}
        values |= {"norm_up": norm(g_up), "norm_down": norm(g_down)}
        values["ratio"] = values["norm_up"] / max(norm(g_full), 1e-300)
        values["separation"] = class_separation(label[up], label[down])
        values["mass"] = loss_mass(losses - before, up, down)
        planted = planted_in(trainer)
        if planted is not None:
            values["precision"] = float(torch.isin(index[torch.cat([up, down])], planted).double().mean())
        if record:
            self.largest = {**values, "change": relative, "step": step}
        if not rose:
            return {}
        if self.found is None:
            self.found = step
            for name, group in (("up", up), ("down", down)):
                self.groups[name], self.places[name] = index[group].tolist(), place[group].tolist()
                self.changes[name] = (losses - before)[group].tolist()
        return values

    def _mean_gradient(self, trainer: Trainer, module: LightningModule, group: Tensor) -> list[Tensor]:
        """The gradient by the network's weights of the mean loss of these rows of the probe; the same on all ranks."""
        weights = [p for _, p in trained_weights(module)]
        if not weights:
            raise ValueError("opposing signals need weights that are trained, and all are frozen")
        rows = group[group % trainer.world_size == trainer.global_rank] // trainer.world_size
        found = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in weights]
        for batch in self.examples(trainer, "train", [self._mine[row] for row in rows.tolist()]):
            total = losses_of(module, batch).sum()
            for place, gradient in zip(found, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    place.add_(gradient, alpha=1 / len(group))
        if trainer.world_size > 1:
            flat = torch.cat([g.flatten() for g in found])  # one message for all
            dist.all_reduce(flat)
            found = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in found]), found, strict=True)]
        return found

    # ------------------------------------------------------------------ the whole training

    def conclude(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        values: dict[str, float] = {key: value for key, value in self.counts.items() if key != "pairs"}
        values |= {f"largest_{key}": value for key, value in self.largest.items()}
        if self.largest:
            values["largest_opposition"] = self.largest["cosine_random"] - self.largest["cosine"]
        if self.groups and wanted(trainer):
            with isolate_rng():
                self._collect(trainer, module)
            self._hand_over(trainer)
        return values

    def _collect(self, trainer: Trainer, module: LightningModule) -> None:
        """A row for each example of the first groups, with its image."""
        names, self._rows, self._pictures = list(getattr(module, "class_names", [])), [], {}
        for group, members in self.groups.items():
            batch = fetch(trainer, "train", self.places[group])
            label, image = label_of(batch).tolist(), batch.get("image") if isinstance(batch, Mapping) else batch[0]
            for i, (index, change) in enumerate(zip(members, self.changes[group], strict=True)):
                shown = names[label[i]] if 0 <= label[i] < len(names) else str(label[i])
                self._rows.append({"group": group, "index": index, "label": shown, "change": change})
                if isinstance(image, Tensor) and image.dim() == 4 and image.shape[1] in (1, 3):
                    self._pictures[index] = image[i].detach().float().cpu().clamp(0, 1).expand(3, -1, -1)

    def _hand_over(self, trainer: Trainer) -> None:
        """The groups as a file, and as a table to W&B."""
        file = Path(trainer.default_root_dir) / f"{self.name}.json"
        if trainer.loggers:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"step": self.found, **self.groups}) + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                columns = ["group", "index", "label", "change", "image"]
                rows = []
                for row in self._rows:
                    picture = self._pictures.get(row["index"])
                    shown = None if picture is None else wandb.Image(picture.permute(1, 2, 0).numpy())
                    rows.append([row["group"], row["index"], row["label"], row["change"], shown])
                logger.log_table(f"{self.name}/groups", columns=columns, data=rows)

    def draw(self) -> Figure | None:
        """Losses of the probe and of the first groups; cosines at the rises; the groups' images."""
        if f"{self.name}/loss" not in self.history:
            return None
        strips = [[r for r in self._rows if r["group"] == g][:SHOWN] for g in ("up", "down")] if self._pictures else []
        figure = new_figure(10.0, 3.4 + 1.25 * len(strips))
        grid = figure.add_gridspec(1 + len(strips), 1, height_ratios=[3.4, *[1.25] * len(strips)])
        left, right = grid[0].subgridspec(1, 2).subplots(squeeze=False)[0]
        for key, label, color in (("loss", "probe", "0.3"), ("up", "rose first", "C3"), ("down", "fell first", "C0")):
            points = self.history.get(f"{self.name}/{key}", [])
            if points:
                left.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.0)
        left.set_yscale("log")
        left.set_ylabel("mean loss")
        for key, label, color in (("cosine", "the two groups", "C3"), ("cosine_random", "random groups", "0.6")):
            points = self.history.get(f"{self.name}/{key}", [])
            if points:
                right.plot(*zip(*points, strict=True), "o", color=color, label=label, markersize=3)
        if self.largest:
            right.plot(self.largest["step"], self.largest["cosine"], "D", color="k", mfc="none", label="largest change")
        right.set_ylim(-1.05, 1.05)
        right.set_ylabel("cosine of mean gradients")
        right.axhline(0, color="0.8", linewidth=0.8)
        for axis in (left, right):
            axis.axvline(self.warmup, color="0.8", linewidth=0.8, linestyle=":")
            axis.set_xlim(0, max(self.steps[-1], 1))
            axis.set_xlabel("optimizer step")
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, framealpha=0.85, edgecolor="none")
        rises, pairs = self.counts["rises"], self.counts["pairs"]
        figure.suptitle(f"opposing signals: the probe's loss rose in {rises} of {pairs} steps looked at", fontsize=9)
        for place, (strip, words) in enumerate(zip(strips, ("rose most", "fell most"), strict=False)):
            axes = grid[place + 1].subgridspec(1, SHOWN).subplots(squeeze=False)[0]
            for axis in axes:
                axis.set_axis_off()
            for axis, row in zip(axes, strip, strict=False):
                axis.imshow(self._pictures[row["index"]].permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_title(f"{str(row['label'])[:9]}\n#{row['index']}\n{row['change']:+.2g}", fontsize=6)
            axes[0].text(
                -0.15, 0.5, words, transform=axes[0].transAxes, rotation=90, fontsize=7, va="center", ha="right"
            )
        return figure


def planted_in(trainer: Trainer) -> Tensor | None:
    """Dataset indices of all examples that techniques planted (their ``planted``); None where none say so."""
    found = [technique.planted for technique in techniques_of(trainer) if isinstance(technique, PlantOpposingOutliers)]
    return torch.tensor(sorted({i for planted in found for i in planted}), dtype=torch.long) if found else None


# ---------------------------------------------------------------------- planting


def training_labels(trainer: Trainer) -> Tensor:
    """Labels (N,) of the training set, read without its images.

    Raises:
        ValueError: if the dataset has none that can be read so.
    """
    dataset, _ = dataset_of(trainer, "train")
    entries = getattr(dataset, "entries", None)
    label = entries.get("label") if isinstance(entries, Mapping) else getattr(dataset, "targets", None)
    if label is None:
        raise ValueError(
            f"planting needs to know the labels: {type(dataset).__name__} has neither entries['label'] nor targets"
        )
    return torch.as_tensor(label)


class PlantOpposingOutliers(Perturbation):
    """Adds ``magnitude`` times one direction to ``k`` training examples of each of two classes, always the same ones.

    The direction is drawn once, of length 1 over all pixels of an image, and is the same for both classes and in all
    epochs; it is added after augmentation. Pixels may leave [0, 1]: an outlier within them would be a weak one.
    Validation and test data stay as they are.

    Args:
        k: examples of each class.
        magnitude: length of what is added, in pixel values; 0 adds nothing.
        classes: the two classes; the first two of the data if omitted.
        seed: of choice and direction; the run's if omitted.
        name: its place in checkpoints.

    Raises:
        ValueError: for a setting out of range, for data without images, labels or ``index``, or for a class with fewer
            than ``k`` examples.
    """

    site: ClassVar[str] = "data"
    zero: ClassVar = {"magnitude": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self,
        k: int = 12,
        magnitude: float = 8.0,
        classes: Sequence[int] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(seed=seed, name=name)
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if not 0 <= magnitude < math.inf:
            raise ValueError(f"magnitude must be a number from 0 on, not {magnitude}")
        if classes is not None and len(set(classes)) != 2:
            raise ValueError(f"classes must be two different ones, not {list(classes)}")
        self.k, self.magnitude, self.classes = k, magnitude, None if classes is None else list(classes)
        #: Dataset indices of the examples that are changed, those of the first class first.
        self.planted: list[int] = []
        self._direction: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.magnitude:
            self.planted = self._choose(trainer)

    def _choose(self, trainer: Trainer) -> list[int]:
        label = training_labels(trainer)
        there = label.unique().tolist()
        classes = there[:2] if self.classes is None else self.classes
        if len(classes) < 2:
            raise ValueError("opposing outliers need two classes, and the training data have one")
        chosen: list[int] = []
        for c in classes:
            members = (label == c).nonzero().flatten()
            if len(members) < self.k:
                raise ValueError(f"class {c} has {len(members)} training examples, too few for k = {self.k}")
            draw = torch.Generator().manual_seed(self._seed_of("choice", c))
            chosen += members[torch.randperm(len(members), generator=draw)[: self.k]].tolist()
        return chosen

    def _seed_of(self, *keys: object) -> int:
        return fold_seed(run_seed() if self.seed is None else self.seed, self.name, *keys)

    def direction(self, shape: Sequence[int]) -> Tensor:
        """What is added at magnitude 1 to an image (C, H, W): of length 1."""
        if self._direction is None or self._direction.shape != torch.Size(shape):
            drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(self._seed_of("direction")))
            self._direction = drawn / drawn.norm()
        return self._direction

    def as_trained(self, module: LightningModule, batch: Batch) -> None:
        image, index = batch.get("image"), batch.get("index")
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() != 4:
            raise ValueError("planting is for batches with an 'image' (B, C, H, W)")
        if not isinstance(index, Tensor):
            raise ValueError("planting needs the batch's 'index' (B,), to know its examples again")
        if not self.magnitude:
            return
        mine = torch.isin(index, torch.tensor(self.planted, device=index.device))
        added = self.magnitude * self.direction(image.shape[1:]).to(image)
        for name in ("image", "view"):  # a second view is one of the same example
            seen = batch.get(name)
            if isinstance(seen, Tensor) and seen.shape == image.shape:
                batch[name] = torch.where(mine.view(-1, 1, 1, 1), seen + added, seen)

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.as_trained(module, batch)


# ---------------------------------------------------------------------- removing


class DropGroups(Perturbation):
    """Trains without the two groups that :class:`OpposingSignals` found, from its first rise on: the causal test.

    Their rows are taken out of the batch, so the loss is the mean of the others; ranks that drop different numbers are
    weighted by what is left. Where nothing of a batch is left, its gradient is zero (what weight decay and momentum do
    goes on). Batches that are accumulated count alike, whatever is left of each.

    Args:
        examples: dataset indices to leave out from the start; the groups of the trainer's OpposingSignals if omitted.
        file: in place of both, the ``opposing_signals.json`` of an earlier run.
        which: ``extreme``, the groups themselves, or ``random``, the control: as many others, drawn from all examples.
        fraction: this part of each group, the most extreme first; 0 drops nothing.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, without groups to come, for batches without ``index``, and for
            captioned data, whose loss compares the examples of a batch with each other.
    """

    site: ClassVar[str] = "data"
    zero: ClassVar = {"fraction": 0.0}

    def __init__(
        self,
        examples: Sequence[int] | None = None,
        file: Path | None = None,
        which: Literal["extreme", "random"] = "extreme",
        fraction: float = 1.0,
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        if examples is not None and file is not None:
            raise ValueError("give examples or a file, not both")
        if which not in ("extreme", "random"):
            raise ValueError(f"which must be extreme or random, not '{which}'")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], not {fraction}")
        self.examples = None if examples is None else [int(i) for i in examples]
        self.file, self.which, self.fraction = file, which, fraction
        self._drawn: tuple[int, list[int]] | None = None
        self._scale: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.examples is not None:
            return
        if self.file is not None:
            try:
                saved = json.loads(Path(self.file).read_text(encoding="utf-8"))
                self._groups = [[int(i) for i in saved[name]] for name in ("up", "down")]
            except (OSError, ValueError, KeyError, TypeError):
                raise ValueError(f"{self.file} holds no groups: name the opposing_signals.json of a run") from None
        elif not any(isinstance(d, OpposingSignals) for d in diagnostics_of(trainer)):
            raise ValueError("nothing says which groups to drop: add OpposingSignals, or give file or examples")

    def dropped(self, trainer: Trainer) -> list[int]:
        """Dataset indices that get no weight in the steps to come; the same on all ranks."""
        if self.examples is not None:
            groups = [self.examples]
        elif self.file is not None:
            groups = self._groups
        else:
            watching = next(d for d in diagnostics_of(trainer) if isinstance(d, OpposingSignals))
            groups = list(watching.groups.values())
        members = [i for group in groups for i in group[: math.ceil(self.fraction * len(group))]]
        if self.which == "random" and members:
            if self._drawn is None or self._drawn[0] != len(members):
                seed = fold_seed(run_seed() if self.seed is None else self.seed, self.name, "random")
                size = len(dataset_of(trainer, "train")[0])
                others = torch.tensor(sorted(set(range(size)) - set(members)), dtype=torch.long)
                order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
                self._drawn = (len(members), others[order[: len(members)]].tolist())
            return self._drawn[1]
        return members

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        index = batch.get("index")
        if not isinstance(index, Tensor):
            raise ValueError("dropping examples needs the batch's 'index' (B,), to know its examples again")
        if "concept" in batch:
            raise ValueError("the loss of captioned data compares the examples of a batch: none of them can be dropped")
        dropped = self.dropped(module.trainer)
        if not dropped:
            return
        keep = ~torch.isin(index, torch.tensor(dropped, device=index.device))
        left = keep.sum()
        counts = torch.stack([left, torch.ones_like(left)]).double()
        if self._world > 1:
            counts = counts.to(device_of(module), torch.float32)
            dist.all_reduce(counts)
        total, ranks = counts.tolist()
        mean = total / ranks
        self._scale = float(left) / mean if mean else 0.0
        if bool(keep.all()):
            return
        if not bool(keep.any()):
            keep[0] = True  # a batch can't be empty; its loss is scaled by 0
        size, rows = len(index), keep.nonzero().flatten()
        for name, value in list(batch.items()):
            if isinstance(value, Tensor) and value.dim() and len(value) == size:
                batch[name] = value[rows.to(value.device)]
            elif isinstance(value, list) and len(value) == size:
                batch[name] = [value[i] for i in rows.tolist()]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._scale is not None and self._scale != 1.0:
            scale = self._scale
            loss.register_hook(lambda gradient: gradient * scale)

    def restore(self, module: LightningModule) -> None:
        self._scale = None
