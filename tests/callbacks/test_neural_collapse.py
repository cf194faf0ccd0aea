"""NC1 to NC4 against definitions written out anew, their zeros, and the callback on networks of several shapes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import neural_collapse
from callbacks.neural_collapse import Moments, NeuralCollapse, nc1, nc1_ratio, nc2, nc3, nc4, pooled
from tests.callbacks.small import trainer

# ---------------------------------------------------------------------- the measures


def by_definition(h: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """All measures, example by example and class by class."""
    classes = sorted(set(y.tolist()))
    k, d = len(classes), h.shape[1]
    mu = {c: h[y == c].mean(0) for c in classes}
    centre = sum(mu.values()) / k
    s_w, s_b = np.zeros((d, d)), np.zeros((d, d))
    for row, c in zip(h, y, strict=True):
        s_w += np.outer(row - mu[c], row - mu[c]) / len(h)
    for c in classes:
        s_b += np.outer(mu[c] - centre, mu[c] - centre) / k
    m = np.stack([mu[c] - centre for c in classes])
    own = w[classes]
    etf = (np.eye(k) - np.ones((k, k)) / k) / math.sqrt(k - 1)

    def angles(v: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(v)) for j in range(len(v)) if i != j]
        cosines = [v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j]) for i, j in pairs]
        return float(np.mean([abs(c + 1 / (len(v) - 1)) for c in cosines]))

    lengths = np.array([np.linalg.norm(row) for row in m])
    product = own @ m.T
    wrong = 0
    for row in h:
        nearest = min(classes, key=lambda c: float(((row - mu[c]) ** 2).sum()))
        wrong += int(np.argmax(w @ row + b)) != nearest
    return {
        "nc1": float(np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-10, hermitian=True))) / k,
        "nc1r": float(np.trace(s_w) / np.trace(s_b)),
        "nc2_norms": float(lengths.std() / lengths.mean()),
        "nc2_angles": angles(m),
        "nc2_gram": float(np.linalg.norm(m @ m.T / np.linalg.norm(m @ m.T) - etf)),
        "nc3": float(np.linalg.norm(product / np.linalg.norm(product) - etf)),
        "nc3_dual": float(((own / np.linalg.norm(own) - m / np.linalg.norm(m)) ** 2).sum()),
        "nc4": wrong / len(h),
        "global_mean_logits": float(np.linalg.norm(w @ centre + b)),
    }


def measured(h: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> dict[str, float]:
    moments = Moments.of(h, y, len(w))
    first, second = nc3(w[moments.present], moments.centred)
    values = {"nc1": nc1(moments), "nc1r": nc1_ratio(moments), "nc3": first, "nc3_dual": second}
    values |= {f"nc2_{key}": value for key, value in nc2(moments.centred).items()}
    return {**values, "nc4": nc4(h[y >= 0], w, b, moments)}


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6), st.integers(1, 9), st.integers(12, 60), st.integers(0, 10**6), st.sampled_from([None, 1, "one"])
)
def test_they_are_what_the_definitions_say(classes: int, width: int, count: int, seed: int, missing: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=g)
    y[:classes] = torch.arange(classes)
    if missing == 1 and classes > 2:
        y[y == 1] = 0  # a class without an example
    if missing == "one" and classes > 2:
        y[y == 1] = 0
        y[0] = 1  # one with a single one
    h = torch.randn(count, width, generator=g).double() * 2 + 3 + torch.randn(classes, width, generator=g)[y]
    w, b = torch.randn(classes, width, generator=g).double(), torch.randn(classes, generator=g).double()
    found, wanted = measured(h, y, w, b), by_definition(h.numpy(), y.numpy(), w.numpy(), b.numpy())
    for key, value in found.items():
        assert value == pytest.approx(wanted[key], rel=1e-7, abs=1e-9), key


def simplex_rows(classes: int, width: int, g: torch.Generator) -> Tensor:
    """A simplex of unit vectors (K, d), rotated at random."""
    rotation = torch.linalg.qr(torch.randn(width, width, generator=g).double())[0]
    rows = (torch.eye(classes).double() - 1 / classes) * math.sqrt(classes / (classes - 1))
    return rows @ rotation[:classes]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 8),
    st.integers(0, 5),
    st.floats(1e-3, 1e3),
    st.floats(0, 10),
    st.floats(0.01, 100),
    st.integers(0, 999),
)
def test_all_are_zero_at_a_simplex(classes: int, more: int, scale: float, shift: float, head: float, seed: int) -> None:
    """However it is turned, scaled and shifted, and however many examples each class has."""
    g = torch.Generator().manual_seed(seed)
    rows = simplex_rows(classes, classes + more, g)
    y = torch.arange(classes).repeat_interleave(torch.randint(1, 6, (classes,), generator=g))
    centre = scale * shift * torch.randn(classes + more, generator=g).double()
    h, w = scale * rows[y] + centre, head * rows
    found = measured(h, y, w, -w @ centre)
    assert max(abs(value) for value in found.values()) < 1e-6, found
    for value in nc2(w).values():
        assert value == pytest.approx(0, abs=1e-9)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    """Also where a part has no example of a class; rows without a label count for nothing."""
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(20, 4, generator=g), torch.arange(20) // 7
    y[3] = -1
    whole, parts = Moments.of(h, y, 4), Moments.of(h[:5], y[:5], 4) + Moments.of(h[5:], y[5:], 4)
    assert whole.counts.tolist() == [6, 7, 6, 0]
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    known = y >= 0
    assert nc1(parts) == pytest.approx(nc1(Moments.of(h[known], y[known], 3)), rel=1e-12)


def test_wide_features_have_traces_only() -> None:
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(30, 6, generator=g), torch.arange(30) % 3
    wide, whole = Moments.of(h, y, 3, widest=5), Moments.of(h, y, 3, widest=6)
    assert wide.second.dim() == 0 and math.isnan(nc1(wide))
    assert nc1_ratio(wide) == pytest.approx(nc1_ratio(whole), rel=1e-12)


def test_numbers_that_do_not_exist_are_no_zeros() -> None:
    h = torch.arange(6.0).view(3, 2)
    one = Moments.of(h, torch.zeros(3, dtype=torch.long), 2)
    assert math.isnan(nc1(one)) and math.isnan(nc1_ratio(one))
    same = Moments.of(torch.cat([h, h]), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert math.isnan(nc1(same)) and nc1_ratio(same) == math.inf


def test_of_equally_near_means_and_of_equal_logits_the_first_counts() -> None:
    """Means at -1 and 1: an example at 0 is as near to both, and a head of zeros likes all classes alike."""
    h, y = torch.tensor([[-1.0], [1.0], [0.0]]).double(), torch.tensor([1, 0, -1])
    moments = Moments.of(h, y, 2)
    assert moments.means.squeeze(1).tolist() == [1.0, -1.0]
    zero = torch.zeros(2, 1).double()
    assert nc4(h[2:], zero, None, moments) == 0.0  # both say class 0
    assert nc4(h[2:], zero, torch.tensor([0.0, 1.0]).double(), moments) == 1.0
    assert nc4(h[:2], zero, None, moments) == 0.5


def test_a_class_without_examples_is_never_the_nearest() -> None:
    h, y = torch.tensor([[2.0], [0.0]]).double(), torch.tensor([2, 1])
    moments, w = Moments.of(h, y, 3), torch.tensor([[0.0], [-1.0], [1.0]]).double()
    assert nc4(h, w, torch.tensor([0.0, 1.0, 0.0]).double(), moments) == 0.0


def test_features_are_means_over_positions_or_tokens() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x, "a", 2), x.double().sum((2, 3)) / 20)
    torch.testing.assert_close(pooled(x[0], "a", 3), x[0].double().sum(1) / 4)
    assert torch.equal(pooled(x[0, 0], "a", 4), x[0, 0])
    for wrong in ((x, x), x[0, 0, 0], x.unsqueeze(0)):
        with pytest.raises(ValueError, match="layer 'a' gives no features"):
            pooled(wrong, "a", 2)


# ---------------------------------------------------------------------- the callback


class Net(LightningModule):
    """A user's own network: a map, tokens, a flat layer, and a head that isn't its last linear layer."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Conv2d(1, 5, 3)
        self.tokens = nn.Linear(4, 6)
        self.flat = nn.Linear(30, 4)
        self.head = nn.Linear(4, classes)
        self.unused = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.flat(self.tokens(self.map(x).flatten(2)).flatten(1))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(count: int = 24, classes: int = 3) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    label = torch.arange(count) % classes
    images = torch.randn(count, 1, 4, 4, generator=g) + label.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, label), 8)


