"""What every diagnostic shares: looking at a network while it trains, and changing nothing.

A diagnostic is measured at certain optimizer steps of the training (step 0 is before the first one). It sees a fixed
choice of examples as they are, without augmentation, in evaluation mode. With it on, weights, optimizer, gradients and
all random streams are bit for bit those of the run without it. Numbers go to ``metrics.csv`` and to W&B, a picture
into ``plots/``, and ``plots/diagnostics.html`` puts those of a run side by side.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.perturbation import crafting, device_of, fold_seed, run_seed, techniques_of, trained_weights
from callbacks.report import Report, save_figure, save_page, wanted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Batch = Any
#: A training step costs about as much as so many forward passes of its examples.
STEP = 3
#: Numbers in examples that pass through a network together whatever the training batch is: 256 of CIFAR's images.
SMALL = 2**20
#: Fewer examples than this say too little, whatever ``share`` allows.
LEAST = 16
#: Floating-point operations that a processor does while it reads two numbers of a vector and writes one of them back
#: (a vector of the weights' length passes through memory, not through a cache; measured on a CPU: 80 to 140) ...
SWEEP = 100
#: ... and numbers that stay in the cache, which cost next to nothing.
CACHED = 2**18

# ---------------------------------------------------------------------- when


def log_steps(count: int, total: int) -> list[int]:
    """At most ``count`` different steps in 0..total, evenly spaced in the logarithm, with 0, 1 and ``total``.

    Raises:
        ValueError: for fewer than three.
    """
    if count < 3:
        raise ValueError(f"take at least 3 measurements, not {count}")
    reach = math.log(max(total, 1))
    steps = {round(math.exp(reach * i / (count - 2))) for i in range(count - 1)}
    return sorted({0, max(total, 0), *(step for step in steps if step <= total)})


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole training; a million where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else 10**6


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of an epoch, at least 1."""
    batches = trainer.num_training_batches
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches)) if math.isfinite(batches) else 10**6


def effective_batch(trainer: Trainer) -> int:
    """Examples of an optimizer step: the batch size of a rank, times the ranks, times the accumulated batches.

    Raises:
        ValueError: if the training loader doesn't say its batch size.
    """
    loader: Any = trainer.train_dataloader
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if loader is None and not isinstance(size, int):
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
    if loader is not None:
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        size = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
    if not isinstance(size, int):
        raise ValueError("diagnostics need to know the batch size: give the training DataLoader a batch_size")
    return size * trainer.world_size * trainer.accumulate_grad_batches


# ---------------------------------------------------------------------- of which examples


def dataset_of(trainer: Trainer, part: str) -> tuple[Any, Any]:
    """The training (``train``) or validation (``val``) dataset of a fit, and its loader's ``collate_fn``.

    Raises:
        ValueError: if there is none, or none of a known length.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if callable(getattr(data, "part", None)):  # one of ours
        return data.part(part), None
    if part == "val" and trainer.val_dataloaders is None:
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        except MisconfigurationException:  # there is none
            pass
    if part == "train" and trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader if part == "train" else trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, (list, tuple)) else loader
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"diagnostics need a '{part}' DataLoader over a dataset with a length and an index")
    return dataset, getattr(loader, "collate_fn", None)


def take(dataset: Any, collate: Any, positions: Sequence[int]) -> Batch:
    """The batch of these examples; of our own datasets as they are, without augmentation.

    What another dataset draws at random is drawn alike each time, by the example's position.
    """
    if callable(getattr(dataset, "plain", None)):
        return dataset.plain(positions)
    found = []
    with isolate_rng():
        for position in positions:
            seed = fold_seed("example", position)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            found.append(dataset[position])
        return (collate or torch.utils.data.default_collate)(found)


def fetch(trainer: Trainer, part: str, positions: Sequence[int]) -> Batch:
    """The batch of these examples on the trainer's device.

    Of ``train`` they are as techniques that stand for other data leave them (:meth:`Perturbation.as_trained`).
    """
    batch = trainer.precision_plugin.convert_input(take(*dataset_of(trainer, part), positions))
    batch = trainer.strategy.batch_to_device(batch)
    if part == "train" and isinstance(batch, dict):
        for technique in techniques_of(trainer):
            technique.as_trained(trainer.lightning_module, batch)
    return batch


def elements_of(batch: Batch) -> int:
    """Numbers in the largest tensor of a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=1)


def label_of(batch: Batch) -> Tensor:
    """Labels (B,) of a batch: its ``label``, or the second entry of a pair.

    Raises:
        ValueError: if it has none.
    """
    if isinstance(batch, Mapping):
        label = batch.get("label")
    else:
        label = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(label, Tensor) or label.dim() != 1 or label.is_floating_point():
        raise ValueError(
            "this diagnostic needs batches with whole numbers as labels (B,): an entry 'label', or pairs (input, label)"
        )
    return label


