"""Local complexity against closed forms and counts made by hand, and what of it reaches the log."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.local_complexity import LocalComplexity, crossed, crossed_units, frame, phases, vertices
from recipes.classifier import Classifier
from tests.callbacks.small import trainer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_layer(seed: int = 0, units: int = 40, dim: int = 12, points: int = 25) -> tuple[nn.Linear, Tensor]:
    g = generator(seed)
    layer = nn.Linear(dim, units).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(units, dim, generator=g))
        layer.bias.copy_(torch.randn(units, generator=g))
    return layer, torch.rand(points, dim, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------------- the polytope


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_rows_of_a_frame_are_orthonormal(data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 60))
    k = data.draw(st.integers(1, dim))
    rows = frame(k, dim, generator(data.draw(st.integers(0, 99))))
    assert rows.shape == (k, dim) and rows.dtype == torch.float64
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_frame_is_drawn_by_its_generator_and_points_everywhere() -> None:
    assert torch.equal(frame(3, 5, generator(1)), frame(3, 5, generator(1)))
    assert not torch.equal(frame(3, 5, generator(1)), frame(3, 5, generator(2)))
    g = generator(3)
    mean = torch.stack([frame(2, 3, g) for _ in range(2000)]).mean(0)
    assert mean.abs().max() < 5 / math.sqrt(3 * 2000)  # five deviations: no sign is preferred


@pytest.mark.parametrize("k", [0, 5])
def test_more_directions_than_dimensions_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 4 orthonormal directions in 4 dimensions, not {k}"):
        frame(k, 4)


def test_vertices() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # two points of 1x2
    found = vertices(x, torch.tensor([[0.6, 0.8]], dtype=torch.float64), 0.5)
    assert found.dtype == torch.float32
    wanted = torch.tensor([[[[1.3, 2.4]], [[0.7, 1.6]]], [[[3.3, 4.4]], [[2.7, 3.6]]]])
    torch.testing.assert_close(found, wanted)
    for r in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="r must be positive"):
            vertices(x, torch.eye(2), r)
    with pytest.raises(ValueError, match="2 dimensions, but the frame"):
        vertices(x, torch.eye(3), 0.1)


def test_zero_is_a_sign_of_its_own() -> None:
    # one point of four corners, seven units
    same = [[1, 1, 1, 2], [-1, -2, -1, -1], [0, 0, 0, 0]]
    other = [[1, 1, -1, 1], [-1, 1, 1, 1], [0, 1, 1, 1], [-3, -1, 0, -1]]
    assert crossed(torch.tensor([*same, *other]).T[None].float()).tolist() == [[False] * 3 + [True] * 4]


# ---------------------------------------------------------------------- the first layer


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("r", [0.01, 0.3, 2.0])
def test_the_first_layer_is_its_closed_form(k: int, r: float) -> None:
    layer, x = first_layer()
    rows = frame(k, 12, generator(4))
    relu = nn.ReLU(inplace=True)
    ((counts, units),) = crossed_units(nn.Sequential(layer, relu), {"relu": relu}, x, rows, r).values()
    w, b = layer.weight.detach(), layer.bias.detach()
    reach = r * (w @ rows.T).abs().amax(1)
    wanted = [(abs(sum(w[j] * x[i]) + b[j]) < reach[j]).item() for i in range(25) for j in range(40)]
    by_point = [sum(wanted[i * 40 : (i + 1) * 40]) for i in range(25)]
    assert counts.tolist() == by_point and units == 40
    assert 0 < sum(by_point) < 1000


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.lists(st.floats(1e-3, 3), min_size=2, max_size=6))
def test_the_first_layer_grows_with_r(seed: int, radii: list[float]) -> None:
    layer, x = first_layer(seed)
    rows = frame(6, 12, generator(seed))
    found = [crossed_units(layer, {"w": layer}, x, rows, r)["w"][0] for r in sorted(radii)]
    for smaller, larger in zip(found, found[1:], strict=False):
        assert (smaller <= larger).all()


def test_nothing_is_crossed_at_a_small_r_and_all_at_a_large_one() -> None:
    layer, x = first_layer()
    rows = frame(6, 12, generator(1))
    assert not crossed_units(layer, {"w": layer}, x, rows, 1e-9)["w"][0].any()
    assert (crossed_units(layer, {"w": layer}, x, rows, 1e4)["w"][0] == 40).all()


# ---------------------------------------------------------------------- behind it


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            values.normal_(0, 0.3)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    layers = (nn.Conv2d(2, 5, 3, 2, 1), norm, nn.LeakyReLU(0.1, inplace=True), nn.Flatten(), nn.Linear(45, 7))
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(7, 3)).double().eval()


def by_hand(net: Any, point: Tensor, rows: Tensor, r: float) -> tuple[int, int]:
    """Crossed units of both layers at a point (2, 6, 6), corner by corner, batch norm written out."""
    maps, hidden = [], []
    for sign in (1, -1):
        for direction in rows:
            corner = point + sign * r * direction.reshape(2, 6, 6)
            z = F.conv2d(corner[None], net[0].weight, net[0].bias, 2, 1)[0]
            norm = net[1]
            for c in range(5):
                scale = norm.weight[c] / (norm.running_var[c] + 1e-5).sqrt()
                z[c] = (z[c] - norm.running_mean[c]) * scale + norm.bias[c]
            maps.append(z.flatten().tolist())
            hidden.append((torch.where(z > 0, z, 0.1 * z).flatten() @ net[4].weight.T + net[4].bias).tolist())
    return tuple(sum(min(unit) < 0 < max(unit) for unit in zip(*z, strict=True)) for z in (maps, hidden))  # type: ignore[return-value]


@torch.no_grad()
def test_convolutions_and_frozen_batch_norm() -> None:
    net, rows = convolutional(), frame(8, 72, generator(2))
    x = torch.rand(6, 2, 6, 6, generator=generator(3), dtype=torch.float64)
    found = crossed_units(net, {"a": net[2], "b": net[5]}, x, rows, 2.0)
    wanted = [by_hand(net, point, rows, 2.0) for point in x]
    assert found["a"][0].tolist() == [a for a, _ in wanted] and found["a"][1] == 45
    assert found["b"][0].tolist() == [b for _, b in wanted] and found["b"][1] == 7
    assert all(0 < a < 45 for a, _ in wanted) and any(0 < b < 7 for _, b in wanted)
    named = crossed_units(net, {"norm": net[1], "linear": net[4]}, x, rows, 2.0)  # what comes out of them
    assert torch.equal(named["norm"][0], found["a"][0]) and torch.equal(named["linear"][0], found["b"][0])


@pytest.mark.parametrize("rows", [1, 16, 17, 50, 10**6])
def test_the_size_of_chunks_changes_nothing(rows: int) -> None:
    net, directions = convolutional(), frame(8, 72, generator(2))
    x = torch.rand(7, 2, 6, 6, generator=generator(3), dtype=torch.float64)
    largest: list[int] = []
    net.register_forward_pre_hook(lambda _, args: largest.append(len(args[0])))
    found = crossed_units(net, {"a": net[2], "b": net[5]}, x, directions, 2.0, rows)
    assert max(largest) <= max(rows, 16) and sum(largest) == 7 * 16
    whole = crossed_units(net, {"a": net[2], "b": net[5]}, x, directions, 2.0, 7 * 16)
    for name in found:
        assert torch.equal(found[name][0], whole[name][0]) and found[name][1] == whole[name][1]


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    layer, x = first_layer(units=12)
    relu, rows = nn.ReLU(), frame(6, 12, generator(1))
    once, units = crossed_units(lambda v: relu(layer(v)), {"a": relu}, x, rows, 0.3)["a"]
    twice, more = crossed_units(lambda v: (relu(layer(v)), relu(layer(v))), {"a": relu}, x, rows, 0.3)["a"]
    assert torch.equal(twice, 2 * once) and (units, more) == (12, 24) and once.any()


def test_numbers_that_are_not_finite_give_none() -> None:
    layer, x = first_layer()
    x[3] = math.nan
    counts = crossed_units(layer, {"w": layer}, x, frame(6, 12, generator(1)), 0.3)["w"][0]
    assert counts.isnan().nonzero().tolist() == [[3]]


def test_hooks_are_gone_also_after_an_error() -> None:
    layer, x = first_layer()
    other = nn.ReLU()
    with pytest.raises(ValueError, match="layer 'b' is never called"):
        crossed_units(layer, {"a": layer, "b": other}, x, frame(6, 12, generator(1)), 0.3)
    mean = nn.Flatten(0)
    with pytest.raises(ValueError, match="layer 'm' gives no numbers"):
        crossed_units(nn.Sequential(layer, mean), {"m": mean}, x, frame(6, 12, generator(1)), 0.3)
    assert not layer._forward_hooks and not other._forward_pre_hooks and not mean._forward_hooks


# ---------------------------------------------------------------------- phases


def test_phases_of_a_curve_that_falls_rises_and_falls() -> None:
    found = phases([[0, 8], [1, 6], [3, 7], [10, 4], [20, 9], [50, 10], [70, 7], [90, 5]])
    assert found == {
        **{"start": 8, "valley": 4, "peak": 10, "end": 5, "valley_step": 10, "peak_step": 50},
        **{"first_descent": 0.5, "ascent": 2.5, "second_descent": 0.5},
    }


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([5, 4, 2], (2, 2, 0.4, 1, 1)),  # it only falls
        ([2, 3, 4], (0, 2, 1, 2, 1)),  # it only rises
        ([3, 3, 3], (2, 2, 1, 1, 1)),
        ([7], (0, 0, 1, 1, 1)),
        ([4, 6, 1, 2], (0, 1, 1, 1.5, 1 / 3)),  # the larger rise is the first one
    ],
)
def test_phases_that_do_not_take_place_have_the_ratio_one(values: list[float], wanted: tuple[float, ...]) -> None:
    found = phases([[i, value] for i, value in enumerate(values)])
    names = ("valley_step", "peak_step", "first_descent", "ascent", "second_descent")
    assert tuple(found[name] for name in names) == pytest.approx(wanted)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_the_largest_rise_by_trying_all(values: list[int]) -> None:
    found = phases([[i, value] for i, value in enumerate(values)])
    largest = max(b - a for i, a in enumerate(values) for b in values[i:])
    assert found["peak"] - found["valley"] == largest
    assert found["valley"] == values[int(found["valley_step"])] and found["valley_step"] <= found["peak_step"]
    assert found["first_descent"] <= 1 <= found["ascent"] and found["second_descent"] <= 1


def test_phases_of_nothing() -> None:
    assert math.isnan(phases([[0, 0.0], [1, 0.0]])["first_descent"])


# ---------------------------------------------------------------------- the callback


class Own(LightningModule):
    """A user's: pairs, an MLP of two hidden layers on 6 numbers."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 20), act(), nn.Dropout(0.5), nn.Linear(20, 10), act(), nn.Linear(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def pairs(seed: int, count: int = 30, floats: bool = True) -> DataLoader[Any]:
    x = torch.rand(count, 6, generator=generator(seed))
    return DataLoader(TensorDataset(x if floats else x.long(), (x[:, 0] > 0.5).long()), 10)


