"""Opposing signals: groups and numbers by hand, what is planted, what is dropped, and the causal test in the small."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.opposing_signals import (
    DropGroups,
    OpposingSignals,
    PlantOpposingOutliers,
    class_separation,
    cosine,
    extreme_groups,
    loss_mass,
    odd_period,
)
from callbacks.perturbation import parameter_groups
from callbacks.report import Report
from datamodules.digits import Digits
from datamodules.images import ImageDataModule, ImageSet
from tests.callbacks.small import trainer

SIDE = 8


class Noise(ImageDataModule):
    """Random grey images of 8 pixels, two classes by turns."""

    num_classes, image_size, in_chans = 2, SIDE, 1

    def __init__(self, size: int = 24, batch_size: int = 24, translate: float = 0.0) -> None:
        super().__init__(batch_size, flip=False, translate=translate, seed=3)
        self.class_names, self.domain_names, self.size = ["a", "b"], ["all"], size

    def load(self, part: str) -> ImageSet:
        g = torch.Generator().manual_seed(len(part))
        label = torch.arange(self.size) % 2
        images = torch.randint(256, (self.size, 1, SIDE, SIDE), generator=g, dtype=torch.uint8)
        return ImageSet(images, {"label": label, "domain": torch.zeros_like(label)})


class Linear(LightningModule):
    """Logistic regression; keeps what each step saw, and the gradient of each step."""

    class_names = ("a", "b")

    def __init__(self, lr: float = 0.1, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE * SIDE, classes))
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone(image)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append({name: value.clone() for name, value in batch.items()})
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen_in_validation = batch["image"].clone()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(parameter_groups(self, lr=self.lr))


class Steps(Callback):
    """The weights after each step, by the number of steps."""

    def __init__(self) -> None:
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: Any, module: Any) -> None:
        layer = module.backbone[1]
        self.weights[trainer.global_step] = (layer.weight.detach().clone(), layer.bias.detach().clone())


def fit(*callbacks: Any, data: Any = None, module: Any = None, epochs: int = 12, **options: Any) -> Any:
    module = module or Linear()
    runner = trainer(*callbacks, max_epochs=epochs, use_distributed_sampler=False, **options)
    runner.fit(module, datamodule=data or Noise())
    return module


# ---------------------------------------------------------------------- the mathematics


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=30), st.data())
@settings(deadline=None, max_examples=50)
def test_extreme_groups_are_the_ends_of_the_order(values: list[float], data: Any) -> None:
    q = data.draw(st.integers(1, len(values) // 2))
    up, down = extreme_groups(torch.tensor(values), q)
    assert [values[i] for i in up] == sorted(values, reverse=True)[:q]
    assert [values[i] for i in down] == sorted(values)[:q]
    if len(set(values)) == len(values):
        assert not set(up.tolist()) & set(down.tolist())


def test_extreme_groups_need_room() -> None:
    with pytest.raises(ValueError, match="don't fit"):
        extreme_groups(torch.zeros(5), 3)
    up, down = extreme_groups(torch.zeros(6), 2)
    assert up.tolist() == down.tolist() == [0, 1]  # equal ones by position


def test_numbers_by_hand() -> None:
    change = torch.tensor([3.0, -1.0, 0.5, -0.5])
    assert loss_mass(change, torch.tensor([0]), torch.tensor([1])) == pytest.approx(4 / 5)
    assert loss_mass(torch.zeros(3), torch.tensor([0]), torch.tensor([1])) == 0
    assert class_separation(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])) == 1
    assert class_separation(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])) == pytest.approx(1 / 3)
    assert class_separation(torch.tensor([0, 1, 2, 2]), torch.tensor([2, 1, 3, 3])) == pytest.approx(0.5)
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 1.0]), torch.tensor([[2.0]])]
    assert cosine(a, b) == pytest.approx(8 / (5 * 5**0.5))
    assert cosine(a, [torch.zeros(2), torch.zeros(1, 1)]) == 0


@given(st.floats(1, 1e4), st.integers(1, 5000), st.floats(0, 1e6))
@settings(deadline=None, max_examples=100)
def test_the_period_is_the_least_odd_one_that_is_paid_for(pair: float, steps: int, allowed: float) -> None:
    n = odd_period(pair, steps, allowed)
    assert n % 2 == 1
    assert n >= steps or math.ceil(steps / n) * pair <= allowed
    assert n == 1 or math.ceil(steps / (n - 2)) * pair > allowed


# ---------------------------------------------------------------------- the diagnostic


def by_hand(steps: Steps, data: Noise, step: int, q: int, plant: Any = None) -> dict[str, Any]:
    """Groups and numbers of a step from formulas of logistic regression, in float64."""
    batch = data.part("train").plain(range(len(data.part("train"))))
    if plant is not None:
        plant.as_trained(None, batch)
    x, y = batch["image"].flatten(1).double(), batch["label"]

    def losses(at: int) -> Tensor:
        w, b = (t.double() for t in steps.weights[at])
        return -(x @ w.T + b).log_softmax(1)[torch.arange(len(y)), y]

    change = losses(step) - losses(step - 1)
    order = sorted(range(len(y)), key=lambda i: float(change[i]))
    down, up = order[:q], order[::-1][:q]
    w, b = (t.double() for t in steps.weights[step])
    residual = (x @ w.T + b).softmax(1) - F.one_hot(y, 2)

    def gradient(rows: list[int]) -> Tensor:
        r, inputs = residual[rows], torch.cat([x[rows], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        return (r.T @ inputs / len(rows)).flatten()

    g_up, g_down, g = gradient(up), gradient(down), gradient(list(range(len(y))))
    found = {"cosine": float(g_up @ g_down / (g_up.norm() * g_down.norm())), "ratio": float(g_up.norm() / g.norm())}
    found |= {"norm_up": float(g_up.norm()), "norm_down": float(g_down.norm()), "loss": float(losses(step).mean())}
    mass = float(change[up + down].abs().sum() / change.abs().sum())
    return {**found, "mass": mass, "up": sorted(up), "down": sorted(down), "before": float(losses(step - 1).mean())}


def test_a_rise_is_measured_as_by_hand() -> None:
    """At a large rate the loss goes up and down; every number is compared at every rise."""
    data, steps, watch = Noise(), Steps(), OpposingSignals(probe=24, q=3, warmup=4, share=None)
    plant = PlantOpposingOutliers(k=3, magnitude=20.0)
    fit(steps, plant, watch, data=data, module=Linear(0.5), precision="64-true")  # losses of 1e-20 have an order, too
    history = {key.partition("/")[2]: {int(a): b for a, b in points} for key, points in watch.history.items()}
    rises = []
    for step in range(1, 13):
        wanted = by_hand(steps, data, step, 3, plant)
        assert history["loss"][step] == pytest.approx(wanted["loss"], rel=1e-4)
        if wanted["loss"] > wanted["before"]:
            rises.append(step)
        if step > 4 and wanted["loss"] > wanted["before"]:
            for key in ("cosine", "ratio", "norm_up", "norm_down", "mass"):
                assert history[key][step] == pytest.approx(wanted[key], rel=1e-3, abs=1e-4), key
    late = [step for step in rises if step > 4]
    assert len(late) > 1
    assert sorted(history["cosine"]) == late
    first = by_hand(steps, data, late[0], 3, plant)
    assert {name: sorted(group) for name, group in watch.groups.items()} == {k: first[k] for k in ("up", "down")}
    assert (watch.found, history["rises"][12]) == (late[0], len(rises))
    assert (history["rises_late"][12], history["rises_after"][12]) == (len(late), len(late) - 1)
    planted = len(set(plant.planted) & {*first["up"], *first["down"]})
    assert history["precision"][late[0]] == pytest.approx(planted / 6)
    followed = [step for step in history["up"] if step >= late[0]]
    assert followed == list(range(late[0], 13))


def test_the_largest_change_is_there_without_a_rise() -> None:
    data, steps, watch = Noise(), Steps(), OpposingSignals(probe=24, q=3, warmup=3, share=None)
    fit(steps, watch, data=data, module=Linear(0.01))
    relative = {}
    for step in range(4, 13):
        found = by_hand(steps, data, step, 3)
        relative[step] = abs(found["loss"] - found["before"]) / found["before"]
    largest = max(relative, key=lambda step: relative[step])
    assert watch.counts.pop("pairs") == 12 and not any(watch.counts.values()) and not watch.groups
    assert watch.largest["step"] == largest
    assert watch.largest["cosine"] == pytest.approx(by_hand(steps, data, largest, 3)["cosine"], rel=1e-3)
    logged = {key.partition("/")[2]: points for key, points in watch.history.items()}
    assert logged["largest_cosine"] == [[12, watch.largest["cosine"]]]
    opposition = watch.largest["cosine_random"] - watch.largest["cosine"]
    assert logged["largest_opposition"][0][1] == pytest.approx(opposition)
    assert "cosine" not in logged


def test_random_groups_are_disjoint_and_no_extremes() -> None:
    extreme, drawn = (OpposingSignals(probe=24, q=3, warmup=3, share=None, which=w) for w in ("extreme", "random"))
    for watch in (extreme, drawn):
        fit(watch, PlantOpposingOutliers(k=3, magnitude=20.0), module=Linear(0.5))
    assert extreme.found == drawn.found is not None
    members = drawn.groups["up"] + drawn.groups["down"]
    assert len(set(members)) == 6 and set(members) != {*extreme.groups["up"], *extreme.groups["down"]}


def test_where_the_share_is_small_it_looks_at_pairs_an_odd_number_apart(caplog: Any) -> None:
    def steps_of(share: float | None) -> list[int]:
        watch = OpposingSignals(probe=16, share=share)
        with caplog.at_level(logging.INFO, "callbacks"):
            fit(watch, data=Noise(64, 16), epochs=10)
        return watch.steps

    assert steps_of(None) == list(range(41))
    assert not [r for r in caplog.records if "apart" in r.message]
    looks = steps_of(0.5)
    said = [r.getMessage() for r in caplog.records if "apart" in r.getMessage()]
    assert len(said) == 1
    period = int(said[0].split("steps ")[1].split()[0])
    assert period > 1 and period % 2 == 1
    pairs = [(a, b) for a, b in itertools.pairwise(looks) if b == a + 1]
    assert all(b % period == 0 for _, b in pairs) and len(pairs) == 40 // period
    assert steps_of(0.5) == looks
    # looks at pairs cost two passes, gradients of the probe and four groups at most four and a half
    assert len(pairs) * 16 * 6.5 <= 0.5 * 3 * 64 * 10


def test_the_groups_survive_a_checkpoint_and_are_written(tmp_path: Path) -> None:
    watch = OpposingSignals(probe=24, q=3, warmup=3, share=None)
    options: dict[str, Any] = {"logger": CSVLogger(tmp_path), "default_root_dir": tmp_path}
    fit(PlantOpposingOutliers(k=3, magnitude=20.0), watch, Report(), module=Linear(0.5), **options)
    saved = json.loads((tmp_path / "opposing_signals.json").read_text())
    assert saved == {"step": watch.found, **watch.groups}
    again = OpposingSignals(probe=24, q=3, warmup=3, share=None)
    again.load_state_dict(torch.load(_saved(tmp_path, watch), weights_only=True))
    assert (again.groups, again.largest, again.counts) == (watch.groups, watch.largest, watch.counts)
    assert again._before == watch._before
    assert (tmp_path / "plots" / "opposing_signals.png").stat().st_size > 10_000
    assert len(watch._rows) == 6 and {row["label"] for row in watch._rows} <= {"a", "b"}
    assert set(watch._pictures) == {*watch.groups["up"], *watch.groups["down"]}


def _saved(folder: Path, watch: OpposingSignals) -> Path:
    torch.save(watch.state_dict(), folder / "state.pt")
    return folder / "state.pt"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probe": 4}, "probe must lie"),
        ({"probe": 2001}, "probe must lie"),
        ({"probe": 20, "q": 6}, "q must lie"),
        ({"warmup": -1}, "warmup"),
        ({"which": "both"}, "which must be"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OpposingSignals(**options)


def test_data_too_small() -> None:
    with pytest.raises(ValueError, match="at least 8 training examples"):
        fit(OpposingSignals(), data=Noise(6, 6))


# ---------------------------------------------------------------------- planting


def test_what_is_planted() -> None:
    """The same rows get the same vector of length ``magnitude`` in each epoch, whatever the augmentation."""
    data, plant = Noise(translate=0.2), PlantOpposingOutliers(k=4, magnitude=8.0)
    module, plain = Linear(), Linear()
    fit(plant, data=data, module=module, epochs=3)
    fit(data=Noise(translate=0.2), module=plain, epochs=3)
    assert len(set(plant.planted)) == 8
    label = data.part("train").entries["label"]
    assert label[plant.planted].tolist() == [0] * 4 + [1] * 4
    added: list[Tensor] = []
    for seen, clean in zip(module.seen, plain.seen, strict=True):
        assert torch.equal(seen["index"], clean["index"])
        mine = torch.isin(seen["index"], torch.tensor(plant.planted))
        assert int(mine.sum()) == 8
        assert torch.equal(seen["image"][~mine], clean["image"][~mine])
        added += list(seen["image"][mine] - clean["image"][mine])
    for each in added:
        torch.testing.assert_close(each, added[0], rtol=0, atol=2e-6)
    assert float(added[0].norm()) == pytest.approx(8, rel=1e-4)
    assert torch.equal(module.seen_in_validation, plain.seen_in_validation)


def test_the_choice_goes_by_the_seed() -> None:
    def planted(**options: Any) -> tuple[list[int], Tensor]:
        plant = PlantOpposingOutliers(k=4, **options)
        fit(plant, epochs=1)
        return plant.planted, plant.direction((1, SIDE, SIDE))

    first, same, other = planted(seed=1), planted(seed=1), planted(seed=2)
    assert first[0] == same[0] != other[0]
    assert torch.equal(first[1], same[1]) and not torch.equal(first[1], other[1])
    turned = planted(seed=1, classes=[1, 0])[0]
    assert turned == first[0][4:] + first[0][:4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be"),
        ({"magnitude": -1.0}, "magnitude"),
        ({"classes": [1, 1]}, "two different"),
        ({"k": 13}, "class 0 has 12 training examples"),
        ({"classes": [0, 7]}, "class 7 has 0"),
    ],
)
def test_planting_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(PlantOpposingOutliers(**options))


# ---------------------------------------------------------------------- dropping


def test_dropped_examples_have_no_weight() -> None:
    """One step of full-batch descent is that of the other examples alone; a batch of dropped ones moves nothing."""
    drop = [0, 5, 6, 11]
    steps, data = Steps(), Noise()
    module = fit(DropGroups(drop), steps, data=data, epochs=1)
    batch = data.part("train").plain([i for i in range(24) if i not in drop])
    alone = Linear()
    weight = next(alone.backbone.parameters())
    wanted = weight - 0.1 * torch.autograd.grad(alone.loss(batch), weight)[0]
    torch.testing.assert_close(steps.weights[1][0], wanted.detach())
    assert sorted(module.seen[0]["index"].tolist()) == batch["index"].tolist()
    every = Steps()
    fit(DropGroups(list(range(24))), every, epochs=1)
    assert torch.equal(every.weights[0][0], every.weights[1][0])


def test_groups_are_dropped_after_the_first_rise_and_rises_vanish() -> None:
    """The causal test: of full-batch descent on outliers that keep it from settling."""

    def run(*more: Any) -> tuple[OpposingSignals, Linear]:
        watch = OpposingSignals(probe=24, q=3, warmup=4, share=None)
        module = fit(PlantOpposingOutliers(k=3, magnitude=20.0), watch, *more, module=Linear(0.5), epochs=20)
        return watch, module

    (plain, _), (dropped, module), (control, other) = run(), run(DropGroups()), run(DropGroups(which="random"))
    assert plain.found == dropped.found == control.found
    assert dropped.found is not None
    members = {*dropped.groups["up"], *dropped.groups["down"]}
    for step, seen in enumerate(module.seen):
        index = set(seen["index"].tolist())
        assert index == set(range(24)) - (members if step >= dropped.found else set()), step
    left = set(other.seen[-1]["index"].tolist())
    assert len(left) == 18 and members <= left
    assert dropped.counts["rises_after"] < min(plain.counts["rises_after"], control.counts["rises_after"])


def test_groups_of_an_earlier_run(tmp_path: Path) -> None:
    file = tmp_path / "opposing_signals.json"
    file.write_text(json.dumps({"step": 9, "up": [1, 2, 3], "down": [7, 8, 9]}))
    module = fit(DropGroups(file=file, fraction=0.5), epochs=1)
    assert set(range(24)) - set(module.seen[0]["index"].tolist()) == {1, 2, 7, 8}
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no groups"):
        fit(DropGroups(file=file), epochs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "add OpposingSignals"),
        ({"examples": [1], "file": "x"}, "not both"),
        ({"fraction": 2.0}, "fraction"),
        ({"which": "none"}, "which must be"),
    ],
)
def test_dropping_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(DropGroups(**options))


def test_digits_of_some_classes() -> None:
    data = Digits(8, 250, translate=0.0, classes=[8, 3])
    train = data.part("train")
    whole = Digits(8).part("train")
    assert (data.num_classes, data.class_names, len(train)) == (2, ["8", "3"], 250)
    for number, digit in enumerate((8, 3)):
        mine, theirs = train.entries["label"] == number, whole.entries["label"] == digit
        assert torch.equal(train.images[mine], whole.images[theirs])  # type: ignore[index]
    with pytest.raises(ValueError, match="no digit '12'"):
        Digits(classes=[1, 12])


def test_groups_are_shown_by_position_where_indices_are_others(tmp_path: Path) -> None:
    """A user's batches may have an index of their own."""
    watch, data = OpposingSignals(probe=24, q=3, warmup=0, share=None), Noise()
    original = watch.examples

    def renumbered(*args: Any, **more: Any) -> Any:
        for batch in original(*args, **more):
            yield {**batch, "index": batch["index"] + 1000}

    watch.examples = renumbered  # type: ignore[method-assign]
    plant = PlantOpposingOutliers(k=3, magnitude=20.0)
    fit(Report(), plant, watch, module=Linear(0.5), data=data, default_root_dir=tmp_path)
    assert watch.groups
    for group, places in watch.places.items():
        assert watch.groups[group] == [place + 1000 for place in places]
        batch = data.part("train").plain(places)
        plant.as_trained(Linear(), batch)
        for index, image, label in zip(watch.groups[group], batch["image"], batch["label"].tolist(), strict=True):
            assert torch.equal(watch._pictures[index], image.clamp(0, 1).expand(3, -1, -1))
            assert {"group": group, "index": index, "label": "ab"[label]}.items() <= next(
                row.items() for row in watch._rows if row["index"] == index
            )


def test_rises_of_the_others_are_counted_by_hand() -> None:
    data, steps, watch = Noise(), Steps(), OpposingSignals(probe=24, q=3, warmup=2, share=None)
    plant = PlantOpposingOutliers(k=3, magnitude=20.0)
    module = fit(steps, watch, plant, data=data, module=Linear(0.5))
    assert watch.found is not None
    batch = data.part("train").plain(range(24))
    plant.as_trained(module, batch)
    others = [i for i in range(24) if i not in {*watch.groups["up"], *watch.groups["down"]}]
    means = {}
    for step, (weight, bias) in steps.weights.items():
        logits = batch["image"].flatten(1) @ weight.T + bias
        means[step] = float(F.cross_entropy(logits[others].double(), batch["label"][others]))
    rises = sum(means[step] > means[step - 1] for step in range(watch.found + 1, 13))
    assert watch.counts["rises_others"] == rises > 0
