"""SGD's noise: injected with the covariance of a smaller batch, and measured without bias."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.sgd_noise import (
    SGDNoiseInjection,
    SGDTemperature,
    effective_batch,
    margins_of,
    noise_trace,
    noise_weights,
)

CLASSES, FEATURES = 2, 2


class Linear(LightningModule):
    """Softmax regression; its gradients are known: (p - e_y) x of each example."""

    def __init__(self, lr: float = 0.0, wrong: bool = False, zero: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(FEATURES, CLASSES, bias=False)
        if zero:
            nn.init.zeros_(self.fc.weight)
        self.lr, self.wrong = lr, wrong

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        return F.cross_entropy(self(x), y) * (1.1 if self.wrong else 1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, CLASSES * FEATURES), by hand."""
        with torch.no_grad():
            slope = self(x).softmax(1) - F.one_hot(y, CLASSES)
            return torch.einsum("nc,nf->ncf", slope, x).flatten(1).double()


def points(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=g) + 0.5, torch.randint(0, CLASSES, (n,), generator=g)


def loader(n: int, size: int, times: int = 1, pairs: bool = False) -> DataLoader[Any]:
    """The same n examples, in order, so many times."""
    x, y = points(n)
    rows: Any = [(x[i], y[i]) if pairs else {"image": x[i], "label": y[i]} for i in range(n)] * times
    return DataLoader(rows, batch_size=size)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(**{**quiet, "max_epochs": 1, "accelerator": "cpu", **options}, callbacks=list(callbacks))


class Gradients(Callback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.found.append(pl_module.fc.weight.grad.flatten().double().clone())  # type: ignore[union-attr, operator]


def covariance_is(found: Tensor, wanted: Tensor) -> None:
    """Within five standard errors of a gaussian's sample covariance."""
    n = len(found)
    error = ((wanted.diagonal()[:, None] * wanted.diagonal() + wanted.square()) / n).sqrt()
    assert ((found.T.cov() - wanted).abs() <= 5 * error + 1e-12).all()


# ---------------------------------------------------------------------- injected


@pytest.mark.parametrize(("emulated", "accumulated"), [(1, 1), (3, 1), (4, 2)])
def test_injected_noise_has_the_covariance_of_a_smaller_batch(emulated: int, accumulated: int) -> None:
    """A model that doesn't move, and the same batch at each step: what varies is the noise alone."""
    size, steps = 6, 900 // accumulated
    module, seen = Linear(), Gradients()
    rows = loader(size, size, steps * accumulated)
    technique = SGDNoiseInjection(emulated)
    trainer(technique, seen, accumulate_grad_batches=accumulated, log_every_n_steps=10**6).fit(module, rows)
    found = torch.stack(seen.found)
    own = module.gradients(*points(size))
    assert len(found) == steps
    wanted = (1 / emulated - 1 / (size * accumulated)) * own.T.cov()
    error = (wanted.diagonal() / steps).sqrt()
    assert ((found.mean(0) - own.mean(0)).abs() <= 5 * error + 1e-7).all(), "the noise has a mean"
    covariance_is(found, wanted)


@pytest.mark.parametrize(("emulated", "size"), [(1, 4), (2, 4), (2, 8), (5, 16), (16, 16)])
def test_a_noisy_large_batch_is_like_a_small_one(emulated: int, size: int) -> None:
    """Over batches too: mean and covariance of the gradient are those of batches of b, here drawn independently."""
    torch.manual_seed(0)
    n = 20_000
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    g = torch.randn(n, size, 3, dtype=torch.float64) @ mixing + 0.7
    c = torch.stack([noise_weights(xi, size, emulated) for xi in torch.randn(n, size, dtype=torch.float64)])
    noisy = g.mean(1) + (c[..., None] * g).sum(1)
    wanted = mixing.T @ mixing / emulated
    assert ((noisy.mean(0) - 0.7).abs() < 5 * (wanted.diagonal() / n).sqrt()).all()
    small = noisy.T.cov()
    # A mixture of gaussians has heavier tails than one: the error is taken from the sample itself
    centred = noisy - noisy.mean(0)
    error = torch.einsum("ni,nj->nij", centred, centred).std(0) / math.sqrt(n)
    assert ((small - wanted).abs() < 5 * error).all()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 12), accumulated=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_weights_sum_to_nothing_and_scale(size: int, accumulated: int, seed: int, data: Any) -> None:
    batch = size * accumulated
    emulated = data.draw(st.integers(1, batch))
    xi = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = noise_weights(xi, batch, emulated, accumulated)
    assert abs(float(c.sum())) < 1e-12  # so a part that all gradients share gets no noise
    centred = (xi - xi.mean()).square().sum()
    wanted = (1 / emulated - 1 / batch) / accumulated * centred / (size - 1)
    assert float(c.square().sum()) == pytest.approx(float(wanted), abs=1e-15)


