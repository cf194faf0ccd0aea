"""The paper's model: its exact identities, and the recipe's modes against them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.neural_collapse import Moments, NeuralCollapse, nc1, nc1_ratio, nc2, nc3
from recipes.classifier import Classifier
from recipes.near_features.module import (
    NearFeatures,
    central_weights,
    flow,
    minimise,
    near_features_loss,
    nearest_features,
)
from tests.laws import cells

# ---------------------------------------------------------------------- the model


def problem(seed: int = 0, count: int = 60, classes: int = 4, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random ReLU features (N, d) of noisy clusters, one-hot labels (N, K) and labels (N,); classes of unlike size."""
    g = torch.Generator().manual_seed(seed)
    label = torch.cat([torch.arange(classes), torch.randint(0, classes, (count - classes,), generator=g)])
    raw = torch.randn(classes, 9, generator=g)[label] + torch.randn(count, 9, generator=g)
    incoming = torch.relu(raw @ torch.randn(9, width, generator=g)).double()
    return incoming, F.one_hot(label, classes).double(), label


def deviations(features: Tensor, label: Tensor) -> Tensor:
    means = torch.stack([features[label == c].mean(0) for c in range(int(label.max()) + 1)])
    return features - means[label]


def ratio(features: Tensor, label: Tensor) -> float:
    return nc1_ratio(Moments.of(features, label, int(label.max()) + 1))


def test_the_loss_is_the_papers() -> None:
    incoming, targets, _ = problem()
    g = torch.Generator().manual_seed(1)
    w, h = torch.randn(4, 7, generator=g).double(), torch.randn(60, 7, generator=g).double()
    total = 0.0
    for i in range(60):
        total += float((w @ h[i] - targets[i]) @ (w @ h[i] - targets[i])) / 120
        total += 0.3 * float((h[i] - incoming[i]) @ (h[i] - incoming[i])) / 120
    total += 0.2 * float(w.norm()) ** 2 / 8
    assert float(near_features_loss(w, h, targets, incoming, 0.2, 0.3)) == pytest.approx(total, rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0), st.floats(1e-3, 2.0))
