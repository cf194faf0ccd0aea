"""``crafting``: what runs inside, and that nothing is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.perturbation import Batch, Perturbation, crafting
from tests.callbacks.small import Net, images, trainer

MODES = ["eval", "train", "train_frozen_bn"]


class Mixed(nn.Module):
    """Everything whose training pass does something beside computing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
        self.batch = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.without = nn.BatchNorm2d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.batch, self.frozen, self.without, self.instance, self.drop):
            x = layer(x)
        return self.head(x.flatten(1))


def images_and_labels() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 4, 4, generator=g) * 3 + 1, torch.arange(6) % 2


def state(module: nn.Module) -> dict[str, Any]:
    return {
        "flags": [(n, m.training, getattr(m, "track_running_stats", None)) for n, m in module.named_modules()],
        "needs": [(n, p.requires_grad) for n, p in module.named_parameters()],
        "grads": [(n, None if p.grad is None else p.grad.tolist()) for n, p in module.named_parameters()],
        "values": [(n, v.tolist()) for n, v in module.state_dict().items()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(mode: Any, parameters: bool, fails: bool) -> None:
    module = Mixed()
    x, label = images_and_labels()
    F.cross_entropy(module(x), label).backward()  # gradients of another step are there
    before = state(module)
    try:
        with crafting(module, mode, parameters=parameters):
            image = x.clone().requires_grad_()
            for _ in range(2):
                torch.autograd.grad(F.cross_entropy(module(image), label), image)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state(module) == before


def test_what_each_mode_computes() -> None:
    """One batch norm layer, its formulas by hand, and dropout."""
    x = images_and_labels()[0]
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(0.5)  # type: ignore[union-attr]
    norm.running_var.fill_(4.0)  # type: ignore[union-attr]
    module = nn.Sequential(norm, nn.Dropout(0.5))
    running = (x - 0.5) / (4.0 + norm.eps) ** 0.5
    by_batch = (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt()
    with crafting(module, "eval"):
        torch.testing.assert_close(module(x), running)
    for mode, wanted in (("train", by_batch), ("train_frozen_bn", running)):
        with crafting(module, mode):  # type: ignore[arg-type]
            found = module(x)
        kept = found != 0
        assert 0.2 < kept.float().mean() < 0.8
        torch.testing.assert_close(found[kept], 2 * wanted[kept])


def test_each_submodule_keeps_its_own_mode() -> None:
    x = images_and_labels()[0]
    module = nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Dropout(0.5).eval(), nn.Dropout(1.0))
    with crafting(module, "train"):
        assert not module[0].training and not module[1].training
        assert torch.count_nonzero(module(x)) == 0  # the last one still drops
    with crafting(module, "eval"):
        assert torch.count_nonzero(module(x)) > 0


def test_the_default_is_frozen_batch_norm() -> None:
    module = Net()
    with crafting(module):
        assert module.backbone.training and not module.backbone[1].training


def test_parameters_take_a_gradient_only_if_asked() -> None:
    module = Mixed()
    x, _ = images_and_labels()
    with crafting(module):
        assert not module(x).requires_grad
        assert module(x.clone().requires_grad_()).requires_grad
    with crafting(module, parameters=True):
        (gradient,) = torch.autograd.grad(module(x).sum(), module.head.weight)
        assert gradient.shape == (2, 16)
        assert not module.head.bias.requires_grad  # frozen stays frozen


def test_nested() -> None:
    module = Mixed()
    before = state(module)
    with crafting(module, "eval"):
        inner = state(module)
        with crafting(module, "train"):
            assert not module.training
        with crafting(module, "train_frozen_bn"):
            module(images_and_labels()[0])
        assert state(module) == inner
    assert state(module) == before


def test_within_inference_mode() -> None:
    module = Mixed()
    with torch.inference_mode():
        x, label = images_and_labels()
        before = state(module)
        with crafting(module, "train"):
            image = x.clone().requires_grad_()  # clone: what was made in inference mode can't enter a graph
            (gradient,) = torch.autograd.grad(F.cross_entropy(module(image), label.clone()), image)
        assert state(module) == before
        assert torch.is_inference_mode_enabled()
    assert gradient.abs().sum() > 0
    with torch.no_grad(), crafting(module):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_graph_from_before_can_still_be_used() -> None:
    module = Mixed()
    x, label = images_and_labels()
    loss = F.cross_entropy(module.eval()(x), label)
    module.train()
    with crafting(module, "eval"):
        module(x)
    loss.backward()
    assert module.head.weight.grad is not None


def test_the_step_draws_the_dropout_that_it_would_have_drawn() -> None:
    x = torch.ones(1000)
    module = nn.Dropout(0.5)
    torch.manual_seed(3)
    plain = module(x)
    torch.manual_seed(3)
    with crafting(module):
        first = module(x)
        second = module(x)
    assert torch.equal(module(x), plain)
    assert torch.equal(first, plain)
    assert not torch.equal(second, plain)


@pytest.mark.parametrize(("outside", "inside"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_autocast(outside: str, inside: str) -> None:
    module = Mixed()
    x = images_and_labels()[0]
    with torch.autocast("cpu", dtype=getattr(torch, outside)):
        with crafting(module):
            assert module(x).dtype == getattr(torch, inside)
        assert module(x).dtype == getattr(torch, outside)


class Dtypes(Perturbation):
    """Notes in which precision it crafts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        with crafting(module):
            self.seen.append(module.backbone(batch["image"]).dtype)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize(("precision", "inside"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_callback_crafts_in_the_trainers_mixed_precision(precision: str, inside: torch.dtype) -> None:
    technique = Dtypes()
    trainer(technique, precision=precision, limit_train_batches=1).fit(Net(), images())
    assert technique.seen == [inside]


def test_unknown_mode() -> None:
    with pytest.raises(ValueError) as error, crafting(nn.Linear(1, 1), "test"):  # type: ignore[arg-type]
        pass
    assert str(error.value) == "crafting mode must be eval, train or train_frozen_bn, not 'test'"


def test_a_module_without_parameters() -> None:
    with crafting(nn.ReLU(), "eval"):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_recurrent_layer_can_be_crafted_through_in_evaluation_mode(mode: Any) -> None:
    """cuDNN refuses the backward pass of one in evaluation mode, so it is off there, and only there."""
    before = torch.backends.cudnn.enabled
    for network, off in ((torch.nn.GRU(3, 2), mode == "eval"), (torch.nn.Linear(3, 2), False)):
        with crafting(network, mode):
            assert torch.backends.cudnn.enabled is (before and not off)
        assert torch.backends.cudnn.enabled is before