def fit(diagnostic: LocalComplexity, module: Any = None, floats: bool = True, **options: Any) -> Any:
    module = module or Own()
    trainer(diagnostic, **{"max_epochs": 2, **options}).fit(module, pairs(1, floats=floats), pairs(2, floats=floats))
    return module


def test_what_is_logged_is_the_mean_over_the_points() -> None:
    looks = LocalComplexity(r=0.2, share=None, seed=3)
    module = fit(looks).eval()
    assert looks.steps == [0, 1, 2, 3, 4, 5, 6] and looks.count == 256
    assert looks.frame is not None and looks.frame.shape == (6, 6)  # no more directions than dimensions
    layers = {"net.1": module.net[1], "net.4": module.net[4]}
    data = {"train": pairs(1).dataset.tensors[0], "val": pairs(2).dataset.tensors[0]}  # type: ignore[attr-defined]
    for part, x in data.items():  # all 30 of each
        found = crossed_units(module, layers, x, looks.frame, 0.2)
        total = 0.0
        for (name, (counts, _)), units in zip(found.items(), (20, 10), strict=True):
            mean, total = float(counts.mean()), total + float(counts.mean())
            assert looks.history[f"local_complexity/{part}/{name}"][-1] == pytest.approx([6, mean])
            assert looks.history[f"local_complexity/{part}_share/{name}"][-1] == pytest.approx([6, mean / units])
        assert looks.history[f"local_complexity/{part}"][-1] == pytest.approx([6, total])
        assert looks.history[f"local_complexity/{part}_share"][-1] == pytest.approx([6, total / 30])
        assert total > 0
    for part in ("train", "val", "random"):
        cut = phases(looks.history[f"local_complexity/{part}"])
        for key in ("start", "valley", "first_descent", "ascent", "second_descent", "peak_step"):
            assert looks.history[f"local_complexity/{part}_{key}"] == [[6, cut[key]]]


