"""The linear probe: the regression against its definition, what is measured by it, and that it leaves no trace."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks import linear_probe
from callbacks.linear_probe import LinearProbe, choose_l2, held_out, solve, standardised
from datamodules.images import ImageDataModule, ImageSet
from recipes.classifier import Classifier
from tests.callbacks.small import Net, trainer
from tests.processes import ranks


class Stub(ImageDataModule):
    """Grey images of 8 pixels: noise, to train on and to test; for the probe, stripes whose phase tells the class.

    Args:
        noise: how far the probe's images are from their class's, from 0 on.
        meaning: without, their labels are drawn at random.
    """

    num_classes, image_size, in_chans = 2, 8, 1

    def __init__(self, noise: float = 0.0, meaning: bool = True, train: int = 120, test: int = 90) -> None:
        super().__init__(batch_size=8, flip=False, seed=0)
        self.class_names, self.domain_names = ["a", "b"], ["all"]
        self.noise, self.meaning, self.sizes = noise, meaning, (train, test)

    def load(self, part: str) -> ImageSet:
        g = torch.Generator().manual_seed(len(part))
        label = torch.arange(16) % 2
        images = torch.randint(256, (16, 1, 8, 8), generator=g, dtype=torch.uint8)
        return ImageSet(images, {"label": label, "domain": torch.zeros_like(label)})

    def stripes(self, size: int, seed: int) -> ImageSet:
        g = torch.Generator().manual_seed(seed)
        label = torch.arange(size) % 3
        clean = torch.zeros(3, 8, 8)
        clean[1, ::2] = clean[2, :, ::2] = 1
        images = clean[label] + self.noise * torch.randn(size, 8, 8, generator=g)
        label = label if self.meaning else torch.randint(3, (size,), generator=g)
        return ImageSet((255 * images).clamp(0, 255).byte()[:, None], {"label": label})

    def probe_sets(self) -> tuple[ImageSet, ImageSet]:
        torch.rand(3), np.random.rand(), random.random()  # data that draw without care
        return self.stripes(self.sizes[0], 1), self.stripes(self.sizes[1], 2)


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    small: dict[str, Any] = {"backbone_args": {"width": 4, "drop_rate": 0.5}, "num_classes": 2, "image_size": 8}
    return Classifier("cnn4", in_chans=1, **small, **options)


def by_hand(module: Classifier, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 8) of the small classifier, one image at a time, and labels."""
    module.eval()
    net: Any = module.backbone
    found = []
    with torch.no_grad():
        for image in images.images:  # type: ignore[union-attr]
            x = (image[None].float() / 255 - 0.5) / 0.25
            for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
                x = layer(x)
            found.append(x.mean((2, 3))[0].double().numpy())
    return np.stack(found), images.entries["label"].numpy()


def newton(x: np.ndarray, y: np.ndarray, k: int, l2: float) -> np.ndarray:
    """The regression's minimum by Newton's method on the full Hessian, with a column of ones for the biases."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    n, d = x.shape
    w, target, penalty = np.zeros((d, k)), np.eye(k)[y], np.append(np.full(d - 1, l2), 0.0)
    for _ in range(50):
        p = np.exp(x @ w - (x @ w).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - target) / n + penalty[:, None] * w
        hessian = np.einsum("nd,ne,nkl->dkel", x, x, np.einsum("nk,kl->nkl", p, np.eye(k)) - p[:, :, None] * p[:, None])
        hessian = hessian.reshape(d * k, d * k) / n + np.kron(np.diag(penalty), np.eye(k))
        w = w - 0.7 * np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-12)[0].reshape(d, k)
    assert np.abs(gradient).max() < 1e-9
    return w


def hard(n: int = 150, d: int = 60, k: int = 4, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """Standardised features, strongly correlated, of which a part has another's label."""
    g = torch.Generator().manual_seed(3)
    mixing = torch.randn(d, d, generator=g).double() * torch.logspace(0, -3, d).double()
    label = torch.arange(n) % k
    x = torch.randn(n, d, generator=g).double() @ mixing.T + 0.5 * torch.randn(k, d, generator=g).double()[label]
    other = torch.rand(n, generator=g) < wrong
    return standardised(x, x), torch.where(other, torch.randint(k, (n,), generator=g), label)


