"""The evaluator from outside: what is logged, on which examples, and what it says of bad defences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.robustness import RobustAccuracy, sanity, wilson
from tests.laws import cells


def evaluated(verb: str, folder: Path, *, module: Any = None, size: int = 40, **settings: Any) -> dict[str, float]:
    evaluator = RobustAccuracy(**{"eps": 0.02, "steps": 5, "restarts": 2, "val_steps": 3, **settings})
    runner = cells.trainer(evaluator, default_root_dir=folder)
    module = module or cells.recipe("classifier")
    getattr(runner, verb)(module, datamodule=cells.data("classifier", size=size), verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


@pytest.mark.parametrize(("verb", "stage"), [("validate", "val"), ("test", "test")])
def test_attacks_run_within_lightnings_inference_mode(verb: str, stage: str, tmp_path: Path) -> None:
    module = cells.recipe("classifier")
    before = {n: v.clone() for n, v in module.state_dict().items()}
    found = evaluated(verb, tmp_path, module=module)
    assert found[f"{stage}/clean_acc"] == pytest.approx(found["val/acc" if stage == "val" else "test/acc"])
    for name in ("pgd", "fgsm"):
        assert found[f"{stage}/robust_acc"] <= found[f"{stage}/{name}_acc"] <= found[f"{stage}/clean_acc"]
    assert not cells.differing(before, module.state_dict())
    assert all(p.grad is None for p in module.parameters())


def test_a_test_leaves_a_curve_a_plot_and_an_interval(tmp_path: Path) -> None:
    found = evaluated("test", tmp_path)
    result = json.loads((tmp_path / "robustness.json").read_text())
    assert result["examples"] == 40 and result["eps"] == 0.02
    radii, values = zip(*result["curve"], strict=True)
    assert list(radii) == sorted(radii) and radii[0] == 0 and values[0] == pytest.approx(found["test/clean_acc"])
    assert list(values) == sorted(values, reverse=True)
    assert (tmp_path / "plots" / "robustness.png").stat().st_size > 5000
    assert found["test/robust_acc_low"] <= found["test/robust_acc"] <= found["test/robust_acc_high"]


def test_the_budget_is_kept_and_the_examples_are_the_same_each_time(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watched(RobustAccuracy):
        def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(sorted(key for _, _, keys in self._kept for key in keys.tolist()))
            super().on_test_epoch_end(trainer, pl_module)

    for batch in (4, 7):
        runner = cells.trainer(Watched(eps=0.02, steps=1, restarts=1, budget=10), default_root_dir=tmp_path)
        data = cells.data("classifier", size=40, batch_size=batch)
        runner.test(cells.recipe("classifier"), datamodule=data, verbose=False)
    assert len(seen[0]) == 10 and seen[0] == seen[1] and seen[0] != list(range(10))


def test_validation_in_a_fit_logs_the_gap_and_changes_nothing_of_training(tmp_path: Path) -> None:
    plain, watched = cells.recipe("classifier"), cells.recipe("classifier")
    cells.trainer(max_epochs=2).fit(plain, datamodule=cells.data("classifier"))
    runner = cells.trainer(RobustAccuracy(eps=0.02, val_steps=2), max_epochs=2, default_root_dir=tmp_path)
    runner.fit(watched, datamodule=cells.data("classifier"))
    assert not cells.differing(cells.weights(plain), cells.weights(watched))
    assert {"val/robust_acc", "val/robust_gap"} <= runner.callback_metrics.keys()


def test_a_linear_classifier_holds_as_far_as_its_margin(tmp_path: Path) -> None:
    """Two classes, logits (s, -s) with s the mean pixel less 1/2: PGD moves s by eps at most, and FGSM by just that."""

    class Mean(type(cells.recipe("classifier"))):  # type: ignore[misc]
        def forward(self, image: Tensor) -> Tensor:
            s = image.mean((1, 2, 3)) - 0.5
            return torch.stack([s, -s, torch.full_like(s, -9.0)], 1)

    module = cells.recipe("classifier")
    module.__class__ = Mean
    runner = cells.trainer(RobustAccuracy(eps=0.01, steps=10), default_root_dir=tmp_path)
    data = cells.data("classifier", size=60)
    runner.test(module, datamodule=data, verbose=False)
    part = data.part("test")
    s = part.images.double().div(255).mean((1, 2, 3)) - 0.5
    label = part.entries["label"]
    margin = torch.where(label == 0, s, torch.where(label == 1, -s, torch.full_like(s, -1)))
    # a pixel at the box's edge can't move all the way: the mean moves a little less than eps
    low, high = (float((margin > m).double().mean()) for m in (0.01, 0.0097))
    found = {n: float(v) for n, v in runner.callback_metrics.items()}
    assert low - 1e-6 <= found["test/pgd_acc"] <= high + 1e-6
    assert found["test/fgsm_acc"] == found["test/pgd_acc"]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        ({"clean": 0.8, "noise": 0.78, "fgsm": 0.4, "pgd": 0.3, "large": 0.0}, []),
        ({"clean": 0.8, "fgsm": 0.3, "pgd": 0.6}, ["FGSM is stronger than PGD"]),
        ({"clean": 0.8, "pgd": 0.5, "square": 0.4}, ["Square attack is stronger than PGD"]),
        ({"clean": 0.8, "pgd": 0.9}, ["the attack doesn't work"]),
        ({"clean": 0.8, "pgd": 0.7, "noise": 0.5}, ["random noise is stronger"]),
        ({"clean": 0.8, "pgd": 0.5, "autoattack": 0.2}, ["AutoAttack is far stronger"]),
        ({"clean": 0.8, "pgd": 0.5, "large": 0.2}, ["covers all images"]),
    ],
)
def test_the_rules_say_what_is_suspicious(accuracy: dict[str, float], words: list[str]) -> None:
    found = sanity(accuracy, 1000)
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found, strict=True))


def test_a_defence_that_hides_its_gradient_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Masked(type(cells.recipe("classifier"))):  # type: ignore[misc]
        def forward(self, image: Tensor) -> Tensor:
            return super().forward((image * 8).round() / 8 + 0 * image)

    module = cells.recipe("classifier")
    module.__class__ = Masked
    evaluator = RobustAccuracy(eps=0.02, steps=3, restarts=1)
    cells.trainer(evaluator, default_root_dir=tmp_path).test(
        module, datamodule=cells.data("classifier", size=40), verbose=False
    )
    assert any("covers all images" in words for words in evaluator.result["broken"])


def test_the_interval_is_wilsons() -> None:
    # by hand: n = 100, p = .3, z = 1.96: centre (.3 + .019208) / 1.038416, reach .091...
    low, high = wilson(30, 100)
    assert low == pytest.approx(0.2189, abs=2e-4) and high == pytest.approx(0.3958, abs=2e-4)
    assert wilson(0, 50)[0] == 0 and 0 < wilson(0, 50)[1] < 0.1


def test_autoattack_is_no_weaker_than_pgd(tmp_path: Path) -> None:
    found = evaluated("test", tmp_path, size=8, autoattack=True, eps=0.004)
    assert found["test/robust_acc"] <= found["test/autoattack_acc"] <= found["test/clean_acc"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"steps": 0}, "steps must be at least 1"), ({"eps": 0.0}, "eps must be positive")],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RobustAccuracy(**settings)


def test_a_module_without_a_radius_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RobustAccuracy needs eps"):
        evaluated("test", tmp_path, eps=None)