def test_random_points_fill_the_unit_cube_and_are_the_same_at_each_step() -> None:
    looks = LocalComplexity(parts=["random"], share=None, points=500, directions=2)
    seen: list[Tensor] = []
    module = Own()
    module.net.register_forward_pre_hook(lambda _, args: None if module.training else seen.append(args[0].clone()))
    fit(looks, module, max_epochs=1, limit_val_batches=0)
    centres = [x.reshape(500, 4, 6).mean(1) for x in seen]
    assert len(centres) == 4 and torch.equal(seen[0], seen[-1])
    assert -1e-6 < centres[0].min() < 0.02 and 0.98 < centres[0].max() < 1 + 1e-6
    assert (centres[0].mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * 500)
    assert set(looks.history) == {
        *(f"local_complexity/{key}" for key in ("random", "random_share")),
        *(f"local_complexity/{key}/{layer}" for key in ("random", "random_share") for layer in ("net.1", "net.4")),
        *(f"local_complexity/random_{key}" for key in phases([[0, 1]])),
    }


def test_points_are_left_out_where_they_cost_too_much() -> None:
    looks = LocalComplexity(share=1e-6)
    fit(looks)
    assert looks.count == 16


def test_what_was_chosen_goes_on_with_a_run() -> None:
    looks, other = LocalComplexity(share=1e-6), LocalComplexity(share=None)
    fit(looks, max_epochs=1)
    other.load_state_dict(looks.state_dict())
    fit(other)
    assert other.count == 16


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fit(LocalComplexity(), Own(nn.GELU)), "Own has GELU in place of ReLU, so it isn't piecewise linear"),
        (lambda: fit(LocalComplexity(), Own(nn.Identity)), "no nn.ReLU (F.relu can't be hooked): name the layers"),
        (lambda: fit(LocalComplexity(layers=["net.9"])), "no layer 'net.9'"),
        (lambda: fit(LocalComplexity(layers="net.1")), "layers must be 'auto' or a list"),  # type: ignore[arg-type]
        (lambda: fit(LocalComplexity(), floats=False), "an entry 'image' of floats, or be pairs"),
        (lambda: fit(LocalComplexity(directions=7)), "1 to 6 orthonormal directions in 6 dimensions, not 7"),
        (lambda: LocalComplexity(r=0), "r must be positive"),
        (lambda: LocalComplexity(points=0), "points must be at least 1"),
        (lambda: LocalComplexity(rows=0), "rows must be at least 1"),
        (lambda: LocalComplexity(directions=-1), "directions must be at least 1"),
        (lambda: LocalComplexity(measurements=2), "at least 3 measurements"),
        (lambda: LocalComplexity(parts=["test"]), "parts must be some of train, val, random"),  # type: ignore[list-item]
        (lambda: LocalComplexity(parts=[]), "parts must be some of"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make()
    assert "\n" not in str(error.value)


def test_named_layers_of_a_network_without_modules_for_its_activations() -> None:
    looks = LocalComplexity(layers=["net.0"], share=None, parts=["train"], r=0.2)
    module = fit(looks, Own(nn.GELU)).eval()
    x = pairs(1).dataset.tensors[0]  # type: ignore[attr-defined]
    assert looks.frame is not None
    w, b = module.net[0].weight.detach(), module.net[0].bias.detach()
    wanted = ((x @ w.T + b).abs() < 0.2 * (w @ looks.frame.T.float()).abs().amax(1)).sum(1).double().mean()
    assert looks.history["local_complexity/train/net.0"][-1][1] == pytest.approx(float(wanted))


def test_in_a_classifier_the_radius_is_of_pixels_and_the_head_is_left_out() -> None:
    options: dict[str, Any] = {"in_chans": 1, "num_classes": 3, "image_size": 4}
    torch.manual_seed(0)
    module = Classifier("mlp", backbone_args={"width": 30, "depth": 2}, lr=1e-3, **options)
    looks = LocalComplexity(share=None, parts=["val"], r=0.1)
    g = generator(0)
    rows = [{"image": torch.rand(1, 4, 4, generator=g), "label": torch.tensor(i % 3)} for i in range(20)]
    runner = trainer(looks, max_epochs=1)
    runner.fit(module, DataLoader(rows, 10), DataLoader(rows, 10))  # type: ignore[arg-type]
    layers = {key.rpartition("/")[2] for key in looks.history if key.startswith("local_complexity/val/")}
    assert layers == {"layer1.1", "layer2.1"}
    linear: Any = module.backbone.layer1[0]
    w, b = linear.weight.detach().double(), linear.bias.detach().double()
    x = torch.stack([row["image"] for row in rows]).flatten(1).double()
    assert looks.frame is not None and looks.frame.shape == (16, 16)
    at_point = (x - 0.5) / 0.25 @ w.T + b
    wanted = (at_point.abs() < 0.1 / 0.25 * (w @ looks.frame.T).abs().amax(1)).sum(1).double().mean()
    assert looks.history["local_complexity/val/layer1.1"][-1][1] == pytest.approx(float(wanted))


def test_the_picture() -> None:
    looks = LocalComplexity(share=None, points=20)
    assert looks.draw() is None
    fit(looks)
    figure = looks.draw()
    assert figure is not None
    left, right = figure.axes
    assert [line.get_label() for line in left.get_lines()][::2] == ["train", "val", "random"]
    assert "r = 0.05" in left.get_title()
    assert [line.get_label() for line in right.get_lines()] == ["net.1", "net.4"]
    assert left.get_lines()[0].get_ydata().tolist() == [v for _, v in looks.history["local_complexity/train"]]
