"""Faults that tests inject into a run of the toy recipe."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.cli.toy import ToyNet


class Fail(Callback):
    """One rank fails at one optimizer step.

    Args:
        where: ``step`` (within the training step), ``callback``, ``validation``, ``start`` (before the ranks' first
            collective operation of training) or ``end`` (after the last one).
        rank: which rank.
        step: at which optimizer step (the first validation behind it, for a validation).
        how: ``raise``, ``kill`` (SIGKILL) or ``sleep`` (for an hour, in all ranks
            but this one, which raises).
    """

    def __init__(self, where: str = "step", rank: int = 0, step: int = 3, how: str = "raise") -> None:
        self.where, self.rank, self.step, self.how = where, rank, step, how

    def fail(self, trainer: Trainer, where: str) -> None:
        if where != self.where or trainer.global_step < self.step or trainer.sanity_checking:
            return
        if self.how == "sleep" and trainer.global_rank != self.rank:
            time.sleep(3600)
        if trainer.global_rank == self.rank:
            Path(os.environ.get("FAULT_MOMENT", os.devnull)).touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"boom in {where} at step {trainer.global_step}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.fail(trainer, "start")
        step = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.fail(trainer, "step")
            return step(*args, **kwargs)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.fail(trainer, "callback")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fail(trainer, "end")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.fail(trainer, "validation")


class KillWandb(Callback):
    """Ends W&B's service process of this run (SIGKILL), or stops it where it is (SIGSTOP), at one optimizer step."""

    def __init__(self, step: int = 3, name: str = "SIGKILL") -> None:
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            for pid in children("wandb-core"):
                os.kill(pid, getattr(signal, self.name))


def children(name: str) -> list[int]:
    """Ids of this process's children whose command line holds a name."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as line:
                    if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid() and name in line.read():
                        found.append(int(entry))
            except OSError:  # ended meanwhile
                pass
    return found


class Poison(Callback):
    """One rank's images are nan at one optimizer step."""

    def __init__(self, step: int, rank: int = 1) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            batch["image"] = torch.full_like(batch["image"], float("nan"))


class Lose(Callback):
    """A file is cut short or removed at the end of the first epoch."""

    def __init__(self, file: str, how: str = "cut") -> None:
        self.file, self.how = Path(file), how

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.file.unlink() if self.how == "gone" else self.file.write_bytes(self.file.read_bytes()[:60])


class PhotoNet(ToyNet):
    """The toy for images of any size."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.body.insert(0, torch.nn.AdaptiveAvgPool2d(4))
