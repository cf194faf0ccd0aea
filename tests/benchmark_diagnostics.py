"""What diagnostics cost: the time that measuring takes over the time of the epoch without it, in one run."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from callbacks.diagnostic import Diagnostic
from tests.laws.cells import trainer
from tests.laws.diagnostics import diagnostics


def diagnostic_table(module: Callable[[], LightningModule], data: Callable[[], LightningDataModule]) -> None:
    """A row for each diagnostic of callbacks/ with its own settings: what an epoch costs more with it."""
    print("\n| diagnostic, one epoch | over the epoch without it | measurements | slowest, over a step |")
    print("| -- | -- | -- | -- |")
    for name, cls in diagnostics().items():
        diagnostic = cls()
        times: list[float] = []
        measuring = diagnostic.measuring

        @contextlib.contextmanager
        def timed(on: Any, times: list[float] = times, measuring: Any = measuring, it: Diagnostic = diagnostic) -> Any:
            before = it._seconds
            with measuring(on):
                yield
            times.append(it._seconds - before)

        diagnostic.measuring = timed  # type: ignore[method-assign]
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            runner = trainer(diagnostic, limit_val_batches=0, default_root_dir=folder)
            runner.fit(module(), datamodule=data())
        spent, whole = diagnostic.seconds
        step = (whole - spent) / runner.global_step
        cells = f"{whole / (whole - spent):.3f} | {len(diagnostic.steps)} | {max(times) / step:.2f}"
        print(f"| {name} | {cells} |", flush=True)
