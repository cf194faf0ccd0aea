"""The style techniques on a network, seen from outside: what a layer gave, and what the next one got in its place."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from callbacks.style import DSU, AdvStyle, EFDMix, MixStyle
from tests.callbacks.styled import (
    ALWAYS,
    TECHNIQUES,
    B,
    Net,
    batch_of,
    begin,
    begun,
    flow,
    shift_of,
    spread,
    statistics,
    theta_of,
)

IMAGE = batch_of()["image"]
every = pytest.mark.parametrize("kind", TECHNIQUES)
chosen = pytest.mark.parametrize("per_sample", [False, True])

# ---------------------------------------------------------------------- what becomes of a style


@pytest.mark.parametrize("kind", [MixStyle, EFDMix])
def test_each_example_is_mixed_with_another(kind: type) -> None:
    x, y = flow(begun(kind(layers=["first"], seed=0, **ALWAYS[kind])), IMAGE)["first"]
    if kind is MixStyle:
        shift_of(x, y)  # the content is that of x
        own, found = (statistics(v).transpose(1, 0, 2).reshape(B, -1) for v in (x, y))
    else:
        assert torch.equal(x.flatten(2).argsort(-1), y.flatten(2).argsort(-1))
        own, found = (v.detach().double().flatten(2).sort(-1).values.flatten(1).numpy() for v in (x, y))
    partners, weights = [], []
    for i in range(B):
        tried = []
        for j in range(B):  # the best weight for every partner, and how well it explains what came out
            away = own[j] - own[i]
            weight = float((found[i] - own[i]) @ away / max(away @ away, 1e-12))
            tried.append((float(np.abs(own[i] + weight * away - found[i]).max()), j, weight))
        error, j, weight = min(tried)
        assert error < 1e-4 and -1e-6 <= weight <= 1 + 1e-6
        partners.append(j)
        weights.append(weight)
    moved = [i for i in range(B) if np.abs(found[i] - own[i]).max() > 1e-4]
    assert len({partners[i] for i in moved}) == len(moved) >= B // 2, "the partners are no permutation"
    assert len({round(weights[i], 4) for i in moved}) == len(moved), "each example has a weight of its own"


@pytest.mark.parametrize(("alpha", "variance"), [(0.1, 0.25 / 1.2), (5.0, 0.25 / 11)])
def test_the_weight_of_the_other_style_is_beta(alpha: float, variance: float) -> None:
    """The variance of Beta(a, a) is 1 / (4 (2a + 1)); the mean is a half."""
    found: list[float] = []
    for step in range(40):
        technique = MixStyle(layers=["first"], p=1.0, alpha=alpha, seed=1)
        x, y = flow(begun(technique, step), IMAGE)["first"]
        own, shift = statistics(x), shift_of(x, y)
        for i in range(B):
            away = own - own[:, i : i + 1]
            weight = (shift[:, i : i + 1] * away).sum((0, 2)) / np.maximum((away**2).sum((0, 2)), 1e-12)
            error = np.abs(weight[None, :, None] * away - shift[:, i : i + 1]).max((0, 2))
            error[i] = np.inf
            if np.abs(shift[:, i]).max() > 1e-3:  # else the partner can't be told
                found.append(weight[error.argmin()])
    # weights below about 1e-3 are left out, which for Beta(0.1, 0.1) is a quarter of them: its other half is whole
    upper = np.array([w for w in found if w > 0.5])
    moment = np.mean((upper - 0.5) ** 2)
    assert moment == pytest.approx(variance, rel=0.12)


def test_dsu_draws_a_standard_normal_times_the_spread() -> None:
    steps, drawn = 60, []
    for step in range(steps):
        x, y = flow(begun(DSU(layers=["first"], p=1.0, seed=0), step), IMAGE)["first"]
        drawn.append(shift_of(x, y) / spread(x)[:, None])
    noise = np.stack(drawn).reshape(steps, -1)  # steps by (2, B, C)
    count = noise.size
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs((noise**2).mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    correlation = np.corrcoef(noise.T) - np.eye(noise.shape[1])  # over examples, channels, mean and deviation
    assert np.abs(correlation).max() < 6 / steps**0.5
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 4 / count**0.5, "steps draw alike"


@pytest.mark.parametrize("variant", ["full", "direction"])
def test_advstyle_shifts_by_noise_times_its_intensities(variant: Any) -> None:
    """Full: the intensity is theta; direction: theta's direction, as long as the spread of the batch's styles."""
    module = begun(AdvStyle(layers=["first"], variant=variant, seed=0, **ALWAYS[AdvStyle]))
    noise = []
    for first in (0.1, 0.5):
        with torch.no_grad():
            theta_of(module).copy_(torch.tensor([[first, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.5, -0.4, first, 0.2, 0.1]]))
        x, y = flow(module, IMAGE)["first"]
        width = theta_of(module).detach().double().numpy()
        if variant == "direction":
            size = np.linalg.norm(spread(x), axis=1, keepdims=True)
            width = width / np.linalg.norm(width, axis=1, keepdims=True) * size
        noise.append(shift_of(x, y) / width[:, None])
    np.testing.assert_allclose(noise[0], noise[1], atol=1e-4)  # drawn once for the step
    count = noise[0].size
    assert abs(noise[0].mean()) < 4 / count**0.5 and abs((noise[0] ** 2).mean() - 1) < 4 * (2 / count) ** 0.5


@every
def test_strength_scales_the_shift_and_zero_is_nothing(kind: type) -> None:
    moved = []
    for strength in (1.0, 0.5, 0.0):
        technique = kind(layers=["first"], strength=strength, seed=0, **ALWAYS[kind])
        x, y = flow(begun(technique), IMAGE)["first"]
        moved.append((y - x).detach())
    assert moved[0].abs().max() > 0.05
    torch.testing.assert_close(2 * moved[1], moved[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(moved[2], torch.zeros_like(moved[2]))


# ---------------------------------------------------------------------- where and when


@every
def test_evaluation_and_steps_that_are_not_perturbed_are_untouched(kind: type) -> None:
    technique = kind(layers=["first", "second"], **ALWAYS[kind])
    module = begun(technique)
    clean = Net()(IMAGE)
    assert not torch.equal(module(IMAGE), clean)
    assert torch.equal(module.eval()(IMAGE), clean)
    technique.restore(module.train())
    assert torch.equal(module(IMAGE), clean)
    technique.detach(module)
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MixStyle, {"p": 0.0}),
        (EFDMix, {"p": 0.0}),
        (DSU, {"p": 0.0}),
        (AdvStyle, {"p_identity": 1.0, "p_dsu": 0.0}),
        *((kind, {"strength": 0.0, **ALWAYS[kind]}) for kind in TECHNIQUES),
    ],
)
def test_a_layer_that_keeps_its_style_costs_nothing(kind: type, settings: dict[str, Any]) -> None:
    """What it gives is passed on as it is, not computed anew."""
    module = begun(kind(layers=["first"], **settings))
    given: list[torch.Tensor] = []
    module.backbone[0].register_forward_hook(lambda _, args, output: given.append(output), prepend=True)
    passed_on = flow(module, IMAGE)["first"][1]
    assert passed_on.data_ptr() == given[0].data_ptr()


@every
@chosen
def test_how_often_a_layer_is_moved(kind: type, per_sample: bool) -> None:
    steps, module = 250, Net().train()
    identity = 1 / 3 if kind is AdvStyle else 0.5  # as published
    more: dict[str, Any] = {"alpha": 2.0} if kind in (MixStyle, EFDMix) else {}
    technique = kind(layers=["first", "second"], per_sample=per_sample, seed=3, **more)
    kept, large = np.zeros((steps, 2, B), bool), np.zeros((steps, B), bool)
    for step in range(steps):
        begin(technique, module, step)
        if kind is AdvStyle:  # an intensity that tells its branch from DSU's
            with torch.no_grad():
                theta_of(module).fill_(1e4)
        with torch.no_grad():
            for i, (x, y) in enumerate(flow(module, IMAGE).values()):
                moved = (y - x).abs().flatten(1).amax(1) / x.abs().flatten(1).amax(1)
                kept[step, i] = (moved < 1e-6).numpy()
                if i == 0:
                    large[step] = (moved > 100).numpy()
        technique.restore(module)
    alone = 1 / B if kind in (MixStyle, EFDMix) else 0.0  # a permutation may leave an example where it is
    independent = steps * (B if per_sample else 1)
    assert abs(kept.mean() - identity - (1 - identity) * alone) < 4 * (0.25 / 2 / independent) ** 0.5
    if kind is AdvStyle:
        assert abs(large.mean() - 1 / 3) < 4 * (0.25 / independent) ** 0.5
    if kind in (DSU, AdvStyle):
        assert (kept == kept[..., :1]).all() != per_sample, "alike for the batch, unless chosen per sample"
    first, second = kept[:, 0].mean(1), kept[:, 1].mean(1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / steps**0.5, "layers choose together"


@every
@chosen
def test_ranks_choose_alike_and_draw_their_own_noise(kind: type, per_sample: bool) -> None:
    apart = 0
    for step in range(1, 7):
        found = []
        for rank in range(2):  # the images are alike, so what differs is what was drawn
            technique = kind(layers=["first"], per_sample=per_sample, seed=0)
            x, y = flow(begun(technique, step, rank=rank, ranks=2), IMAGE)["first"]
            found.append((y - x).detach())
        moved = [bool(f.abs().max() > 1e-6) for f in found]
        if not per_sample:
            assert moved[0] == moved[1], "the ranks chose differently"
        if all(moved):
            apart += 1
            assert not torch.equal(found[0], found[1]), "the ranks drew the same noise"
    assert apart >= 1


@chosen
@pytest.mark.parametrize("kind", [DSU, AdvStyle])
def test_two_ranks_draw_what_one_process_draws(kind: type, per_sample: bool) -> None:
    """Example i of rank r is example 2i + r of the whole."""
    identity = 0.3 if per_sample else 0.0
    more = {"p": 1 - identity} if kind is DSU else {"p_identity": identity, "p_dsu": 0.0}
    whole = batch_of(2 * B)

    def noise(rank: int, ranks: int) -> np.ndarray:
        batch = {k: v[rank::ranks] for k, v in whole.items()}
        module = begun(kind(layers=["first"], per_sample=per_sample, seed=5, **more), 1, batch, rank, ranks)
        if kind is AdvStyle:  # without a process group each of these sets it from its own batch
            with torch.no_grad():
                theta_of(module).fill_(0.3)
        x, y = flow(module, batch["image"])["first"]
        return shift_of(x, y) / (spread(x)[:, None] if kind is DSU else 0.3)

    one = noise(0, 1)
    assert np.abs(one).max() > 0.5
    for rank in range(2):
        np.testing.assert_allclose(noise(rank, 2), one[:, rank::2], atol=1e-3)


@every
def test_every_forward_of_a_step_sees_the_same_styles_and_the_next_step_others(kind: type) -> None:
    technique = kind(layers=["first", "second"], **ALWAYS[kind])
    module = begun(technique)
    once, twice = module(IMAGE), module(IMAGE)
    assert torch.equal(once, twice)
    technique.restore(module)
    begin(technique, module, 1)
    assert not torch.equal(module(IMAGE), once)


@every
def test_views_of_an_example_share_its_draws_and_its_partner(kind: type) -> None:
    """Two views in one batch of twice the size; the same images here, so the two halves must come out alike."""
    module = begun(kind(layers=["first"], seed=0, **ALWAYS[kind]))
    x, y = flow(module, torch.cat((IMAGE, IMAGE)))["first"]
    torch.testing.assert_close(y[:B], y[B:])
    alone = flow(module, IMAGE)["first"][1]
    # DSU's spread is that of the whole batch, by the factor that 2n - 1 in place of n - 1 makes
    torch.testing.assert_close(y[:B], alone) if kind is not DSU else np.testing.assert_allclose(
        shift_of(x, y)[:, :B], shift_of(x[:B], alone) * ((2 * B - 2) / (2 * B - 1)) ** 0.5, atol=1e-4
    )


@pytest.mark.parametrize("kind", [MixStyle, EFDMix])
def test_views_are_mixed_within_themselves(kind: type) -> None:
    """Two views, of which the second is far from the first; and a part of the batch has no partners."""
    module = begun(kind(layers=["first"], seed=0, **ALWAYS[kind]))
    both = flow(module, torch.cat((IMAGE, 10 + 3 * IMAGE)))["first"][1]
    for half, view in zip(both.chunk(2), (IMAGE, 10 + 3 * IMAGE), strict=True):
        torch.testing.assert_close(half, flow(module, view)["first"][1])
    assert torch.equal(module(IMAGE[:5]), Net()(IMAGE[:5]))


@every
def test_recomputation_by_activation_checkpointing_sees_the_same_draws(kind: type) -> None:
    module = begun(kind(layers=["first"], **ALWAYS[kind]))
    batch = batch_of()
    wanted = torch.autograd.grad(module.loss(batch), list(module.parameters()))
    head, conv = module.backbone[1:], module.backbone[0]  # type: ignore[index]  # a Sequential
    logits = head(checkpoint(conv, batch["image"].requires_grad_(), use_reentrant=False))
    loss = torch.nn.functional.cross_entropy(logits, batch["label"])
    for a, b in zip(torch.autograd.grad(loss, list(module.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b)


@every
def test_a_batch_of_one_keeps_its_style(kind: type) -> None:
    module = begun(kind(layers=["first", "second"], **ALWAYS[kind]), batch=batch_of(1))
    batch = batch_of(1)
    assert torch.equal(module(batch["image"]), Net()(batch["image"]))
    module.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@every
def test_a_copy_of_the_network_has_layers_of_its_own(kind: type) -> None:
    """As weight averaging makes them: what happens to the copy is no matter for the network."""
    technique = kind(layers=["first"], **ALWAYS[kind])
    module = begun(technique)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(IMAGE), module(IMAGE))
    technique.restore(module)
    assert torch.equal(module(IMAGE), Net()(IMAGE))
    assert not torch.equal(twin(IMAGE), module(IMAGE))


def test_default_layers_of_each_technique() -> None:
    """AdvStyle and DSU after six layers of a ResNet, MixStyle and EFDMix after its first two stages."""
    from recipes.classifier import Classifier

    six = ["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    for kind in TECHNIQUES:
        module = Classifier("test_resnet", num_classes=2, image_size=64)
        technique = kind()
        technique.attach(module)
        found = [n.removeprefix("backbone.") for n, m in module.named_modules() if m._forward_hooks]
        assert found == (["layer1", "layer2"] if kind in (MixStyle, EFDMix) else six)


# ---------------------------------------------------------------------- what can't be


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MixStyle, {"p": 1.5}, r"p must lie in \[0, 1\], not 1.5"),
        (EFDMix, {"alpha": 0.0}, "alpha must be positive, not 0.0"),
        (DSU, {"p": -0.1}, r"p must lie in \[0, 1\], not -0.1"),
        (DSU, {"strength": -1.0}, "strength must not be negative"),
        (AdvStyle, {"p_identity": 0.6, "p_dsu": 0.6}, "together at most 1, not 0.6 and 0.6"),
        (AdvStyle, {"p_dsu": -0.6}, "together at most 1"),
        (AdvStyle, {"variant": "half"}, "variant must be full or direction, not 'half'"),
    ],
)
def test_settings_out_of_range(kind: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@every
def test_layers_that_can_not_be(kind: type) -> None:
    module = Net()
    with pytest.raises(ValueError, match="no layer 'layer1' in the backbone Sequential. Layers: first, second"):
        kind(layers=["first", "layer1"]).attach(module)
    with pytest.raises(ValueError, match="layer 'head' gives no feature map"):
        kind(layers=["head"]).attach(module)
    with pytest.raises(ValueError, match=r"no stages found in Sequential; name the layers. Layers: first"):
        kind().attach(module)
    module.example_input_array = torch.zeros(2, 3, 2, 2)
    with pytest.raises(ValueError, match="layer 'pool' gives .*one position per channel has no style"):
        module.backbone.head = torch.nn.Flatten()  # type: ignore[union-attr]
        kind(layers=["first", "pool"]).attach(module)
    assert not any(m._forward_hooks for m in module.modules())
