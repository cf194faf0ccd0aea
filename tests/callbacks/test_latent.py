"""Latent adversarial training: only what lies behind the layer runs, and what is found is PGD's own answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from callbacks.latent import LatentAdversarial, latent_pgd
from callbacks.layers import Added, Behind
from tests.callbacks.small import trainer
from tests.laws import cells


class Residual(nn.Module):
    """Sums between children, in place and not, and a child that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        self.twice = nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.twice(h)
        h += self.twice(h).relu_()
        h = h + self.middle(h)
        return self.last(h + self.twice(h))


def counted(network: nn.Module) -> dict[str, int]:
    calls: dict[str, int] = {}
    for name, module in network.named_modules():
        calls[name] = 0
        original = module.forward

        def forward(*args: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*args)

        module.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("layer", ["stem.0", "stem", "twice", "middle.0", "middle", "last"])
def test_what_is_replayed_gives_what_running_it_all_gives(layer: str) -> None:
    torch.manual_seed(0)
    network, x = Residual().eval(), torch.randn(5, 3)
    place = network.get_submodule(layer)
    plain = network(x)
    behind = Behind(network, place)
    h = behind.reach(lambda: network(x))
    moved = h + 0.3

    def replaced(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        handle.remove()  # the first call only
        return moved

    handle = place.register_forward_hook(replaced)
    wanted = network(x)
    with behind.replaying():
        for _ in range(2):  # the second time nothing has been spoilt by what works in place
            behind.again(h)
            torch.testing.assert_close(network(x), plain)
            behind.again(moved)
            torch.testing.assert_close(network(x), wanted)
    assert not any("forward" in m.__dict__ for m in network.modules())


def test_what_lies_before_the_layer_runs_once() -> None:
    network, x = Residual().eval(), torch.randn(5, 3)
    calls = counted(network)
    behind = Behind(network, network.middle)
    h = behind.reach(lambda: network(x))
    assert calls["last"] == 0, "what lies behind the layer isn't run to reach it"
    before = dict(calls)
    with behind.replaying():
        for _ in range(3):
            behind.again(h)
            network(x)
    more = {name: calls[name] - before[name] for name in calls}
    ran = {"": 3, "last": 3, "twice": 3}
    assert more == {name: ran.get(name, 0) for name in calls}


def test_a_layer_that_is_not_called_is_named() -> None:
    network = Residual()
    with pytest.raises(ValueError, match="the layer Dropout is never called"):
        Behind(network, nn.Dropout()).reach(lambda: network(torch.randn(5, 3)))


@given(
    st.sampled_from(["l2", "linf"]), st.floats(0.0, 2.0), st.integers(1, 4), st.sampled_from([(7,), (3, 2), (2, 3, 3)])
)
@settings(max_examples=30, deadline=None)
def test_a_perturbation_stays_within_its_share(norm: Any, eps: float, steps: int, shape: tuple[int, ...]) -> None:
    h = torch.randn(4, *shape) * torch.tensor([0.01, 1.0, 5.0, 100.0]).view(4, *[1] * len(shape))
    weight = torch.randn(shape)
    start = 2 * torch.rand(4, *shape) - 1
    found = latent_pgd(lambda z: (z * weight).tanh().sum(), h, eps=eps, alpha=eps, steps=steps, norm=norm, start=start)
    rows, own = found.flatten(1), h.flatten(1)
    if norm == "l2":
        assert (rows.norm(dim=1) <= eps * own.norm(dim=1) * (1 + 1e-5)).all()
    else:
        assert (rows.abs().amax(1) <= eps * own.square().mean(1).sqrt() * (1 + 1e-5) + 1e-7).all()


def test_one_step_is_the_formula() -> None:
    """On a linear head the ascent direction is known: eps |h| w / |w|, whatever h is."""
    torch.manual_seed(0)
    h, weight = torch.randn(3, 6), torch.randn(6)
    found = latent_pgd(
        lambda z: (z @ weight).sum(), h, eps=0.2, alpha=1.0, steps=1, norm="l2", start=torch.zeros_like(h)
    )
    wanted = 0.2 * h.norm(dim=1, keepdim=True) * weight / weight.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["classifier", "adversarial_training"])
def test_the_step_sees_features_that_are_harder(recipe: str) -> None:
    """The training loss at the perturbed features is larger than the plain one, in every step of a run."""
    given, plain = [], []

    class Watch(LatentAdversarial):
        def perturb(self, module: Any, batch: Any) -> None:
            with torch.no_grad():
                plain.append(float(module.loss(batch)))
            super().perturb(module, batch)
            with torch.no_grad():
                given.append(float(module.loss(batch)))

    module = cells.recipe(recipe, norm=False, drop=False)
    fitted = trainer(Watch("layer2", eps=0.5, steps=3), use_distributed_sampler=False)
    fitted.fit(module, datamodule=cells.data(recipe))
    assert len(given) == 3 and all(g > p + 1e-3 for g, p in zip(given, plain, strict=True))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        LatentAdversarial(steps=0)
    module = cells.recipe("classifier")
    with pytest.raises(ValueError, match="no layer 'layer9'.*layer1"):
        trainer(LatentAdversarial("layer9")).fit(module, datamodule=cells.data("classifier"))


def test_crafting_costs_the_head_only() -> None:
    """Passes through the part before the layer: one to reach it and the step's own."""
    module = cells.recipe("classifier", drop=False)
    calls: list[int] = []
    module.backbone.layer1.register_forward_hook(lambda *_: calls.append(1))
    forward = module.backbone.layer1[0].forward
    ran: list[int] = []

    def counting(*args: Any) -> Any:
        ran.append(1)
        return forward(*args)

    module.backbone.layer1[0].forward = counting
    fitted = trainer(LatentAdversarial("layer2", steps=6), limit_val_batches=0, use_distributed_sampler=False)
    fitted.fit(module, datamodule=cells.data("classifier"))
    assert len(ran) == 2 * cells.STEPS


def test_mixed_precision_crafts() -> None:
    module = cells.recipe("classifier", drop=False)
    before = {n: p.clone() for n, p in module.named_parameters()}
    fitted = trainer(LatentAdversarial(norm="linf"), precision="bf16-mixed", use_distributed_sampler=False)
    fitted.fit(module, datamodule=cells.data("classifier"))
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert F.cross_entropy(module(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_padding_neither_moves_nor_counts(norm: Any) -> None:
    """The same texts with more padding behind them: the same perturbation, none of it on padding."""
    found = []
    for width in (0, 6):
        module, batch = cells.recipe("attention_at"), next(iter(cells.data("attention_at").train_dataloader()))
        for name in ("tokens", "attention_mask"):
            batch[name] = F.pad(batch[name], (0, width))
        technique = LatentAdversarial("encoder", eps=0.3, steps=2, norm=norm, seed=0)
        technique._layer = module.backbone.encoder
        technique._added = Added(technique._layer)
        technique.perturb(module, batch)
        delta = technique._added.delta
        assert delta is not None and not delta[~batch["attention_mask"]].any() and delta.any()
        found.append(delta[:, : delta.shape[1] - width])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
