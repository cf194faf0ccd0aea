"""The objectives against their formulas written out, and what the recipe's step sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.weights import AWP
from recipes.adversarial_training import alp_loss, mart_loss, trades_loss, vat_loss
from tests.laws import cells

OBJECTIVES = ("standard", "trades", "mart", "alp", "vat", "fast")


def logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    pair = [torch.randn(6, 4, generator=g, dtype=torch.float32).mul(2).requires_grad_() for _ in range(2)]
    return pair[0], pair[1], torch.tensor([0, 1, 2, 3, 1, 0])


def by_hand(name: str, z: list[list[float]], z2: list[list[float]], y: list[int], weight: float) -> float:
    """One example after the other, in Python's numbers."""

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(v) for v in row)
        return [math.exp(v) / total for v in row]

    total = 0.0
    for a, b, k in zip(z, z2, y, strict=True):
        p, q = softmax(a), softmax(b)
        kl = sum(s * (math.log(s) - math.log(t)) for s, t in zip(p, q, strict=True))
        if name == "trades":
            total += -math.log(p[k]) + weight * kl
        elif name == "mart":
            wrong = max(v for j, v in enumerate(q) if j != k)
            kl = sum(s * (math.log(s) - math.log(t + 1e-12)) for s, t in zip(p, q, strict=True))
            total += -math.log(q[k]) - math.log(1.0001 - wrong + 1e-12) + weight * kl * (1.0000001 - p[k])
        elif name == "alp":
            apart = sum((s - t) ** 2 for s, t in zip(a, b, strict=True))
            total += 0.5 * (-math.log(p[k]) - math.log(q[k])) + weight * apart
        else:
            total += kl
    return total / len(y)


LOSSES: dict[str, Any] = {"trades": trades_loss, "mart": mart_loss, "alp": alp_loss}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*LOSSES, "vat"])
def test_a_loss_is_its_formula(name: str, seed: int) -> None:
    z, z2, y = logits(seed)
    ours = vat_loss(z, z2) if name == "vat" else LOSSES[name](z, z2, y, 3.0)
    assert float(ours.detach()) == pytest.approx(by_hand(name, z.tolist(), z2.tolist(), y.tolist(), 3.0), rel=1e-5)


@pytest.mark.parametrize("name", [*LOSSES, "vat"])
def test_a_losss_gradients_are_those_of_its_formula(name: str) -> None:
    """By central differences of the formula in double precision; VAT's clean branch is a constant."""
    z, z2, y = logits()
    (vat_loss(z, z2) if name == "vat" else LOSSES[name](z, z2, y, 3.0)).backward()
    for which, leaf in enumerate((z, z2)):
        values = leaf.detach().double()
        for i in range(2):
            for j in range(4):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = values.clone()
                    moved[i, j] += step
                    pair = [moved.tolist(), z2.tolist()] if which == 0 else [z.tolist(), moved.tolist()]
                    ends.append(by_hand(name, *pair, y.tolist(), 3.0))
                expected = (ends[0] - ends[1]) / 2e-5
                if name == "vat" and which == 0:
                    assert leaf.grad is None
                else:
                    assert leaf.grad is not None
                    assert float(leaf.grad[i, j]) == pytest.approx(expected, abs=1e-5)


def a_step(objective: str, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    radius = 2.0 if objective == "vat" else 0.05
    module = cells.recipe("adversarial_training", drop=False, objective=objective, eps=radius, steps=None, **more)
    module.norm = "linf"
    batch = next(iter(cells.data("adversarial_training", batch_size=6).train_dataloader()))
    return module, batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_crafted_images_stay_in_the_ball_and_raise_the_objective(objective: str) -> None:
    module, batch = a_step(objective)
    module.eval()
    crafted = module.craft(batch)
    moved = crafted.double() - batch["image"].double()
    if objective == "vat":
        assert float(moved.flatten(1).norm(dim=1).max()) <= 2.0
    else:
        assert float(moved.abs().max()) <= 0.05
    assert 0 <= float(crafted.min()) and float(crafted.max()) <= 1
    clean = float(module.loss({**batch, "adversarial": batch["image"]}).detach())
    assert float(module.loss({**batch, "adversarial": crafted}).detach()) > clean
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_training_forwards_at_most(objective: str) -> None:
    """Batch norm counts the passes that are the step's own: the adversarial images', and the clean ones' where used."""
    module, batch = a_step(objective)
    cells.trainer().fit(module, datamodule=cells.data("adversarial_training", size=4))
    counts = {int(m.num_batches_tracked) for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert counts == {2 if objective in ("trades", "mart", "alp") else 1}


def test_unlabelled_examples_take_part_in_vat_only_by_their_distribution() -> None:
    module, batch = a_step("vat")
    batch["label"] = torch.tensor([0, 1, -1, -1, 2, -1])
    batch["adversarial"] = module.craft(batch)
    module.eval()
    z, z2 = module(batch["image"]), module(batch["adversarial"])
    known = z.log_softmax(-1)[[0, 1, 4], [0, 1, 2]].mean().neg()
    torch.testing.assert_close(module.loss(batch), known + vat_loss(z, z2), rtol=1e-4, atol=1e-5)
    batch["label"].fill_(-1)
    assert torch.isfinite(module.loss(batch))


def test_a_weight_perturbation_sees_the_images_that_the_step_sees() -> None:
    seen: list[tuple[str, Tensor]] = []
    module, _ = a_step("standard")
    loss = module.loss
    module.loss = lambda batch: seen.append(("loss", batch["adversarial"])) or loss(batch)
    cells.trainer(AWP()).fit(module, datamodule=cells.data("adversarial_training"))
    assert len(seen) == 2 * cells.STEPS
    for ascent, step in zip(seen[::2], seen[1::2], strict=True):
        assert ascent[1] is step[1]


@pytest.mark.parametrize("schedule", ["cosine", "cyclic", "step"])
def test_schedules(schedule: str) -> None:
    rates: list[float] = []

    class Rates(cells.Perturbation):
        def perturb(self, module: Any, batch: Any) -> None:
            rates.append(self.optimizer_rate(module))

        @staticmethod
        def optimizer_rate(module: Any) -> float:
            return float(module.trainer.optimizers[0].param_groups[0]["lr"])

    settings: dict[str, Any] = {"schedule": schedule, "milestones": [2], "lr": 0.12}
    module = cells.recipe("adversarial_training", **settings)
    cells.trainer(Rates(), max_epochs=4).fit(module, datamodule=cells.data("adversarial_training"))
    assert len(rates) == 12
    if schedule == "cyclic":
        assert rates == pytest.approx([0.02 * min(i, 12 - i) for i in range(12)])
    elif schedule == "step":
        assert rates == pytest.approx([0.12] * 6 + [0.012] * 6)
    else:
        assert rates[0] == 0.12 and rates[0] == rates[2] > rates[3] > rates[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "best"}, "objective must be one of standard, trades"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"schedule": "step"}, "needs milestones"),
        ({"peak": 1.0}, "peak must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cells.recipe("adversarial_training", **settings)


def test_a_prediction_says_whether_it_holds() -> None:
    module, batch = a_step("standard")
    module.eval()
    with torch.inference_mode():
        near = module.predict_step({n: v.clone() for n, v in batch.items()}, 0)
        module.eps = 1.0
        far = module.predict_step({n: v.clone() for n, v in batch.items()}, 0)
    assert near["holds"].dtype == torch.bool and int(far["holds"].sum()) <= int(near["holds"].sum())
