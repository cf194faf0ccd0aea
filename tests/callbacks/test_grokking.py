"""The curves of grokking: accuracies counted by hand, an attack whose best point is known, and when they arrive."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.grokking import Grokking, first_reached, value_at
from callbacks.local_complexity import LocalComplexity
from tests.callbacks.small import trainer


class Linear(LightningModule):
    """A user's: pairs, two classes, one linear layer, of which what an attack finds is known."""

    def __init__(self, own_losses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2))
        self.frozen = nn.Parameter(torch.full((3,), 100.0), requires_grad=False)
        if own_losses:
            self.example_losses = lambda batch: self(batch[0]).square().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.5)


def pairs(seed: int, count: int = 40, floats: bool = True) -> DataLoader[Any]:
    x = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x if floats else (9 * x).long(), (x[:, 0] > x[:, 1]).long()), 10)


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    return pairs(seed).dataset.tensors  # type: ignore[attr-defined,no-any-return]


def fit(*watched: Any, module: Any = None, **options: Any) -> Linear:
    module = module or Linear()
    trainer(*watched, **{"max_epochs": 3, **options}).fit(module, pairs(1), pairs(2))
    return module  # type: ignore[no-any-return]


def last(watch: Grokking, key: str) -> float:
    return watch.history[f"{watch.name}/{key}"][-1][1]


# ---------------------------------------------------------------------- what is measured


def test_accuracies_losses_and_the_length_of_the_weights() -> None:
    watch = Grokking(share=None, eps=0)
    module = fit(watch).eval()
    assert watch.steps == list(range(13))
    for part, seed in (("train", 1), ("val", 2)):
        x, y = tensors(seed)
        logits = module(x).detach()
        assert last(watch, f"{part}_acc") == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert last(watch, f"{part}_loss") == pytest.approx(float(F.cross_entropy(logits, y)))
    weights: Any = module.net[1]
    wanted = math.hypot(*weights.weight.flatten().tolist(), *weights.bias.tolist())
    assert last(watch, "weight_norm") == pytest.approx(wanted)  # what is frozen isn't counted
    assert "grokking/robust_acc" not in watch.history


def test_the_loss_is_the_modules_own() -> None:
    watch = Grokking(share=None, eps=0)
    module = fit(watch, module=Linear(own_losses=True)).eval()
    for part, seed in (("train", 1), ("val", 2)):
        assert last(watch, f"{part}_loss") == pytest.approx(module(tensors(seed)[0]).square().sum(1).mean().item())


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_robust_accuracy_is_that_of_the_worst_point_of_the_ball(eps: float, bounds: Any) -> None:
    watch = Grokking(share=None, eps=eps, steps=40, bounds=bounds)
    module = fit(watch).eval()
    x, y = tensors(2)
    linear: Any = module.net[1]
    toward = linear.weight[1] - linear.weight[0]  # the other class's score less its own grows along this, for class 0
    sign = torch.where(y == 0, 1.0, -1.0)[:, None] * toward.detach().sign()
    worst = x + eps * sign
    worst = worst if bounds is None else worst.clamp(*bounds)
    wanted = float((module(worst).argmax(1) == y).float().mean())
    assert last(watch, "robust_acc") == pytest.approx(wanted)
    assert last(watch, "robust_acc") <= last(watch, "val_acc")
    assert 0 < wanted < 1 or eps == 0.3


def test_a_step_of_the_attack_is_alpha() -> None:
    """From a random start a single small step can't reach the worst point; with a large one it does."""
    small = Grokking(share=None, eps=0.2, alpha=1e-6, steps=1, name="small")
    large = Grokking(share=None, eps=0.2, alpha=0.4, steps=1, name="large")
    exact = Grokking(share=None, eps=0.2, steps=50, name="exact")
    fit(small, large, exact)
    assert last(large, "robust_acc") == last(exact, "robust_acc") < last(small, "robust_acc")


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_the_attack_starts_at_random_within_ball_and_box_at_the_same_place_each_time(bounds: Any) -> None:
    class Watched(Linear):
        seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not self.training:
                self.seen.append(x.detach().clone())
            return super().forward(x)

    watch, module = Grokking(share=None, eps=0.3, alpha=1e-9, steps=1, bounds=bounds), Watched()
    Watched.seen = []
    fit(watch, module=module, max_epochs=1)
    starts = [x for x in module.seen if len(x) == 40]
    assert len(starts) == 5 and all(torch.equal(x, starts[0]) for x in starts)
    x = tensors(2)[0]
    near = (starts[0][:, None] - x[None]).abs().amax(2).amin(1)  # of each start the example that is nearest
    assert 0.1 < near.mean() and near.max() <= 0.3 + 1e-6
    assert (starts[0].min() < 0) == (bounds is None) and (starts[0].max() > 1) == (bounds is None)


