"""What AdvStyle learns: where its intensities start, which way they go, and what a checkpoint and other ranks know."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.exact_resume import ExactResume
from callbacks.statistics import spread_over_ranks
from callbacks.style import DSU, AdvStyle
from tests.callbacks.small import trainer
from tests.callbacks.styled import EPS, C, Net, batch_of, begin, begun, data, flow, shift_of, spread, theta_of

HOME = Path(__file__).parents[2]
ADVERSARIAL: dict[str, Any] = {"layers": ["first"], "p_identity": 0.0, "p_dsu": 0.0, "seed": 0}


class Thetas(Callback):
    """Notes the first layer's intensities before and after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.before = theta_of(pl_module).detach().clone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append((self.before, theta_of(pl_module).detach().clone()))


def first_spread(image: Tensor) -> Tensor:
    """Spread of the styles after the first layer of a new network."""
    conv: Any = Net().backbone.get_submodule("first")
    return torch.from_numpy(spread(F.conv2d(image, conv.weight, conv.bias, padding=1))).float()


def published_loss(module: Net, theta: Tensor, noise: np.ndarray, batch: Mapping[str, Any]) -> Tensor:
    """The loss as a function of theta, in float64, from the formula: nothing is reversed here."""
    weights = {k: v.detach().double() for k, v in module.named_parameters() if k.startswith("backbone")}
    x = F.conv2d(batch["image"].double(), weights["backbone.first.weight"], weights["backbone.first.bias"], padding=1)
    mean, std = x.mean((2, 3)), (x.var((2, 3)) + EPS).sqrt()
    e = torch.from_numpy(noise)
    mean, std, e_mean, e_std = (s[..., None, None] for s in (mean, std, e[0], e[1]))
    theta_mean, theta_std = theta[:, :, None, None]
    y = (x - mean) / std * (std + e_std * theta_std) + (mean + e_mean * theta_mean)
    y = F.conv2d(y, weights["backbone.second.weight"], weights["backbone.second.bias"], padding=1)
    y = F.max_pool2d(y, 2).relu().flatten(1)
    logits = F.linear(y, weights["backbone.head.2.weight"], weights["backbone.head.2.bias"])
    return F.cross_entropy(logits, batch["label"])


# ---------------------------------------------------------------------- the start


@pytest.mark.parametrize("variant", ["full", "direction"])
def test_the_first_batch_sets_the_intensities(variant: Any) -> None:
    module = begun(AdvStyle(**ADVERSARIAL, variant=variant), batch=batch_of(seed=4))
    torch.testing.assert_close(theta_of(module).detach(), first_spread(batch_of(seed=4)["image"]))


def test_the_first_active_batch_sets_them_once() -> None:
    technique = AdvStyle(**ADVERSARIAL, start_epoch=0, every_n_steps=2)
    module = Net().train()
    begin(technique, module, 1, batch_of(seed=1))  # not a multiple of 2
    assert (theta_of(module) == 0.1).all()
    begin(technique, module, 2, batch_of(seed=2))
    wanted = first_spread(batch_of(seed=2)["image"])
    torch.testing.assert_close(theta_of(module).detach(), wanted)
    technique.restore(module)
    begin(technique, module, 4, batch_of(seed=4))
    torch.testing.assert_close(theta_of(module).detach(), wanted)


def test_they_are_set_from_features_that_no_style_has_moved() -> None:
    """Of the second layer too, in the branch that moves the first."""
    module = begun(AdvStyle(**{**ADVERSARIAL, "layers": ["first", "second"]}))
    clean = Net()
    clean_second = flow(clean, batch_of()["image"])["second"][0]
    torch.testing.assert_close(theta_of(module, "second").detach(), torch.from_numpy(spread(clean_second)).float())


def test_a_single_example_sets_nothing() -> None:
    technique = AdvStyle(**ADVERSARIAL)
    module = begun(technique, batch=batch_of(1))
    assert (theta_of(module) == 0.1).all()
    technique.restore(module)
    begin(technique, module, 1, batch_of(seed=3))
    torch.testing.assert_close(theta_of(module).detach(), first_spread(batch_of(seed=3)["image"]))


