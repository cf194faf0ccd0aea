"""Generalization measures against formulas worked out here; the search for sigma; the pair of distributions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.generalization_measures import (
    MEASURES,
    GeneralizationMeasures,
    floor_of,
    largest_sigma,
    log_path_norm,
    noisy,
    norm_measures,
    pac_bayes,
    spectral_norm,
)
from callbacks.label_noise import LabelNoise
from tests.laws import cells, laws

# ---------------------------------------------------------------------- weights


def test_norms_of_matrices_that_are_known() -> None:
    # singular values 3 and 4; 2; the convolution flattens to (1, 4) with the only singular value 6
    weights = {
        "a": torch.tensor([[0.0, 3.0], [4.0, 0.0]]),
        "b": torch.tensor([[2.0], [0.0]]),
        "c": torch.full((1, 1, 2, 2), 3.0),
        "bias": torch.tensor([1.0, 2.0]),
    }
    start = {name: torch.zeros_like(value) for name, value in weights.items()} | {"b": torch.tensor([[2.0], [5.0]])}
    found = norm_measures(weights, start, 0.5)
    assert found == pytest.approx(
        {
            "params": 4 + 2 + 4 + 2,
            "inverse_margin2": 4.0,
            "log_prod_spec": math.log(16 * 4 * 36 / 0.25),
            "log_prod_fro": math.log(25 * 4 * 36 / 0.25),
            "sum_fro_over_spec": 25 / 16 + 1 + 1,
            "sum_log_fro": math.log(25 * 4 * 36),
            "distance": math.sqrt(25 + 25 + 36 + 5),
            "spec_distance": math.sqrt(16 + 25 + 36),
            "norm": math.sqrt(25 + 4 + 36 + 5),
        }
    )


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix.double())[0]), rel=1e-10)


def brute_path_norm(layers: list[nn.Linear]) -> float:
    """The sum over all paths, one by one: from each input, and from each bias on."""
    total = 0.0
    for first in range(len(layers)):
        sizes = [layer.out_features for layer in layers[first:]]
        begins = [layers[0].in_features] if first == 0 else []
        for path in itertools.product(*(range(s) for s in [*begins, *sizes])):
            if first == 0:  # from an input
                product = 1.0
                for layer, (i, j) in zip(layers, itertools.pairwise(path), strict=True):
                    product *= layer.weight[j, i].item() ** 2
                total += product
        for path in itertools.product(*(range(s) for s in sizes)):  # from this layer's bias
            product = layers[first].bias[path[0]].item() ** 2
            for layer, (i, j) in zip(layers[first + 1 :], itertools.pairwise(path), strict=True):
                product *= layer.weight[j, i].item() ** 2
            total += product
    return total


def test_the_path_norm_is_the_sum_over_all_paths() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    before = [p.clone() for p in net.parameters()]
    found = log_path_norm(net, torch.randn(1, 1, 2, 2))
    assert found == pytest.approx(math.log(brute_path_norm(layers)), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_batch_norm_counts_as_the_affine_map_that_it_is() -> None:
    torch.manual_seed(4)
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(2, 3), norm, nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.tensor([0.3, 1.0, 4.0]))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator,union-attr]
    first, last = nn.Linear(2, 3), net[3]
    with torch.no_grad():  # batch norm folded into the layer before, but for its two biases, which are two paths
        first.weight.copy_(net[0].weight * scale[:, None])  # type: ignore[operator]
        shift = norm.bias - scale * norm.running_mean  # type: ignore[operator]
        first.bias.copy_(((net[0].bias * scale).square() + shift.square()).sqrt())  # type: ignore[operator]
    assert isinstance(last, nn.Linear)
    wanted = math.log(brute_path_norm([first, last]))
    assert log_path_norm(net, torch.zeros(1, 2)) == pytest.approx(wanted, rel=1e-5)


def test_a_network_that_has_no_path_norm_says_so() -> None:
    assert log_path_norm(nn.Embedding(4, 2), torch.zeros(1, 3)) is None  # takes no numbers
    assert log_path_norm(nn.Linear(2, 1, bias=False).apply(_zero), torch.zeros(1, 2)) is None


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def test_pac_bayes_is_its_formula() -> None:
    # |W - W0|^2 = 4, sigma = 0.1: KL = 4 / 0.02 = 200; ln(2 * 20 / 0.05) = ln 800
    assert pac_bayes(2.0, 0.1, 400) == pytest.approx(math.sqrt((200 + math.log(800)) / 800))


# ---------------------------------------------------------------------- noise on weights


def test_sigma_of_an_accuracy_with_a_closed_form() -> None:
    # P(1 + sigma * e > 0) = Phi(1 / sigma); it is 0.9 at sigma = 1 / 1.2815516
    def phi(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    tried: list[tuple[float, float]] = []
    found = largest_sigma(lambda sigma: phi(1 / sigma), 1.0, 0.1, tried)
    assert found == pytest.approx(1 / 1.2815516, rel=0.01) and found <= 1 / 1.2815516
    assert len(tried) == 10 and all(1e-4 < sigma < 1 for sigma, _ in tried)
    assert largest_sigma(lambda sigma: 1.0, 1.0, 0.1) == pytest.approx(1.0, rel=0.01)
    assert largest_sigma(lambda sigma: 0.0, 1.0, 0.1) == pytest.approx(1e-4)


def test_noise_is_what_it_says_and_leaves_nothing() -> None:
    weights = [torch.randn(50, 40), torch.randn(7)]
    before = [w.clone() for w in weights]
    with noisy(weights) as move:
        move(0.3, torch.Generator().manual_seed(1))
        g = torch.Generator().manual_seed(1)
        for weight, kept in zip(weights, before, strict=True):
            assert torch.equal(weight, kept + 0.3 * torch.randn(kept.shape, generator=g))
        move(1e-9, torch.Generator().manual_seed(2))  # from the weights, not from where the last draw left them
        assert torch.allclose(weights[0], before[0], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    with pytest.raises(KeyError), noisy(weights) as move:
        move(1.0, torch.Generator().manual_seed(3))
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


# ---------------------------------------------------------------------- the pair


def test_the_pair_of_distributions() -> None:
    # 600 examples fitted, 900 held out with an error of 0.1: D1 0.06, D2 0.6 * 0.9 = 0.54
    assert floor_of(0.0, 0.1, 600, 900, 10) == pytest.approx((0.06, 0.54, 0.24))
    # the training error is the same in both, so it doesn't move the floor
    assert floor_of(0.3, 0.1, 600, 900, 10)[2] == pytest.approx(0.24)
    assert floor_of(0.0, 0.9, 600, 900, 10)[2] == pytest.approx(0.0)
    assert floor_of(0.0, 0.1, 600, 900, 10, redrawn=0.8)[1] == pytest.approx(0.48)


# ---------------------------------------------------------------------- in a training


def fit(*parts: Any, epochs: int = 2, **settings: Any) -> tuple[GeneralizationMeasures, LightningModule, Any]:
    diagnostic = GeneralizationMeasures(share=None, **settings)
    module, data = cells.recipe("classifier"), cells.Images(size=24)
    cells.trainer(diagnostic, *parts, max_epochs=epochs).fit(module, datamodule=data)
    return diagnostic, module, data


def last(diagnostic: GeneralizationMeasures) -> dict[str, float]:
    assert all(len(points) == 1 for points in diagnostic.history.values())
    return {key.partition("/")[2]: points[0][1] for key, points in diagnostic.history.items()}


def test_in_a_training_all_is_of_the_last_weights() -> None:
    noise = LabelNoise(1.0, seed=3)
    diagnostic, module, data = fit(noise)
    found = last(diagnostic)
    assert set(MEASURES) <= found.keys() and all(map(math.isfinite, found.values()))
    start = dict(cells.recipe("classifier").named_parameters())
    weights = dict(module.named_parameters())
    away = torch.cat([(weights[n] - start[n]).detach().double().flatten() for n in weights])
    assert found["distance"] == pytest.approx(float(away.norm()))
    assert found["params"] == sum(p.numel() for p in weights.values())
    module.eval()
    errors, losses, margins = {}, {}, {}
    for part in ("train", "val"):
        batch = data.part(part).plain(range(24))
        label: Tensor = noise.labels(batch["label"], batch["index"]) if part == "train" else batch["label"]
        with torch.no_grad():
            logits = module(batch["image"]).double()
        errors[part] = float((logits.argmax(1) != label).double().mean())
        losses[part] = float(F.cross_entropy(logits, label))
        others = [logits[i, [c for c in range(3) if c != y]].max() for i, y in enumerate(label.tolist())]
        margins[part] = logits[range(24), label] - torch.stack(others)
    assert found["train_error"] == pytest.approx(errors["train"]) and found["val_error"] == pytest.approx(errors["val"])
    assert found["gap"] == pytest.approx(errors["val"] - errors["train"])
    assert found["train_loss"] == pytest.approx(losses["train"]) and found["val_loss"] == pytest.approx(losses["val"])
    assert found["margin"] == pytest.approx(float(margins["train"].quantile(0.1)), rel=1e-5)
    assert found["unfit"] == (found["margin"] < 1e-3)
    assert found["inverse_margin2"] == pytest.approx(max(found["margin"], 1e-3) ** -2, rel=1e-4)
    assert found["pac_bayes"] == pytest.approx(pac_bayes(found["distance"], found["sigma"], 24))
    risks = floor_of(errors["train"], errors["val"], 24, 24, 3)
    assert (found["risk_1"], found["risk_2"], found["floor"]) == pytest.approx(risks)
    assert found["risk_2_drawn"] == pytest.approx(found["risk_2"], abs=0.1)


def test_labels_that_are_redrawn_are_wrong_as_often_as_expected() -> None:
    found = last(fit(redraws=3000)[0])
    # an error of a drawn label has variance 2/9; 24 examples in 3000 labellings, a half of the distribution
    assert found["risk_2_drawn"] == pytest.approx(found["risk_2"], abs=4 * 0.5 * (2 / 9 / 72000) ** 0.5)


def test_weights_are_as_without_it_and_the_numbers_come_again() -> None:
    first, module, _ = fit()
    again, _, _ = fit()
    plain = cells.recipe("classifier")
    cells.trainer(max_epochs=2).fit(plain, datamodule=cells.Images(size=24))
    assert not cells.differing(cells.weights(module), cells.weights(plain))
    assert first.history == again.history


def test_the_first_weights_survive_a_resume(tmp_path: Path) -> None:
    whole, module, _ = fit()
    file, killed = tmp_path / "killed.ckpt", laws.Kill(tmp_path / "killed.ckpt", 6)
    with pytest.raises(KeyError, match="stopped on purpose"):
        fit(killed)
    torch.manual_seed(99)
    resumed, again = GeneralizationMeasures(share=None), cells.recipe("classifier")
    runner = cells.trainer(resumed, max_epochs=2)
    runner.fit(again, datamodule=cells.Images(size=24), ckpt_path=file, weights_only=True)
    assert not cells.differing(cells.weights(module), cells.weights(again))
    assert resumed.history == whole.history


def test_settings_out_of_range_are_refused() -> None:
    for settings in (
        {"quantile": 0.0},
        {"quantile": 1.0},
        {"drop": 1.5},
        {"draws": 0},
        {"examples": 0},
        {"redraws": 0},
    ):
        with pytest.raises(ValueError, match="must"):
            GeneralizationMeasures(**settings)  # type: ignore[arg-type]


def test_a_network_without_trained_matrices_is_refused() -> None:
    module = cells.recipe("classifier")
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    with pytest.raises(ValueError, match="a weight matrix that is trained"):
        cells.trainer(GeneralizationMeasures(share=None)).fit(module, datamodule=cells.Images())


def test_it_is_drawn() -> None:
    figure = fit()[0].draw()
    assert figure is not None and len(figure.axes) == 3
    assert len(figure.axes[2].patches) >= len(MEASURES)