def test_what_is_wrong_before_the_attack_counts_as_wrong() -> None:
    class OffTheData(Linear):
        """Right everywhere but at the examples themselves."""

        def forward(self, x: Tensor) -> Tensor:
            data, label = tensors(2)
            distance = (x[:, None] - data[None]).abs().amax(2)
            nearest = label[distance.argmin(1)]
            right = F.one_hot(torch.where(distance.amin(1) < 1e-6, 1 - nearest, nearest), 2).float()
            return right + 0 * super().forward(x)

    watch = Grokking(share=None, eps=0.01, steps=1)
    fit(watch, module=OffTheData(), max_epochs=1)
    assert last(watch, "val_acc") == 0 == last(watch, "robust_acc")


def test_it_is_measured_when_local_complexity_is() -> None:
    class Net(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    watch, complexity = Grokking(), LocalComplexity()
    fit(watch, complexity, module=Net(), max_epochs=20)
    assert watch.steps == complexity.steps and len(watch.steps) <= 50


def test_examples_are_left_out_where_they_cost_too_much() -> None:
    watch, other = Grokking(share=1e-6), Grokking(share=None)
    fit(watch)
    assert watch.count == 16
    other.load_state_dict(watch.state_dict())
    fit(other)
    assert other.count == 16  # a run that goes on keeps its examples


# ---------------------------------------------------------------------- when they arrive


def test_first_reached() -> None:
    curve = [[0, 0.1], [1, 0.5], [4, 0.9], [9, 0.6]]
    assert [first_reached(curve, level) for level in (0.0, 0.1, 0.5, 0.51, 0.9)] == [0, 0, 1, 4, 4]
    assert math.isnan(first_reached(curve, 0.91))
    assert [value_at(curve, step) for step in (0, 3, 4, 100)] == [0.1, 0.5, 0.9, 0.6]
    assert math.isnan(value_at(curve, -1))


CURVES = {
    "train_acc": [0.1, 0.5, 1.0, 1.0, 1.0],
    "val_acc": [0.1, 0.2, 0.4, 0.9, 0.8],
    "robust_acc": [0.0, 0.1, 0.6, 0.3, 0.5],
}


def concluded(watch: Grokking) -> dict[str, float]:
    for key, values in CURVES.items():
        watch.history[f"grokking/{key}"] = [[step, v] for step, v in zip((0, 10, 100, 1000, 9000), values, strict=True)]
    return watch.conclude(None, None)  # type: ignore[arg-type,return-value]


def test_delays_to_a_part_of_the_own_end() -> None:
    assert concluded(Grokking()) == pytest.approx(
        {
            **{"train_step": 100, "val_step": 1000, "robust_step": 100},
            **{"val_delay": 900, "robust_delay": 0},
            **{"robust_peak": 0.6, "robust_peak_step": 100, "robust_end": 0.5, "robust_late_gain": -0.1},
        }
    )


def test_delays_to_a_given_level() -> None:
    found = concluded(Grokking(level=0.5))
    assert (found["train_step"], found["val_step"], found["robust_step"]) == (10, 1000, 100)
    assert (found["val_delay"], found["robust_delay"]) == (990, 90)
    assert found["robust_late_gain"] == pytest.approx(0.5 - 0.1)
    never = concluded(Grokking(level=0.95))
    assert never["train_step"] == 100 and math.isnan(never["val_step"]) and math.isnan(never["robust_delay"])


def test_without_an_attack_nothing_is_said_of_it() -> None:
    assert set(concluded(Grokking(eps=0))) == {"train_step", "val_step", "val_delay"}


def test_the_end_of_a_run_is_logged() -> None:
    watch = Grokking(share=None)
    fit(watch)
    found = watch.conclude(None, None)  # type: ignore[arg-type]
    for key, value in found.items():
        assert watch.history[f"grokking/{key}"] == [[12, value]]


# ---------------------------------------------------------------------- refusals, picture


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grokking(eps=-0.1), "eps must not be negative"),
        (lambda: Grokking(alpha=0), "alpha must be positive"),
        (lambda: Grokking(steps=0), "steps must be at least 1"),
        (lambda: Grokking(points=0), "points must be at least 1"),
        (lambda: Grokking(level=0), "level must lie in (0, 1]"),
        (lambda: Grokking(level=1.1), "level must lie in (0, 1]"),
        (lambda: Grokking(measurements=2), "at least 3 measurements"),
    ],
)
def test_settings_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_inputs_that_cannot_be_attacked() -> None:
    class Words(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 9)

    loaders = pairs(1, floats=False), pairs(2, floats=False)
    with pytest.raises(ValueError, match="Grokking attacks inputs, but .* or set eps 0") as error:
        trainer(Grokking()).fit(Words(), *loaders)
    assert "\n" not in str(error.value)
    watch = Grokking(eps=0, share=None)
    trainer(watch).fit(Words(), *loaders)
    assert watch.steps == [0, 1, 2, 3, 4]


def test_the_picture() -> None:
    watch = Grokking(share=None)
    assert watch.draw() is None
    fit(watch)
    figure = watch.draw()
    assert figure is not None
    left = figure.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    assert list(lines)[:1] == ["train"] and "val" in lines and "val, PGD within 0.0314" in lines
    assert list(lines["val"]) == [v for _, v in watch.history["grokking/val_acc"]]
    assert {line.get_label() for line in figure.axes[1].get_lines()} == {"train loss", "val loss"}
    without = Grokking(share=None, eps=0)
    fit(without)
    assert without.draw() is not None
