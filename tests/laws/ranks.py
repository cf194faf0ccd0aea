"""``python -m tests.laws.ranks FOLDER``: one of two ranks; runs every cell of law 4 and keeps what came out."""

from __future__ import annotations

import functools
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from callbacks.perturbation import Perturbation
from recipes._run import quiet
from tests.laws import cells, diagnostics, right, wrong
from tests.laws.laws import one_process

#: Beside what is found in callbacks/, on the classifier.
OURS = (right.Nothing, right.AscendInput, right.AscendWeights)
WRONG = (wrong.WeightsOfItsOwnRank, wrong.LooksAtItsRank, wrong.LeavesAParameterUnused)


def wanted() -> dict[tuple[str, str], tuple[type[Perturbation], dict[str, Any]]]:
    """(recipe, label) -> technique and its arguments; the label ends in ``!`` where two ranks must be one process."""
    found: dict[tuple[str, str], tuple[type[Perturbation], dict[str, Any]]] = {}
    for recipe in cells.recipes():
        plain = [right.Nothing] if recipe != "classifier" else []
        for cls in [*cells.techniques().values(), *plain, *((*OURS, *WRONG) if recipe == "classifier" else ())]:
            if (recipe, cls.__name__) not in cells.APART:
                found[recipe, cls.__name__] = (cls, {})
                if cls.per_example is not None:
                    found[recipe, f"{cls.__name__}!"] = (cls, dict(cls.per_example))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[tuple[str, str], Any] = {}
    with quiet():
        for (recipe, label), (cls, arguments) in wanted().items():
            make = functools.partial(cells.technique, cls, recipe, **arguments)
            try:
                results[recipe, label] = one_process(recipe, make, cells.BATCH, devices=2, strategy="ddp")
            except Exception as error:  # whatever it is, it belongs to this cell alone and is reported there
                results[recipe, label] = f"{type(error).__name__}: {error}"
        for recipe, names in diagnostics.looks_on():
            try:
                found: Any = diagnostics.two_ranks_cell(recipe, names, cells.BATCH, devices=2, strategy="ddp")
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            results[recipe, f"diagnostics {' '.join(names)}"] = found
    (folder / f"{os.environ['LOCAL_RANK']}.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
