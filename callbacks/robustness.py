"""Accuracy under attack, measured while a recipe validates and tests, with rules that tell when not to trust it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.adversary import classification, fgsm, pgd
from callbacks.balls import Norm, random_noise
from callbacks.perturbation import crafting, fold_seed, run_seed
from callbacks.report import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
#: Examples attacked at a time.
CHUNK = 128
#: Radii of the curve, as multiples of ``eps``.
CURVE = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
#: A radius, as a part of the box, at which no answer can hold.
LARGE = {"linf": 1.0, "l2": 1e3}

# ---------------------------------------------------------------------- statistics and rules


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of the 95 % interval of a share, by Wilson's formula, which is sound at 0 and 1, too."""
    if count == 0:
        return 0.0, 1.0
    p = right / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def sanity(accuracy: dict[str, float], count: int) -> list[str]:
    """What is suspicious about accuracies of the same ``count`` examples, in words.

    Known names: clean, noise, fgsm, pgd, square (black-box), autoattack, large (PGD at a radius that covers the box).
    """
    slack = 1.96 * math.sqrt(0.25 / max(count, 1))
    found = []

    def above(name: str, other: str, slack: float = 0.0) -> bool:
        return name in accuracy and other in accuracy and accuracy[name] > accuracy[other] + slack + 1e-9

    for name in ("noise", "fgsm", "pgd", "square", "autoattack"):
        if above(name, "clean", slack if name == "noise" else 0.0):
            found.append(f"{name} gives a higher accuracy than clean images: the attack doesn't work")
    if above("pgd", "fgsm", slack):
        found.append("gradient masking suspected: FGSM is stronger than PGD")
    if above("pgd", "square"):
        found.append("gradient masking suspected: Square attack is stronger than PGD")
    if above("pgd", "noise", slack):
        found.append("gradient masking suspected: random noise is stronger than PGD")
    if above("pgd", "autoattack", max(slack, 0.05)):
        found.append("PGD overestimates: AutoAttack is far stronger; report AutoAttack")
    if accuracy.get("large", 0.0) > 0.0:
        found.append(f"gradient masking suspected: {accuracy['large']:.1%} holds at a radius that covers all images")
    return found


# ---------------------------------------------------------------------- the evaluator


