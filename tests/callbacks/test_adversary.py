"""The attacks against formulas worked out here, another implementation, and the ball they must not leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from callbacks.adversary import AdversarialInput, apgd, classification, dlr_loss, fgsm, fgsm_rs, pgd
from callbacks.balls import Ball, length, random_in_ball, random_noise
from tests.laws import cells

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "fgsm_rs": fgsm_rs, "pgd": pgd, "apgd": apgd}


def network(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, classes))


def right(model: nn.Module, count: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and labels that the network gets right."""
    x = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return x, model(x).argmax(1)


def each(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([(1, 7), (3, 5), (2, 3, 4, 4), (2, 1, 1, 1)]),
    eps=st.sampled_from([0.0, 1e-3, 8 / 255, 0.1, 0.3, 2.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_an_attack_stays_in_ball_and_box(
    name: str, norm: str, shape: tuple[int, ...], eps: float, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(shape, generator=g).to(dtype), torch.randn(shape, generator=g)
    torch.manual_seed(seed)
    found = ATTACKS[name](lambda z: (z.float() * w).sin().sum(), x, eps=eps, norm=norm)
    assert found.dtype == dtype and found.shape == x.shape
    assert float(length(found.double() - x.double(), 2 if norm == "l2" else torch.inf).max()) <= eps
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert not found.requires_grad
    if eps == 0:
        assert torch.equal(found, x)


def test_where_the_input_is_outside_of_the_box_it_is_not_pushed_further_out() -> None:
    x = torch.tensor([[-0.2, 0.5, 1.3]])
    found = pgd(lambda z: z.sum(), x, eps=0.1, start="zero", steps=20)
    assert found.tolist()[0] == pytest.approx([-0.1, 0.6, 1.3])


def test_fgsm_is_one_step_of_eps_along_the_sign() -> None:
    model = network()
    x, y = right(model)
    z = x.clone().requires_grad_()
    F.cross_entropy(model(z), y).backward()
    assert z.grad is not None
    torch.testing.assert_close(fgsm(each(model), x, y, eps=0.1), (x + 0.1 * z.grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("rule", ["sign", "normalised", "momentum"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_step_by_step(norm: Any, rule: Any) -> None:
    """The loop written out, with clip and projection as the papers have them."""
    model = network()
    x, y = right(model)
    eps, alpha = (0.1, 0.03) if norm == "linf" else (0.8, 0.2)
    begin = random_in_ball(x, eps, norm, torch.Generator().manual_seed(1))
    z, m = (x + begin).clamp(0, 1), torch.zeros_like(x)
    for k in range(1, 6):
        leaf = z.clone().requires_grad_()
        F.cross_entropy(model(leaf), y, reduction="sum").backward()
        g = leaf.grad
        assert g is not None
        if rule == "momentum":
            g = m = 0.9 * m + g / g.abs().sum((1, 2, 3), keepdim=True)
        if norm == "l2":
            z = z + alpha * g / g.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
            d = z - x
            z = (x + d * (eps / d.pow(2).sum((1, 2, 3), keepdim=True).sqrt()).clamp(max=1)).clamp(0, 1)
        else:
            z = z + alpha * (g / g.abs().amax((1, 2, 3), keepdim=True) if rule == "normalised" else g.sign())
            z = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
        ours = pgd(each(model), x, y, eps=eps, alpha=alpha, steps=k, norm=norm, rule=rule, momentum=0.9, start=begin)
        torch.testing.assert_close(ours, z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3)])
@pytest.mark.parametrize("steps", [1, 5, 25, 60])
def test_apgd_is_autoattacks(norm: Any, eps: float, steps: int) -> None:
    """Another implementation, from the same start: the same best loss of every example."""
    from pyautoattack.autopgd_base import APGDAttack

    model = network()
    x, y = right(model)
    theirs = APGDAttack(model, n_iter=steps, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, device="cpu")
    theirs.init_hyperparam(x)
    begin = random_in_ball(x, eps, norm, torch.Generator().manual_seed(1))
    _, _, losses, _ = theirs.attack_single_run(x, y, x_init=(x + begin).clamp(0, 1))
    ours = apgd(each(model), x, y, eps=eps, steps=steps, norm=norm, start=begin)
    torch.testing.assert_close(each(model)(ours, y), losses, rtol=1e-4, atol=1e-6)


def test_apgd_is_no_weaker_than_pgd_at_the_same_cost() -> None:
    model = network()
    x, y = right(model)
    points = [f(each(model), x, y, eps=0.1, steps=20, start="zero") for f in (pgd, apgd)]
    losses = [float(each(model)(point, y).mean().detach()) for point in points]
    assert losses[1] >= losses[0] * 0.999


def test_examples_that_are_wrong_take_no_part_in_further_passes() -> None:
    model, sizes = network(), []
    x, y = right(model)
    y = torch.where(torch.arange(16) < 6, (y + 1) % 5, y)  # six are wrong from the start

    def loss_fn(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(z))
        return classification(model)(z, label)  # type: ignore[return-value]

    found = pgd(loss_fn, x, y, eps=0.05, steps=4, restarts=3, start="zero")
    assert torch.equal(found[:6], x[:6])
    assert sizes[0] == 16 and max(sizes[1:]) <= 10 and sizes == sorted(sizes, reverse=True)
    still = int((model(found).argmax(1) == y).sum())
    assert sizes[-1] >= still > 0


def test_restarts_only_add() -> None:
    model = network()
    x, y = right(model, 64)

    def attacked(loss_fn: Any, restarts: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pgd(loss_fn, x, y, eps=0.06, steps=3, restarts=restarts, generator=generator)

    correct = [int((model(attacked(classification(model), r)).argmax(1) == y).sum()) for r in (1, 2, 8)]
    assert correct[0] >= correct[1] >= correct[2]
    one, four = (each(model)(attacked(each(model), r), y) for r in (1, 4))
    assert bool((four >= one - 1e-6).all()) and float(four.sum()) > float(one.sum())


def test_a_targeted_attack_reaches_its_target() -> None:
    model = network()
    x, y = right(model)
    target = (y + 2) % 5
    for attack in (pgd, apgd):
        found = attack(classification(model), x, target, eps=0.6, steps=30, targeted=True)
        assert float((model(found).argmax(1) == target).float().mean()) > 0.9
        assert float(each(model)(found, target).mean()) < float(each(model)(x, target).mean())


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_work_in_inference_mode_and_leave_no_gradient(name: str) -> None:
    model = network()
    x, y = right(model)
    torch.manual_seed(0)
    plain = ATTACKS[name](classification(model), x, y, eps=0.05)
    torch.manual_seed(0)
    with torch.inference_mode():
        inside = ATTACKS[name](classification(model), x.clone(), y.clone(), eps=0.05)
    assert torch.equal(plain, inside)
    assert all(p.grad is None for p in model.parameters())


def test_dlr_is_its_formula() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.5, 2.0, 1.0, 0.0]])
    # right: -(3 - 1) / (3 - 0); wrong, label 0: -(0.5 - 2) / (2 - 0.5)
    torch.testing.assert_close(dlr_loss(logits, torch.tensor([0, 0])), torch.tensor([-2 / 3, 1.0]))
    with pytest.raises(ValueError, match="at least three classes"):
        dlr_loss(logits[:, :2], torch.tensor([0, 0]))


def test_random_points_fill_the_ball_and_noise_lies_on_its_edge() -> None:
    x = torch.full((4000, 2), 0.5)
    radius = length(random_in_ball(x, 0.2, "l2", torch.Generator().manual_seed(0))).flatten() / 0.2
    assert float((radius <= 0.5).float().mean()) == pytest.approx(0.25, abs=0.03)  # a quarter of the disc's area
    assert float(random_in_ball(x, 0.2).abs().max()) == pytest.approx(0.2, abs=1e-3)
    edge = random_noise(x, eps=0.2) - x
    torch.testing.assert_close(edge.abs(), torch.full_like(edge, 0.2))
    torch.testing.assert_close(length(random_noise(x, eps=0.2, norm="l2") - x), torch.full((4000, 1), 0.2))


def test_the_edge_of_a_ball_is_the_nearest_number_within() -> None:
    x = torch.tensor([[0.05, 0.050001, 0.3, 1.0]])
    ball = Ball(x, 0.05, "linf", None)
    assert ball.low is not None and ball.high is not None
    torch.testing.assert_close(ball.low, x - 0.05, rtol=0, atol=2e-7)
    torch.testing.assert_close(ball.high, x + 0.05, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"eps": -1.0}, "eps must not be negative"),
        ({"eps": 0.1, "steps": 0}, "steps and restarts must be at least 1"),
        ({"eps": 0.1, "norm": "l1"}, "norm must be linf or l2"),
        ({"eps": 0.1, "alpha": -1.0}, "alpha must not be negative"),
        ({"eps": 0.1, "rule": "up"}, "rule must be"),
    ],
)
def test_settings_out_of_range_are_named(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pgd(lambda z: z.sum(), torch.rand(2, 3), **settings_)


# ---------------------------------------------------------------------- the technique


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "fgsm_rs", "apgd", "noise"])
def test_the_step_sees_inputs_at_the_radius_with_a_larger_loss(attack: Any) -> None:
    module = cells.recipe("classifier", norm=False, drop=False)
    batch = next(iter(cells.data("classifier", batch_size=8).train_dataloader()))
    given, technique = dict(batch), AdversarialInput(attack, eps=0.05, steps=5)
    technique.perturb(module, batch)
    distance = (batch["image"].double() - given["image"].double()).abs().amax((1, 2, 3))
    assert float(distance.max()) <= 0.05 and float(distance.min()) > 0.04
    gain = float(module.loss(batch) - module.loss(given))  # type: ignore[operator]
    assert gain > 0.01 or attack == "noise"
    assert torch.equal(given["image"], dict(given)["image"]) and all(p.grad is None for p in module.parameters())


