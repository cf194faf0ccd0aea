"""Two ranks, started once for all cells of law 4."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.processes import ranks

Ranks = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """``two_ranks(recipe, technique)``: per rank, the weights after each step, or the error as text."""
    folder = tmp_path_factory.mktemp("ranks")
    ends = ranks([sys.executable, "-m", "tests.laws.ranks", str(folder)], 2, folder, 1500)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    results = [pickle.loads((folder / f"{r}.pkl").read_bytes()) for r in range(2)]

    def of(recipe: str, technique: str) -> Any:
        return [result[recipe, technique] for result in results]

    return of