def test_each_half_step_is_a_minimiser_and_the_flow_is_the_gradient(seed: int, lam_w: float, lam_h: float) -> None:
    incoming, targets, _ = problem(seed)
    h = incoming + 0.1 * torch.randn(incoming.shape, generator=torch.Generator().manual_seed(seed)).double()
    w = central_weights(h, targets, lam_w).requires_grad_()
    h = h.requires_grad_()
    loss = near_features_loss(w, h, targets, incoming, lam_w, lam_h)
    by_w, by_h = torch.autograd.grad(loss, (w, h))
    assert float(by_w.abs().max()) < 1e-10
    # through W*(H), whose gradient is nothing at its minimum
    through = near_features_loss(central_weights(h, targets, lam_w), h, targets, incoming, lam_w, lam_h)
    moved = -len(h) * torch.autograd.grad(through, h)[0]
    torch.testing.assert_close(flow(h.detach(), targets, lam_w, incoming, lam_h), moved, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(-len(h) * by_h, moved, rtol=1e-7, atol=1e-9)
    w = w.detach()
    best = nearest_features(w, targets, incoming, lam_h).requires_grad_()
    (left,) = torch.autograd.grad(near_features_loss(w, best, targets, incoming, lam_w, lam_h), best)
    assert float(left.abs().max()) < 1e-12


@pytest.mark.parametrize("lam_h", [0.02, 0.3])
def test_at_a_stationary_point_deviations_shrink_by_what_the_head_sees(lam_h: float) -> None:
    """By lam_h/(s^2 + lam_h) along each right singular direction of W, not at all where W sees nothing."""
    incoming, targets, label = problem()
    w, h = minimise(targets, incoming, 5e-3, lam_h)
    grad = (h @ w.T - targets) @ w + lam_h * (h - incoming)
    assert float(grad.abs().max()) < 1e-8
    _, s, directions = torch.linalg.svd(w)
    assert len(directions) == 7 > len(s) and float(s.max()) > 0.3
    shrunk = torch.cat([lam_h / (s.square() + lam_h), torch.ones(3).double()])
    before, after = deviations(incoming, label) @ directions.T, deviations(h, label) @ directions.T
    torch.testing.assert_close(after, before * shrunk, rtol=0, atol=1e-8)


def test_the_pull_holds_collapse_back() -> None:
    """NC1r rises with lam_h, from below that of H0 up to it."""
    incoming, targets, label = problem()
    found = [ratio(minimise(targets, incoming, 5e-3, lam)[1], label) for lam in (0.01, 0.05, 0.2, 1.0, 100.0)]
    assert found == sorted(found) and len(set(found)) == 5
    assert found[-1] < ratio(incoming, label) and found[0] < 0.8 * ratio(incoming, label)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_rises_along_the_central_path(seed: int) -> None:
    incoming, targets, label = problem(seed)
    h, found = incoming, [ratio(incoming, label)]
    for step in range(1, 601):
        h = h + 0.02 * flow(h, targets, 5e-3)
        if step % 20 == 0:
            found.append(ratio(h, label))
    assert len(found) == 31
    assert all(later <= before + 1e-9 for before, later in itertools.pairwise(found)), found
    assert found[-1] < 0.9 * found[0]


def test_unconstrained_features_collapse() -> None:
    """Without H0, classes of one size end at a simplex that is the head's, too (of the class means less their mean)."""
    incoming, _, _ = problem(width=6)
    label = torch.arange(60) % 4
    targets = F.one_hot(label, 4).double()
    w, h = minimise(targets, torch.zeros_like(incoming), 0.01, 0.01, start=incoming)
    moments = Moments.of(h, label, 4)
    assert nc1_ratio(moments) < 1e-10 and nc1(moments) < 1e-8
    assert max(nc2(moments.centred).values()) < 1e-5
    assert max(nc3(w - w.mean(0), moments.centred)) < 1e-5


# ---------------------------------------------------------------------- the modes with a table


def table(mode: str, **options: Any) -> NearFeatures:
    torch.manual_seed(2)
    usual: dict[str, Any] = {"backbone_args": {"width": 16, "depth": 1}, "num_classes": 3, "image_size": 32, "lr": 0.02}
    return NearFeatures("mlp", mode=mode, **{**usual, **options})  # type: ignore[arg-type]  # one of the modes


def fit(module: NearFeatures, *more: Any, epochs: int = 2, **options: Any) -> Trainer:
    runner = cells.trainer(*more, max_epochs=epochs, **options)
    runner.fit(module, datamodule=cells.Images())
    return runner


def start(module: NearFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """H0, one-hot labels and labels of :class:`cells.Images`, from the module's frozen network."""
    data = cells.Images()
    data.setup("fit")
    batch = data.part("train").plain(range(12))
    with torch.no_grad():
        incoming = torch.relu(
            module.backbone.incoming.layer1[0](((batch["image"] - module.mean) / module.std).flatten(1))
        )
    return incoming.double(), F.one_hot(batch["label"], 3).double(), batch["label"]


@pytest.mark.parametrize("lam_h", [0.0, 0.4])
@pytest.mark.parametrize("unconstrained", [False, True])
def test_a_training_on_the_central_path_takes_the_steps_of_the_flow(lam_h: float, unconstrained: bool) -> None:
    module = table("central_path", lam_h=lam_h, unconstrained=unconstrained)
    runner = fit(module)  # 6 steps
    incoming, targets, label = start(module)
    h, ratios = incoming, [ratio(incoming, label)]
    for _ in range(6):
        h = h + 0.02 * flow(h, targets, 0.005, 0 * incoming if unconstrained else incoming, lam_h)
        ratios.append(ratio(h, label))
    torch.testing.assert_close(module.table.rows.detach(), h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.backbone.fc.weight, central_weights(h, targets, 0.005), rtol=1e-7, atol=1e-9)
    logged = runner.callback_metrics
    assert float(logged["path/nc1r"]) == pytest.approx(ratios[-1], rel=1e-6)
    assert float(logged["path/end_over_start"]) == pytest.approx(ratios[-1] / ratios[0], rel=1e-6)
    assert float(logged["path/largest_rise"]) == pytest.approx(
        max(0.0, *(b - a for a, b in itertools.pairwise(ratios))), rel=1e-5, abs=1e-12
    )


def test_alternation_is_the_exact_minimisation() -> None:
    module = table("alternation", lam_h=0.3)
    fit(module)
    incoming, targets, _ = start(module)
    w, h = minimise(targets, incoming, 0.005, 0.3, steps=6)
    torch.testing.assert_close(module.table.rows.detach(), h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.backbone.fc.weight, w, rtol=1e-7, atol=1e-9)


def test_a_table_takes_gradient_steps_on_the_papers_loss() -> None:
    """All examples in one batch: head lr, table lr times N."""
    module = table("table", lam_h=0.3, momentum=0.0, schedule="constant")
    w = module.backbone.fc.weight.detach().clone().requires_grad_()
    incoming, targets, _ = start(module)
    cells.trainer(max_epochs=1).fit(module, datamodule=cells.Images(batch_size=12))
    h = incoming.clone().requires_grad_()
    by_w, by_h = torch.autograd.grad(near_features_loss(w, h, targets, incoming, 0.005, 0.3), (w, h))
    torch.testing.assert_close(module.backbone.fc.weight.detach(), w.detach() - 0.02 * by_w)
    torch.testing.assert_close(module.table.rows.detach(), incoming - 0.02 * 12 * by_h)
    assert float((module.table.rows - incoming).detach().abs().max()) > 1e-4


def test_rows_stand_for_training_examples_alone() -> None:
    """An example of other data has the same index as one of training; it isn't that one."""
    module = table("central_path", lam_h=0.0)
    data = cells.Images()
    cells.trainer(max_epochs=2).fit(module, datamodule=data)
    module.eval()
    train, val = (data.part(part).plain(range(12)) for part in ("train", "val"))
    w = module.backbone.fc.weight
    torch.testing.assert_close(module.example_logits(train), module.table.rows @ w.T)
    incoming = module.backbone.incoming((val["image"] - module.mean) / module.std).double()
    torch.testing.assert_close(module.example_logits(val), incoming @ w.T)
    torch.testing.assert_close(module(train["image"]), module.table.incoming @ w.T)
    far = {**val, "index": val["index"] + 1000}
    torch.testing.assert_close(module.example_logits(far), incoming @ w.T)


def test_a_diagnostic_sees_the_table() -> None:
    module, collapse = table("central_path", lam_h=0.0), NeuralCollapse(share=None)
    fit(module, collapse)
    incoming, _, label = start(module)
    found = {key: points[-1][1] for key, points in collapse.history.items()}
    assert found["neural_collapse/incoming/nc1r"] == pytest.approx(ratio(incoming, label), rel=1e-6)
    assert found["neural_collapse/features/nc1r"] == pytest.approx(ratio(module.table.rows.detach(), label), rel=1e-6)
    assert found["neural_collapse/deep_over_shallow"] == pytest.approx(
        found["neural_collapse/end_over_start"], rel=1e-6
    )


@pytest.mark.parametrize("mode", ["table", "central_path", "alternation"])
def test_a_table_resumes_exactly_and_opens_without_its_data(mode: str, tmp_path: Path) -> None:
    whole = table(mode, lam_h=0.1)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(whole, save, epochs=3, enable_checkpointing=True)
    resumed = table(mode, lam_h=0.1)
    cells.trainer(max_epochs=3).fit(
        resumed, datamodule=cells.Images(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=False
    )
    assert not cells.differing(cells.weights(whole), cells.weights(resumed))
    opened = NearFeatures.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=False)
    assert len(opened.table.rows) == 12 and opened.path[0] > 0


def test_a_table_needs_data_of_ours() -> None:
    from torch.utils.data import DataLoader

    with pytest.raises(ValueError, match="mode network"):
        cells.trainer().fit(table("table"), DataLoader([{"image": torch.zeros(3, 32, 32)}]))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- a network


def network(**options: Any) -> NearFeatures:
    torch.manual_seed(2)
    usual: dict[str, Any] = {"backbone_args": {"width": 16, "depth": 3}, "num_classes": 3, "image_size": 32}
    return NearFeatures("mlp", **{**usual, **options})


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"image": torch.rand(6, 3, 32, 32, generator=g), "label": torch.arange(6) % 3}


@pytest.mark.parametrize("objective", ["ce", "mse"])
@pytest.mark.parametrize("anchor", [None, "layer1"])
def test_a_networks_loss_and_that_no_gradient_flows_through_the_anchor(objective: Any, anchor: str | None) -> None:
    module = network(objective=objective, anchor=anchor, lam_h=0.7)
    net, images = module.backbone, batch()
    h0 = net.layer1(((images["image"] - module.mean) / module.std).flatten(1))
    h0 = h0 if anchor else net.layer2(h0)
    h = net.layer3(net.layer2(h0) if anchor else h0)
    logits = net.fc(h)
    fit = F.cross_entropy(logits, images["label"])
    if objective == "mse":
        fit = (logits - torch.eye(3)[images["label"]]).square().sum() / 12
    wanted = fit + 0.35 * (h - h0.detach()).square().sum() / 6
    weights = list(module.backbone.parameters())
    loss = module.loss(images)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(module.example_losses(images).mean(), wanted)
    for one, other in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_a_pull_it_is_the_classifier() -> None:
    near, plain = cells.recipe("near_features", lam_h=0.0, lr=0.02), cells.recipe("classifier", lr=0.02)
    for module in (near, plain):
        torch.manual_seed(0)
        cells.trainer(max_epochs=1).fit(module, datamodule=cells.Images())
    assert isinstance(near, Classifier) and not cells.differing(cells.weights(near), cells.weights(plain))


def test_the_pull_keeps_features_near() -> None:
    def distance(lam_h: float) -> float:
        module = network(lam_h=lam_h, lr=0.05)
        cells.trainer(max_epochs=20).fit(module, datamodule=cells.Images())
        held = network(lam_h=2.0)
        held.load_state_dict(module.state_dict())
        with torch.no_grad():
            return float(held.loss(batch()) - F.cross_entropy(held(batch()["image"]), batch()["label"]))

    assert distance(1.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "other"}, "mode must be one of network, table"),
        ({"objective": "hinge"}, "objective ce or mse"),
        ({"lam_h": -1.0}, "must not be negative"),
        ({"mode": "alternation", "lam_h": 0.0}, "in alternation positive"),
        ({"lam_w": 0.0}, "lam_w positive"),
        ({"anchor": "nowhere"}, "no layer 'nowhere'"),
        ({"backbone_args": {"width": 16, "depth": 1}}, "no stage of MLP before the last is 16 wide"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(**options)


def test_an_anchor_of_another_width_is_said() -> None:
    module = NearFeatures(
        "resnet10t", 3, 3, 32, anchor="layer1", backbone_args={"channels": (8, 8, 16, 32), "stem_width": 8}
    )
    with pytest.raises(ValueError, match="'layer1' gives 8 features and the head takes 32"):
        module.loss(batch())
