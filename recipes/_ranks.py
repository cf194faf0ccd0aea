"""All ranks of a run end together: the error of one is shown once, by the first rank, and no rank waits for a dead one.

A collective operation waits for a rank that failed until its timeout, which is half an hour. So each rank keeps a
connection to the first one, over which it says that it failed and learns that another did. A connection also ends, at
once and on any node, with the process that held it: so a rank that was killed is missed, however it went.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

from recipes import _errors
from recipes._atomic import not_written
from recipes._stop import Interrupted, Signals

log = logging.getLogger(__name__)
#: Seconds in which a rank that learned of a failure may end by itself (close its files) before it is ended.
GRACE = 5.0
#: Seconds in which a better explanation may come than that a connection to another rank was lost.
SETTLE = 3.0
#: Seconds in which other ranks follow one that stopped at a signal.
FOLLOW = 15.0
#: How a lost rank shows in the others' collective operations.
_AFTERMATH = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "ncclRemoteError",
    "communicator was aborted",
    "Watchdog caught collective operation timeout",
)


@dataclass
class Verdict:
    """Why a run ended: the rank, the line that says it, hints, exit code and traceback."""

    rank: int
    line: str
    hints: list[str]
    code: int
    trace: str = ""
    #: The line alone says what to do: no traceback is pointed to.
    plain: bool = False
    #: 2: this rank's own error; 1: it is gone; 0: it lost the connection to another, or stopped at a signal.
    weight: int = 2


def verdict_of(rank: int, error: BaseException) -> Verdict:
    """What a rank says of its own error."""
    import traceback

    if isinstance(error, Interrupted):
        return Verdict(rank, f"stopped by {error}", [], error.code, weight=0)
    error = not_written(error) or error  # whatever came of it
    message, hints = _errors.describe(error)
    bad = _errors.is_bad_input(error)
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _AFTERMATH)
    line = message if bad else f"{type(error).__name__}: {message}"
    trace = "".join(traceback.format_exception(error))
    plain = bad and bool(hints or _errors.raised_here(error))
    return Verdict(rank, line, hints, 2 if bad else 1, trace, plain, weight=0 if lost else 2)


def gone(rank: int) -> Verdict:
    """What is said of a rank whose connection ended without a word."""
    hint = "killed from outside, out of memory, or its machine is down: see the system's log of that rank's node"
    return Verdict(rank, f"rank {rank} is gone without a word", [hint], 1, weight=1)


class Ranks(Callback):
    """Connects the ranks of a run and ends them together; to be the first callback, so that it hears of errors first.

    Args:
        signals: those that end a run; where it fails, they are ignored.
        end_now: called with the verdict in a rank that doesn't end by itself, before it is ended; says and closes.
        begins: what this rank begins with, which all of them must, as ``rank 3 <begins>``.
    """

    def __init__(self, signals: Signals, end_now: Callable[[Verdict], None], begins: str = "") -> None:
        self.signals, self.end_now, self.begins = signals, end_now, begins
        self.verdict: Verdict | None = None
        self._known = threading.Event()
        self._done = threading.Event()
        self._socket: socket.socket | None = None
        self._desk: _Desk | None = None
        self._lock = threading.Lock()
        self._rank = 0
        self._tried = False
        self._own: Verdict | None = None
        self._has_said = False

    def follow(self, trainer: Trainer) -> None:
        """Connect as soon as the trainer's strategy has: the first hook of a callback comes after the data is read."""
        connect_strategy = trainer.strategy.setup_environment

        def setup_environment() -> None:
            connect_strategy()
            self._connect(trainer)

        vars(trainer.strategy)["setup_environment"] = setup_environment

    def _connect(self, trainer: Trainer) -> None:
        if trainer.world_size == 1 or self._tried:
            return
        self._tried = True  # on all ranks alike, also where it fails: what follows is a collective operation
        self._rank = trainer.global_rank
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = getattr(environment, "main_address", "127.0.0.1")
        own: tuple[int, str, str] = (0, "", self.begins)
        if self._rank == 0:
            try:
                self._desk = _Desk(host, trainer.world_size)
                own = (self._desk.port, self._desk.token, self.begins)
            except OSError as error:
                log.debug("the first rank can't be reached: %s", error)
        port, token, begins = trainer.strategy.broadcast(own)
        try:
            connection = socket.create_connection((host, port), timeout=20)
            connection.settimeout(None)
            _keep_alive(connection)
        except OSError as error:  # as it was before: a launcher or a timeout ends this rank
            log.warning(
                f"rank {self._rank} isn't watched, and the others may wait for it in vain where it fails: it doesn't "
                f"reach the first rank at {host}:{port} ({error})"
            )
        else:
            self._socket = connection
            self._say({"token": token, "hello": self._rank})
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._forget)  # or a loader's worker would hold the connection
            threading.Thread(target=self._listen, name="ranks", daemon=True).start()
        if begins != self.begins:
            raise ValueError(
                f"rank {self._rank} {self.begins}, the first rank {begins}: is that folder the same on all nodes?"
            )

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.tell(verdict_of(self._rank, exception))

    # ------------------------------------------------------------------ this rank's part

    def tell(self, own: Verdict) -> None:
        """Say that this rank fails, or stops at a signal; only the first time counts."""
        if self._own is None:
            self._own = own
            self.signals.ending = self._own.code < 128
            self._say({"failed": asdict(self._own)})

    def agreed(self) -> Verdict | None:
        """What all ranks end with, waiting for it if this rank has told an error; None where it stands alone,
        as it also does when the first rank has ended well before."""
        if self._socket is not None and self._own is not None and self._own.code < 128:
            self._known.wait(2 * SETTLE)
        return self.verdict

    def says(self, verdict: Verdict) -> bool:
        """Whether it is this rank, now, that says it: the first one, or the second where the first is gone."""
        with self._lock:
            before, self._has_said = self._has_said, True
        return not before and self._rank == (1 if verdict.weight == 1 and verdict.rank == 0 else 0)

    def end(self) -> Verdict | None:
        """This rank ends by itself: with the run's good end, or after :meth:`agreed`.

        Returns:
            What all ranks were told before; where this one ended well, another didn't.
        """
        self._done.set()
        if self._desk is not None:
            self.verdict = self._desk.close(well=self._own is None) or self.verdict
        if self._socket is not None:
            if self.verdict is not None and self.verdict.weight > 0:
                threading.Thread(target=_end_with_python, args=[self.verdict.code], daemon=True).start()
            self._say({"bye": True})
        self._forget()
        return self.verdict

    def _say(self, what: dict[str, Any]) -> None:
        try:
            assert self._socket is not None
            self._socket.sendall(json.dumps(what).encode() + b"\n")
        except (OSError, AssertionError):
            pass

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._desk is not None:
            self._desk.forget()

    def _listen(self) -> None:
        connection = self._socket
        assert connection is not None
        verdict = None
        try:
            with connection.makefile("rb") as lines:
                line = lines.readline()
            said = json.loads(line) if line else {"end": asdict(gone(0))}
            verdict = Verdict(**said["end"]) if "end" in said else None
        except (OSError, ValueError):
            verdict = gone(0)
        if verdict is None or self._done.is_set():
            self._known.set()
            return
        self.verdict, self.signals.ending = verdict, verdict.weight > 0
        self._known.set()
        if not self._done.wait(GRACE):
            try:
                self.end_now(verdict)
            finally:
                os._exit(verdict.code)


