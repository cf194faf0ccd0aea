"""The benchmark runs and prints its table; what it measures takes minutes and is not judged here."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from callbacks.style import adversarial_style, dsu, efdmix, mixstyle
from tests import benchmarks
from tests.laws.diagnostics import diagnostics


def test_the_quick_benchmark_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["--quick"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    heads = ("| step", "| --", "| CoPrompt's", "| pre-training", "| text classifier", "| diagnostic,")
    rows = [line for line in lines if not line.startswith(heads)]
    assert len(rows) == 8 + len(benchmarks.ADVERSARIAL) + 1 + 2 + 7 + 7 + len(diagnostics())
    for row in rows:
        assert all(0.02 < float(value) < 200 for value in re.findall(r"\d+\.\d+", row)), row


def test_the_quick_benchmark_of_ranks_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["scaling", "--quick"]) == 0
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| (coprompt|scalelong)", line)
    ]
    assert len(rows) == 2
    for _, step, ranks, trained, handed, sent in rows:
        assert float(step.removesuffix(" ms")) > 0 and 0.02 < float(ranks.removesuffix(" x")) < 200
        # DDP hands over each trained weight's gradient once, and of two ranks each sends half of it twice
        assert f"gradients {trained}," in f"{handed}," and float(sent.split()[0]) == pytest.approx(
            float(trained.split()[0]), rel=0.01
        )


def test_the_published_attention_is_that_of_ours() -> None:
    from tests.benchmark_skips import diffusion

    ours, theirs = (diffusion("small U-ViT", "cpu", published=published) for published in (False, True))
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 900.0])
    assert type(ours.backbone.mid_block.attn) is not type(theirs.backbone.mid_block.attn)
    torch.testing.assert_close(ours(x, time), theirs(x, time), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
def test_the_published_arithmetic_is_that_of_ours(learned: bool) -> None:
    """What the times are compared with computes the same numbers."""
    x = torch.randn(4, 3, 5, 5)
    theta = torch.rand(2, 3)
    torch.manual_seed(5)
    theirs = benchmarks.published_shift(x, theta if learned else None)
    torch.manual_seed(5)
    e_std = torch.randn(4, 3, 1, 1)[..., 0, 0]
    e_mean = torch.randn(4, 3, 1, 1)[..., 0, 0]
    ours = adversarial_style(x, theta[0], theta[1], e_mean, e_std) if learned else dsu(x, e_mean, e_std)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_published_mixtures_are_those_of_ours() -> None:
    x = torch.randn(4, 3, 5, 5)
    for published, ours in ((benchmarks.published_mixstyle, mixstyle), (benchmarks.published_efdmix, efdmix)):
        torch.manual_seed(5)
        theirs = published(x, None)
        torch.manual_seed(5)
        lam = torch.distributions.Beta(0.1, 0.1).sample((4, 1, 1, 1)).flatten()
        torch.testing.assert_close(ours(x, torch.randperm(4), lam), theirs, rtol=1e-4, atol=1e-5)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    """Floats of 4 bytes: 1000, 500 and 500 more; the first 500 go before 2000 come, so 3500 is the peak."""
    peaks, stood = [], [torch.ones(10_000)]
    for _ in range(3):
        peak = benchmarks.Peak()
        peak.start()
        stood.clear()  # what stood before doesn't count, nor what came in an earlier measurement
        first, second = torch.empty(1000), torch.empty(500)
        third = torch.empty(500)
        del second
        fourth = torch.empty(2000)
        del first
        stood.append(torch.empty(300))
        peaks.append(peak.stop())
        del third, fourth
        stood.append(torch.ones(10_000))
    assert peaks == [4 * 3500] * 3


@pytest.mark.parametrize("case", [c for c in benchmarks.ADVERSARIAL if not c.bf16], ids=lambda c: c.name)
def test_the_published_steps_train_as_ours_do(case: benchmarks.Case) -> None:
    """From one start, with crafting that can't differ (radius 0), ours and the published step give the same update."""
    torch.manual_seed(0)
    if case.objective is None:
        ours: Any = benchmarks.Classifier("cnn4", num_classes=10, image_size=32)
    else:
        ours = benchmarks.AdversarialTrainer("cnn4", num_classes=10, image_size=32, objective=case.objective, eps=0.0)
    theirs = copy.deepcopy(ours)
    for module in (ours, theirs):
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.0  # the published codes move them while they craft
    batch = {"image": torch.rand(6, 3, 32, 32), "label": torch.arange(6)}
    optimizers = [benchmarks.plain_optimizer(module) for module in (ours, theirs)]
    benchmarks.step(ours, optimizers[0], dict(batch), case.make(ours))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EPS", "ALPHA", "RADIUS", "SIZE", "NOISE"):
            patch.setattr(benchmarks, name, 0.0)
        case.published(theirs, optimizers[1], batch)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
