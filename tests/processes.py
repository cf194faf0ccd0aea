"""What a command runs, and ranks of a process group on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recipes._cli import HOME


def model_of(recipe: str) -> str:
    """The dotted class that ``recipes/<recipe>/__main__.py`` runs."""
    text = (HOME / "recipes" / recipe / "__main__.py").read_text(encoding="utf-8")
    return text.partition('run("')[2].partition('"')[0]


class Ended(NamedTuple):
    """How a rank ended, and what it said."""

    code: int
    out: str
    err: str


def ranks(command: Sequence[str], world: int, folder: Path, seconds: float) -> list[Ended]:
    """Run a command as each of the ranks, one thread each, until the last has ended.

    Args:
        command: of every rank.
        world: how many; a single one is no group.
        folder: for what they say.
        seconds: until all that still run are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    if world > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    said = [[folder / f"rank-{world}-{rank}.{kind}" for kind in ("out", "err")] for rank in range(world)]
    running = []
    end = time.monotonic() + seconds
    try:
        for rank, files in enumerate(said):
            place = {"LOCAL_RANK": str(rank), "RANK": str(rank)} if world > 1 else {"LOCAL_RANK": "0"}
            with files[0].open("wb") as out, files[1].open("wb") as err:  # a full pipe would hold all ranks up
                running.append(subprocess.Popen(command, cwd=HOME, env={**common, **place}, stdout=out, stderr=err))
        codes = [process.wait(max(0.0, end - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(code, *(file.read_text() for file in files)) for code, files in zip(codes, said, strict=True)]