# ---------------------------------------------------------------------- the regression


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3])
def test_the_gradient_at_the_solution_is_zero(l2: float, caplog: pytest.LogCaptureFixture) -> None:
    features, label = hard()
    solution = solve(features, label, 4, l2).numpy()
    x, target = features.numpy(), np.eye(4)[label.numpy()]
    scores = x @ solution[:-1] + solution[-1]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert np.abs(x.T @ (p - target) / len(x) + l2 * solution[:-1]).max() < 1.1e-6
    assert np.abs((p - target).mean(0)).max() < 1.1e-6, "biases aren't penalised"
    assert np.abs(solution).max() > 1e-3 and not caplog.records


def test_where_it_starts_changes_nothing() -> None:
    features, label = hard()
    start = torch.randn(61, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        solve(features, label, 4, 0.1, start)[:-1], solve(features, label, 4, 0.1)[:-1], atol=1e-4, rtol=0
    )


def test_one_that_is_not_solved_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(linear_probe, "TOLERANCE", 0.0)
    monkeypatch.setattr(linear_probe, "ROUNDS", 1)
    solve(*hard(), 4, 0.1)
    [said] = [record.getMessage() for record in caplog.records]
    assert "isn't solved" in said and "at l2 0.1" in said


def test_a_fifth_of_each_class_chooses_the_penalty() -> None:
    label = torch.tensor([0] * 50 + [1] * 25 + [2] * 10)[torch.randperm(85, generator=torch.Generator().manual_seed(1))]
    held = held_out(label)
    assert label[held].bincount().tolist() == [10, 5, 2]
    assert torch.equal(held, held_out(label))
    assert 0 < held[label == 0][:25].sum() < 10, "not the last ones of each class"


@pytest.mark.parametrize("grid", [(1e-3, 1e-2, 1e-1, 1.0, 10.0), (10.0, 1e-3, 0.1)])
def test_the_penalty_is_that_of_the_least_loss_on_what_is_held_out(grid: tuple[float, ...]) -> None:
    features, label = hard(d=12, wrong=0.5)
    held = held_out(label).numpy()
    x, y = features.numpy(), label.numpy()
    losses = {}
    for l2 in grid:
        w = newton(x[~held], y[~held], 4, l2)
        scores = x[held] @ w[:-1] + w[-1]
        losses[l2] = float(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(held.sum()), y[held]]))
    chosen, fit = choose_l2(features, label, 4, grid)
    assert chosen == min(losses, key=lambda l2: losses[l2]) not in (min(grid), max(grid))
    assert fit is not None
    np.testing.assert_allclose(fit[:-1].numpy(), newton(x[~held], y[~held], 4, chosen)[:-1], atol=1e-4)


def test_features_are_standardised_by_the_training_part() -> None:
    g = torch.Generator().manual_seed(0)
    by = torch.randn(50, 3, generator=g).double() * torch.tensor([2.0, 1e-4, 0.0]) + torch.tensor([5.0, 0.0, 0.1])
    other = torch.randn(7, 3, generator=g).double()
    x = by.numpy()
    wanted = (other.numpy()[:, :2] - x.mean(0)[:2]) / x.std(0)[:2]
    found = standardised(other, by)
    np.testing.assert_allclose(found[:, :2], wanted)
    assert torch.equal(found[:, 2], torch.zeros(7).double()), "constant in training: of no use"


# ---------------------------------------------------------------------- what is measured


def probed(module: LightningModule, data: Any, probe: LinearProbe | None = None, **options: Any) -> LinearProbe:
    probe = probe or LinearProbe()
    runner = trainer(probe, **options)
    runner.test(module, datamodule=data, verbose=False)
    logged = {k: float(v) for k, v in runner.callback_metrics.items() if "probe" in k}
    wanted = {"test/probe_acc": probe.result["accuracy"], "test/probe_chance": probe.result["chance"]}
    assert logged == pytest.approx(wanted, nan_ok=True, abs=1e-6)
    return probe


