"""The functions of callbacks.statistics against the papers' formulas, worked out here in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from callbacks import style
from callbacks.statistics import Shift, Unused
from callbacks.style import (
    adversarial_style,
    batch_spread,
    dsu,
    efdmix,
    feature_statistics,
    gradient_reversal,
    mixstyle,
)

EPS = 1e-6
SHAPES = [(4, 3, 5, 6), (2, 1, 1, 2), (3, 7, 8, 8), (4, 9, 5), (2, 2, 3)]


def as_map(x: Tensor) -> Tensor:
    """(B, C, positions) of a feature map or of tokens."""
    return x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)


def like(flat: Tensor, x: Tensor) -> Tensor:
    return flat.reshape(x.shape) if x.dim() == 4 else flat.transpose(1, 2)


def plain_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums written out, (B, C) each."""
    flat = as_map(x)
    n = flat.shape[-1]
    mean = flat.sum(-1) / n
    variance = ((flat - mean[..., None]) ** 2).sum(-1) / (n - 1)
    return mean, (variance + EPS).sqrt()


def spread(s: Tensor) -> Tensor:
    return (((s - s.mean(0)) ** 2).sum(0) / (len(s) - 1) + EPS).sqrt()


def restyled(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """x with these statistics in place of its own."""
    own_mean, own_std = plain_statistics(x)
    return like((as_map(x) - own_mean[..., None]) / own_std[..., None] * std[..., None] + mean[..., None], x)


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64) * 3 + 1
    channels = shape[1] if len(shape) == 4 else shape[2]
    noise = torch.randn(2, shape[0], channels, generator=g, dtype=torch.float64)
    theta = torch.rand(2, channels, generator=g, dtype=torch.float64)
    gradient = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x.requires_grad_(), noise, theta.requires_grad_(), gradient


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_names_others_rely_on() -> None:
    functions = ("feature_statistics", "mixstyle", "dsu", "efdmix", "adversarial_style")
    for name in (*functions, "MixStyle", "DSU", "EFDMix", "AdvStyle"):
        assert callable(getattr(style, name)) and name in style.__all__


@pytest.mark.parametrize("shape", SHAPES)
def test_feature_statistics(shape: tuple[int, ...]) -> None:
    x, *_ = draw(shape)
    for found, wanted in zip(feature_statistics(x), plain_statistics(x), strict=True):
        close(found, wanted)
    single = feature_statistics(x.detach().float())
    for found, wanted in zip(single, plain_statistics(x.detach()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_statistics_of_half_precision_are_float32_and_do_not_overflow() -> None:
    x = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    x[:, :, 0] = -300
    mean, std = feature_statistics(x)
    assert mean.dtype == std.dtype == torch.float32
    close(mean.double(), torch.full((2, 3), 150.0, dtype=torch.float64))
    torch.testing.assert_close(std, torch.full((2, 3), math.sqrt(360000 * 3 / 16 * 16 / 15)), rtol=1e-5, atol=0)


def test_no_spread_over_one_position() -> None:
    with pytest.raises(ValueError, match="one position per channel"):
        feature_statistics(torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="feature map .B, C, H, W. or tokens"):
        feature_statistics(torch.zeros(2, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_mixstyle(shape: tuple[int, ...]) -> None:
    x, _, _, gradient = draw(shape)
    permutation = torch.arange(shape[0]).roll(1)
    lam = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    mean, std = (s.detach() for s in plain_statistics(x))
    mix = lam[:, None]
    own = (as_map(x) - mean[..., None]) / std[..., None]  # no gradient through the statistics
    mixed = own * (mix * std + (1 - mix) * std[permutation])[..., None]
    wanted = like(mixed + (mix * mean + (1 - mix) * mean[permutation])[..., None], x)
    found = mixstyle(x, permutation, lam)
    close(found, wanted)
    close(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, wanted)))


@pytest.mark.parametrize("shape", SHAPES)
def test_efdmix(shape: tuple[int, ...]) -> None:
    x, _, _, gradient = draw(shape)
    permutation = torch.arange(shape[0]).roll(1)
    lam = torch.linspace(0.0, 1.0, shape[0], dtype=torch.float64)
    flat = as_map(x)
    rank = (flat[..., :, None] > flat[..., None, :]).sum(-1)  # how many values of the channel are smaller
    same = (rank[..., :, None] == rank[permutation][..., None, :]).double()
    matched = (same @ flat[permutation][..., None])[..., 0]  # the other's value of the same rank; gradient goes to it
    wanted = like(flat + (1 - lam)[:, None, None] * (matched - flat.detach()), x)
    found = efdmix(x, permutation, lam)
    close(found, wanted)
    close(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, wanted)))


@pytest.mark.parametrize("shape", SHAPES)
def test_dsu(shape: tuple[int, ...]) -> None:
    x, noise, _, gradient = draw(shape)
    mean, std = plain_statistics(x)
    wanted = restyled(x, mean + noise[0] * spread(mean), std + noise[1] * spread(std))
    found = dsu(x, noise[0], noise[1])
    close(found, wanted)
    close(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, wanted)))
    close(batch_spread(mean), spread(mean))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [0.0, 0.2, 10.0])
