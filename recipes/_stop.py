"""Ctrl-C and SIGTERM end a run at the next complete step, with ``last.ckpt`` written; and ``last.ckpt`` itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from recipes._atomic import remove_partial
from recipes._loggers import MetricsCSV
from recipes._run import rank
from recipes._slurm import in_job

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked this run to end. ``code`` is the exit code, ``saved`` the checkpoint or None."""

    def __init__(self, signum: int, saved: Path | None = None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.saved = signum, saved
        self.code = 128 + signum


class Signals:
    """Handlers of SIGINT and SIGTERM, and in a SLURM job of its requeue signal, SIGUSR1; in force within ``with``.

    While :attr:`patient` (a training loop runs that can save itself) a signal only sets :attr:`received`; else it ends
    the run where it is. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False
        #: The run failed and ends within a bounded time: a launcher's signal, sent for that failure, changes nothing.
        self.ending = False
        self._when = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._heard = (*SIGNALS, signal.SIGUSR1) if in_job() else SIGNALS

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in self._heard}
            self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Put our handlers back: Lightning sets its own for SIGTERM at the start of each loop, which save nothing and
        end with code 0. Where ours is there for SIGUSR1, it sets none."""
        if self._before:
            for signum in self._heard:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader's worker, forked with our handlers: its parent will end it
            return
        if self.ending:
            return
        now = time.monotonic()
        if self.received is not None:
            # Some launchers pass a terminal's Ctrl-C on, so that it comes twice at the same moment.
            if signum == signal.SIGINT and now - self._when > 0.3:
                if sys.stdout.isatty():
                    sys.stdout.write("\x1b[?25h")  # the bar hides the cursor
                    sys.stdout.flush()
                os._exit(128 + signum)
            return
        self.received, self._when = signum, now
        if not self.patient:
            raise Interrupted(signum)
        if rank() == 0:  # a terminal's Ctrl-C reaches all ranks
            os.write(2, b"\nstopping at the next complete step (a second Ctrl-C ends at once)\n")


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: at every epoch's end, every so many steps if wished, and when a signal ends the run.

    Lightning's ``save_last`` writes only where the monitored metric became better (2.6.6), so its last is not the last.
    A checkpoint is saved where the loops can go on from it exactly: after a step at which the optimizer stepped, but
    not after one that is followed by a validation or the epoch's end, which resuming would leave out; those are waited
    for.

    Args:
        folder: where ``last.ckpt`` goes.
        stamp: what is stored in every checkpoint of the run under ``recipe``: plain values only.
        signals: whose request ends the run.
        every_n_steps: save also every so many optimizer steps, and one step later where a validation comes between;
            0: don't. No more steps than that are lost with a run that is killed.
    """

    def __init__(self, folder: Path, stamp: dict[str, Any], signals: Signals, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ValueError(f"last_every_n_steps must not be negative, but is {every_n_steps}")
        self.file = folder / "last.ckpt"
        self.stamp, self.signals, self.every_n_steps = stamp, signals, every_n_steps
        self._seen = 0  # optimizer steps at the last look
        self._due = False
        self._stop: int | None = None  # the signal all ranks agreed on
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    # ------------------------------------------------------------------ agreement of the ranks

    def _agree(self, trainer: Trainer, wait: bool = False) -> int | None:
        """The signal any rank received. Ranks learn of it one step late, so that asking costs no waiting."""
        if self._stop is None:
            if trainer.world_size == 1:
                self._stop = self.signals.received
            else:
                if self._pending is not None:
                    work, flag = self._pending
                    work.wait()
                    self._stop = int(flag.item()) or None
                flag = torch.tensor([self.signals.received or 0])
                self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
                if wait:
                    self._pending[0].wait()
                    self._stop, self._pending = self._stop or int(flag.item()) or None, None
        return self._stop

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(str(self.file.parent))
        self.file = Path(folder) / self.file.name
        if stage == "fit" and trainer.is_global_zero:  # of a run that was killed
            remove_partial(self.file.parent)
        if stage == "fit" and trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking must not wait for the GPU

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()
        self.signals.patient = True
        self._seen = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.received = self._agree(trainer, wait=True)
        self.signals.patient = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.signals.patient = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signum = self._agree(trainer, wait=True)
        if signum:  # what the epoch before left behind is saved
            raise Interrupted(signum, self.file if self.file.exists() else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:  # in the middle of an accumulation window
            return
        self._seen = trainer.global_step
        signum = self._agree(trainer)
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._due = True
        if not signum and not self._due:
            return
        last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        fetcher = trainer.fit_loop._data_fetcher
        if last or (fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)):
            return
        # The loop logs a step's metrics after this hook, and resuming doesn't run the step again.
        connector = trainer._logger_connector
        if connector.should_update_logs:
            self._log_ahead(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)
        self.save(trainer)
        if signum:
            connector.on_batch_end()
            connector.update_train_step_metrics()
            raise Interrupted(signum, self.file)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_ahead(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.stamp

    def _log_ahead(self, trainer: Trainer, step: int) -> None:
        """Write what the loop is about to log, so that no checkpoint knows of a step that metrics.csv doesn't."""
        metrics = trainer._logger_connector.metrics["log"]  # on all ranks, which may have to average it
        for logger in trainer.loggers:
            if metrics and "step" not in metrics and isinstance(logger, MetricsCSV):
                logger.log_ahead({"epoch": trainer.current_epoch, **metrics}, step)

    def save(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``; every rank takes part."""
        self._due = False
        trainer.save_checkpoint(self.file, weights_only=False)


class SignalsInForce(Callback):
    """Puts our signal handlers back where Lightning replaced them; for loops that save nothing."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.install()