def logits_of(module: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, classes): of ``image``, of the whole batch where there is no image, or of the first of a pair.

    A module whose logits depend on more than that has ``example_logits(batch)``.

    Raises:
        ValueError: if the module gives none.
    """
    label, own = label_of(batch), getattr(module, "example_logits", None)
    if callable(own):
        logits = own(batch)
    elif isinstance(batch, Mapping):
        logits = module(batch["image"] if "image" in batch else batch)
    else:
        logits = module(batch[0])
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(label):
        raise ValueError(f"this diagnostic needs logits (B, classes), which {type(module).__name__} doesn't give")
    return logits


def losses_of(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of each example (B,): the module's ``example_losses(batch)``, else the cross-entropy of its logits.

    Of a single logit (B, 1), that of label 1 against 0.

    Raises:
        ValueError: if the module gives no logits, or an example has no label (-1).
    """
    own = getattr(module, "example_losses", None)
    if callable(own):
        return own(batch)
    logits, label = logits_of(module, batch).float(), label_of(batch)
    if bool((label < 0).any()):
        raise ValueError("this diagnostic needs the loss of each example, and some of these have no label")
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], label.float(), reduction="none")
    return F.cross_entropy(logits, label, reduction="none")


# ---------------------------------------------------------------------- of vectors as long as the weights


def squared_length(vector: Tensor) -> Tensor:
    """The sum of squares of a tensor, (), float64; summed in float64, without a copy."""
    return torch.linalg.vector_norm(vector.detach(), dtype=torch.float64).square()


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape, summed in float64; in parts, whose copies stay in the cache."""
    parts = zip(a.flatten().split(CACHED), b.flatten().split(CACHED), strict=True)
    return float(torch.stack([x.double() @ y.double() for x, y in parts]).sum())


# ---------------------------------------------------------------------- over ranks


def summed(values: Tensor, where: torch.device) -> Tensor:
    """The sum over all ranks, float64, on the CPU; ``where`` the ranks talk."""
    values = values.detach().double()
    if not (dist.is_available() and dist.is_initialized()):
        return values.cpu()
    values = values.to(where).clone()
    dist.all_reduce(values)
    return values.cpu()


def gathered(values: Tensor, where: torch.device) -> Tensor:
    """Rows (n, ...) of all ranks, on the CPU, as one process has them: rank r's row i is row ``i * ranks + r``.

    Ranks may have different numbers of rows.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values.detach().cpu()
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.zeros(world, dtype=torch.long, device=where)
    counts[rank] = len(values)
    dist.all_reduce(counts)
    padded = torch.zeros(int(counts.max()), *values.shape[1:], dtype=values.dtype, device=where)
    padded[: len(values)] = values.detach().to(where)
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    there = torch.arange(len(padded), device=where)[:, None] < counts
    return torch.stack(parts, 1)[there].cpu()


# ---------------------------------------------------------------------- the callback


