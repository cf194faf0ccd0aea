"""The seven laws, for every technique on every recipe; and for each law a technique that breaks it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws import cells, laws, wrong

TECHNIQUES = sorted(cells.techniques())
RECIPES = sorted(cells.recipes())
every = pytest.mark.parametrize(("recipe", "name"), [(r, t) for r in RECIPES for t in TECHNIQUES])


def make(name: str, /, **more: Any) -> laws.Make:
    cls = cells.techniques().get(name) or getattr(wrong, name)
    return functools.partial(cells.technique, cls, **more)


def test_techniques_and_recipes_are_found() -> None:
    assert {"MixStyle", "EFDMix", "DSU", "AdvStyle"} <= set(TECHNIQUES)
    assert {"classifier", "advstyle"} <= set(RECIPES)


@every
def test_1_no_trace(recipe: str, name: str) -> None:
    laws.no_trace(recipe, make(name))
    laws.no_trace_of_a_failed_step(recipe, make(name))


@pytest.mark.parametrize("name", ["LeaksGradient", "MovesBatchNorm", "ChangesTheBatch", "ForgetsToRestore"])
def test_1_bites(name: str) -> None:
    with pytest.raises(AssertionError):
        laws.no_trace("classifier", make(name))


def test_1_bites_where_a_step_fails() -> None:
    with pytest.raises(AssertionError, match="failed step"):
        laws.no_trace_of_a_failed_step("classifier", make("RestoresOnlyAfterTheBackwardPass"))


@every
def test_2_zero_is_nothing(recipe: str, name: str) -> None:
    zero = cells.techniques()[name].zero
    assert zero, f"{name} must say at which settings it does nothing (`zero`)"
    laws.zero_is_nothing(recipe, make(name, **zero))


def test_2_bites() -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        laws.zero_is_nothing("classifier", make("NotNothingAtZero", sigma=0.0))


@every
def test_3_off_at_evaluation(recipe: str, name: str) -> None:
    laws.off_at_evaluation(recipe, make(name))


def test_3_bites() -> None:
    with pytest.raises(AssertionError, match="saw the technique"):
        laws.off_at_evaluation("classifier", make("OnAtEvaluation"))


@every
def test_4_two_ranks_are_one(recipe: str, name: str, two_ranks: Any) -> None:
    laws.two_ranks_agree(two_ranks(recipe, name))
    settings = cells.techniques()[name].per_example
    if settings is not None:
        laws.two_ranks_are_one(two_ranks(recipe, f"{name}!"), recipe, make(name, **settings))


def test_4_bites(two_ranks: Any) -> None:
    with pytest.raises(AssertionError, match="different weights"):
        laws.two_ranks_agree(two_ranks("classifier", "WeightsOfItsOwnRank"))
    laws.two_ranks_agree(two_ranks("classifier", "LooksAtItsRank!"))
    with pytest.raises(AssertionError, match="one process's"):
        laws.two_ranks_are_one(two_ranks("classifier", "LooksAtItsRank!"), "classifier", make("LooksAtItsRank"))


@every
@pytest.mark.parametrize("stop", [3, 5], ids=["at an epoch's end", "in mid-epoch"])
def test_5_resume_is_exact(recipe: str, name: str, stop: int, tmp_path: Path) -> None:
    laws.resume_is_exact(recipe, make(name), tmp_path, stop)


@pytest.mark.parametrize("name", ["ForgetsWhenResumed", "DrawsGlobally"])
def test_5_bites(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="losses"):
        laws.resume_is_exact("classifier", make(name), tmp_path, 5)


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in TECHNIQUES for b in TECHNIQUES])
def test_6_it_composes(first: str, second: str) -> None:
    laws.composes("classifier", make(first), make(second, name="second"))


def test_6_bites() -> None:
    one = make("RestoresInListOrder")
    laws.no_trace("classifier", one)  # alone it is harmless
    with pytest.raises(AssertionError, match="still in"):
        laws.no_trace("classifier", one, make("RestoresInListOrder", name="second"))


@every
def test_7_accumulation(recipe: str, name: str) -> None:
    laws.accumulates(recipe, make(name))


@every
def test_7_precision_clipping_and_layout(recipe: str, name: str) -> None:
    plain = laws.runs_in(recipe, make(name))
    half = laws.runs_in(recipe, make(name), precision="bf16-mixed")
    assert half == pytest.approx(plain, rel=0.1)
    laws.runs_in(recipe, make(name), gradient_clip_val=0.01)
    assert laws.runs_in(recipe, make(name), channels_last=True)[0] == pytest.approx(plain[0], rel=1e-4)


@every
@pytest.mark.slow
def test_7_compiled(recipe: str, name: str) -> None:
    torch._dynamo.reset()
    assert laws.runs_in(recipe, make(name), compile=True) == pytest.approx(laws.runs_in(recipe, make(name)), rel=1e-3)


def test_7_bites() -> None:
    with pytest.raises(AssertionError, match="micro-batch"):
        laws.accumulates("classifier", make("DropsAccumulated"))
    with pytest.raises(Exception, match="(?i)double|dtype"):
        laws.runs_in("classifier", make("Float64"), precision="bf16-mixed")