@pytest.mark.parametrize("settings", [{}, {"l2": [10.0]}])
def test_what_is_measured_is_the_regression_on_the_networks_features(settings: dict[str, Any]) -> None:
    module, data = classifier(), Stub(noise=0.45, train=60, test=300)
    found = probed(module, data, LinearProbe(batch_size=50, **settings)).result
    (x, y), (test_x, test_y) = (by_hand(module, part) for part in data.probe_sets())
    mean, deviation = x.mean(0), x.std(0)
    used = deviation > 1e-6
    w = newton(((x - mean) / deviation)[:, used], y, 3, found["l2"])
    right = ((((test_x - mean) / deviation)[:, used] @ w[:-1] + w[-1]).argmax(1) == test_y).mean()
    assert 0.4 < right < 0.95, "neither trivial nor hopeless"
    assert found["accuracy"] == pytest.approx(right, abs=1e-9)
    assert (found["train"], found["test"], found["classes"], found["chance"]) == (60, 300, 3, pytest.approx(1 / 3))


def test_features_are_those_of_the_normalised_image() -> None:
    module, data = classifier().eval(), Stub(noise=0.3)
    part = data.probe_sets()[1]
    features, label = LinearProbe(batch_size=40)._features(trainer(), module, part)
    wanted, labels = by_hand(module, part)
    np.testing.assert_allclose(features.numpy(), wanted, atol=1e-6)
    assert np.array_equal(label.numpy(), labels) and features.dtype == torch.float64


def test_separable_classes_are_told_apart_and_random_ones_are_not() -> None:
    assert probed(classifier(), Stub(noise=0.05)).result["accuracy"] == 1.0
    found = probed(classifier(), Stub(noise=0.05, meaning=False, train=300, test=600)).result
    assert abs(found["accuracy"] - found["chance"]) < 0.08
    assert found["chance"] == pytest.approx(0.3617, abs=0.03)


def test_the_test_part_chooses_nothing() -> None:
    class Mislabelled(Stub):
        def probe_sets(self) -> tuple[ImageSet, ImageSet]:
            train, test = super().probe_sets()
            test.entries["label"] = 2 - test.entries["label"]
            return train, test

    one = probed(classifier(), Stub(noise=0.45)).result
    other = probed(classifier(), Mislabelled(noise=0.45)).result
    assert one["l2"] == other["l2"] and one["accuracy"] > other["accuracy"]


def test_a_single_penalty_is_taken() -> None:
    assert probed(classifier(), Stub(), LinearProbe(l2=[0.5])).result["l2"] == 0.5


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_it_runs_in_any_precision(precision: Any) -> None:
    plain = probed(classifier(), Stub(noise=0.2)).result["accuracy"]
    assert probed(classifier(), Stub(noise=0.2), precision=precision).result["accuracy"] == pytest.approx(
        plain, abs=0.1
    )


def test_features_that_are_not_finite_give_no_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    module = classifier()
    torch.nn.init.constant_(module.backbone.layer4[0].weight, float("nan"))
    assert np.isnan(probed(module, Stub()).result["accuracy"])
    assert "features aren't finite" in caplog.text


def test_a_dry_run_takes_one_batch() -> None:
    probe = LinearProbe(batch_size=20)
    trainer(probe, fast_dev_run=True).test(classifier(), datamodule=Stub(), verbose=False)
    assert (probe.result["train"], probe.result["test"]) == (20, 20)


# ---------------------------------------------------------------------- no trace


class Trains(Classifier):
    """Tests with batch norm and dropout as in training, and says what is left when all callbacks are through."""

    def on_test_epoch_start(self) -> None:
        self.backbone.layer2.train()
        self.backbone.head_drop.train()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.left = {
            "flags": [m.training for m in self.modules()],
            "gradients": [p.requires_grad for p in self.parameters()],
            "weights": {k: v.clone() for k, v in self.state_dict().items()},
            "random": (torch.get_rng_state(), torch.rand(4), np.random.rand(), random.random()),
        }


