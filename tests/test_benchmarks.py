"""The benchmark runs and prints its table; what it measures takes minutes and is not judged here."""

from __future__ import annotations

import re

import pytest
import torch

from recipes.classifier import Classifier
from tests import benchmarks


def test_the_quick_benchmark_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["--quick"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 8
    for row in rows:
        assert all(0.1 < float(value) < 20 for value in re.findall(r"\d+\.\d+", row)), row


@pytest.mark.parametrize("learned", [True, False])
def test_the_published_arithmetic_is_that_of_ours(learned: bool) -> None:
    """What the times are compared with computes the same numbers."""
    from callbacks.statistics import adversarial_style, dsu

    x = torch.randn(4, 3, 5, 5)
    theta = torch.rand(2, 3)
    torch.manual_seed(5)
    theirs = benchmarks.published_shift(x, theta if learned else None)
    torch.manual_seed(5)
    e_std = torch.randn(4, 3, 1, 1)[..., 0, 0]
    e_mean = torch.randn(4, 3, 1, 1)[..., 0, 0]
    ours = adversarial_style(x, theta[0], theta[1], e_mean, e_std) if learned else dsu(x, e_mean, e_std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kept_memory_counts_a_storage_once() -> None:
    class Twice(Classifier):
        def loss(self, batch):  # type: ignore[no-untyped-def]
            y = batch["x"].exp()  # kept once for exp, and again for each product
            return (y * y * y).sum()

    module = Twice("resnet10t", num_classes=2, image_size=32, backbone_args={"channels": (8, 8, 8, 8), "stem_width": 8})
    x = torch.randn(1000, requires_grad=True)
    assert benchmarks.kept(module, {"x": x}) == 2 * 4000  # exp(x) and exp(x)^2
