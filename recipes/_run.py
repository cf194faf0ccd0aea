"""The folder of a run, its log, its metrics, W&B, and what is shown at its end."""

from __future__ import annotations

import csv
import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from recipes._cli import HOME

log = logging.getLogger(__name__)
#: Set while a run lasts, so that the ranks that Lightning's launcher starts use the first one's folder.
FOLDER_VARIABLE = "RECIPES_RUN_FOLDER"

# ---------------------------------------------------------------------- what is shown

#: Warnings that say nothing a user of a recipe could act on.
_NOISE = (
    r".*LeafSpec.*is deprecated",  # Lightning 2.6.6 on torch >= 2.9
    r".*does not have many workers",
    r".*LightningCLI's args parameter",
    r".*is smaller than the logging interval",
    r".*your dataloader is not resumable",  # the order of the data is in the DataModule's state
    r".*Checkpoint directory .* exists and is not empty",
    r".*module\(s\) in eval mode at the start of training",  # frozen towers are meant to be
    r".*`srun` command is available",
    r".*The dirpath has changed",
    r".*callbacks used to create the checkpoint need to be provided",  # what matters of it, the technique says itself
    r".*Trying to infer the `batch_size`",
    r".*pkg_resources is deprecated",
)
_OURS = ("recipes", "callbacks", "datamodules")
_LIGHTNING = ("lightning.pytorch", "lightning.fabric")


class _Console(logging.Handler):
    """Our own lines on stdout, warnings on stderr; the streams of the moment, since a progress bar replaces them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "console", True):
            return
        if record.levelno >= logging.WARNING:
            sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")
        elif rank_zero_only.rank == 0:
            sys.stdout.write(f"{record.getMessage()}\n")
            sys.stdout.flush()


def _show_warning(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    text = " ".join(str(message).split())
    log.warning(text, extra={"console": rank_zero_only.rank == 0})


@contextmanager
def quiet() -> Iterator[None]:
    """Within it only what a user can act on is shown: our lines, and warnings as one line without source code."""
    handler = _Console()
    loggers = [logging.getLogger(name) for name in _OURS]
    before = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.setLevel(logging.INFO)
        each.propagate = False
        each.addHandler(handler)
    muted = []
    for name in _LIGHTNING:
        for other in logging.getLogger(name).handlers:
            muted.append((other, other.level))
            other.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings("ignore", message=pattern)
            warnings.showwarning = _show_warning
            yield
    finally:
        for other, level in muted:
            other.setLevel(level)
        for each, (level, propagate) in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate


# ---------------------------------------------------------------------- the folder


def git_commit() -> str | None:
    """Commit of the recipes' source, ``+changes`` appended if files differ from it; None where it isn't a checkout."""
    if not (HOME / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(HOME), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


@dataclass
class Run:
    """One run of one recipe, and its folder ``<root>/<recipe>/<YYYYmmdd-HHMMSS>-<id>/``.

    ``trainer.default_root_dir`` is this folder while the run lasts: callbacks put their plots into its ``plots/``.
    With ``fast_dev_run`` it is a temporary folder that is removed at the end.
    """

    recipe: str
    verb: str
    folder: Path
    temporary: bool = False
    resumed: bool = False
    metrics: MetricsCSV | None = None
    wandb: WandbLogger | None = None
    offline: bool = True
    results: dict[str, float] = field(default_factory=dict)
    _handler: logging.Handler | None = None

    @classmethod
    def begin(cls, recipe: str, verb: str, root: Path, *, temporary: bool = False, resume: Path | None = None) -> Run:
        """Choose the folder: the first rank's where Lightning's launcher started this process, the old run's where
        it is resumed, else a new one. Only the first rank makes it."""
        first = rank_zero_only.rank == 0
        given = os.environ.get(FOLDER_VARIABLE)
        if temporary:
            folder = Path(tempfile.mkdtemp(prefix="fast_dev_run-"))
        elif given and not first:
            folder = Path(given)
        elif resume is not None:
            folder = resume
        else:
            folder = root / recipe / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run = cls(recipe, verb, folder, temporary, resumed=resume is not None)
        if first and not temporary:
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            os.environ[FOLDER_VARIABLE] = str(folder.resolve())
            run._handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
            run._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
            for name in (*_OURS, *_LIGHTNING):
                logging.getLogger(name).addHandler(run._handler)
            log.info("command: %s", shlex.join(sys.argv), extra={"console": False})
        return run

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def id(self) -> str:
        """The part of the folder's name after the time; W&B's id of the run."""
        return self.folder.name

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``; a resumed run keeps the one it had as ``config.<n>.yaml`` if it differs."""
        file = self.folder / "config.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            n = 1
            while (kept := self.folder / f"config.{n}.yaml").exists():
                n += 1
            file.rename(kept)
        file.write_text(text, encoding="utf-8")

    def end(self) -> None:
        """Close the logs; forget a temporary folder."""
        if self.wandb is not None and self.wandb._experiment is not None:
            self.wandb.experiment.finish()
        if self._handler is not None:
            for name in (*_OURS, *_LIGHTNING):
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()
            os.environ.pop(FOLDER_VARIABLE, None)
        if self.temporary:
            import shutil

            shutil.rmtree(self.folder, ignore_errors=True)


class SharedFolder(Callback):
    """All ranks use the first one's folder, whoever started them (torchrun and SLURM hand nothing down)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.run.folder = Path(trainer.strategy.broadcast(str(self.run.folder)))
            trainer._default_root_dir = str(self.run.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run.metrics is not None and self.run.resumed:
            self.run.metrics.forget_from(trainer.global_step)


# ---------------------------------------------------------------------- loggers


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
        if self.file.is_file() and rank_zero_only.rank == 0:
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
    if rank_zero_only.rank != 0:
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


# ---------------------------------------------------------------------- the end


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def _short(path: Path) -> str:
    """Relative to where the user stands, if it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def report(run: Run) -> None:
    """The table of metrics and where everything is; on a terminal with Rich, else as plain lines; always in run.log."""
    if rank_zero_only.rank != 0:
        return
    metrics = [(name, f"{value:.4f}") for name, value in sorted(run.results.items())]
    places = []
    if not run.temporary:
        places.append(("run", _short(run.folder)))
        for name in ("best.ckpt", "last.ckpt"):
            if (run.checkpoints / name).is_file():
                places.append((name.removesuffix(".ckpt"), _short(run.checkpoints / name)))
        if run.wandb is not None and run.wandb._experiment is not None:
            if run.offline:
                folder = Path(run.wandb.experiment.dir).parent
                places.append(("W&B", f"wandb sync {shlex.quote(_short(folder))}"))
            elif run.wandb.experiment.url:
                places.append(("W&B", run.wandb.experiment.url))
    terminal = sys.stdout.isatty()
    if terminal and (metrics or places):
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False)
        for title, rows in (("metric", metrics), ("", places)):
            if rows:
                table = Table(box=None, show_header=bool(title), pad_edge=False, header_style="bold")
                table.add_column(title or None, style="cyan", no_wrap=True)
                table.add_column("value" if title else None, overflow="fold", justify="right" if title else "left")
                for row in rows:
                    table.add_row(*row)
                console.print(table)
    for title, rows in (("metrics", metrics), ("where everything is", places)):
        if rows:
            log.info(f"{title}\n{_table(rows)}", extra={"console": not terminal})