def features_of(net: Net, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        maps = net.map(x)
        tokens = net.tokens(maps.flatten(2))
        flat = net.flat(tokens.flatten(1))
    return {"map": maps.mean((2, 3)), "tokens": tokens.mean(1), "flat": flat, "features": torch.relu(flat)}


def test_it_measures_before_training_and_at_epochs_ends() -> None:
    net, collapse = Net(), NeuralCollapse(["map", "tokens", "flat"], "head", share=None, every_n_epochs=2)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    trainer(collapse, max_epochs=5).fit(net, data())
    assert collapse.steps == [0, 6, 12, 15]
    images, label = data().dataset.tensors  # type: ignore[attr-defined]
    for place, state in ((0, start), (-1, net.state_dict())):
        like = Net()
        like.load_state_dict(state)
        w, b = like.head.weight.detach().double().numpy(), like.head.bias.detach().double().numpy()
        for name, h in features_of(like, images).items():
            wanted = by_definition(h.double().numpy(), label.numpy(), np.resize(w, (3, h.shape[1])), b)
            for key, value in wanted.items():
                of_the_head = key.startswith(("nc3", "nc4", "global"))
                if of_the_head and name != "features":
                    assert f"neural_collapse/{name}/{key}" not in collapse.history
                    continue
                found = collapse.history[f"neural_collapse/{name}/{key}"][place][1]
                assert found == pytest.approx(value, rel=2e-4, abs=1e-6), (name, key)  # float32 features
        head = {k: collapse.history[f"neural_collapse/head/nc2_{k}"][place][1] for k in ("norms", "angles", "gram")}
        assert head == pytest.approx(nc2(like.head.weight.detach().double()))
    ratios = [collapse.history[f"neural_collapse/{n}/nc1r"][-1][1] for n in ("map", "tokens", "flat", "features")]
    assert collapse.history["neural_collapse/deep_over_shallow"][-1][1] == pytest.approx(ratios[-1] / ratios[0])
    assert collapse.history["neural_collapse/rises"][-1][1] == sum(
        b > a for a, b in zip(ratios, ratios[1:], strict=False)
    )
    last = [value for _, value in collapse.history["neural_collapse/features/nc1r"]]
    assert collapse.history["neural_collapse/end_over_start"] == [[15, pytest.approx(last[-1] / last[0])]]
    rise = max(0.0, *(b - a for a, b in zip(last, last[1:], strict=False)))
    assert collapse.history["neural_collapse/largest_rise"][0][1] == pytest.approx(rise)
    figure = collapse.draw()
    assert figure is not None and len(figure.axes) == 4 and all(len(axis.lines) for axis in figure.axes)


def test_a_layer_that_the_head_takes_as_it_is_counts_once_by_depth() -> None:
    class Last(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.flat(self.tokens(self.map(x).flatten(2)).flatten(1)))

    collapse = NeuralCollapse(["flat"], "head", share=None)
    trainer(collapse).fit(Last(), data())
    assert "neural_collapse/deep_over_shallow" not in collapse.history
    assert collapse.history["neural_collapse/flat/nc1r"] == collapse.history["neural_collapse/features/nc1r"]


def test_stages_and_head_of_a_classifier_are_found() -> None:
    from tests.laws import cells

    collapse = NeuralCollapse(share=None)
    cells.trainer(collapse).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    found = {key.split("/")[1] for key in collapse.history if key.endswith("/nc1r")}
    assert found == {"layer1", "layer2", "layer3", "layer4", "features"}
    assert collapse.history["neural_collapse/rises"][0][1] <= 3  # layer4 pooled is what the head takes


def test_one_all_reduce_also_where_a_rank_lacks_a_class_or_has_one_example_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(7, 4, generator=g).double(), torch.tensor([0, 1, 0, 2, 2, 1, 0])
    whole = Moments.of(h, y, 3)
    sent: list[Tensor] = []

    def noted(flat: Tensor, where: torch.device) -> Tensor:
        sent.append(flat)
        return flat

    monkeypatch.setattr(neural_collapse, "summed", noted)

    def rank(number: int) -> Any:
        collapse = NeuralCollapse()
        collapse._total, collapse._positions = 7, list(range(number, 7, 2))
        of = SimpleNamespace(global_rank=number, world_size=2)
        moments = {
            "a": Moments.of(h[number::2, :2], y[number::2], 3),
            "features": Moments.of(h[number::2], y[number::2], 3),
        }
        return collapse._over_ranks(of, moments, h[number::2], y[number::2], torch.device("cpu"))  # type: ignore[arg-type]

    rank(0), rank(1)
    assert len(sent) == 2  # one for each
    total = sent[0] + sent[1]
    monkeypatch.setattr(neural_collapse, "summed", lambda flat, where: total)
    for number in (0, 1):
        found, features, labels = rank(number)
        assert torch.equal(features, h) and torch.equal(labels, y)
        for one, other in zip(vars(found["features"]).values(), vars(whole).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["a"].sums, whole.sums[:, :2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["nowhere"], "head": "head"}, "no layer 'nowhere'"),
        ({"head": "nowhere"}, "no layer 'nowhere'"),
        ({"head": "map"}, "needs a linear head"),
        ({"head": "flat"}, "'flat' doesn't"),
        ({}, "needs a linear layer that gives the logits of Net"),  # the last one is unused
        ({"layers": ["unused"], "head": "head"}, "never called"),
    ],
)
def test_what_cannot_be_measured_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        trainer(NeuralCollapse(**options)).fit(Net(), data())
    assert "\n" not in str(error.value)


def test_a_layer_as_wide_as_the_logits_is_not_taken_for_the_head() -> None:
    with pytest.raises(ValueError, match="'flat' doesn't"):
        trainer(NeuralCollapse(head="flat")).fit(Net(4), data())


def test_labels_that_the_head_has_no_output_for_are_said() -> None:
    net = Net(2)
    net.training_step = lambda batch, batch_idx: net(batch[0]).mean()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a label 2, but the head has 2 outputs"):
        trainer(NeuralCollapse(head="head")).fit(net, data())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_epochs": 0}, "at least 1"),
        ({"examples": 0}, "at least 1"),
        ({"layers": ["a", "a"]}, "once"),
        ({"layers": ["features"]}, "neither"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NeuralCollapse(**options)


def test_maps_with_channels_last_are_pooled_over_their_square() -> None:
    """Swin's layers give (B, H, W, C)."""
    from callbacks.neural_collapse import pooled

    maps = torch.randn(2, 5, 7, 7)
    wanted = maps.double().mean((2, 3))
    torch.testing.assert_close(pooled(maps, "x", 2), wanted)
    torch.testing.assert_close(pooled(maps.permute(0, 2, 3, 1), "x", 2), wanted)