class RobustAccuracy(Callback):
    """Attacks a fixed part of the validation and test images and logs ``<stage>/robust_acc`` and its parts.

    Logged, of the same examples: ``clean_acc``, ``fgsm_acc``, ``pgd_acc``, ``robust_acc`` (right under every attack, so
    never above any of them), and in test also ``noise_acc`` (the control), ``autoattack_acc`` if asked for,
    ``robust_acc_low`` and ``robust_acc_high`` (95 %), the curve over radii, and which sanity rules are broken.
    In validation also ``robust_gap``: robust accuracy on the epoch's last training batch less that of validation, whose
    growth is robust overfitting.

    Which examples are taken depends on the run's seed and not on the number of ranks; each rank attacks its share and
    counts are added up. Random starts are of the example, so two ranks find what one process finds.

    Args:
        eps: radius, in pixels of [0, 1]; null: the module's own ``eps``.
        norm: ``linf`` or ``l2``; null: the module's own ``norm``, or linf.
        steps: of PGD in test; ``eps / 4`` each, or more where the steps wouldn't cross the ball.
        restarts: of PGD in test.
        val_steps: of PGD in validation, from one start.
        budget: examples attacked in test.
        val_budget: examples attacked in validation.
        autoattack: in test, also AutoAttack (standard), the worst of four attacks; needs ``pip install pyautoattack``.
        every_n_epochs: of validation: in the first epoch, every so many after it, and in the last.

    Raises:
        ValueError: for a setting out of range, or a module that gives no logits of images.
    """

    def __init__(
        self,
        eps: float | None = None,
        norm: Norm | None = None,
        steps: int = 50,
        restarts: int = 5,
        val_steps: int = 10,
        budget: int = 1000,
        val_budget: int = 200,
        autoattack: bool = False,
        every_n_epochs: int = 1,
    ) -> None:
        whole = {"steps": steps, "restarts": restarts, "val_steps": val_steps, "budget": budget}
        for name, value in {**whole, "val_budget": val_budget, "every_n_epochs": every_n_epochs}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if eps is not None and not eps > 0:
            raise ValueError(f"eps must be positive, not {eps}")
        if autoattack:
            _autoattack()
        self.eps, self.norm, self.steps, self.restarts, self.val_steps = eps, norm, steps, restarts, val_steps
        self.budget, self.val_budget, self.autoattack, self.every_n_epochs = (
            budget,
            val_budget,
            autoattack,
            every_n_epochs,
        )
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels, keys of their random starts
        self._chosen: Tensor | None = None
        self._seen = 0
        self._train: tuple[Tensor, Tensor, Tensor] | None = None
        #: Of the last evaluation: accuracies, the curve and the broken rules; the same on all ranks.
        self.result: dict[str, Any] = {}

    # ------------------------------------------------------------------ which examples

    def _start(self, loader: Any, budget: int) -> None:
        self._kept, self._seen, self._chosen = [], 0, None
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        size = len(loader.dataset) if hasattr(getattr(loader, "dataset", None), "__len__") else 0
        if size:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(fold_seed(run_seed(), "robust")))
            self._chosen = torch.zeros(size, dtype=torch.bool)
            self._chosen[order[:budget]] = True

    def _keep(self, batch: Any, budget: int) -> None:
        if not isinstance(batch, dict) or "image" not in batch or "label" not in batch:
            raise ValueError("RobustAccuracy needs batches with 'image' and 'label'")
        image, label, index = batch["image"], batch["label"], batch.get("index")
        if self._chosen is not None and index is not None:
            wanted = self._chosen[index.cpu()].nonzero().squeeze(1).to(image.device)
            keys = index[wanted]
        else:  # no telling which they are: the first ones
            wanted = torch.arange(min(len(image), max(budget - self._seen, 0)), device=image.device)
            keys = wanted + self._seen
        self._seen += len(image)
        if len(wanted):
            self._kept.append((image[wanted].clone(), label[wanted].clone(), keys.clone()))

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        # in the first epoch, too: a checkpoint callback wants the metric from then on (Lightning keeps its last value)
        return trainer.current_epoch % self.every_n_epochs == 0 or trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 == trainer.num_training_batches
        if last and isinstance(batch, dict) and "image" in batch and "label" in batch and self._due(trainer):
            known = batch["label"] >= 0
            keys = torch.arange(int(known.sum()))
            self._train = (batch["image"][known].detach(), batch["label"][known], keys)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer.val_dataloaders, self.val_budget)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer.test_dataloaders, self.budget)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self._due(trainer):
            self._keep(batch, self.val_budget)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._keep(batch, self.budget)

    # ------------------------------------------------------------------ attacking

    def _radius(self, module: LightningModule) -> tuple[float, Norm]:
        eps = getattr(module, "eps", None) if self.eps is None else self.eps
        if not isinstance(eps, (int, float)):
            raise ValueError("RobustAccuracy needs eps: the module has none of its own")
        norm: Norm = self.norm or getattr(module, "norm", "linf")  # type: ignore[assignment]  # a user's module has any
        return float(eps), norm

    def _survivors(
        self, module: LightningModule, eps: float, norm: Norm, stage: Literal["val", "test"], kept: Sequence[Any]
    ) -> dict[str, Tensor]:
        """For each attack, which of this rank's examples are right, bool (N,)."""
        steps, restarts = (self.steps, self.restarts) if stage == "test" else (self.val_steps, 1)
        alpha = max(eps / 4, 2.5 * eps / steps) if steps < 10 else eps / 4
        loss_fn = classification(module)
        found: dict[str, list[Tensor]] = {}

        def right(name: str, x: Tensor, y: Tensor) -> None:
            with torch.no_grad():
                logits = module(x)
                if logits.dim() != 2 or len(logits) != len(y):
                    raise ValueError("RobustAccuracy needs a module whose forward gives logits (B, classes)")
                found.setdefault(name, []).append(logits.argmax(1) == y)

        images, labels, keys = (torch.cat([k[i] for k in kept]) if kept else None for i in range(3))
        if images is None or labels is None or keys is None:
            return {}
        for first in range(0, len(images), CHUNK):
            x, y = images[first : first + CHUNK], labels[first : first + CHUNK]
            own = keys[first : first + CHUNK].tolist()
            right("clean", x, y)
            right("fgsm", fgsm(loss_fn, x, y, eps=eps, norm=norm), y)
            start = _per_key(x, own, eps, norm)
            settings: dict[str, Any] = {"eps": eps, "alpha": alpha, "steps": steps, "norm": norm}
            moved, left = x.clone(), torch.arange(len(x), device=x.device)
            for number in range(restarts):  # those that are still right go on to another start
                begin = start if number == 0 else _per_key(x, own, eps, norm, number)
                moved[left] = pgd(loss_fn, x[left], y[left], **settings, start=begin[left])
                with torch.no_grad():
                    left = left[module(moved[left]).argmax(1) == y[left]]
                if not len(left):
                    break
            right("pgd", moved, y)
            if stage == "test":
                right("noise", random_noise(x, eps=eps, norm=norm, drawn=_per_key(x, own, 1.0, "linf")), y)
                for factor in CURVE:
                    scaled = {**settings, "eps": factor * eps, "alpha": factor * alpha, "steps": min(steps, 20)}
                    right(f"x{factor}", pgd(loss_fn, x, y, **scaled, start=factor * start), y)
                whole = LARGE[norm]
                right("large", pgd(loss_fn, x, y, eps=whole, alpha=whole / 10, steps=20, norm=norm, start="zero"), y)
                if self.autoattack:
                    right("square", _autoattack(["square"])(module, x, y, eps, norm), y)
                    right("autoattack", _autoattack()(module, x, y, eps, norm), y)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _measure(
        self, module: LightningModule, stage: Literal["val", "test"], kept: Sequence[Any]
    ) -> tuple[dict[str, int], int]:
        """Counts of right answers over all ranks, by attack, and of examples."""
        eps, norm = self._radius(module)
        with crafting(module, "eval"):
            found = self._survivors(module, eps, norm, stage, kept)
        names = ["clean", "fgsm", "pgd"]
        if stage == "test":
            names += ["noise", "large", *(f"x{f}" for f in CURVE)]
            names += ["square", "autoattack"] if self.autoattack else []
        attacks = [n for n in ("clean", "fgsm", "pgd", "square", "autoattack") if n in names]
        if found:
            found["robust"] = torch.stack([found[n] for n in attacks]).all(0)
        counts = [int(found[n].sum()) if found else 0 for n in [*names, "robust"]]
        total = torch.tensor([*counts, len(found["clean"]) if found else 0], device=module.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return dict(zip([*names, "robust"], total[:-1].tolist(), strict=True)), int(total[-1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._due(trainer):
            return
        counts, size = self._measure(pl_module, "val", self._kept)
        accuracy = {name: right / max(size, 1) for name, right in counts.items()}
        for name, value in accuracy.items():
            pl_module.log(f"val/{name}_acc", value, prog_bar=name == "robust", rank_zero_only=False, sync_dist=False)
        if trainer.training or self._train is not None:
            train, number = self._measure(pl_module, "val", [] if self._train is None else [self._train])
            if number:
                gap = train["robust"] / number - accuracy["robust"]
                pl_module.log("val/robust_gap", gap, sync_dist=False)
            self._train = None
        self._kept = []

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts, size = self._measure(pl_module, "test", self._kept)
        accuracy = {name: right / max(size, 1) for name, right in counts.items()}
        low, high = wilson(counts["robust"], size)
        shown = {n: v for n, v in accuracy.items() if not n.startswith("x") and n != "large"}
        for name, value in {**{f"{n}_acc": v for n, v in shown.items()}, "robust_acc_low": low}.items():
            pl_module.log(f"test/{name}", value, sync_dist=False)
        pl_module.log("test/robust_acc_high", high, sync_dist=False)
        eps, norm = self._radius(pl_module)
        curve = [(0.0, accuracy["clean"]), *((f * eps, accuracy[f"x{f}"]) for f in CURVE)]
        broken = sanity(accuracy, size)
        self.result = {"eps": eps, "norm": norm, "examples": size, "accuracy": shown, "curve": curve, "broken": broken}
        self._kept = []
        if trainer.is_global_zero:
            self._report(trainer, low, high)

    def _report(self, trainer: Trainer, low: float, high: float) -> None:
        result = self.result
        accuracy = result["accuracy"]
        for words in result["broken"]:
            log.warning("robustness: %s", words)
        log.info(
            "robust accuracy %.3f (95 %%: %.3f to %.3f) of %d images at %s radius %.4g; clean %.3f; %s",
            accuracy["robust"],
            low,
            high,
            result["examples"],
            result["norm"],
            result["eps"],
            accuracy["clean"],
            "no sanity rule is broken" if not result["broken"] else f"{len(result['broken'])} sanity rules are broken",
        )
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "robustness.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        save_figure(trainer, "robustness", _draw(result))


def _per_key(x: Tensor, keys: Sequence[int], eps: float, norm: Norm, number: int = 0) -> Tensor:
    """The random start of some number for each example, decided by its place in the data: (B, ...)."""
    drawn = torch.empty(x.shape, dtype=torch.float32)
    for row, key in zip(drawn, keys, strict=True):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(fold_seed(run_seed(), "start", number, key)))
    if norm == "l2":
        drawn = drawn / drawn.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
    return (eps * drawn).to(x)


def _autoattack(attacks: list[str] | None = None) -> Callable[[LightningModule, Tensor, Tensor, float, Norm], Tensor]:
    """AutoAttack's images, of the standard four attacks or of those named; needs the package.

    Its targeted attacks need four classes; with fewer, APGD-CE, FAB and Square are what is left.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ValueError("AutoAttack needs a package: pip install pyautoattack") from None

    def attack(module: LightningModule, x: Tensor, y: Tensor, eps: float, norm: Norm) -> Tensor:
        names = {"linf": "Linf", "l2": "L2"}
        with torch.no_grad():
            classes = module(x[:1]).shape[1]
        wanted = attacks or (["apgd-ce", "fab", "square"] if classes < 4 else ["apgd-ce", "apgd-t", "fab-t", "square"])
        common = {"eps": eps, "norm": names[norm], "device": x.device, "seed": run_seed()}
        found = AutoAttack(module, version="custom", attacks=wanted, **common)
        # as its standard version sets them, but no more targets than there are other classes
        found.apgd.n_restarts = found.fab.n_restarts = found.apgd_targeted.n_restarts = 1
        found.apgd_targeted.n_target_classes = found.fab.n_target_classes = min(9, classes - 1)
        return found.run_standard_evaluation(x, y, batch_size=CHUNK)[0].to(x)

    return attack


def _draw(result: dict[str, Any]) -> Figure:
    """Accuracy against radius."""
    figure = new_figure(5.0, 3.4)
    axis = figure.subplots()
    radii, values = zip(*result["curve"], strict=True)
    axis.plot(radii, values, "o-", markersize=4)
    axis.axvline(result["eps"], color="grey", linewidth=0.8, linestyle="--", label="eps")
    axis.set_xlabel(f"radius ({result['norm']}, pixels in [0, 1])")
    axis.set_ylabel("accuracy under PGD")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{result['examples']} images", fontsize=10)
    return figure