class Diagnostic(Callback):
    """Something that is measured while a network trains, and that leaves no trace on it.

    A diagnostic says when (:meth:`plan`) and what (:meth:`measure`), and how it is drawn (:meth:`draw`).

    Args:
        share: at most this part of what the training costs (counted in forward passes of examples, a training step as
            three of its batch) is spent on measuring: fewer examples are looked at, and, below 16, less often, but at
            the beginning and the end. None: no limit. What it really took of the training's time is printed at the end.
        seed: of its own draws; None: the run's.
        name: its place in metrics (``<name>/...``), plots and checkpoints; the class name in snake case if omitted.

    Raises:
        ValueError: for a setting out of range.
    """

    #: Whether :meth:`measure` needs gradients by the network's weights (with ``torch.autograd.grad``).
    by_weights: ClassVar[bool] = False

    def __init__(self, *, share: float | None = 0.1, seed: int | None = None, name: str | None = None) -> None:
        if share is not None and not 0 < share < math.inf:
            raise ValueError(f"share must be positive, or null for no limit, not {share}")
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        self.name = name or snake
        if not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and '_', not '{self.name}'")
        self.share, self.seed = share, seed
        #: Metric to its points (step, value), in the order of the steps.
        self.history: dict[str, list[list[float]]] = {}
        #: Steps that were measured.
        self.steps: list[int] = []
        #: What :meth:`affordable` gave; a run that goes on keeps its examples, however long it is now.
        self.afforded: int | None = None
        self.figure: Figure | None = None
        #: Of the last fit: seconds that measuring took, and the whole training with it.
        self.seconds = (0.0, 0.0)
        self._planned: frozenset[int] = frozenset()
        self._seconds = 0.0
        self._begun = 0.0
        self._elements = 0

    # ------------------------------------------------------------------ what a diagnostic overrides

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        """The optimizer steps at which it is measured, 0 being before the first one. Also measured: the last step."""
        raise NotImplementedError(f"{type(self).__name__} must define plan(trainer, module)")

    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        """Numbers by name, the same on all ranks, on all of which it is called. In evaluation mode; see `measuring`."""
        raise NotImplementedError(f"{type(self).__name__} must define measure(trainer, module)")

    def conclude(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        """Numbers of the whole training, from :attr:`history`; logged after the last measurement."""
        return {}

    def draw(self) -> Figure | None:
        """The picture of the whole training, from :attr:`history` (see `callbacks.report.new_figure`)."""
        return None

    # ------------------------------------------------------------------ what a diagnostic calls

    def generator(self, *keys: object) -> torch.Generator:
        """A generator for draws of one purpose; the same on all ranks and at each call."""
        seed = run_seed() if self.seed is None else self.seed
        return torch.Generator().manual_seed(fold_seed(seed, self.name, *keys))

    def allowance(self, trainer: Trainer) -> float | None:
        """Forward passes of examples that all measurements of the training may take together; None: any number."""
        if self.share is None:
            return None
        return self.share * STEP * total_steps(trainer) * effective_batch(trainer)

    def sweep(self, trainer: Trainer) -> float:
        """Forward passes of an example that take as long as going once through vectors as long as the weights.

        Counted once a fit: the operations of one example's loss against :data:`SWEEP` for each weight.
        """
        module = trainer.lightning_module
        number = sum(weight.numel() for _, weight in trained_weights(module)) - CACHED
        if number <= 0:
            return 0.0
        first = self.drawn(trainer, "train")[:1].tolist()  # the same on all ranks
        with self.measuring(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
            losses_of(module, fetch(trainer, "train", first))
        return SWEEP * number / max(counter.get_total_flops(), number)

    def affordable(self, trainer: Trainer, wanted: int, passes: float, sweeps: float = 0) -> int:
        """Of how many examples, at most ``wanted``, each planned measurement may make ``passes`` forward passes.

        Where not even :data:`LEAST` examples can be paid at each, there are fewer measurements, though at least two.
        To be called once: a second call, in a run that goes on, gives the first one's answer.

        Args:
            trainer: in a fit, when its plan is made.
            wanted: how many it would take if nothing had to be paid.
            passes: forward passes of each example at each measurement; a backward pass counts as two.
            sweeps: how often each measurement goes through vectors as long as the weights, whatever the number of
                examples; see :meth:`sweep`.
        """
        allowed = self.allowance(trainer)
        if allowed is None:
            self.afforded = self.afforded or wanted
            return self.afforded
        fixed = sweeps * self.sweep(trainer) if sweeps else 0.0
        least, plan = min(LEAST, wanted), sorted(self._planned)
        left = max(int(allowed / (fixed + passes * least)), 2)
        if left < len(plan):
            self._planned = frozenset(plan[round(i * (len(plan) - 1) / (left - 1))] for i in range(left))
            words = "%s: %d of %d measurements, at %d examples, so that they take no more than the share of %g"
            log.info(words, self.name, left, len(plan), least, self.share)
        fits = max(int((allowed / max(len(self._planned), 1) - fixed) / passes), least)
        self.afforded = self.afforded or min(wanted, fits)
        return self.afforded

    def positions(self, trainer: Trainer, part: str, count: int) -> list[int]:
        """Which examples of ``train`` or ``val`` are looked at: drawn once, alike on all ranks; this rank's share.

        Rank r of n takes every n-th from the r-th on.
        """
        order = self.drawn(trainer, part)[:count]
        return order[trainer.global_rank :: trainer.world_size].tolist()

    def drawn(self, trainer: Trainer, part: str) -> Tensor:
        """All positions in ``train`` or ``val`` in the order in which examples are chosen, alike on all ranks.

        Of our own data without those that have no label (-1), where others have one.
        """
        dataset, _ = dataset_of(trainer, part)
        order = torch.randperm(len(dataset), generator=self.generator("examples", part))
        label = getattr(dataset, "entries", {}).get("label")
        known = label[order] >= 0 if isinstance(label, Tensor) and label.dim() == 1 else None
        return order if known is None or not bool(known.any()) else order[known]

    def chunk(self, trainer: Trainer, part: str) -> int:
        """Examples that pass through the network at a time: a rank's training batch, or, of small ones, up to 256."""
        if not self._elements:
            self._elements = elements_of(take(*dataset_of(trainer, part), [0]))
        try:
            batch = effective_batch(trainer) // (trainer.world_size * trainer.accumulate_grad_batches)
        except ValueError:  # the loader doesn't say
            batch = 1
        return min(256, max(batch, SMALL // self._elements))

    def examples(
        self, trainer: Trainer, part: str, positions: Sequence[int], size: int | None = None
    ) -> Iterator[Batch]:
        """These examples as :func:`fetch` gives them, in batches of ``size``; see :meth:`chunk` where it is omitted."""
        size = self.chunk(trainer, part) if size is None else size
        for first in range(0, len(positions), size):
            yield fetch(trainer, part, positions[first : first + size])

    @contextmanager
    def measuring(self, module: LightningModule) -> Iterator[None]:
        """Where it is measured: in evaluation mode, gradients on (but not by weights, unless ``by_weights``).

        Afterwards train flags, gradient flags, ``.grad`` and the random streams of torch, NumPy and Python are as
        before; so are buffers, unless a network moves them in evaluation mode, too. The time that it takes is counted.
        """
        device = device_of(module)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # other shapes aren't compiled anew
            stack.enter_context(crafting(module, "eval", parameters=self.by_weights))
            yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - begun

    def record(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Log numbers (``<name>/<key>``) of the present step and keep them in :attr:`history`.

        Loggers count steps from 0, as Lightning's own numbers do: what is measured after k steps is logged at k - 1.
        """
        step = trainer.global_step
        named = {f"{self.name}/{key}": float(value) for key, value in values.items()}
        for key, value in named.items():
            self.history.setdefault(key, []).append([step, value])
        if named:
            for logger in trainer.loggers:
                logger.log_metrics({**named, "epoch": trainer.current_epoch}, step=step - 1)

    # ------------------------------------------------------------------ the loop

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "steps": self.steps, "afforded": self.afforded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.steps = state_dict["history"], state_dict["steps"]
        self.afforded = state_dict.get("afforded")  # of an older version: worked out again

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_names(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it dynamically

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun, self._seconds = time.perf_counter(), 0.0
        with isolate_rng():
            self._planned = frozenset(self.plan(trainer, pl_module))
            self.prepare(trainer, pl_module)
        self._look(trainer, pl_module)

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Called once before the first measurement of a fit, when the plan is known: choose examples here."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module, last=True)
        self.record(trainer, self.conclude(trainer, pl_module))
        self.seconds = spent, whole = self._seconds, time.perf_counter() - self._begun
        if trainer.is_global_zero:
            others = sum(d._seconds for d in diagnostics_of(trainer))
            share = spent / max(whole - others, 1e-9)
            words = "%s: %d measurements, %.1f s, %.1f %% of the training's own time"
            log.info(words, self.name, len(self.steps), spent, 100 * share)
        if wanted(trainer) and any(isinstance(c, Report) for c in trainer.callbacks):  # type: ignore[attr-defined]
            self.figure = self.draw()
            if self.figure is not None:
                save_figure(trainer, self.name, self.figure)
            if diagnostics_of(trainer)[-1] is self:
                save_page(trainer, "diagnostics", page(trainer))

    def _look(self, trainer: Trainer, module: LightningModule, last: bool = False) -> None:
        step = trainer.global_step
        if (step in self._planned or last) and (not self.steps or self.steps[-1] != step):
            self.steps.append(step)  # once, where batches are accumulated or a run goes on
            with self.measuring(module):
                values = self.measure(trainer, module)
            self.record(trainer, values)


def check_names(callbacks: Sequence[Callback]) -> None:
    """ValueError if two diagnostics would write to the same place."""
    names = [callback.name for callback in callbacks if isinstance(callback, Diagnostic)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two diagnostics are named '{name}': give one of them another name=...")


def diagnostics_of(trainer: Trainer) -> list[Diagnostic]:
    """The diagnostics of a trainer, in the order of its list."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
    return [callback for callback in callbacks if isinstance(callback, Diagnostic)]


# ---------------------------------------------------------------------- one page

_STYLE = (
    "body{font-family:sans-serif;margin:2em;color:#222}main{display:flex;flex-wrap:wrap;gap:1.5em}"
    "figure{margin:0;max-width:48%;min-width:420px}img{width:100%}td,th{padding:.1em .8em .1em 0;text-align:left}"
)


def page(trainer: Trainer) -> str:
    """HTML: the pictures of all diagnostics of a run side by side, and the last value of each number."""
    parts, rows = [], []
    for diagnostic in diagnostics_of(trainer):
        name = html.escape(diagnostic.name)
        if diagnostic.figure is not None:
            buffer = io.BytesIO()
            diagnostic.figure.savefig(buffer, dpi=110)
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(
                f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
            )
        for key, points in sorted(diagnostic.history.items()):
            rows.append(f"<tr><td>{html.escape(key)}</td><td>{points[-1][1]:.6g}</td><td>{points[-1][0]:.0f}</td></tr>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>diagnostics</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Diagnostics</h1>\n<main>{''.join(parts)}</main>\n"
        "<h2>Last values</h2>\n<table><tr><th>number</th><th>value</th><th>step</th></tr>\n"
        + "\n".join(rows)
        + "</table>\n</body></html>\n"
    )