def test_another_entry_than_the_image_is_attacked() -> None:
    class Embedded(nn.Module):
        def loss(self, batch: Any) -> Tensor:
            return (batch["embedding"] * torch.tensor([1.0, -2.0])).mean()

    technique = AdversarialInput(eps=0.5, norm="l2", entry="embedding", bounds=None, start="zero")
    batch: Any = {"embedding": torch.zeros(3, 2), "label": torch.zeros(3)}
    technique.perturb(Embedded(), batch)  # type: ignore[arg-type]
    expected = 0.5 * torch.tensor([1.0, -2.0]) / 5**0.5
    torch.testing.assert_close(batch["embedding"], expected.expand(3, 2), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no entry 'picture' of floats to attack; it has: embedding"):
        AdversarialInput(entry="picture").perturb(Embedded(), batch)  # type: ignore[arg-type]


def test_a_random_start_is_what_one_process_would_draw() -> None:
    x = torch.zeros(4, 3, 5, 5)
    whole = AdversarialInput(seed=1)
    drawn = whole.rows("start", x)
    for rank in (0, 1):
        part = AdversarialInput(seed=1)
        part._rank, part._world = rank, 2
        assert torch.equal(part.rows("start", x[:2]), drawn[rank::2])
    assert len(drawn.unique()) > 290
