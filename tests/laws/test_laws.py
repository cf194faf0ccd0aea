"""The seven laws, for every technique on every recipe; and for each law techniques that break it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.perturbation import Perturbation
from tests.laws import cells, laws, right, wrong
from tests.laws.ranks import OURS

OWN = {cls.__name__: cls for cls in OURS}
TECHNIQUES = sorted(cells.techniques())
RECIPES = sorted(cells.recipes())
PAIRS = [
    *((r, t) for r in RECIPES for t in TECHNIQUES if (r, t) not in cells.APART),
    *((r, "Nothing") for r in RECIPES if r != "classifier"),
    *(("classifier", t) for t in OWN),
]
every = pytest.mark.parametrize(("recipe", "name"), PAIRS)


def find(name: str) -> type[Perturbation]:
    return cells.techniques().get(name) or OWN.get(name) or getattr(wrong, name)


def make(name: str, on: str = "classifier", /, **more: Any) -> laws.Make:
    return functools.partial(cells.technique, find(name), on, **more)


# ---------------------------------------------------------------------- what the laws are applied to


def test_techniques_and_recipes_are_found() -> None:
    assert {"MixStyle", "EFDMix", "DSU", "AdvStyle"} <= set(TECHNIQUES)
    assert {"classifier", "advstyle"} <= set(RECIPES)
    assert {"Nothing", "AscendInput", "AscendWeights"} == set(OWN)
    assert right.AscendInput.site == "input"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_small_here(recipe: str) -> None:
    size = sum(p.numel() for p in cells.recipe(recipe).parameters())
    assert size < 100_000, f"say in tests/laws/cells.py, RECIPES, how recipe '{recipe}' is made small ({size} weights)"


def test_what_is_apart_says_so() -> None:
    for (recipe, name), words in cells.APART.items():
        with pytest.raises(ValueError, match=words) as error:
            cells.trainer(make(name, recipe)()).fit(cells.recipe(recipe), datamodule=cells.data(recipe))
        assert "\n" not in str(error.value)


@every
def test_attaching_goes_by_where_the_weights_are(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Lightning says that the module is there before its weights are."""
    module, runner = cells.recipe(recipe), cells.trainer(max_epochs=0)
    runner.fit(module, datamodule=cells.data(recipe))
    monkeypatch.setattr(type(module), "device", property(lambda self: torch.device("meta")))
    technique = make(name, recipe)()
    technique.attach(module)
    technique.detach(module)


# ---------------------------------------------------------------------- 1


@every
def test_1_no_trace(recipe: str, name: str) -> None:
    laws.no_trace(recipe, make(name, recipe))
    laws.no_trace_of_a_failed_step(recipe, make(name, recipe))


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("LeaksGradient", "crafting left a gradient"),
        ("MovesBatchNorm", "crafting moved the buffers"),
        ("MovesRunningMeans", "crafting moved the buffers"),
        ("ChangesTheBatch", "changed in place"),
        ("ForgetsToRestore", "perturbation is still in"),
        ("LeavesEvaluationMode", "train flags differ"),
        ("FreezesParameters", "gradient flags differ"),
        ("LeavesAHook", "hooks differ"),
        ("AddsToTheGradient", "more than the step's gradient"),
    ],
)
def test_1_bites(name: str, finding: str) -> None:
    with pytest.raises(AssertionError, match=finding):
        laws.no_trace("classifier", make(name))


@pytest.mark.parametrize(
    ("name", "finding"),
    [("RestoresOnlyAfterTheBackwardPass", "left its mark"), ("KeepsItsHookAfterAnError", "hooks are left")],
)
def test_1_bites_where_a_step_fails(name: str, finding: str) -> None:
    laws.no_trace("classifier", make(name))  # no harm otherwise
    with pytest.raises(AssertionError, match=finding):
        laws.no_trace_of_a_failed_step("classifier", make(name))


# ---------------------------------------------------------------------- 2


@every
def test_2_zero_is_nothing(recipe: str, name: str) -> None:
    zero = find(name).zero
    assert zero, f"{name} must say at which settings it does nothing (`zero`)"
    laws.zero_is_nothing(recipe, make(name, recipe, **zero))


@pytest.mark.parametrize("name", ["NotNothingAtZero", "DrawsAtZero"])
def test_2_bites(name: str) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        laws.zero_is_nothing("classifier", make(name, sigma=0.0))


# ---------------------------------------------------------------------- 3


@every
def test_3_off_at_evaluation(recipe: str, name: str) -> None:
    laws.off_at_evaluation(recipe, make(name, recipe))


@pytest.mark.parametrize(
    ("name", "finding"), [("OnAtEvaluation", "saw the technique"), ("MovesWeightsAtEvaluation", "test changed the net")]
)
def test_3_bites(name: str, finding: str) -> None:
    with pytest.raises(AssertionError, match=finding):
        laws.off_at_evaluation("classifier", make(name))


