"""Two ranks, started once for all cells of law 4."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ranks = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """``two_ranks(recipe, technique)``: per rank, the weights after each step, or the error as text."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    common["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.laws.ranks", str(folder)]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(command, cwd=root, env={**common, "LOCAL_RANK": str(r), "RANK": str(r)}) for r in range(2)
    ]
    try:
        for process in running:
            assert process.wait(timeout=900) == 0
    finally:
        for process in running:
            process.kill()
    results = [pickle.loads((folder / f"{r}.pkl").read_bytes()) for r in range(2)]

    def of(recipe: str, technique: str) -> Any:
        return [result[recipe, technique] for result in results]

    return of
