"""``python -m tests.laws.ranks FOLDER``: one of two ranks; runs every cell of law 4 and keeps what came out."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
from collections.abc import Iterator
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

#: Settings of recipes under which the loss is another one, beside what tests/laws/cells.py has; by recipe.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adversarial_training": [{"objective": o} for o in ("trades", "mart", "alp", "vat", "fast")],
    "advstyle": [{"task": "retrieval"}],
    "attention_at": [
        {"technique": t}
        for t in ("vanilla", "word_at", "word_iat", "attention_rp", "attention_iat", "attention_vat", "attention_ivat")
    ],
    "classifier": [{"optimizer": "adamw"}],
    "coprompt": [{"technique": t} for t in ("coop", "cocoop", "maple", "promptsrc")],
    "grok": [{"objective": "ce"}],
    "near_features": [{"objective": "mse"}],
    "noise_mask": [{"stage": "plain"}],
    "scalelong": [{"objective": "edm"}, {"min_snr": 5.0}, {"conditional": True, "label_dropout": 0.2}],
}


@contextlib.contextmanager
def variant(recipe: str, settings: dict[str, Any]) -> Iterator[str]:
    """Within it a recipe has other settings; gives the label of its cell."""
    before = cells.RECIPES.get(recipe, {})
    cells.RECIPES[recipe] = {**before, **settings}
    try:
        yield " ".join(map(str, settings.values()))
    finally:
        cells.RECIPES[recipe] = before


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
        for recipe, all_settings in VARIANTS.items():
            for settings in all_settings:
                with variant(recipe, settings) as label:
                    results[recipe, label] = one_process(recipe, right.Nothing, cells.BATCH, devices=2, strategy="ddp")
        for recipe, names in diagnostics.looks_on():
            try:
                found: Any = diagnostics.two_ranks_cell(recipe, names, cells.BATCH, devices=2, strategy="ddp")
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            results[recipe, f"diagnostics {' '.join(names)}"] = found
    (folder / f"{os.environ['LOCAL_RANK']}.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