def _end_with_python(code: int) -> None:
    """A communicator of lost ranks may never close; daemons still run while the interpreter ends."""
    threading.main_thread().join()
    time.sleep(2 * GRACE)
    os._exit(code)


def _keep_alive(connection: socket.socket) -> None:
    """A machine that is off ends no connection; half a minute of silence does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Desk:
    """In the first rank: hears all ranks, its own too, and tells all of them when one fails."""

    def __init__(self, host: str, ranks: int) -> None:
        if host in ("127.0.0.1", "localhost"):
            self.listener = socket.create_server(("127.0.0.1", 0), backlog=ranks)
        elif host == "::1":
            self.listener = socket.create_server((host, 0), family=socket.AF_INET6, backlog=ranks)
        elif socket.has_dualstack_ipv6():
            self.listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=ranks)
        else:
            self.listener = socket.create_server(("", 0), backlog=ranks)
        self.port, self.token = self.listener.getsockname()[1], secrets.token_hex(16)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, int | None] = {}  # its rank, once it has said it
        self._closed = False
        self._candidate: Verdict | None = None
        self._told: Verdict | None = None
        self._deadline = 0.0
        threading.Thread(target=self._serve, name="ranks' desk", daemon=True).start()

    def forget(self) -> None:
        """In a fork: leave the connections to the process that was forked."""
        self.listener.close()
        for each in list(self._open):
            each.close()

    def close(self, well: bool) -> Verdict | None:
        """The first rank ends by itself, so nobody waits for it any more; the others end at their own pace.

        Args:
            well: it didn't fail. Then a rank that does says so itself, unless all were told before.

        Returns:
            What all ranks were told.
        """
        with self._lock:
            if not self._closed and self._told is None:
                self._told = None if well else self._candidate
                self._tell_all({"end": asdict(self._told)} if self._told else {"bye": True})
            self._closed = True
            return self._told

    def _serve(self) -> None:
        pieces: dict[socket.socket, bytes] = {}
        with selectors.DefaultSelector() as events:
            events.register(self.listener, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in events.select(0.2 if self._candidate else 1.0):
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is self.listener:
                        try:
                            new, _ = self.listener.accept()
                            _keep_alive(new)
                        except OSError:  # it was closed, or who called has gone
                            continue
                        self._open[new], pieces[new] = None, b""
                        events.register(new, selectors.EVENT_READ)
                        continue
                    try:
                        piece = connection.recv(65536)
                    except OSError:
                        piece = b""
                    *lines, pieces[connection] = (pieces[connection] + piece).split(b"\n")
                    leaves = not piece or len(pieces[connection]) > 1 << 20
                    for line in lines:
                        leaves = not self._hear(connection, line) or leaves
                    if leaves:
                        events.unregister(connection)
                        rank = self._open.pop(connection)
                        connection.close()
                        if rank is not None:
                            self._consider(gone(rank))
                if self._candidate and time.monotonic() > self._deadline:
                    with self._lock:
                        if not self._closed and any(rank is not None for rank in self._open.values()):
                            self._told = self._candidate
                            self._tell_all({"end": asdict(self._told)})
                    return

    def _hear(self, connection: socket.socket, line: bytes) -> bool:
        """Take in one message; False from a stranger."""
        try:
            said = json.loads(line)
            if said.get("token") == self.token:
                self._open[connection] = int(said["hello"])
            elif self._open[connection] is None:
                return False
            elif "bye" in said:
                self._open[connection] = None  # it may leave
            elif "failed" in said:
                self._consider(Verdict(**said["failed"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def _consider(self, new: Verdict) -> None:
        """Of several explanations the best: an own error before a lost rank, then the lowest rank's."""
        old, now = self._candidate, time.monotonic()
        wait = 0.3 if new.weight == 2 else 1.0 if new.weight == 1 else FOLLOW if new.code > 128 else SETTLE
        self._deadline = now + wait if old is None else min(self._deadline, now + wait)
        if old is None or (-new.weight, new.rank) < (-old.weight, old.rank):
            self._candidate = new

    def _tell_all(self, what: dict[str, Any]) -> None:
        for connection in list(self._open):
            try:
                connection.sendall(json.dumps(what).encode() + b"\n")
            except OSError:
                pass


@contextmanager
def launched(end_now: Callable[[Verdict], None], connected: Callable[[], bool]) -> Iterator[None]:
    """Within it, ranks that Lightning's launcher starts are watched by us until they are connected.

    Lightning's own observer kills this process, within five seconds and without a word, where one of them fails.
    """

    def observe(processes: list[subprocess.Popen[bytes]]) -> None:
        def watch() -> None:
            while not connected() and any(process.poll() is None for process in processes):
                for rank, process in enumerate(processes, 1):
                    if process.poll():
                        time.sleep(GRACE)  # it may be this rank's error, too
                        if not connected():
                            line = f"rank {rank} ended with {process.returncode} before the ranks were connected"
                            end_now(Verdict(rank, line, ["its own error is above"], 1))
                            os._exit(1)
                time.sleep(0.5)

        threading.Thread(target=watch, name="launched", daemon=True).start()

    before = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = observe  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = before