def test_adversarial_style_and_the_gradient_of_its_intensities(shape: tuple[int, ...], lam: float) -> None:
    x, noise, theta, gradient = draw(shape)
    mean, std = plain_statistics(x)
    wanted = restyled(x, mean + noise[0] * theta[0], std + noise[1] * theta[1])
    found = adversarial_style(x, theta[0], theta[1], noise[0], noise[1], lam)
    close(found, wanted)
    g_x, g_theta = torch.autograd.grad(found, (x, theta), gradient)
    close(g_x, torch.autograd.grad(wanted, x, gradient, retain_graph=True)[0])
    # dL/dtheta_mean = -lam sum G e_mean; dL/dtheta_std = -lam sum G x_hat e_std (papers/11)
    normal = (as_map(x) - mean[..., None]) / std[..., None]
    g = as_map(gradient)
    by_hand = torch.stack([(g * noise[0][..., None]).sum((0, 2)), (g * normal * noise[1][..., None]).sum((0, 2))])
    close(g_theta, -lam * by_hand)


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[3:])
@pytest.mark.parametrize("own", [0.0, 0.7])
def test_a_direction_takes_the_size_of_the_spread(shape: tuple[int, ...], own: float) -> None:
    """The released re-identification code: the gradient flows through the size, too; here beside some DSU."""
    x, noise, theta, gradient = draw(shape)
    mean, std = plain_statistics(x)
    widths = [w * spread(s).norm() + own * spread(s) for w, s in zip(theta, (mean, std), strict=True)]
    wanted = restyled(x, mean + noise[0] * widths[0], std + noise[1] * widths[1])
    weight = torch.tensor([[1.0], [own]], dtype=torch.float64).expand(2, shape[0])
    found = Shift.apply(x, theta, noise, weight, bool(own), True, EPS)
    close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y, (x, theta), gradient) for y in (found, wanted)), strict=True):
        close(a, b)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (3, 4, 2)])
@pytest.mark.parametrize("through_spread", [False, True])
@pytest.mark.parametrize("direction", [False, True])
def test_the_fused_shift_is_twice_differentiable(shape: tuple[int, ...], through_spread: bool, direction: bool) -> None:
    x, noise, theta, _ = draw(shape)
    weight = torch.rand(2, shape[0], dtype=torch.float64)

    def function(x: Tensor, theta: Tensor) -> Tensor:
        return Shift.apply(x, theta, noise, weight, through_spread, direction, EPS)

    assert torch.autograd.gradcheck(function, (x, theta))
    assert torch.autograd.gradgradcheck(function, (x, theta))


def test_an_unused_intensity_gets_a_zero_gradient_and_changes_nothing() -> None:
    x, _, theta, gradient = draw((2, 3, 4, 4))
    y = Unused.apply(x, theta)
    assert torch.equal(y, x)
    g_x, g_theta = torch.autograd.grad(y, (x, theta), gradient)
    assert torch.equal(g_x, gradient) and torch.equal(g_theta, torch.zeros_like(theta))


def test_gradient_reversal() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = gradient_reversal(x, 3.0)
    close(y, x)
    close(torch.autograd.grad(y.sum(), x)[0], torch.full((5,), -3.0, dtype=torch.float64))


# ---------------------------------------------------------------------- properties

maps = st.tuples(st.integers(2, 5), st.integers(1, 5), st.integers(1, 6), st.integers(2, 6))


@settings(max_examples=30, deadline=None)
@given(maps, st.integers(0, 10**6))
def test_a_restyled_map_has_the_intended_statistics(shape: tuple[int, ...], seed: int) -> None:
    x, noise, theta, _ = draw(shape, seed)
    y = adversarial_style(x, theta[0], theta[1], noise[0], noise[1]).detach()
    mean, std = plain_statistics(x.detach())
    got_mean, got_std = plain_statistics(y)
    close(got_mean, mean + noise[0] * theta[0].detach())
    # the normalised map has a deviation a little below one, since eps lies under the root
    shrunk = ((std**2 - EPS).clamp_min(0) / std**2).sqrt()
    wanted = ((std + noise[1] * theta[1].detach()).abs() * shrunk) ** 2
    close(got_std**2, wanted + EPS)


@settings(max_examples=30, deadline=None)
@given(maps, st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_nothing_is_moved_at_zero(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    x, noise, _, _ = draw(shape, seed)
    x = x.detach().to(dtype)
    permutation = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    one = torch.ones(shape[0])
    e_mean, e_std = noise.to(dtype)
    for y in (mixstyle(x, permutation, one), efdmix(x, permutation, one), dsu(x, e_mean, e_std, strength=0.0)):
        assert y.dtype == dtype and torch.equal(y, x)


@settings(max_examples=30, deadline=None)
@given(maps, st.integers(0, 10**6))
def test_efdmix_at_zero_takes_the_other_values_in_its_own_order(shape: tuple[int, ...], seed: int) -> None:
    x, *_ = draw(shape, seed)
    x = x.detach()
    permutation = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    y = as_map(efdmix(x, permutation, torch.zeros(shape[0])))
    flat = as_map(x)
    close(y.sort(-1).values, flat[permutation].sort(-1).values)
    assert torch.equal(y.argsort(-1), flat.argsort(-1))


@settings(max_examples=30, deadline=None)
@given(maps, st.integers(0, 10**6))
def test_the_order_of_a_batch_does_not_matter(shape: tuple[int, ...], seed: int) -> None:
    x, noise, theta, _ = draw(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    for function in (
        lambda x, n: dsu(x, n[0], n[1]),
        lambda x, n: adversarial_style(x, theta[0], theta[1], n[0], n[1]),
    ):
        close(function(x, noise)[order], function(x[order], noise[:, order]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_in_memory_does_not_matter(layout: torch.memory_format) -> None:
    x, noise, theta, gradient = draw((4, 6, 5, 5))
    laid = x.detach().contiguous(memory_format=layout).requires_grad_()
    pairs = [(adversarial_style(v, theta[0], theta[1], noise[0], noise[1]), v) for v in (x, laid)]
    close(pairs[0][0], pairs[1][0])
    close(*(torch.autograd.grad(y, v, gradient)[0] for y, v in pairs))
    assert pairs[1][0].is_contiguous(memory_format=layout)