def test_the_noise_of_a_batch_has_a_dimension_less_than_examples() -> None:
    g = torch.randn(4, 10, dtype=torch.float64)
    noise = torch.stack([noise_weights(torch.randn(4, dtype=torch.float64), 4, 1) @ g for _ in range(50)])
    assert torch.linalg.matrix_rank(noise) == 3


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="can't have the noise of one of 8"):
        trainer(SGDNoiseInjection(8)).fit(Linear(), loader(6, 6))
    with pytest.raises(ValueError, match="at least two"):
        trainer(SGDNoiseInjection(1), accumulate_grad_batches=2).fit(Linear(), loader(6, 1))
    with pytest.raises(ValueError, match="each example's own loss.*Linear has none") as error:
        trainer(SGDNoiseInjection(2)).fit(Linear(wrong=True), loader(6, 6))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least 1"):
        SGDNoiseInjection(0)


@pytest.mark.parametrize("emulated", [None, 6])
def test_as_large_a_batch_is_no_noise(emulated: int | None) -> None:
    module, plain = Linear(0.5), Linear(0.5)
    trainer(SGDNoiseInjection(emulated)).fit(module, loader(6, 6, 3))
    trainer().fit(plain, loader(6, 6, 3))
    assert torch.equal(module.fc.weight, plain.fc.weight)


def test_a_module_may_say_its_examples_losses() -> None:
    class Squared(Linear):
        def example_losses(self, batch: Any) -> Tensor:
            return self(batch["image"]).square().sum(1)

        def loss(self, batch: Any) -> Tensor:
            return self.example_losses(batch).mean()

    module, seen = Squared(), Gradients()
    trainer(SGDNoiseInjection(2), seen, log_every_n_steps=10**6).fit(module, loader(6, 6, 600))
    x, _ = points(6)
    own = torch.einsum("nc,nf->ncf", 2 * module(x).detach(), x).flatten(1).double()
    covariance_is(torch.stack(seen.found), (1 / 2 - 1 / 6) * own.T.cov())


# ---------------------------------------------------------------------- formulas


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 20), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_trace_of_single_gradients_is_that_of_their_covariance(n: int, d: int, seed: int) -> None:
    g = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trace, square = noise_trace(float(g.square().sum()), float(g.sum(0).square().sum()), n, 1)
    wanted = float(g.var(0).sum())
    assert trace == pytest.approx(wanted)
    assert square == pytest.approx(float(g.mean(0).square().sum()) - wanted / n)


def test_groups_give_the_same_trace_without_bias() -> None:
    """Over all groupings of the sample the mean is the trace from single gradients, exactly."""
    import itertools

    g = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for order in itertools.permutations(range(6)):
        means = g[list(order)].view(3, 2, 3).mean(1)
        found.append(noise_trace(float(means.square().sum()), float(means.sum(0).square().sum()), 3, 2))
    traces, squares = zip(*found, strict=True)
    assert sum(traces) / len(traces) == pytest.approx(float(g.var(0).sum()))
    assert sum(squares) / len(squares) == pytest.approx(float(g.mean(0).square().sum() - g.var(0).sum() / 6))


def test_margins() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert margins_of(logits, torch.tensor([1, 2])).tolist() == [1.0, -1.0]
    assert margins_of(torch.tensor([[0.5], [0.5]]), torch.tensor([0, 1])).tolist() == [-0.5, 0.5]


def test_effective_batch() -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.found = effective_batch(trainer)

    look = Look()
    trainer(look, accumulate_grad_batches=3).fit(Linear(), loader(6, 2, pairs=True))
    assert look.found == 6
    with pytest.raises(ValueError, match="batch_size"):
        trainer(look).fit(Linear(), DataLoader([points(2)], batch_size=None))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- measured


def measured(module: LightningModule, rows: Any, *more: Any, options: dict[str, Any] | None = None, **args: Any) -> Any:
    diagnostic = SGDTemperature(**{"share": None, **args})
    trainer(diagnostic, *more, **(options or {})).fit(module, rows)
    return diagnostic


