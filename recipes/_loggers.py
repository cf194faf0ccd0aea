"""Where a run's metrics go: metrics.csv in its folder, and W&B, which never asks for anything and never blocks."""

from __future__ import annotations

import csv
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

from recipes._run import Run, git_commit, rank, shown

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
        self._ahead: dict[str, Any] | None = None
        self._failed = False
        self._when = time.monotonic()
        if self.file.is_file() and rank() == 0:
            whole = self.file.read_text(encoding="utf-8").rpartition("\n")[0]  # a killed run's last row may be cut
            self._rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(whole.splitlines())]

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
        row = {"step": len(self._rows) if step is None else step, **values}
        if self._ahead is not None and self._ahead["step"] == row["step"] and self._ahead.keys() <= row.keys():
            if self._ahead.keys() != row.keys():  # there is more now
                self._rows = [row if each is self._ahead else each for each in self._rows]
                self._columns = []
            self._ahead = None
            return
        self._rows.append(row)
        if time.monotonic() - self._when > self.every:
            self.save()

    @rank_zero_only
    def log_ahead(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write a row that is about to be logged, and is then not written again."""
        self._ahead = None
        self.log_metrics(metrics, step)
        self._ahead = self._rows[-1]
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
        """Write what isn't written yet; where the disk is full, all of it when there is room again."""
        self._when = time.monotonic()
        try:
            self._write()
        except OSError as error:
            self._columns = []  # what is in the file now isn't known
            if not self._failed:
                log.warning(f"{self.file} can't be written now ({error.strerror}); training goes on")
            self._failed = True
        else:
            self._failed = False

    def _write(self) -> None:
        columns = ["epoch", "step"] + sorted({k for row in self._rows for k in row} - {"epoch", "step"})
        fresh = columns != self._columns
        if fresh:
            self._columns, self._written = columns, 0
        if self._written == len(self._rows) and not fresh:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        file = self.file.with_suffix(".partial") if fresh else self.file  # a rewritten file is whole at any moment
        with file.open("w" if fresh else "a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns)
            if fresh:
                writer.writeheader()
            writer.writerows(self._rows[self._written :])
        if fresh:
            os.replace(file, self.file)
        self._written = len(self._rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a server (through the proxy that is set, if any) answers in that time, and not that it is broken."""
    answer: list[bool] = []

    def ask() -> None:
        from urllib.error import HTTPError
        from urllib.request import urlopen

        try:
            with urlopen(f"{url.rstrip('/')}/healthz", timeout=seconds):
                answer.append(True)
        except HTTPError as error:
            answer.append(error.code < 500)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent ignores the timeout
    thread.start()
    thread.join(seconds)
    return bool(answer and answer[0])


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
    return ("online", "") if reachable(base) else ("offline", f"{base} doesn't answer")


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


# ---------------------------------------------------------------------- W&B


class Wandb(WandbLogger):
    """Lightning's logger, served by a thread: training neither waits for W&B nor ends with it.

    What is logged goes into a queue, in order. Where W&B's process is lost, so is what it hadn't written (it writes
    late: all of a short run). Then the numbers of the newest :attr:`again` entries are written anew, offline, under the
    same id, and logging goes on there. Where that fails, too, or W&B doesn't empty the queue, it is switched off; both
    are said in one line. A picture or table that W&B doesn't take is left out, which is said once.

    Args:
        arguments: those of Lightning's.
        keep: file in which the number of the last logged step is kept. W&B can't know it when a run goes on offline,
            would count from 0 again, and its server would drop what is logged under numbers that it has.
    """

    #: Logged entries that may wait; at ten steps an entry these are tens of thousands of steps.
    most = 5000
    #: Logged entries whose numbers are kept, to be written anew: more than W&B holds back.
    again = 10_000

    def __init__(self, keep: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.off = False
        self.moved = False
        self._keep = keep
        self._step = int(keep.read_text() or -1) if keep.is_file() else -1
        self._config: dict[str, Any] = {}
        self._numbers: deque[tuple[int, dict[str, float]]] = deque(maxlen=self.again)
        self._left_out = False
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue(self.most)
        self._thread = threading.Thread(target=self._serve, name="W&B", daemon=True)

    @property
    def experiment(self) -> Any:
        """W&B's run, whose ``log`` only queues; on other ranks a dummy."""
        run = WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]
        return _Queued(self, run) if self._experiment is not None else run

    def begin(self, config: dict[str, Any]) -> None:
        """Start W&B's run; raises what W&B raises."""
        self._config = config
        self.log_hyperparams(config)
        self._thread.start()

    def later(self, call: Callable[[], Any]) -> None:
        """Do this in W&B's thread, after all that was asked for before."""
        if not self.off:
            try:
                self._queue.put_nowait(call)
            except queue.Full:
                self.switch_off("it takes no more metrics")

    def log(self, data: Mapping[str, Any], **arguments: Any) -> None:
        """What ``wandb.Run.log`` does, later."""

        def call() -> None:
            self._step += 1
            numbers = {key: value for key, value in data.items() if isinstance(value, (int, float))}
            if numbers and not self.moved:
                self._numbers.append((self._step, numbers))
            given = {"step": self._step, **arguments}
            try:
                self._experiment.log(dict(data), **given)  # type: ignore[union-attr]
            except Exception as error:
                if len(numbers) == len(data):
                    raise
                self._experiment.log(numbers, **given)  # type: ignore[union-attr]  # where W&B is lost, raises as well
                self._leave_out(error)
            with suppress(OSError):  # a full disk
                whole = self._keep.with_suffix(".partial")
                whole.write_text(str(self._step))
                os.replace(whole, self._keep)

        self.later(call)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        plain = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in metrics.items()}
        if not self.off:
            try:
                super().log_metrics(plain, step)
            except Exception as error:
                self.switch_off(_shortly(error))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._guarded(super().log_image, key, images, step, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().log_table, *args, **kwargs)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        update = super().log_hyperparams
        if self._thread.is_alive():
            self.later(lambda: update(params))
        else:
            update(params)

    def log_reference(self, name: str, file: Path, aliases: list[str], metadata: dict[str, Any]) -> None:
        """Log a file as an artifact by reference: its place, size and checksum; it isn't uploaded."""

        def call() -> None:
            import wandb

            try:
                artifact = wandb.Artifact(name, type="model", metadata=metadata)
                artifact.add_reference(file.resolve().as_uri(), name=file.name)
            except Exception as error:
                self._leave_out(error)
                return
            self._experiment.log_artifact(artifact, aliases=aliases)  # type: ignore[union-attr]

        self.later(call)

    def _guarded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not self.off:
            try:
                function(*args, **kwargs)
            except Exception as error:
                self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        if not self._left_out:
            log.warning(f"W&B doesn't take everything ({_shortly(error)}); what it doesn't is left out there")
        self._left_out = True
        log.debug("W&B", exc_info=True)

    def switch_off(self, why: str) -> None:
        """Log nothing more, and say so once."""
        if not self.off:
            self.off = True
            log.warning(f"W&B is switched off ({why}); the metrics are in metrics.csv")

    @property
    def folder(self) -> Path:
        """Where W&B's files of this run are, to be synced."""
        return Path(self._experiment.dir).parent  # type: ignore[union-attr]

    def _write_anew(self, why: str) -> None:
        """Go on in a new offline run of the same id, which gets the newest numbers of the lost one."""
        _abandon()
        self.moved = True
        import wandb

        with _quietly("offline"):
            run = wandb.init(**{**self._wandb_init, "mode": "offline"})
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            run.config.update({"wandb_lost": why, **self._config}, allow_val_change=True)
        for step, numbers in self._numbers:
            run.log(numbers, step=step)
        self._numbers.clear()
        self._experiment = run
        log.warning(f"W&B was lost ({why}) and goes on offline, without earlier pictures: {shown(self.folder)}")

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            if self.off:
                continue
            try:
                call()
            except BaseException as error:  # asyncio's cancellation is none of Exception
                log.debug("W&B", exc_info=True)
                why = _shortly(error)
                try:
                    self._write_anew(why) if not self.moved else self.switch_off(why)
                except BaseException:
                    log.debug("W&B", exc_info=True)
                    self.switch_off(why)

    def close(self, code: int, seconds: float) -> None:
        """End W&B's run with an exit code; what isn't through after ``seconds`` stays on disk, to be synced.

        Takes at most twice that time.
        """
        if self._experiment is None or not self._thread.is_alive():
            return

        def end() -> None:
            self._thread.join()
            if not self.off:
                self._experiment.finish(exit_code=code)  # type: ignore[union-attr]

        def anew() -> None:
            self._write_anew(why)
            self._experiment.finish(exit_code=code)  # type: ignore[union-attr]

        try:
            self._queue.put(None, timeout=1)
        except queue.Full:
            pass
        why = _bounded(end, seconds)
        if why and not self.off and not self.moved:
            why = _bounded(anew, seconds)
        if why:
            self.switch_off(why)
        if self.off:  # W&B would wait for it at this process's end
            _abandon()


def _shortly(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _bounded(call: Callable[[], None], seconds: float) -> str:
    """Why a call didn't end well within that time; empty if it did."""
    said: list[str] = []

    def attempt() -> None:
        try:
            call()
            said.append("")
        except BaseException as error:
            log.debug("W&B", exc_info=True)
            said.append(_shortly(error))

    thread = threading.Thread(target=attempt, name="W&B's end", daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else f"it didn't end within {seconds:g} s"


class _Queued:
    """A run of W&B whose ``log`` waits in the logger's queue."""

    def __init__(self, logger: Wandb, run: Any) -> None:
        self._logger, self._run = logger, run

    def log(self, data: Mapping[str, Any], step: int | None = None, **arguments: Any) -> None:
        self._logger.log(data, **arguments)  # the number of the step is the logger's

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _abandon() -> None:
    """End W&B's process, and let nothing of it be waited for at this process's end, where W&B would."""
    try:
        import wandb
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.service import service_token

        setup = wandb_setup.singleton()
        connection: Any = setup._connection
        setup._connection = None
        service_token.clear_service_in_env()
        if connection is not None:
            connection._torn_down = True
            connection._finalizer._queue.put(None)  # its thread ends, or would fail with a traceback
            connection._cleanup()
            connection._proc._process.kill()
            connection._proc._process.wait(5)
        if wandb.run is not None:
            setup.remove_active_run(wandb.run)
            wandb.run = None
    except Exception:  # another version of W&B keeps them elsewhere
        log.debug("W&B", exc_info=True)


def _quietly(mode: str) -> AbstractContextManager[None]:
    """Within it W&B starts without a word; it doesn't report its own errors, which fails loudly with the network."""
    reporting = os.environ.get("WANDB_ERROR_REPORTING", "false")
    return _environment(WANDB_SILENT="true", WANDB_MODE=mode, WANDB_ERROR_REPORTING=reporting)


def start_wandb(run: Run, switch: str, config: dict[str, Any]) -> Wandb | None:
    """W&B's logger with its files in the run's folder, or None where it is off or doesn't start. Never asks anything.

    A server that answers at first and then keeps the run from starting is given up after 20 seconds; the run is logged
    offline then. WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_NAME and WANDB_TAGS say where a run belongs, as W&B has it;
    else the group is the recipe and the type the verb.

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
    config = {"recipe": run.recipe, "git_commit": git_commit(), **config}
    for attempt in [mode, *(["offline"] if mode == "online" else [])]:
        try:
            run.wandb, run.offline = _start(run, attempt, config), attempt == "offline"
            return run.wandb
        except Exception as error:
            _abandon()
            then = "it logs offline" if attempt == "online" else "the metrics are in metrics.csv"
            log.warning(f"W&B doesn't start ({' '.join(str(error).split())[:160]}); {then}")
            log.debug("W&B", exc_info=True)
    return None


def _start(run: Run, mode: str, config: dict[str, Any]) -> Wandb:
    import wandb

    settings = wandb.Settings(silent=True, console="off", show_errors=False, show_warnings=False, init_timeout=20)
    if base := os.environ.get("WANDB_BASE_URL"):  # it reads its environment once in a process
        settings.base_url = base
    if "finish_timeout" in type(settings).model_fields:  # it gives up and closes its file a little before we do
        settings.finish_timeout = 0.8 * run.patience
    logger = Wandb(
        run.folder / "wandb" / "last_step",
        project=os.environ.get("WANDB_PROJECT", "perturbation-recipes"),
        name=os.environ.get("WANDB_NAME", f"{run.recipe}-{run.id}"),
        version=os.environ.get("WANDB_RUN_ID", run.id),
        save_dir=str(run.folder),
        group=os.environ.get("WANDB_RUN_GROUP", run.recipe),
        job_type=os.environ.get("WANDB_JOB_TYPE", run.verb),
        tags=[tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag],
        mode=mode,
        settings=settings,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns about the mere argument
    with _quietly(mode):
        logger.begin(config)
    return logger
