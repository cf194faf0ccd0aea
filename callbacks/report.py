"""Pictures of a run: what the first step saw, how it learned, what it confuses; into ``plots/`` and to W&B."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More classes than this are drawn without their names.
NAMED = 40
#: Longer names are cut in the captions of images, which stand side by side.
LETTERS = 16


class Report(Callback):
    """Draws into ``<run folder>/plots/`` on the first rank, nothing in a dry run. Stands before the techniques.

    * ``inputs.png``: images of the first training batch and, where a technique changed them or put others beside them
      (``adversarial``), what the step saw.
    * ``curves.png``: losses and metrics as last logged in each epoch (a loss logged at each step: its last batch's).
    * ``test.png``: accuracy of each domain and the confusion matrix, of a module that after testing has ``confusion``:
      counts (domains, classes, classes) with true classes in rows.
    * ``samples-<epoch>.png`` and ``levels.png``: of a module that after validation has ``samples``, generated images
      (N, C, H, W) in [0, 1], and ``level_loss`` (bins,), its loss by noise level; the latter over the epochs.
    * ``mistakes.png``: of a module that after testing has ``mistakes``, the image of each class of which it was most
      confidently wrong (those of the first rank).

    Args:
        images: how many images of the first batch are drawn.
    """

    works_sharded = True

    def __init__(self, images: int = 12) -> None:
        if images < 1:
            raise ValueError(f"images must be at least 1, not {images}")
        self.images = images
        self._batch: dict[str, Any] | None = None
        self._clean: Tensor | None = None
        self._seen: Tensor | None = None
        self._titles: list[str] = []
        self._history: dict[str, list[list[float]]] = {}
        self._levels: dict[int, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self._history, "levels": self._levels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history, self._levels = state_dict["history"], state_dict.get("levels", {})

    # ------------------------------------------------------------------ what is collected

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first = batch_idx == 0 and trainer.global_step == 0
        if not first or not wanted(trainer) or not isinstance(batch, dict):
            return
        image = batch.get("image")
        if isinstance(image, Tensor) and image.dim() == 4 and image.shape[1] in (1, 3):
            self._batch, self._clean = batch, _shown(image[: self.images])
            self._titles = _titles(pl_module, batch, len(self._clean))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._batch is not None:  # the first step: the techniques have put into the batch what the step saw
            seen, other = self._batch["image"], self._batch.get("adversarial")  # of recipes that train on both
            seen = other if isinstance(other, Tensor) and other.shape == seen.shape else seen
            self._seen, self._batch = _shown(seen[: self.images]), None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Read on all ranks: reading reduces metrics that are synced, and a rank that stays away hangs the others.
        metrics = trainer.callback_metrics
        if not wanted(trainer):
            return
        for name, value in metrics.items():
            self._history.setdefault(name, []).append([trainer.current_epoch + 1, float(value)])
        if self._clean is not None and self._seen is not None:
            save_figure(trainer, "inputs", draw_inputs(self._clean, self._seen, self._titles))
            self._clean = self._seen = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples, levels = getattr(pl_module, "samples", None), getattr(pl_module, "level_loss", None)
        if not wanted(trainer):
            return
        epoch = trainer.current_epoch + 1
        if isinstance(samples, Tensor):
            save_picture(trainer, f"samples-{epoch:04d}", tiled(samples), "samples")
        if isinstance(levels, Tensor):
            self._levels[epoch] = levels.tolist()
            save_figure(trainer, "levels", draw_levels(self._levels))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if wanted(trainer) and self._history:
            save_figure(trainer, "curves", draw_curves(self._history))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        confusion = getattr(pl_module, "confusion", None)
        if wanted(trainer) and isinstance(confusion, Tensor) and confusion.dim() == 3 and bool(confusion.sum() > 0):
            names = [list(getattr(pl_module, name, [])) for name in ("domain_names", "class_names")]
            save_figure(trainer, "test", draw_test(confusion.cpu(), *names))

        mistakes = getattr(pl_module, "mistakes", None)
        if wanted(trainer) and mistakes:
            save_figure(trainer, "mistakes", draw_mistakes(mistakes, list(getattr(pl_module, "class_names", []))))


def _place(trainer: Trainer, name: str) -> Path:
    file = Path(trainer.default_root_dir) / "plots" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _track(trainer: Trainer, key: str, file: Path) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"plots/{key}", [str(file)])


def save_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """``plots/<name>.png`` in the run's folder, and to W&B."""
    figure.savefig(file := _place(trainer, name), dpi=110)
    _track(trainer, name, file)


def save_picture(trainer: Trainer, name: str, picture: Tensor, key: str) -> None:
    """``plots/<name>.png`` of uint8 (3, H, W), pixel by pixel, and to W&B as ``plots/<key>``."""
    from torchvision.io import write_png

    write_png(picture, str(file := _place(trainer, name)))
    _track(trainer, key, file)


def save_page(trainer: Trainer, name: str, text: str) -> None:
    """``plots/<name>.html`` in the run's folder, and to W&B."""
    file = Path(trainer.default_root_dir) / "plots" / f"{name}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="replace")  # a word may hold half a surrogate pair
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({f"plots/{name}": wandb.Html(str(file), inject=False)})


def wanted(trainer: Trainer) -> bool:
    """Whether this process draws: the first rank does, and nobody in a dry run."""
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)