def test_setting_them_leaves_no_trace_on_the_step() -> None:
    """Batch norm moves once, dropout draws what it would have drawn."""

    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.first = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, C, 3, padding=1))

    module, plain = Noisy().train(), Noisy().train()
    torch.manual_seed(3)
    technique = AdvStyle(layers=["first"], p_identity=1.0, p_dsu=0.0)
    technique.attach(module)
    technique.perturb(module, batch_of())
    assert not (theta_of(module) == 0.1).any()
    found = module(batch_of()["image"])
    torch.manual_seed(3)
    assert torch.equal(found, plain(batch_of()["image"]))
    state = module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


# ---------------------------------------------------------------------- the way


@pytest.mark.parametrize("weight", [0.0, 0.2, 7.0])
def test_the_gradient_is_reversed_and_one_step_goes_up(weight: float) -> None:
    batch, lr = batch_of(), 0.01
    technique = AdvStyle(**ADVERSARIAL, adv_weight=weight)
    module = begun(technique, batch=batch)
    x, y = flow(module, batch["image"])["first"]
    theta = theta_of(module)
    noise = shift_of(x, y) / theta.detach().double().numpy()[:, None]
    at = theta.detach().double().requires_grad_()
    loss = published_loss(module, at, noise, batch)
    (true,) = torch.autograd.grad(loss, at)
    own = module.loss(batch)
    torch.testing.assert_close(own.double(), loss, rtol=1e-4, atol=1e-5)
    own.backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad.double(), -weight * true, rtol=1e-3, atol=1e-5)
    before = theta.detach().clone()
    torch.optim.SGD([theta], lr).step()
    torch.testing.assert_close((theta.detach() - before).double(), lr * weight * true, rtol=1e-3, atol=1e-5)
    if weight:
        assert module.loss(batch) > own
    else:
        assert torch.equal(theta, before)


def test_the_networks_own_gradient_is_not_reversed() -> None:
    gradients = []
    for weight in (0.0, 5.0):
        module = begun(AdvStyle(**ADVERSARIAL, adv_weight=weight))
        module.loss(batch_of()).backward()
        gradients.append({n: p.grad for n, p in module.backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_turned_direction_has_no_gradient_along_itself() -> None:
    module = begun(AdvStyle(**ADVERSARIAL, variant="direction"))
    module.loss(batch_of()).backward()
    theta = theta_of(module)
    assert theta.grad is not None
    along = (theta.grad * theta).sum(1)
    assert theta.grad.abs().max() > 1e-5
    torch.testing.assert_close(along, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"p_identity": 1.0, "p_dsu": 0.0}, {"p_identity": 0.0, "p_dsu": 1.0}])
def test_in_the_other_branches_the_gradient_is_zero_and_not_missing(settings: dict[str, float]) -> None:
    """A parameter that is missing in a step stops DDP."""
    module = begun(AdvStyle(**{**ADVERSARIAL, **settings}))
    module.loss(batch_of()).backward()
    gradient = theta_of(module).grad
    assert gradient is not None and torch.equal(gradient, torch.zeros_like(gradient))


def test_the_dsu_branch_is_dsu() -> None:
    image = batch_of()["image"]
    one = begun(AdvStyle(layers=["first"], p_identity=0.0, p_dsu=1.0, seed=0, name="same"))
    two = begun(DSU(layers=["first"], p=1.0, seed=0, name="same"))
    assert torch.equal(one(image), two(image))


# ---------------------------------------------------------------------- a run