def values(diagnostic: SGDTemperature, key: str) -> dict[int, float]:
    return {int(step): value for step, value in diagnostic.history.get(f"sgd_temperature/{key}", [])}


@pytest.mark.parametrize("pairs", [True, False])
def test_it_measures_what_is_there(pairs: bool) -> None:
    module, begun = Linear(0.3), Linear().fc.weight.detach().clone()
    found = measured(module, loader(20, 5, pairs=pairs), width=4, threshold=0.2, group=1)
    x, y = points(20)
    own = module.gradients(x, y)
    assert list(values(found, "temperature").values()) == pytest.approx([0.3 / (4 * 5)] * len(found.steps))
    assert values(found, "noise")[4] == pytest.approx(float(own.var(0).sum()) * (1 / 5 - 1 / 20), rel=1e-5)
    assert values(found, "gradient_sq")[4] == pytest.approx(float(own.mean(0).square().sum()), rel=1e-4)
    moved = float((module.fc.weight - begun).norm())
    assert values(found, "distance")[4] == pytest.approx(moved, rel=1e-5) and values(found, "distance")[0] == 0
    assert values(found, "weight_change")[4] == pytest.approx(moved / float(begun.norm()), rel=1e-5)
    logits = module(x).detach()
    margins = (logits[torch.arange(20), y] - logits[torch.arange(20), 1 - y]).double()
    assert values(found, "margin_min")[4] == pytest.approx(float(margins.min()), rel=1e-5)
    for q in (10, 50, 90):
        assert values(found, f"margin_{q}")[4] == pytest.approx(float(margins.quantile(q / 100)), rel=1e-4)
    assert values(found, "unfitted")[4] == pytest.approx(float((margins < 0.2).float().mean()))


def test_groups_of_examples_are_whole_and_fixed() -> None:
    module = Linear()
    found = measured(module, loader(64, 8), group=4)
    x, y = points(64)
    own = module.gradients(x, y)
    assert found._size == 4 and len(found._groups) == 16
    assert sorted(i for members in found._groups for i in members) == list(range(64))
    means = torch.stack([own[members].mean(0) for members in found._groups])
    assert values(found, "noise")[8] == pytest.approx(4 * float(means.var(0).sum()) * (1 / 8 - 1 / 64), rel=1e-5)
    assert len(set(values(found, "noise").values())) == 1, "other examples, though the weights never moved"


def test_from_zero_there_is_no_relative_change_and_nothing_is_fitted() -> None:
    found = measured(Linear(0.1, zero=True), loader(20, 5))
    assert not values(found, "weight_change") and values(found, "distance")[4] > 0
    assert values(found, "unfitted")[0] == 1.0, "a margin of 0 is on no side"


def test_the_step_at_which_all_are_fitted() -> None:
    class Separable(Linear):
        pass

    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 4)
    rows = DataLoader([(x[i], torch.tensor(i % 2)) for i in range(8)] * 5, batch_size=8)  # type: ignore[arg-type]
    found = measured(Separable(1.0, zero=True), rows, measurements=5)
    assert list(values(found, "fit_steps").values()) == [1.0] and values(found, "unfitted")[1] == 0
    assert not values(measured(Linear(), loader(20, 5)), "fit_steps")


def test_where_training_began_survives_a_resume(tmp_path: Any) -> None:
    file = tmp_path / "half.ckpt"
    whole = measured(Linear(0.3), loader(20, 5), options={"max_epochs": 4})
    first = SGDTemperature(share=None)
    runner = trainer(first, max_epochs=2)
    runner.fit(Linear(0.3), loader(20, 5))
    runner.save_checkpoint(file)
    again = SGDTemperature(share=None)
    trainer(again, max_epochs=4).fit(Linear(0.3), loader(20, 5), ckpt_path=file, weights_only=True)
    assert values(again, "distance")[16] == values(whole, "distance")[16] > 0
    assert values(again, "weight_change")[16] == values(whole, "weight_change")[16]
    assert torch.equal(again.start["fc.weight"], Linear().fc.weight)


def test_it_is_drawn() -> None:
    figure = measured(Linear(0.3), loader(20, 5)).draw()
    assert [axis.get_title() for axis in figure.axes] == [
        "gradient of a step", "$|w - w_0| / |w_0|$", "margins", "share not fitted"
    ]  # fmt: skip
    assert SGDTemperature().draw() is None


@pytest.mark.parametrize("wrong", [{"width": 0}, {"group": 0}, {"examples": 1}, {"measurements": 2}])
def test_settings_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SGDTemperature(**wrong)  # type: ignore[arg-type]