def _shown(image: Tensor) -> Tensor:
    """A copy of images (N, C, H, W) as (N, H, W, 3) in [0, 1]."""
    return image.detach().float().cpu().clamp(0, 1).nan_to_num().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clone()


def _titles(module: LightningModule, batch: dict[str, Any], count: int) -> list[str]:
    """Class and domain of the first examples, as far as they are known."""
    lines = []
    for key, names in (("label", "class_names"), ("domain", "domain_names")):
        known, values = list(getattr(module, names, [])), batch.get(key)
        if isinstance(values, Tensor) and values.dim() == 1 and not values.is_floating_point():
            names_of = [known[v] if 0 <= v < len(known) else str(v) for v in values[:count].tolist()]
            lines.append([n if len(n) <= LETTERS else n[: LETTERS - 1] + "…" for n in names_of])
    return ["\n".join(parts) for parts in zip(*lines, strict=True)] if lines else [""] * count


# ---------------------------------------------------------------------- drawing


def new_figure(width: float, height: float) -> Figure:
    """A figure that leaves pyplot and the user's choice of a backend alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_inputs(clean: Tensor, seen: Tensor, titles: list[str]) -> Figure:
    """Images (N, H, W, 3) as they came, and below them what the step saw where that is something else."""
    changed = not torch.equal(clean, seen)
    columns = min(len(clean), 12)
    blocks = math.ceil(len(clean) / columns)
    rows = blocks * (2 if changed else 1)
    heights = [1.45, 1.1] if changed else [1.45]  # the lower row has no captions
    figure = new_figure(1.05 * columns, sum(heights) * blocks + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights * blocks)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, title in enumerate(titles):
        block, column = divmod(i, columns)
        row = block * (2 if changed else 1)
        axes[row][column].imshow(clean[i].numpy(), interpolation="nearest")
        axes[row][column].set_title(title, fontsize=7)
        if changed:
            axes[row + 1][column].imshow(seen[i].numpy(), interpolation="nearest")
    figure.suptitle("first batch" + (": clean above, what the step saw below" if changed else ""), fontsize=9)
    return figure


def draw_curves(history: dict[str, list[list[float]]]) -> Figure:
    """Losses on the left, cosines to a teacher on the right, all else between, over the epochs."""
    groups: list[dict[str, list[list[float]]]] = [{}, {}, {}]
    for name, points in history.items():
        groups[0 if "loss" in name else 2 if "/cos_" in name else 1][name] = points
    groups = [group for group in groups if group]
    figure = new_figure(4.6 * len(groups), 3.4)
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for name, points in sorted(group.items()):
            epochs, values = zip(*points, strict=True)
            axis.plot(epochs, values, "o-" if len(points) < 4 else "-", label=name, markersize=3)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("as last logged in each epoch", fontsize=9)
    return figure


def tiled(images: Tensor, smallest: int = 64) -> Tensor:
    """One picture, uint8 (3, H, W), of images (N, C, H, W) in [0, 1] in about a square; small ones are enlarged."""
    from torchvision.utils import make_grid

    times = max(1, math.ceil(smallest / images.shape[-1]))
    shown = (images.cpu().float() * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    shown = shown.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return make_grid(shown, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)


def draw_levels(levels: dict[int, list[float]]) -> Figure:
    """The loss at each noise level (rows of equally many examples, the least noise first), a line for an epoch."""
    from matplotlib import colormaps

    figure = new_figure(4.6, 3.4)
    axis = figure.subplots()
    first, last = min(levels), max(levels)
    for epoch, values in sorted(levels.items()):
        place = [(i + 0.5) / len(values) for i in range(len(values))]
        color = colormaps["viridis"](0.9 * (epoch - first) / max(last - first, 1))
        axis.plot(place, values, color=color, label=f"epoch {epoch}" if epoch in (first, last) else None)
    axis.set_yscale("log")
    axis.set_xlabel("noise level, by its rank")
    axis.set_ylabel("validation loss")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_mistakes(mistakes: dict[int, tuple[float, int, Tensor]], classes: list[str]) -> Figure:
    """An image of each class with the class that it was taken for and how surely, the surest first; at most 32.

    Args:
        mistakes: true class to (confidence, predicted class, image (C, H, W)).
        classes: their names.
    """
    chosen = sorted(mistakes.items(), key=lambda item: -item[1][0])[:32]
    columns = min(len(chosen), 8)
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(1.35 * columns, 1.75 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()

    def name(label: int) -> str:
        known = classes[label] if label < len(classes) else str(label)
        return known if len(known) <= LETTERS else known[: LETTERS - 1] + "…"

    for axis, (label, (sure, predicted, image)) in zip(axes.flat, chosen, strict=False):
        axis.imshow(_shown(image[None])[0].numpy(), interpolation="nearest")
        axis.set_title(f"{name(label)}\n→ {name(predicted)} {sure:.2f}", fontsize=7)
    figure.suptitle("most confident mistake of each class: true → predicted, confidence", fontsize=9)
    return figure


def draw_test(confusion: Tensor, domains: list[str], classes: list[str]) -> Figure:
    """Accuracy of each domain that has images, and the confusion of all of them, rows scaled to one."""
    count = confusion.shape[1]
    known = classes if len(classes) == count else [str(i) for i in range(count)]
    names = domains if len(domains) == len(confusion) else [str(i) for i in range(len(confusion))]
    accuracy = {
        name: float(c.diagonal().sum() / c.sum()) for name, c in zip(names, confusion, strict=True) if bool(c.sum() > 0)
    }
    if accuracy.keys() == {"base", "novel"}:
        base, novel = accuracy["base"], accuracy["novel"]
        accuracy["harmonic mean"] = 2 * base * novel / max(base + novel, 1e-12)
    side = min(max(4.0, 0.27 * count + 1.6), 9.0)
    figure = new_figure(4.4 + side, side)
    left, right = figure.subplots(1, 2, width_ratios=(4.0, side))
    bars = left.barh(list(accuracy), list(accuracy.values()), color="C0", height=0.6)
    left.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    left.set_ylim(max(len(accuracy), 5) - 0.4, -0.6)  # few bars needn't be thick
    left.set_xlim(0, max(accuracy.values()) * 1.25 + 1e-3)
    left.set_title("accuracy by domain", fontsize=10)
    left.spines[["top", "right"]].set_visible(False)
    total = confusion.sum(0).double()
    shares = total / total.sum(1, keepdim=True).clamp_min(1)
    image = right.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if count <= NAMED:
        right.set_xticks(range(count), known, rotation=90, fontsize=8)
        right.set_yticks(range(count), known, fontsize=8)
    right.set_xlabel("predicted")
    right.set_ylabel("true")
    right.set_title("confusion, all domains (rows add to 1)", fontsize=10)
    figure.colorbar(image, ax=right, shrink=0.75)
    return figure
