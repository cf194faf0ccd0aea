"""The perturbed weights against the papers' formulas, and the gradient that the step then takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.weights import ASAM, AWP, SAM, WeightNoise, asam_ascent, awp_ascent, sam_ascent
from tests.laws import cells

W = [torch.tensor([[3.0, 4.0]]), torch.tensor([2.0])]
G = [torch.tensor([[0.0, 2.0]]), torch.tensor([-1.5])]


def test_sam_is_rho_along_the_gradient() -> None:
    # |g| = sqrt(4 + 2.25) = 2.5
    first, second = sam_ascent(W, G, 0.5)
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.4]]))
    torch.testing.assert_close(second, torch.tensor([-0.3]))


def test_asam_scales_by_the_weights_size() -> None:
    # T = 3.01, 4.01, 2.01; T g = 0, 8.02, -3.015 of norm 8.5680; e = rho T T g / norm
    first, second = asam_ascent(W, G, 0.5, 0.01)
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.5 * 4.01 * 8.02 / 8.568017]]))
    torch.testing.assert_close(second, torch.tensor([0.5 * 2.01 * -3.015 / 8.568017]))
    # the second one not scaled: T g = 0, 8.02, -1.5 of norm 8.15907
    _, plain = asam_ascent(W, G, 0.5, 0.01, [True, False])
    torch.testing.assert_close(plain, torch.tensor([0.5 * -1.5 / 8.159068]))


def test_awp_moves_each_layer_by_its_own_length() -> None:
    first, second = awp_ascent(W, G, 0.01)
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.05]]))  # |w| = 5
    torch.testing.assert_close(second, torch.tensor([-0.02]))
    first, second = awp_ascent(W, G, 0.01, "global")  # |w| = sqrt(29), |g| = 2.5
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.01 * 29**0.5 * 0.8]]))
    torch.testing.assert_close(second, torch.tensor([0.01 * 29**0.5 * -0.6]))


def moved(technique: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Any]:
    """A recipe, its weights' gradients, and by how much the technique moves each weight."""
    module = cells.recipe("classifier", norm=False, drop=False)
    batch = next(iter(cells.data("classifier", batch_size=8).train_dataloader()))
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(module.loss(batch), list(named.values()))  # type: ignore[operator]
    before = {n: p.detach().clone() for n, p in named.items()}
    technique.perturb(module, batch)
    by = {n: p.detach() - before[n] for n, p in named.items()}
    assert all(p.grad is None for p in named.values())
    return module, dict(zip(named, gradients, strict=True)), by, (before, batch)


def test_sam_ascends_the_gradient_of_the_batch_and_comes_back() -> None:
    technique = SAM(rho=0.1)
    module, gradients, by, (before, batch) = moved(technique)
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, change in by.items():
        torch.testing.assert_close(change, 0.1 * gradients[name] / total, rtol=1e-3, atol=1e-6)
    technique.restore(module)
    assert not cells.differing(before, {n: p.detach() for n, p in module.named_parameters()})


def test_awp_moves_weight_matrices_only() -> None:
    _, gradients, by, (before, _) = moved(AWP(gamma=0.02))
    for name, change in by.items():
        if before[name].dim() == 1:
            assert not change.any(), name
        else:
            size = gradients[name].norm().clamp_min(1e-30)  # zero behind a norm that begins at zero
            expected = 0.02 * before[name].norm() * gradients[name] / size
            torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)
    _, _, everywhere, _ = moved(AWP(gamma=0.02, norm="global"))
    assert all(bool(change.any()) == bool(gradients[n].any()) for n, change in everywhere.items())
    assert any(change.any() for n, change in everywhere.items() if before[n].dim() == 1)


def test_asam_scales_weights_and_not_biases() -> None:
    _, gradients, by, (before, _) = moved(ASAM(rho=0.3, eta=0.02))
    t = {n: w.abs() + 0.02 if "weight" in n else torch.ones_like(w) for n, w in before.items()}
    total = torch.stack([(t[n] * g).norm() for n, g in gradients.items()]).norm()
    for name, change in by.items():
        torch.testing.assert_close(change, 0.3 * t[name] ** 2 * gradients[name] / total, rtol=1e-3, atol=1e-6)


def test_noise_is_of_the_same_relative_size_and_random() -> None:
    _, gradients, by, (before, _) = moved(WeightNoise(gamma=0.03, seed=1))
    for name, change in by.items():
        if before[name].dim() > 1:
            assert float(change.norm() / before[name].norm()) == pytest.approx(0.03, rel=1e-3)
            assert abs(float(torch.cosine_similarity(change.flatten(), gradients[name].flatten(), 0))) < 0.5
    _, _, again, _ = moved(WeightNoise(gamma=0.03, seed=1))
    _, _, other, _ = moved(WeightNoise(gamma=0.03, seed=2))
    assert not cells.differing(by, again) and cells.differing(by, other)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SAM(rho=-1.0), "rho must not be negative"),
        (lambda: AWP(gamma=-1.0), "gamma must not be negative"),
        (lambda: AWP(norm="row"), "norm must be layer or global"),  # type: ignore[arg-type]
        (lambda: SAM(ascent="all"), "ascent must be synced or per_rank"),  # type: ignore[arg-type]
        (lambda: ASAM(eta=-1.0), "eta must not be negative"),
        (lambda: WeightNoise(gamma=-0.1), "gamma must not be negative"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
