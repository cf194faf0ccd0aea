"""Where a run's metrics go: metrics.csv in its folder, and W&B, which never asks for anything and never blocks."""

from __future__ import annotations

import csv
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from recipes._run import Run, git_commit, rank

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """Writes every logged metric to ``metrics.csv`` in the run's folder: one row per call, a column per metric.

    Unlike Lightning's CSVLogger it adds to the file of a run that is resumed.

    Args:
        folder: folder of the run.
        every: seconds between two writes.
    """

    def __init__(self, folder: Path, every: float = 5.0) -> None:
        super().__init__()
        self.file, self.every = folder / "metrics.csv", every
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._written = 0
        self._when = time.monotonic()
        if self.file.is_file() and rank() == 0:
            with self.file.open(newline="", encoding="utf-8") as f:
                self._rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(f)]

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self._rows.append({"step": len(self._rows) if step is None else step, **values})
        if time.monotonic() - self._when > self.every:
            self.save()

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop what a run logged after the checkpoint it is resumed from."""
        self._rows = [row for row in self._rows if int(float(row.get("step", 0))) < step]
        self._written = 0
        self._columns = []
        self.save()

    @rank_zero_only
    def save(self) -> None:
        self._when = time.monotonic()
        columns = ["epoch", "step"] + sorted({k for row in self._rows for k in row} - {"epoch", "step"})
        fresh = columns != self._columns
        if fresh:
            self._columns, self._written = columns, 0
        if self._written == len(self._rows) and not fresh:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w" if fresh else "a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns)
            if fresh:
                writer.writeheader()
            writer.writerows(self._rows[self._written :])
        self._written = len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def reachable(url: str, seconds: float = 2.0) -> bool:
    """Whether a TCP connection to the server (or to the proxy in front of it) can be made in that time."""
    parts = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or url)
    if "//" not in (parts.geturl() or ""):
        parts = urlsplit(f"//{parts.geturl()}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answer = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
            answer.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a name server that is silent ignores the timeout
    thread.start()
    thread.join(seconds)
    return bool(answer)


def wandb_mode(switch: str) -> tuple[str, str]:
    """``online``, ``offline`` or ``off``, and why where it isn't what was asked for.

    Args:
        switch: of ``--wandb``: ``auto``, ``online``, ``offline`` or ``off``. ``auto`` follows WANDB_MODE, goes online
            with a WANDB_API_KEY and stays offline otherwise.
    """
    mode = {"dryrun": "offline", "disabled": "off", "run": "online"}.get(
        os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", "")
    )
    if switch == "auto":
        switch = mode if mode in ("online", "offline", "off") else "offline"
        if not mode and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_SWEEP_ID")):
            switch = "online"
    if switch != "online":
        return switch, ""
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not os.environ.get("WANDB_API_KEY"):
        import netrc

        try:
            known = netrc.netrc().authenticators(urlsplit(base).hostname or "")
        except (OSError, netrc.NetrcParseError):
            known = None
        if not known:
            return "offline", "no API key (set WANDB_API_KEY or type: wandb login)"
    return ("online", "") if reachable(base) else ("offline", f"{base} can't be reached")


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    try:
        for key, value in values.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        yield
    finally:
        for key, old in before.items():
            os.environ.pop(key, None) if old is None else os.environ.__setitem__(key, old)


def start_wandb(run: Run, switch: str, config: dict[str, Any]) -> WandbLogger | None:
    """W&B's logger with its files in the run's folder, or None where it is off or doesn't start. Never asks anything.

    Args:
        run: this run; it learns the logger and whether it is offline.
        switch: of ``--wandb``.
        config: the resolved settings, logged with the git commit.
    """
    if rank() != 0:
        return None
    mode, why = wandb_mode(switch)
    if why:
        log.info(f"W&B logs offline: {why}")
    if mode == "off":
        return None
    import wandb

    run.offline = mode == "offline"
    try:
        settings = wandb.Settings(silent=True, console="off", show_errors=False, show_warnings=False, init_timeout=30)
        logger = WandbLogger(
            project=os.environ.get("WANDB_PROJECT", "perturbation-recipes"),
            name=f"{run.recipe}-{run.id}",
            version=os.environ.get("WANDB_RUN_ID", run.id),
            save_dir=str(run.folder),
            group=run.recipe,
            job_type=run.verb,
            mode=mode,
            settings=settings,
        )
        logger._wandb_init.pop("anonymous", None)  # wandb warns about the mere argument
        with _environment(WANDB_SILENT="true", WANDB_MODE=mode):
            logger.log_hyperparams({"recipe": run.recipe, "git_commit": git_commit(), **config})
    except Exception as error:
        log.warning(f"W&B doesn't start ({' '.join(str(error).split())[:160]}); the metrics are in metrics.csv")
        log.debug("W&B", exc_info=True)
        return None
    run.wandb = logger
    return logger
