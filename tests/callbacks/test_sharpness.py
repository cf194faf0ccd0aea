"""Sharpness: Lanczos against dense matrices, networks against their dense Hessian, the limit against divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.report import Report
from callbacks.sharpness import Sharpness, lanczos, stability_limit
from tests.callbacks.small import trainer

N, SIZE = 40, 5

# ---------------------------------------------------------------------- the iteration


def symmetric(size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    return (a + a.T) / 2


@given(st.integers(1, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_as_many_iterations_as_dimensions_give_all_eigenvalues(size: int, seed: int) -> None:
    matrix = symmetric(size, seed)
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values, errors = lanczos(lambda v: matrix @ v, start, 2 * size)
    exact = torch.linalg.eigvalsh(matrix)
    assert float(values[-1]) == pytest.approx(float(exact[-1]), rel=1e-6, abs=1e-8)
    assert float(values[0]) == pytest.approx(float(exact[0]), rel=1e-6, abs=1e-8)
    assert float(errors[-1]) < 1e-3


@given(st.integers(20, 60), st.integers(1, 12), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_it_never_overshoots_and_knows_its_error(size: int, iterations: int, seed: int) -> None:
    matrix = symmetric(size, seed)
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values, errors = lanczos(lambda v: matrix @ v, start, iterations)
    exact = torch.linalg.eigvalsh(matrix)
    assert len(values) == len(errors) <= iterations
    assert exact[0] - 1e-9 <= values.min() and values.max() <= exact[-1] + 1e-9
    for value, error in zip(values, errors, strict=True):
        assert float((exact - value).abs().min()) <= float(error) + 1e-9


def test_it_stops_where_nothing_is_left() -> None:
    calls: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return 3 * v

    values, errors = lanczos(product, torch.ones(6), 10)
    assert values.tolist() == pytest.approx([3.0]) and len(calls) == 1 and float(errors[0]) < 1e-5
    zero, _ = lanczos(lambda v: 0 * v, torch.ones(6), 10)
    assert zero.tolist() == [0.0]
    lost, _ = lanczos(lambda v: v * float("nan"), torch.ones(6), 10)
    assert lost.isnan().all()


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="at least 1 iteration"):
        lanczos(lambda v: v, torch.ones(3), 0)
    with pytest.raises(ValueError, match="must not be zero"):
        lanczos(lambda v: v, torch.zeros(3), 2)


# ---------------------------------------------------------------------- the limit


@pytest.mark.parametrize("factor", [0.97, 1.03])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 2.0},
        {"momentum": 0.9, "weight_decay": 1.0},
    ],
)
def test_descent_on_a_parabola_diverges_above_the_limit_alone(options: dict[str, Any], factor: float) -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, **options)
    limit = stability_limit(optimizer)
    assert limit is not None
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * factor * limit * weight.square()).sum().backward()
        optimizer.step()
        if not 1e-12 < float(weight.detach().abs()) < 1e12:
            break
    assert (float(weight.detach().abs()) > 1) == (factor > 1)


def test_others_have_no_limit() -> None:
    weight = nn.Parameter(torch.ones(1))
    assert stability_limit(torch.optim.AdamW([weight])) is None
    assert stability_limit(torch.optim.SGD([weight], lr=0.0)) is None


# ---------------------------------------------------------------------- the diagnostic


class Regression(LightningModule):
    """Half the squared error of a linear layer without bias: the Hessian is X^T X / N, whatever the weights are."""

    def __init__(self, lr: float = 0.1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIZE, 1, bias=False)
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.unused = nn.Linear(2, 2)
        self.lr, self.options = lr, options

    def example_losses(self, batch: Any) -> Tensor:
        return 0.5 * (self.layer(batch[0]).squeeze(1) - batch[1].float()).square()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.example_losses(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, **self.options)


class TwoLayers(LightningModule):
    """A small tanh network with dropout, of which the Hessian is taken without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.05)


def data(size: int = N, batch: int = 8) -> tuple[DataLoader[Any], Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(size, SIZE, generator=g) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.1])
    y = torch.arange(size) % 2
    return DataLoader(TensorDataset(x, y), batch_size=batch), x, y


def fit(module: Any, *callbacks: Any, loader: Any = None, **options: Any) -> Any:
    runner = trainer(*callbacks, **{"max_epochs": 2, **options})
    runner.fit(module, loader or data()[0])
    return runner


def points(watch: Sharpness, key: str) -> list[list[float]]:
    return watch.history[f"sharpness/{key}"]