def leaves(tree: Any, name: str = "") -> dict[str, Tensor]:
    """All numbers of nested lists and dicts, as tensors."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in leaves(value, f"{name}/{key}").items()}
    return {} if tree is None or isinstance(tree, str) else {name: torch.as_tensor(tree)}


def after(*probe: LinearProbe) -> dict[str, Tensor]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"backbone_args": {"width": 4, "drop_rate": 0.5}, "num_classes": 2, "image_size": 8}
    module = Trains("cnn4", in_chans=1, **small)
    module.backbone.layer1[0].weight.requires_grad_(False)
    np.random.seed(0), random.seed(0)
    runner = trainer(*probe, max_epochs=2)
    data = Stub(noise=0.3)
    runner.fit(module, datamodule=data)
    optimizer = runner.optimizers[0].state_dict()
    runner.test(module, datamodule=data, verbose=False)
    return leaves([module.left, module.state_dict(), optimizer, torch.rand(4)])


def test_it_leaves_no_trace() -> None:
    probe = LinearProbe()
    with_it, without = after(probe), after()
    assert probe.result["accuracy"] > 0
    assert with_it.keys() == without.keys() and len(with_it) > 100
    assert [name for name in with_it if not torch.equal(with_it[name], without[name])] == []


def test_it_looks_at_the_network_as_it_predicts() -> None:
    """In evaluation mode, also where a module tests in another."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"backbone_args": {"width": 4, "drop_rate": 0.5}, "num_classes": 2, "image_size": 8}
    assert probed(Trains("cnn4", in_chans=1, **small), Stub(noise=0.05)).result["accuracy"] == 1.0


# ---------------------------------------------------------------------- two ranks

RANK = """
import json, os, pathlib, sys
from callbacks.linear_probe import LinearProbe
from tests.callbacks.small import trainer
from tests.callbacks.test_linear_probe import Stub, classifier

probe = LinearProbe()
if os.environ["RANK"] == "1":
    probe._measure = lambda *_: 1 / 0  # the first rank's answer is everyone's
runner = trainer(probe, devices=2, strategy="ddp", use_distributed_sampler=False)
runner.test(classifier(), datamodule=Stub(noise=0.45), verbose=False)
logged = {k: float(v) for k, v in runner.callback_metrics.items()}
(pathlib.Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps([probe.result, logged]))
"""


def test_two_ranks_log_what_one_process_logs(tmp_path: Path) -> None:
    ends = ranks([sys.executable, "-c", RANK, str(tmp_path)], 2, tmp_path, 100)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    (first, logged), (second, also) = (json.loads((tmp_path / r).read_text()) for r in "01")
    assert first == second == probed(classifier(), Stub(noise=0.45)).result
    assert logged["test/probe_acc"] == also["test/probe_acc"] == pytest.approx(first["accuracy"])


# ---------------------------------------------------------------------- what is refused


class Without(ImageDataModule):
    """No probe_sets."""

    load, num_classes = Stub.load, 2  # type: ignore[assignment]


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_data_without_probe_sets_are_refused_at_the_start(verb: str) -> None:
    with pytest.raises(ValueError, match=r"^LinearProbe needs data with probe_sets\(\), which Without haven't: .*$"):
        getattr(trainer(LinearProbe()), verb)(classifier(), datamodule=Without())


def test_loaders_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"which these haven't"):
        trainer(LinearProbe()).test(classifier(), Stub().test_dataloader())


def test_a_module_without_a_timm_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^LinearProbe needs a module with a timm backbone .*, which Net hasn't: .*$"):
        trainer(LinearProbe()).fit(Net(), datamodule=Stub())


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images to fit and one to test, not 4 and 9"):
        probed(classifier(), Stub(train=4, test=9))


@pytest.mark.parametrize("settings", [{"l2": []}, {"l2": [0.1, 0.0]}, {"l2": [float("inf")]}, {"batch_size": 4}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LinearProbe(**settings)


def test_a_fit_alone_measures_nothing(caplog: pytest.LogCaptureFixture) -> None:
    probe = LinearProbe()
    with caplog.at_level(logging.INFO):
        trainer(probe).fit(classifier(), datamodule=Stub())
    assert not probe.result and "linear probe" not in caplog.text
