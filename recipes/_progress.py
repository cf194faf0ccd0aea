"""What a run shows while it works: a Rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

log = logging.getLogger(__name__)
#: Seconds between two plain lines within an epoch, and between two updates of the bar.
PLAIN_EVERY = 10.0
BAR_EVERY = 0.2


def batch_length(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor; 0 if it holds none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((n for n in map(batch_length, entries) if n), 0)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Progress(ProgressBar):
    """Loss, the monitored metric, images or texts a second (of all ranks, training only), the time to the run's end.

    Metrics are read only when something is shown: reading a tensor on a GPU waits for it.

    Args:
        monitor: name of the metric that is shown beside the loss.
        terminal: draw a bar; else print a line per epoch and one every ten seconds within it.
    """

    def __init__(self, monitor: str | None = None, terminal: bool = False) -> None:
        super().__init__()
        self.monitor, self.terminal = monitor, terminal
        self._on = True
        self._bar: Any = None
        self._task: Any = None
        self._images = 0
        self._busy = 0.0  # seconds in training batches, the validation left out
        self._last = self._begun = 0.0
        self._shown = time.monotonic()
        self._done = self._first = 0

    def disable(self) -> None:  # Lightning calls it on every rank but the first
        self._on = False

    def enable(self) -> None:
        self._on = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Lines of ``LightningModule.print``."""
        if self._on:
            log.info(" ".join(map(str, args)))

    # ------------------------------------------------------------------ figures

    def _total(self, trainer: Trainer) -> float:
        """Training batches of the whole run; inf if there is no end."""
        epochs = trainer.max_epochs
        batches = float(trainer.num_training_batches) * epochs if epochs is not None and epochs >= 0 else float("inf")
        if trainer.max_steps >= 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        return batches

    def _metrics(self, trainer: Trainer) -> str:
        seen = trainer.callback_metrics
        names = [n for n in ("train/loss", self.monitor) if n and n in seen]
        return "  ".join(f"{n} {float(seen[n]):.4f}" for n in names)

    def _rate(self, trainer: Trainer) -> str:
        unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
        return f"{self._images * trainer.world_size / self._busy:,.0f} {unit}/s" if self._busy > 0 else ""

    def _eta(self, trainer: Trainer) -> str:
        left = self._total(trainer) - self._done
        new = self._done - self._first
        if not 0 < left < float("inf") or new <= 0:
            return ""
        return f"eta {clock((time.monotonic() - self._begun) / new * left)}"  # validation included

    def _epoch(self, trainer: Trainer) -> str:
        end = trainer.max_epochs
        return f"epoch {trainer.current_epoch + 1}" + (f"/{end}" if end is not None and end >= 0 else "")

    def _text(self, trainer: Trainer) -> str:
        parts = (self._metrics(trainer), self._rate(trainer), self._eta(trainer))
        return "  ".join(part for part in parts if part)

    # ------------------------------------------------------------------ the bar

    def _start_bar(self, description: str, total: float) -> None:
        if not (self._on and self.terminal):
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = RichProgress(*columns, transient=True, refresh_per_second=5)
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(description, total=None if total == float("inf") else total, text="")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._shown = time.monotonic()
        self._first = self._done = trainer.fit_loop.total_batch_idx + 1  # not 0 after a resume
        self._images, self._busy = 0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_bar(self._epoch(trainer), float(trainer.num_training_batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        # The time to fetch a batch counts, a validation in between doesn't.
        self._last = self._last or now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._done += 1
        if self._done > self._first + 1:  # the first step of a process warms up
            self._images += batch_length(batch)
            self._busy += now - self._last
        self._last = now
        if not self._on:
            return
        if self.terminal:
            if self._bar is None:  # a run that goes on in mid-epoch has no epoch's start
                self._start_bar(self._epoch(trainer), float(trainer.num_training_batches))
            if now - self._shown > BAR_EVERY or batch_idx + 1 == trainer.num_training_batches:
                self._shown = now
                self._bar.update(self._task, completed=batch_idx + 1, text=self._text(trainer))
        elif now - self._shown > PLAIN_EVERY:
            self._shown = now
            place = f"batch {batch_idx + 1}/{trainer.num_training_batches}"
            log.info(f"{self._epoch(trainer)}  {place}  {self._text(trainer)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = 0.0
        self._shown = time.monotonic()
        if self._on:  # on a terminal the bar says it, and the line goes to the log file alone
            log.info(f"{self._epoch(trainer)}  {self._text(trainer)}", extra={"console": not self.terminal})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = 0.0
        if not trainer.training and trainer.state.fn != "fit":
            self._stop_bar()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar()

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, name: str, batch_idx: int, total: float) -> None:
        now = time.monotonic()
        if not self._on or now - self._shown <= (BAR_EVERY if self.terminal else PLAIN_EVERY):
            return
        self._shown = now
        if self.terminal:
            if self._bar is None:
                self._start_bar(name, total)
            self._bar.update(self._task, completed=batch_idx + 1)
        else:
            log.info(f"{name}  batch {batch_idx + 1}/{total}")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit" or not self.terminal:
            self._evaluate("validate", batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate("test", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate("predict", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_bar()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_bar()
