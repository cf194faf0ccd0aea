"""Noise masks: their distribution, the policy's gradient, and what a training step sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import noise_mask as n
from callbacks.noise_mask import NoiseMask
from callbacks.report import Report
from tests.laws import cells

# ---------------------------------------------------------------------- drawing


@given(st.floats(-4, 4), st.floats(-4, 4))
@settings(max_examples=15, deadline=None)
def test_masks_have_the_moments_of_a_beta_distribution(log_alpha: float, log_beta: float) -> None:
    torch.manual_seed(0)
    size = 60_000
    mask = n.sample_mask(torch.full((size, 1), log_alpha), torch.full((size, 1), log_beta)).sigmoid().double()
    a, b = math.exp(log_alpha), math.exp(log_beta)
    mean, variance = a / (a + b), a * b / (a + b) ** 2 / (a + b + 1)
    assert float(mask.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / size))
    fourth = float((mask - mean).pow(4).mean())
    assert float((mask - mean).square().mean()) == pytest.approx(variance, abs=6 * math.sqrt(fourth / size))


def test_a_mask_depends_on_its_seed_alone() -> None:
    log_alpha, log_beta = torch.randn(2, 3, 4, 4).unbind()
    whole = n.sample_mask(log_alpha, log_beta, [5, 6, 7])
    alone = n.sample_mask(log_alpha[1:2], log_beta[1:2], [6])
    assert torch.equal(whole[1], alone[0])
    assert not torch.equal(whole, n.sample_mask(log_alpha, log_beta, [5, 6, 8]))
    state = torch.get_rng_state()
    n.sample_mask(log_alpha, log_beta, [1, 2, 3])
    assert torch.equal(state, torch.get_rng_state())


def test_small_concentrations_reach_both_ends_without_breaking() -> None:
    log = torch.full((4000, 1), -4.0)
    logit = n.sample_mask(log, log, range(4000))
    assert logit.isfinite().all() and 0.45 < float((logit > 0).float().mean()) < 0.55
    assert float(logit.abs().max()) > 100  # a mask that rounds to 0 or 1
    assert n.log_density(log, log, logit).isfinite().all()


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-8, 8))
@settings(max_examples=40, deadline=None)
def test_log_density(log_alpha: float, log_beta: float, logit: float) -> None:
    values = [torch.tensor([v], dtype=torch.float64) for v in (log_alpha, log_beta, logit)]
    a, b, m = math.exp(log_alpha), math.exp(log_beta), 1 / (1 + math.exp(-logit))
    wanted = (a - 1) * math.log(m) + (b - 1) * math.log1p(-m) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    assert float(n.log_density(*values)) == pytest.approx(wanted, rel=1e-8, abs=1e-8)


# ---------------------------------------------------------------------- the gradient


def _costs(mask: Tensor) -> Tensor:
    """A cost of two cells (N, 2) whose expectation is known."""
    return (mask[:, 0] - 0.3) ** 2 + 2 * mask[:, 0] * mask[:, 1] + 3


def _expected_gradient(log: Tensor) -> Tensor:
    """d E[cost] / d log-concentrations (2, 2), from the moments of the Beta distribution."""
    log = log.clone().requires_grad_()
    a, b = log.exp()
    mean, square = a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    expected = square[0] - 0.6 * mean[0] + 0.09 + 2 * mean[0] * mean[1] + 3
    (gradient,) = torch.autograd.grad(expected, log)
    return gradient


@pytest.mark.parametrize("how", ["none", "constant", "leave_one_out", "released"])
def test_the_policys_gradient_is_unbiased_and_the_released_one_is_not(how: str) -> None:
    torch.manual_seed(1)
    size, group = 200_000, 4
    log = torch.tensor([[0.2, 0.9], [0.5, -0.3]], dtype=torch.float64)  # alpha and beta of two cells
    leaf = [log[i].expand(size, 2).clone().requires_grad_() for i in (0, 1)]
    logit = n.sample_mask(leaf[0], leaf[1])
    cost = _costs(logit.sigmoid())
    baseline: Any = {"constant": 3.2}.get(how, 0.0)
    if how == "leave_one_out":
        baseline = torch.cat([n.leave_one_out(part) for part in cost.split(group)])
    objective: Any = "released" if how == "released" else "textbook"
    if how == "released":  # the batch's cost is that of one image here
        logs = n.log_density(leaf[0], leaf[1], logit).logsumexp(1)
        loss = (cost * logs).mean()
        single = n.policy_loss(*(v[:1] for v in (*leaf, logit, cost)), objective="released")
        assert float(single.detach()) == pytest.approx(float((cost[0] * logs[0]).detach()))
    else:
        loss = n.policy_loss(leaf[0], leaf[1], logit, cost, baseline, objective)
    each = torch.stack(torch.autograd.grad(loss, leaf), 1) * size  # (N, 2, 2)
    error = each.view(-1, group, 2, 2).mean(1).std(0) / math.sqrt(size / group)
    distance = ((each.mean(0) - _expected_gradient(log)) / error).abs()
    if how == "released":
        assert float(distance.max()) > 20
    else:
        assert float(distance.max()) < 3, distance


def test_a_baseline_makes_the_gradient_less_noisy() -> None:
    torch.manual_seed(2)
    leaf = [torch.zeros(4000, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    logit = n.sample_mask(*leaf)
    cost = _costs(logit.sigmoid())
    spread = []
    for baseline in (0.0, cost.mean()):
        found = torch.autograd.grad(n.policy_loss(*leaf, logit, cost, baseline), leaf[0])[0] * 4000
        spread.append(float(found.std()))
    assert spread[1] < 0.5 * spread[0]


def test_leave_one_out() -> None:
    assert torch.equal(n.leave_one_out(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([4.0, 3.5, 1.5]))
    assert torch.equal(n.leave_one_out(torch.tensor([3.0])), torch.tensor([3.0]))


def test_the_released_factor_at_the_start() -> None:
    torch.manual_seed(0)
    log = torch.rand(2, 16, 64 * 64)
    factor = n.log_density(log[0], log[1], n.sample_mask(log[0], log[1])).logsumexp(1)
    assert factor.mean().item() == pytest.approx(8.48, abs=0.05)  # measured in the released code


# ---------------------------------------------------------------------- masks as images


@pytest.mark.parametrize(("grid", "side"), [(4, 8), (8, 32), (3, 10)])
def test_enlarged_to_the_nearest_cell(grid: int, side: int) -> None:
    mask = torch.rand(2, grid, grid)
    full = n.enlarge(mask, (side, side), "nearest", 0, 1.0)
    assert full.shape == (2, 1, side, side)
    for y in range(side):
        for x in range(side):
            assert torch.equal(full[:, 0, y, x], mask[:, y * grid // side, x * grid // side])


def test_blurred_by_a_gaussian() -> None:
    mask = torch.zeros(1, 9, 9)
    mask[0, 4, 4] = 1
    full = n.enlarge(mask, (9, 9), "bilinear", 5, 1.5)[0, 0]
    line = torch.tensor([math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-2, 3)])
    line /= line.sum()
    assert torch.allclose(full[2:7, 2:7], line[:, None] * line, atol=1e-6)


# ---------------------------------------------------------------------- in a run


class Watch(Callback):
    """Stands behind the technique: what the step saw, and what it came to."""

    def __init__(self) -> None:
        self.clean: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.label: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.modes: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        (technique,) = [c for c in trainer.callbacks if isinstance(c, NoiseMask)]  # type: ignore[attr-defined]
        assert technique._given is not None
        self.clean.append(technique._given[1]["image"].clone())
        self.seen.append(batch["image"].clone())
        self.label.append(batch["label"])
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({k: p.grad.clone() for k, p in named if p.grad is not None})


def masked_run(seed: int = 0, epochs: int = 1, recipe: str = "classifier", **options: Any) -> tuple[Any, Watch]:
    module, watch = cells.recipe(recipe, norm=False, drop=False), Watch()
    cells.trainer(NoiseMask(seed=seed, **options), watch, max_epochs=epochs).fit(module, datamodule=cells.data(recipe))
    return module, watch


def masks_of(module: Any, watch: Watch) -> Tensor:
    """What the images were multiplied by, (steps, B, H, W), of the first channel."""
    mean = module.mean.view(1, 1, -1, 1, 1)
    clean, seen = torch.stack(watch.clean), torch.stack(watch.seen)
    return ((seen - mean) / (clean - mean))[:, :, 0]


@pytest.mark.parametrize("objective", ["textbook", "released"])
def test_the_classifiers_gradient(objective: Any) -> None:
    module, watch = masked_run(objective=objective)
    for step in range(3):
        module.load_state_dict(watch.weights[step])
        module.zero_grad()
        F.cross_entropy(module(watch.seen[step]), watch.label[step]).backward()
        ratio = []
        for name, parameter in module.named_parameters():
            if name.startswith("backbone") and parameter.grad is not None and parameter.grad.norm() > 1e-6:
                ratio.append(float(watch.gradients[step][name].norm() / parameter.grad.norm()))
                cosine = F.cosine_similarity(watch.gradients[step][name].flatten(), parameter.grad.flatten(), 0)
                assert float(cosine) > 0.9999
        # eight by eight cells: about the log of 64 and a little; the same for all weights
        assert max(ratio) / min(ratio) == pytest.approx(1, abs=1e-3)
        assert ratio[0] == pytest.approx(1.0, abs=1e-4) if objective == "textbook" else 4.1 < ratio[0] < 4.7


def test_the_first_step_has_no_baseline_and_teaches_nothing() -> None:
    _, watch = masked_run()
    policy = {k for k in watch.gradients[0] if k.startswith("perturbations.noise_mask.")}
    assert policy
    assert all(watch.gradients[0][k].abs().max() == 0 for k in policy)
    assert any(watch.gradients[1][k].abs().max() > 0 for k in policy)


def test_running_averages_by_hand() -> None:
    module, watch = masked_run()
    policy, costs = n.Policy(3, 8, width=128), []
    running = watch.weights[0]["perturbations.noise_mask.running"].double()
    for step in range(3):
        state = {k.removeprefix("perturbations.noise_mask."): v for k, v in watch.weights[step].items()}
        policy.load_state_dict({k: state[k] for k in policy.state_dict()})
        with torch.no_grad():
            said = policy(watch.clean[step] - module.mean)
            module.load_state_dict(watch.weights[step])
            cost = F.cross_entropy(module(watch.seen[step]), watch.label[step])
        running = 0.99 * running + 0.01 * said.double().mean(1)
        costs.append(float(cost))
    file = module.state_dict()  # of the last step's start: one step behind
    assert int(file["perturbations.noise_mask.steps"]) == 2
    later, _ = masked_run()
    assert torch.allclose(later.perturbations["noise_mask"].running.double(), running, atol=1e-5)
    wanted = 0.99 * (0.99 * costs[0] + 0.01 * costs[1]) + 0.01 * costs[2]
    assert float(later.perturbations["noise_mask"].baseline) == pytest.approx(wanted, rel=1e-4)


def test_controls() -> None:
    module, watch = masked_run(kind="beta", alpha=4.0, beta=1.0, blur_kernel=0, epochs=8)
    mask = masks_of(module, watch)
    assert "noise_mask" not in getattr(module, "perturbations", {})
    assert -1e-3 <= float(mask.min()) and float(mask.max()) <= 1 + 1e-3
    assert float(mask.mean()) == pytest.approx(0.8, abs=0.01)
    module, watch = masked_run(kind="gaussian", std=0.25, blur_kernel=0, epochs=8)
    mask = masks_of(module, watch)
    assert float(mask.mean()) == pytest.approx(1, abs=0.02) and float(mask.std()) == pytest.approx(0.25, abs=0.02)
    module, watch = masked_run(kind="cutout", hole=3, blur_kernel=0, epochs=8)
    mask = masks_of(module, watch)[..., ::4, ::4].round().flatten(0, 1)  # one pixel of each cell
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    holes = mask == 0
    assert (holes.sum((1, 2)) == 9).all()
    rows, columns = holes.any(2), holes.any(1)
    assert (rows.sum(1) == 3).all() and (columns.sum(1) == 3).all()
    assert rows.any(0).all() and columns.any(0).all()  # anywhere, up to the edges


def test_strength_brings_the_mask_closer_to_one() -> None:
    whole, half = (masked_run(kind="beta", strength=s, seed=3) for s in (1.0, 0.25))
    assert torch.allclose(masks_of(*half), 1 - 0.25 * (1 - masks_of(*whole)), atol=1e-3)


def test_the_mask_is_multiplied_where_the_image_is_normalised() -> None:
    module, watch = masked_run(kind="beta")
    shown = [(images - module.mean) / module.std for images in (watch.clean[0], watch.seen[0])]
    scale = shown[1] / shown[0]
    assert torch.allclose(scale[:, 0], scale[:, 1], atol=1e-2) and float(scale.min()) > -1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_concentrations_keep_their_precision(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    original = n.sample_mask
    monkeypatch.setattr(n, "sample_mask", lambda a, b, s: found.append(a.dtype) or original(a, b, s))
    module = cells.recipe("classifier", norm=False)
    cells.trainer(NoiseMask(), max_epochs=1, precision=precision).fit(module, datamodule=cells.data("classifier"))
    assert set(found) == {torch.float64 if precision == "64-true" else torch.float32}


def test_averages_move_in_any_precision() -> None:
    module = cells.recipe("classifier", norm=False)
    options: dict[str, Any] = {"precision": "bf16-true", "max_epochs": 4}
    cells.trainer(NoiseMask(), **options).fit(module, datamodule=cells.data("classifier"))
    policy: Any = module.perturbations["noise_mask"]  # type: ignore[index, union-attr]
    assert policy.alpha[2].weight.dtype == torch.bfloat16
    assert policy.running.dtype == policy.baseline.dtype == torch.float32
    before = policy.baseline.clone()
    policy.learn(torch.zeros(2, 4, 8, 8), before.expand(4) * 1.1, 1)
    assert float(policy.baseline) == pytest.approx(1.001 * float(before), rel=1e-5)


class Toy(LightningModule):
    """Says the right class as surely as the image is bright in one cell of 4 x 4; nothing else matters to it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.save_hyperparameters({"num_classes": 2})
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        bright = image[:, 0, 2:4, 4:6].mean((1, 2)) - 0.5
        return torch.stack([4 * bright + 0 * self.unused(bright[:, None])[:, 0], torch.zeros_like(bright)], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_mask_of_the_informative_cell_rises_and_falls_for_an_adversary(adversarial: bool) -> None:
    batch = {"image": torch.ones(64, 1, 8, 8), "label": torch.zeros(64, dtype=torch.int64)}
    technique = NoiseMask(
        grid=4, blur_kernel=0, reduce=1, policy_weight=0.1, adversarial=adversarial, baseline="leave_one_out"
    )
    toy = Toy()
    cells.trainer(technique, max_epochs=1).fit(toy, DataLoader([batch] * 150, batch_size=None))
    policy: Any = toy.perturbations["noise_mask"]  # type: ignore[index, union-attr]
    with torch.no_grad():
        log_alpha, log_beta = policy.concentrations(policy(batch["image"][:1] - 0.5))
    mean = (log_alpha - log_beta).sigmoid()[0]
    others = mean.flatten()[[i for i in range(16) if i != 6]]
    if adversarial:
        assert mean[1, 2] < others.min() - 0.1
    else:
        assert mean[1, 2] > others.max() + 0.1


def test_a_network_that_shows_no_example() -> None:
    toy = Toy()
    toy.example_input_array = None
    toy.hparams["in_chans"] = 1
    batch = {"image": torch.ones(4, 1, 8, 8), "label": torch.zeros(4, dtype=torch.int64)}
    cells.trainer(NoiseMask(), max_epochs=1).fit(toy, DataLoader([batch], batch_size=None))
    assert toy.perturbations["noise_mask"].extractor[0].weight.shape[1] == 1  # type: ignore[index, union-attr]


def test_without_costs_of_their_own_images_are_judged_by_the_average() -> None:
    toy, found = Toy(), []
    del toy.hparams["num_classes"]  # so it isn't known which output is the logits
    batch = {"image": torch.rand(8, 1, 8, 8), "label": torch.zeros(8, dtype=torch.int64)}
    technique = NoiseMask(grid=4, baseline="leave_one_out")

    class Kept(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            policy: Any = pl_module.perturbations["noise_mask"]  # type: ignore[index, union-attr]
            found.append(float(policy.alpha[2].bias.grad.abs().max()))

    cells.trainer(technique, Kept(), max_epochs=1).fit(toy, DataLoader([batch] * 3, batch_size=None))
    assert found[0] == 0 and min(found[1:]) > 0


def test_two_policies_come_off_again() -> None:
    module = cells.recipe("classifier", norm=False)
    for _ in range(2):
        pair = [NoiseMask(), NoiseMask(name="second", policy_weight=0.0)]
        cells.trainer(*pair, max_epochs=1).fit(module, datamodule=cells.data("classifier"))
    policies: Any = module.perturbations
    assert int(policies["noise_mask"].steps) == int(policies["second"].steps) == 2 * cells.STEPS
    cells.trainer(max_epochs=1).fit(module, datamodule=cells.data("classifier"))
    assert int(policies["noise_mask"].steps) == 2 * cells.STEPS


def test_masks_are_off_where_the_module_says_so() -> None:
    module, watch = cells.recipe("classifier", norm=False), Watch()
    module.masked = False  # type: ignore[assignment]
    cells.trainer(NoiseMask(), watch).fit(module, datamodule=cells.data("classifier"))
    assert all(torch.equal(a, b) for a, b in zip(watch.clean, watch.seen, strict=True))


def test_pictures_and_curves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"default_root_dir": tmp_path, "max_epochs": 2}
    cells.trainer(Report(), NoiseMask(), **options).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    files = {file.name for file in (tmp_path / "plots").iterdir()}
    assert files >= {"mask-examples.png", "mask-domains.png", "mask-classes.png", "mask-curves.png"}


def test_mean_masks_by_class_are_those_that_were_drawn_from() -> None:
    technique = NoiseMask(kind="cutout", hole=8, blur_kernel=0)  # all of it
    cells.trainer(technique, max_epochs=2).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    assert [epoch for epoch, _ in technique._epochs] == [1, 2]
    means = technique._epochs[0][1]
    assert means.shape == (1 + 3, 8, 8) and (means == 0).all()  # one domain, three classes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "noise"}, "kind must be policy, beta, gaussian or cutout"),
        ({"objective": "ppo"}, "objective must be textbook or released"),
        ({"baseline": "mean"}, "baseline must be ema or leave_one_out"),
        ({"upsample": "cubic"}, "upsample must be nearest or bilinear"),
        ({"grid": 0}, "at least 1"),
        ({"hole": 9}, "hole lie between"),
        ({"blur_kernel": 4}, "blur_kernel must be odd"),
        ({"alpha": 0.0}, "must be positive"),
        ({"strength": 1.5}, r"strength lie in \[0, 1\]"),
        ({"adversarial": True, "objective": "released"}, "adversarial is of the objective textbook"),
    ],
)
def test_settings_out_of_range_are_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        NoiseMask(**options)
    assert "\n" not in str(error.value)


def test_what_it_cannot_work_on_is_one_line() -> None:
    with pytest.raises(ValueError, match="no policy extractor 'resnet0'"):
        masked_run(extractor="resnet0")
    with pytest.raises(ValueError, match="the batch needs 'image'"):
        cells.trainer(NoiseMask()).fit(Toy(), DataLoader([{"label": torch.zeros(4)}], batch_size=None))


def test_the_published_extractor_and_grid() -> None:
    module, watch = masked_run(extractor="resnet10t", reduce=1, width=512, grid=16, blur_kernel=13, blur_sigma=6.0)
    policy: Any = module.perturbations["noise_mask"]
    assert policy.extractor.num_features == 512 and policy.alpha[2].weight.shape == (256, 512)
    assert torch.stack(watch.seen).isfinite().all()
