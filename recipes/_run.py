"""The folder of a run, its log, and what is shown while it lasts and at its end."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes._cli import HOME

if TYPE_CHECKING:
    from recipes._loggers import MetricsCSV, Wandb

log = logging.getLogger(__name__)
#: Set while a run lasts, so that the ranks that Lightning's launcher starts use the first one's folder.
FOLDER_VARIABLE = "RECIPES_RUN_FOLDER"

# ---------------------------------------------------------------------- what is shown

#: Warnings that say nothing a user of a recipe could act on.
_NOISE = (
    r"You are using a custom batch sampler",  # of prediction: ours leaves no image out
    r"`LightningModule.configure_optimizers` returned `None`",  # of what has nothing to train, as was asked for
    r".*LeafSpec.*is deprecated",  # Lightning 2.6.6 on torch >= 2.9
    r".*does not have many workers",
    r"You have overridden `on_after_batch_transfer` in `LightningModule`",  # that is where the recipe draws its noise
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
    r"You're using the WeightAveraging callback with a model that overrides",  # where sharded, configure_model refuses
    r".*WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",  # what it holds is the average
)
_OURS = ("recipes", "callbacks", "datamodules")
_LIGHTNING = ("lightning.pytorch", "lightning.fabric")


def rank() -> int:
    """This process's rank, as far as it is known yet."""
    return int(getattr(rank_zero_only, "rank", 0))


class _Console(logging.Handler):
    """Our own lines on stdout, warnings on stderr; the streams of the moment, since a progress bar replaces them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "console", True):
            return
        if record.levelno >= logging.WARNING:
            sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")
        elif rank() == 0:
            sys.stdout.write(f"{record.getMessage()}\n")
            sys.stdout.flush()


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    text = " ".join(str(message).split())
    log.warning(text, extra={"console": rank() == 0})


@contextmanager
def quiet() -> Iterator[None]:
    """Within it only what a user can act on is shown: our lines, and warnings as one line without source code."""
    loggers = [logging.getLogger(name) for name in (*_OURS, *_LIGHTNING)]
    fonts = logging.getLogger("matplotlib.font_manager")  # says that it builds its cache
    fonts_were, fonts.disabled = fonts.disabled, True
    before = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]
    for each in loggers:
        console = _Console()
        console.setLevel(logging.INFO if each.name in _OURS else logging.WARNING)
        each.setLevel(logging.INFO)
        each.propagate = False
        each.handlers[:] = [console]
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings("ignore", message=pattern)
            warnings.showwarning = _show_warning
            yield
    finally:
        fonts.disabled = fonts_were
        for each, level, propagate, handlers in before:
            each.setLevel(level)
            each.propagate = propagate
            each.handlers[:] = handlers


# ---------------------------------------------------------------------- the folder


def started_by_us() -> bool:
    """Whether Lightning's launcher started this process for the first rank (torchrun and SLURM start all alike)."""
    return rank() != 0 and FOLDER_VARIABLE in os.environ


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


class _LogFile(logging.FileHandler):
    """run.log. Where the disk is full, what can't be written there says nothing of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


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
    wandb: Wandb | None = None
    offline: bool = True
    #: Seconds for W&B's uploads at the end of a run.
    patience: float = 60.0
    results: dict[str, float] = field(default_factory=dict)
    _handler: logging.Handler | None = None

    @classmethod
    def begin(cls, recipe: str, verb: str, root: Path, *, temporary: bool = False, resume: Path | None = None) -> Run:
        """Choose the folder: the first rank's where Lightning's launcher started this process, the old run's where
        it is resumed, else a new one. Only the first rank makes it."""
        first = rank() == 0
        given = os.environ.get(FOLDER_VARIABLE)
        if given and not first:
            folder = Path(given)
        elif temporary and first:  # the others get it by SharedFolder
            folder = Path(tempfile.mkdtemp(prefix="fast_dev_run-"))
        elif resume is not None:
            folder = resume
        else:
            folder = root / recipe / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run = cls(recipe, verb, folder, temporary, resumed=resume is not None)
        if first:
            os.environ[FOLDER_VARIABLE] = str(folder.resolve())
        if first and not temporary:
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            run._handler = _LogFile(folder / "run.log", encoding="utf-8")
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
            shutil.copyfile(file, kept)
        whole = self.folder / "config.partial"  # a killed run must be found again by its config.yaml
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, file)

    def end(self, code: int = 0) -> None:
        """Close the logs, within a bounded time; forget a temporary folder.

        Args:
            code: the exit code, for W&B.
        """
        if self.wandb is not None:
            self.wandb.close(code, self.patience if code == 0 and not self.offline else 15.0)
        if self._handler is not None:
            for name in (*_OURS, *_LIGHTNING):
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()
        if rank() != 0:
            return
        os.environ.pop(FOLDER_VARIABLE, None)
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


class SharedFolder(Callback):
    """All ranks use the first one's folder, whoever started them (torchrun and SLURM hand nothing down)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.run.folder = Path(trainer.strategy.broadcast(str(self.run.folder)))
            vars(trainer)["_default_root_dir"] = str(self.run.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run.metrics is not None and self.run.resumed:
            self.run.metrics.forget_from(trainer.global_step)


# ---------------------------------------------------------------------- the end


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def shown(path: Path) -> str:
    """Relative to where the user stands, if it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def report(run: Run) -> None:
    """The table of metrics and where everything is; on a terminal with Rich, else as plain lines; always in run.log."""
    if rank() != 0:
        return
    metrics = [(name, f"{value:.4f}") for name, value in sorted(run.results.items())]
    places = []
    if not run.temporary:
        places.append(("run", shown(run.folder)))
        for name in ("best.ckpt", "last.ckpt"):
            if (run.checkpoints / name).is_file():
                places.append((name.removesuffix(".ckpt"), shown(run.checkpoints / name)))
        if any((run.folder / "plots").glob("*")):
            places.append(("plots", shown(run.folder / "plots")))
        if run.wandb is not None and run.wandb._experiment is not None:
            if run.offline or run.wandb.off or run.wandb.moved:
                places.append(("W&B", f"wandb sync {shlex.quote(shown(run.wandb.folder))}"))
            elif run.wandb.experiment.url:
                places.append(("W&B", run.wandb.experiment.url))
    terminal = sys.stdout.isatty()
    if terminal and (metrics or places):
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(highlight=False)
        if metrics:
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column("metric", style="cyan", no_wrap=True)
            table.add_column("value", justify="right")
            for row in metrics:
                table.add_row(*row)
            console.print(table)
        for name, place in places:  # one line each, however long: they are there to be copied
            console.print(f"[cyan]{name:6}[/] {escape(place)}", soft_wrap=True)
    for title, rows in (("metrics", metrics), ("where everything is", places)):
        if rows:
            log.info(f"{title}\n{_table(rows)}", extra={"console": not terminal})