@pytest.mark.parametrize("size", [N, 600])  # of one part, and of several
def test_linear_regression(size: int) -> None:
    loader, x, _ = data(size, size // 5)
    watch = Sharpness(share=None, examples=size, iterations=12)
    fit(Regression(0.05, momentum=0.5, weight_decay=0.25), watch, loader=loader)
    exact = torch.linalg.eigvalsh(x.double().T @ x.double() / size)
    assert [step for step, _ in points(watch, "top")] == watch.steps == sorted({0, 1, *watch.steps, 10})
    limit = 2 * 1.5 / 0.05 - 0.25
    for (_, top), (_, found_limit), (_, edge), (_, error) in zip(
        *(points(watch, k) for k in ("top", "limit", "edge", "error")), strict=True
    ):
        assert top == pytest.approx(float(exact[-1]), rel=1e-4)
        assert found_limit == pytest.approx(limit) and edge == pytest.approx(top / limit)
        assert error < 0.01 * top
    assert points(watch, "top_max")[-1][1] == pytest.approx(float(exact[-1]), rel=1e-4)


def test_two_layers_against_the_dense_hessian() -> None:
    """Before the first step and after the last one."""
    loader, x, y = data()
    module, watch = TwoLayers(), Sharpness(share=None, examples=N, iterations=60, every_n_steps=100)
    before = {name: value.detach().clone().double() for name, value in module.named_parameters()}
    fit(module, watch, loader=loader)
    after = {name: value.detach().double() for name, value in module.named_parameters()}
    assert watch.steps == [0, 10]
    copy = TwoLayers().double().eval()
    for (_, top), (_, lowest), weights in zip(
        points(watch, "top"), points(watch, "lowest"), (before, after), strict=True
    ):
        names, shapes = list(weights), [w.shape for w in weights.values()]

        def loss(flat: Tensor, names: Any = names, shapes: Any = shapes) -> Tensor:
            parts = flat.split([s.numel() for s in shapes])
            named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(copy, named, (x.double(),)), y)

        dense = torch.func.hessian(loss)(torch.cat([w.flatten() for w in weights.values()]))
        exact = torch.linalg.eigvalsh(dense)
        assert top == pytest.approx(float(exact[-1]), rel=1e-3)
        assert lowest == pytest.approx(float(exact[0]), rel=1e-2, abs=1e-4)
    assert "sharpness/limit" not in watch.history  # AdamW has none


def test_descent_settles_below_the_limit_and_explodes_above() -> None:
    """The number means what it says: edge < 1 converges, edge > 1 diverges."""
    loader, x, _ = data(N, N)
    top = float(torch.linalg.eigvalsh(x.T @ x / N)[-1])
    for factor in (0.95, 1.05):
        module, watch = Regression(factor * 2 / top), Sharpness(share=None, examples=N)
        fit(module, watch, loader=loader, max_epochs=200)
        assert points(watch, "edge")[0][1] == pytest.approx(factor, rel=1e-3)
        assert (float(module.layer.weight.detach().norm()) > 1e3) == (factor > 1)


def test_precision_of_the_products_is_float32_under_bf16() -> None:
    loader, x, _ = data()
    watch = Sharpness(share=None, examples=N, iterations=12)
    fit(Regression(), watch, loader=loader, precision="bf16-mixed")
    exact = torch.linalg.eigvalsh(x.double().T @ x.double() / N)
    assert points(watch, "top")[0][1] == pytest.approx(float(exact[-1]), rel=1e-4)


def test_the_picture_and_the_share(tmp_path: Path) -> None:
    watch = Sharpness(share=0.5, iterations=4, measurements=3)
    options: dict[str, Any] = {"logger": CSVLogger(tmp_path), "default_root_dir": tmp_path}
    fit(Regression(), watch, Report(), loader=data(400, 40)[0], **options)
    # 2 epochs of 400 examples, a step worth three passes of its examples, at 3 measurements of 4 products at 4 and 3
    assert len(watch._mine) == int(0.5 * 3 * 800 / (3 * 19))
    assert (tmp_path / "plots" / "sharpness.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    "options", [{"measurements": 2}, {"examples": 0}, {"iterations": 0}, {"every_n_steps": 0}, {"share": 0.0}]
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sharpness(**options)


def test_a_frozen_network_has_none() -> None:
    class Frozen(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ValueError, match="all are frozen"):
        fit(Frozen(), Sharpness(share=None))