def test_a_run_climbs_at_its_rate_without_weight_decay() -> None:
    noted, module = Thetas(), Net(decay=0.5, lr=0.02)
    runner = trainer(AdvStyle(**ADVERSARIAL, adv_weight=0.0), noted)
    runner.fit(module, data(3))
    groups = {g["name"]: g for g in runner.optimizers[0].param_groups}
    assert groups["perturbations.adv_style"]["weight_decay"] == 0.0 and groups["model"]["weight_decay"] == 0.5
    assert [id(p) for p in groups["perturbations.adv_style"]["params"]] == [id(theta_of(module))]
    assert len(noted.seen) == 3
    wanted = first_spread(batch_of(seed=0)["image"])
    for before, after in noted.seen:  # with nothing to climb it stays where the first batch put it
        torch.testing.assert_close(before, wanted)
        assert torch.equal(before, after)
    climbing = Thetas()
    trainer(AdvStyle(**ADVERSARIAL, adv_weight=0.2), climbing).fit(Net(decay=0.5, lr=0.02), data(3))
    assert all((before != after).any() for before, after in climbing.seen)


def test_an_optimizer_without_the_intensities_is_an_error() -> None:
    class Forgets(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.backbone.parameters(), 0.1)

    with pytest.raises(ValueError, match="intensities of adv_style are in no optimizer.*parameter_groups"):
        trainer(AdvStyle(**ADVERSARIAL)).fit(Forgets(), data(1))


def test_a_resumed_run_keeps_what_was_learned(tmp_path: Path) -> None:
    def technique() -> AdvStyle:
        return AdvStyle(layers=["first", "second"], adv_weight=2.0, p_identity=0.1, p_dsu=0.1, seed=1)

    def fit(module: Net, epochs: int, file: Path | None = None, *more: Any) -> Trainer:
        runner = trainer(ExactResume(), technique(), *more, max_epochs=epochs)
        runner.fit(module, data(2), ckpt_path=file, weights_only=True)
        return runner

    file, noted = tmp_path / "a.ckpt", Thetas()
    short, whole, resumed = Net(), Net(), Net()
    fit(short, 1).save_checkpoint(file)
    fit(whole, 2)
    fit(resumed, 2, file, noted)
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(noted.seen[0][0], saved["perturbations.adv_style.first.theta"])
    assert not torch.allclose(saved["perturbations.adv_style.first.theta"], first_spread(batch_of(seed=0)["image"]))
    for layer in ("first", "second"):
        assert not torch.equal(theta_of(short, layer), theta_of(whole, layer))
        assert torch.equal(theta_of(whole, layer), theta_of(resumed, layer))


def test_a_layer_that_is_new_at_resume_is_set_and_the_others_are_kept(tmp_path: Path) -> None:
    file, short, resumed = tmp_path / "a.ckpt", Net(), Net()
    runner = trainer(AdvStyle(**ADVERSARIAL, adv_weight=2.0))
    runner.fit(short, data(2))
    runner.save_checkpoint(file)
    learned = theta_of(short).detach().clone()
    noted = Thetas()
    more = AdvStyle(**{**ADVERSARIAL, "layers": ["first", "second"]}, adv_weight=0.0)
    trainer(more, noted, max_epochs=2).fit(resumed, data(2), ckpt_path=file, weights_only=True)
    assert torch.equal(noted.seen[0][0], learned)
    assert not (theta_of(resumed, "second") == 0.1).any()


# ---------------------------------------------------------------------- several ranks


#: What a rank does: in a process of its own, which imports no more than it needs.
RANK = """
import sys, torch
from callbacks.statistics import spread_over_ranks
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.save(spread_over_ranks(torch.load(f"{folder}/{rank}-in.pt")), f"{folder}/{rank}-out.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_set_them_from_all_their_batches(tmp_path: Path) -> None:
    statistic = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 3
    wanted = torch.from_numpy(np.sqrt(statistic.double().numpy().var(0, ddof=1) + EPS)).float()
    torch.testing.assert_close(spread_over_ranks(statistic), wanted)
    for rank, part in enumerate((statistic[:4], statistic[4:])):  # batches may differ in size
        torch.save(part, tmp_path / f"{rank}-in.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], cwd=HOME) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}-out.pt") for rank in range(2)]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], wanted)


def test_one_example_has_no_spread_on_any_rank() -> None:
    assert not spread_over_ranks(torch.randn(1, 3)).isfinite().any()
