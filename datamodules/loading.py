"""What every DataModule shares, of images and of texts: loaders over three parts, an order that resumes exactly."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.sampling import EvalBatches, TrainBatches

log = logging.getLogger(__name__)
#: A set of examples with a length, whose ``__getitems__`` gives a batch.
Set = TypeVar("Set", bound=Any)


def run_seed() -> int:
    """The seed of ``seed_everything`` (0 if it was never called)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def progress(what: str, total: int, many: int, unit: str) -> Any:
    """From ``many`` on a bar on a terminal, a line elsewhere: reading a large benchmark takes minutes."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    if total >= many:
        log.info("%s: %d %s", what, total, unit)
    bar = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=total < many or not sys.stdout.isatty(),
    )
    bar.add_task(what, total=total)
    return bar


def _as_is(batch: Any) -> Any:
    return batch


class PartsDataModule(LightningDataModule, Generic[Set]):
    """Loaders over the three parts of a dataset, each of which :meth:`load` reads when it is needed.

    Args:
        batch_size: of training, per rank.
        num_workers: of each loader; 0 is best for what is in memory.
        seed: of the order of the data, of augmentation and of splits made here; None: the run's seed.
        eval_batch_size: of evaluation, per rank; twice ``batch_size`` if omitted.
    """

    #: Known as soon as the object is there; the command line hands them to the model.
    num_classes: int
    class_names: list[str]
    domain_names: list[str]
    #: What the examples are called in messages.
    unit = "examples"

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError("batch sizes must be at least 1")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.num_workers, self._seed = num_workers, seed
        self._sets: dict[str, Set] = {}
        self._resumed: dict[str, int] | None = None
        self._order: TrainBatches | None = None
        #: Where this run took up an epoch in its middle: the epoch, its block, and what was consumed of it.
        self._began: tuple[int, int, int] | None = None
        #: How often each training batch comes in a row; set by techniques that replay batches, before the loaders are.
        self.replays = 1

    @property
    def seed(self) -> int:
        return run_seed() if self._seed is None else self._seed

    # ------------------------------------------------------------------ what a kind of data says

    def load(self, part: Literal["train", "val", "test"]) -> Set:
        """Read one part, called once for each part that is needed."""
        raise NotImplementedError(f"{type(self).__name__} must define load(part)")

    def ready_for_training(self, examples: Set) -> None:
        """Called with the training part each time its loader is made."""

    def lengths(self, examples: Set) -> Tensor | None:
        """Of each example, (N,), where they differ and short ones are padded to long ones."""
        return None

    @property
    def given(self) -> Path | None:
        """The user's file or folder that is predicted in place of the test data."""
        return None

    def load_given(self) -> Set:
        """The examples in :attr:`given`."""
        raise NotImplementedError(f"{type(self).__name__} must define load_given()")

    # ------------------------------------------------------------------ loaders

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}[stage]
        if stage == "predict" and self.given is not None:
            needed = ()
        for part in needed:
            if part not in self._sets:
                self._sets[part] = self.load(part)  # type: ignore[arg-type]
                if len(self._sets[part]) == 0:
                    raise ValueError(f"{type(self).__name__} has no {self.unit} for '{part}'")

    def part(self, part: Literal["train", "val", "test", "predict"]) -> Set:
        """One part, read if need be; for notebooks and tests."""
        if part not in self._sets and part != "predict":
            self._sets[part] = self.load(part)
        return self._sets[part]

    def _loader(self, part: Literal["train", "val", "test", "predict"], batches: Any) -> DataLoader[Any]:
        return DataLoader(
            self.part(part),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _eval_loader(self, part: Literal["val", "test", "predict"]) -> DataLoader[Any]:
        examples = self.part(part)
        lengths = self.lengths(examples)
        return self._loader(part, EvalBatches(len(examples), self.eval_batch_size, lengths=lengths))

    def order(self, examples: Set) -> TrainBatches:
        """The batches of training, from the first epoch's beginning."""
        lengths = self.lengths(examples)
        return TrainBatches(len(examples), self.batch_size, self.seed, replays=self.replays, lengths=lengths)

    def train_dataloader(self) -> DataLoader[Any]:
        examples = self.part("train")
        self.ready_for_training(examples)
        order = self.order(examples)
        self._order, self._began = order, None
        if self._resumed is not None:
            self._take_up(order, self._resumed)
            self._resumed = None
        elif self.trainer is not None:
            order.epoch = self.trainer.current_epoch
        return self._loader("train", order)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.given is None:
            return self.test_dataloader()
        self._sets["predict"] = self.load_given()
        return self._eval_loader("predict")

    # ------------------------------------------------------------------ exact resume

    def _take_up(self, order: TrainBatches, place: dict[str, int]) -> None:
        """Go on in the middle of an epoch, also with steps of another size than those of the run that began it."""
        order.epoch, order.consumed = place["epoch"], place["consumed"]
        order.replayed = place["replayed"] % self.replays
        order.block = place.get("block", order.step)
        self._began = order.epoch, order.block, order.consumed
        left = (order.size - order.consumed) // order.step * order.replays - order.replayed
        if self.trainer is None or not order.consumed or not left:
            return
        # Lightning counts the epoch's batches, to know which one is the last; these may be more or fewer than those of
        # the run that was saved. With steps of the same size nothing is added here.
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        more = len(order) - left - current.processed  # type: ignore[attr-defined]  # declared as a narrower class
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + more)

    def state_dict(self) -> dict[str, int]:
        """Where the order of the data stands: the epoch, and examples consumed of it over all ranks.

        Beside them, where there are such: ``replayed``, how often the next batch came already, and of examples of
        different lengths the ``block`` of :class:`datamodules.sampling.TrainBatches`.
        """
        if self.trainer is None or self._order is None:
            return {}
        order = self._order
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        epoch = self.trainer.current_epoch
        done = progress.current.processed  # type: ignore[attr-defined]  # declared as a narrower class
        if progress.is_last_batch or done >= len(order):
            return {"epoch": epoch + 1, "consumed": 0}
        batches, replayed = divmod(done, order.replays)
        first, block = 0, order.step
        if self._began is not None and self._began[0] == epoch:
            _, block, first = self._began
        skipped = order.size // order.step - (order.size - first) // order.step
        place = {"epoch": epoch, "consumed": first + (batches - skipped) * order.step}
        place |= {"replayed": replayed} if replayed else {}
        return place | ({"block": block} if order.lengths is not None else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = (
            {"replayed": 0, **{key: int(value) for key, value in state_dict.items()}} if state_dict else None
        )
