"""Commands run side by side as processes of their own, all of which end when the user ends us."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from recipes._cli import HOME


class Stopped(RuntimeError):
    """A command isn't started any more: all are being ended."""


class Jobs:
    """Runs commands side by side.

    Args:
        jobs: how many at a time; they share our cores, unless the user has set OMP_NUM_THREADS.
    """

    #: Seconds that a command has to end by itself.
    grace = 20.0

    def __init__(self, jobs: int) -> None:
        self.pool = ThreadPoolExecutor(jobs)
        # Inside a SLURM job (sbatch, salloc) each command is still a run of its own: SLURM's words for ranks that SLURM
        # starts would mislead it.
        given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        threads = str(max(1, cores() // jobs))
        self.environment = {"OMP_NUM_THREADS": threads, **given, "PYTHONPATH": python_path()}
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> int:
        """Run one command to its end. What it says is added to the file ``output``.

        Returns:
            Its exit code.

        Raises:
            Stopped: where :meth:`stop` was called before it began.
        """
        with output.open("a", encoding="utf-8") as opened:
            with self._lock:
                if self._stopped:
                    raise Stopped("stopped")
                process = subprocess.Popen(  # in a group of its own: a terminal's Ctrl-C reaches it once, through us
                    command,
                    stdout=opened,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**self.environment, **(environment or {})},
                    start_new_session=True,
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """End what still runs: ask, and after :attr:`grace` seconds insist (a rank that hangs hears no SIGTERM)."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + self.grace
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # it leads its group and still lives, so the group is ours
                with suppress(ProcessLookupError):  # or has ended just now
                    if hasattr(os, "killpg"):
                        os.killpg(process.pid, signal.SIGKILL)
                    else:  # Windows
                        process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within it Ctrl-C, SIGTERM and a terminal's end raise KeyboardInterrupt, once.

    Yields:
        The signals received: one, or none.
    """
    received: list[int] = []

    def end(signum: int, frame: object) -> None:
        if not received:  # the children are being ended already, within a bounded time
            received.append(signum)
            raise KeyboardInterrupt

    # The children don't hear the terminal, so what it says to us must end them: SIGHUP, too, unless nohup ignores it.
    # (SIGINT may be ignored, too, where a shell started us in the background; who sends it then means it.)
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        signals.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, end) for signum in signals}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def last_lines(output: Path, count: int = 3) -> str:
    """The last lines that a command said, in one."""
    return " / ".join(output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:])


def cores() -> int:
    """How many cores are ours to use: a job on a cluster has its share of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python_path() -> str:
    """PYTHONPATH with which a child finds the same packages as we did."""
    return os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