# ---------------------------------------------------------------------- 4


@every
def test_4_two_ranks_are_one(recipe: str, name: str, two_ranks: Any) -> None:
    laws.two_ranks_agree(two_ranks(recipe, name))
    settings = find(name).per_example
    if settings is not None:
        laws.two_ranks_are_one(two_ranks(recipe, f"{name}!"), recipe, make(name, recipe, **settings))


def test_4_bites(two_ranks: Any) -> None:
    with pytest.raises(AssertionError, match="different weights"):
        laws.two_ranks_agree(two_ranks("classifier", "WeightsOfItsOwnRank"))
    with pytest.raises(AssertionError, match="plain DDP stops: .*parameters that were not used"):
        laws.two_ranks_agree(two_ranks("classifier", "LeavesAParameterUnused"))
    laws.two_ranks_agree(two_ranks("classifier", "LooksAtItsRank!"))
    with pytest.raises(AssertionError, match="one process's"):
        laws.two_ranks_are_one(two_ranks("classifier", "LooksAtItsRank!"), "classifier", make("LooksAtItsRank"))


# ---------------------------------------------------------------------- 5


@every
@pytest.mark.parametrize("stop", [3, 5], ids=["at an epoch's end", "in mid-epoch"])
def test_5_resume_is_exact(recipe: str, name: str, stop: int, tmp_path: Path) -> None:
    laws.resume_is_exact(recipe, make(name, recipe), tmp_path, stop)


@pytest.mark.parametrize("name", ["ForgetsWhenResumed", "DrawsGlobally", "ForgetsThatItBegan"])
@pytest.mark.parametrize("stop", [3, 5], ids=["at an epoch's end", "in mid-epoch"])
def test_5_bites(name: str, stop: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="losses"):
        laws.resume_is_exact("classifier", make(name), tmp_path, stop)


# ---------------------------------------------------------------------- 6

COMPOSED = [t for r, t in PAIRS if r == "classifier" and t != "Nothing"]


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in COMPOSED for b in COMPOSED])
def test_6_it_composes(first: str, second: str) -> None:
    laws.composes("classifier", make(first), make(second, name="second"))


@pytest.mark.parametrize("name", [t for r, t in PAIRS if r == "scalelong"])
def test_6_long_skip_connections_compose(name: str) -> None:
    skips = make("LongSkipScaling", "scalelong", name="skips")
    laws.composes("scalelong", skips, make(name, "scalelong"))
    laws.composes("scalelong", make(name, "scalelong"), skips)


def test_6_bites() -> None:
    one = make("RestoresInListOrder")
    laws.no_trace("classifier", one)  # alone it is harmless
    with pytest.raises(AssertionError, match="still in"):
        laws.composes("classifier", one, make("RestoresInListOrder", name="second"))


# ---------------------------------------------------------------------- 7


def compiled(backbone: torch.nn.Module) -> None:
    """Traced as one graph, as for a GPU, but not turned into machine code, which takes long."""
    torch._dynamo.reset()
    backbone.compile(backend="eager", fullgraph=True)


def channels_last(backbone: torch.nn.Module) -> None:
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


@every
def test_7_accumulation(recipe: str, name: str) -> None:
    laws.accumulates(recipe, make(name, recipe))


@every
def test_7_precision_clipping_and_layout(recipe: str, name: str) -> None:
    laws.same_in(recipe, make(name, recipe), 0.1, precision="bf16-mixed")
    laws.same_in(recipe, make(name, recipe), 1e-3, channels_last)
    laws.runs_in(recipe, make(name, recipe), gradient_clip_val=0.01)


@every
def test_7_compiled(recipe: str, name: str) -> None:
    laws.same_in(recipe, make(name, recipe), 1e-3, compiled, limit_val_batches=0)  # validation would be traced anew


@every
@pytest.mark.slow
def test_7_compiled_to_machine_code(recipe: str, name: str) -> None:
    torch._dynamo.reset()
    laws.same_in(recipe, make(name, recipe), 1e-3, torch.nn.Module.compile)


def test_7_bites() -> None:
    with pytest.raises(AssertionError, match="micro-batch"):
        laws.accumulates("classifier", make("DropsAccumulated"))
    with pytest.raises(AssertionError, match="(?i)stops: .*(double|dtype)"):
        laws.same_in("classifier", make("Float64"), 0.1, precision="bf16-mixed")
    with pytest.raises(AssertionError, match="stops: .*view"):
        laws.same_in("classifier", make("ViewsItsFeatures"), 1e-3, channels_last)
    with pytest.raises(AssertionError, match="stops: .*branching"):
        laws.same_in("classifier", make("BranchesOnData"), 1e-3, compiled)
