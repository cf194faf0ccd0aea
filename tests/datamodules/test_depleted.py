"""Depleted points, parity of digits, and batches that are drawn anew at each step."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from datamodules.depleted import Depleted, depleted_sign
from datamodules.digits import Digits
from datamodules.parity import DigitsParity
from datamodules.sampling import ReplacementSampler


def draws(sampler: ReplacementSampler) -> list[list[int]]:
    return [[draw.position for draw in batch] for batch in sampler]


# ---------------------------------------------------------------------- points


@pytest.mark.parametrize("chi", [0.0, 1.0, 3.0, -0.5])
def test_the_first_coordinate_has_the_density_and_gives_the_label(chi: float) -> None:
    x, label = depleted_sign(20_000, 3, chi, np.random.default_rng(0))
    assert x.shape == (20_000, 3) and x.dtype == torch.float32
    assert torch.equal(label, (x[:, 0] > 0).long())
    assert abs(float(label.float().mean()) - 0.5) < 0.02

    def cdf(t: np.ndarray) -> np.ndarray:
        """Of |x_1|, by integrating the density."""
        grid = np.geomspace(1e-12, 8, 400_001)
        density = grid**chi * np.exp(-(grid**2) / 2)
        area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
        return np.interp(t, grid, area / area[-1])

    assert stats.kstest(x[:, 0].abs().numpy(), cdf).statistic < 0.02
    for column in (1, 2):
        assert stats.kstest(x[:, column].numpy(), "norm").statistic < 0.02
    assert abs(float((x[:, 0] * x[:, 1]).mean())) < 0.05 * math.sqrt(chi + 1)


def test_parts_and_seeds_have_points_of_their_own() -> None:
    def points(part: str, seed: int) -> torch.Tensor:
        return Depleted(d=4, size=50, val_size=50, test_size=50, seed=seed).load(part).input  # type: ignore[arg-type]

    assert torch.equal(points("train", 3), points("train", 3))
    others = [points("val", 3), points("test", 3), points("train", 4)]
    assert not any(torch.equal(points("train", 3), other) for other in others)


def test_batches_have_what_a_recipe_needs() -> None:
    data = Depleted(d=5, size=7, batch_size=2, epoch_steps=9, seed=0)
    loader = data.train_dataloader()
    assert len(loader) == 9
    batch = next(iter(loader))
    assert {name: tuple(v.shape) for name, v in batch.items()} == {
        "input": (2, 5), **dict.fromkeys(("label", "domain", "index"), (2,))
    }  # fmt: skip
    whole = data.part("train")
    assert torch.equal(whole.plain(batch["index"].tolist())["input"], batch["input"])
    assert torch.equal(whole[3]["input"], whole.input[3])
    assert sum(len(b["label"]) for b in data.val_dataloader()) == 2000
    assert (data.in_chans, data.image_size, data.num_classes) == (5, 1, 2)


@pytest.mark.parametrize("wrong", [{"chi": -1.0}, {"d": 0}, {"size": 0}, {"epoch_steps": 0}, {"test_size": 0}])
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be above -1"):
        Depleted(**wrong)
    with pytest.raises(ValueError, match="don't fill one step"):
        Depleted(size=3, batch_size=4).train_dataloader()


def test_parity_is_that_of_the_digits() -> None:
    data, digits = DigitsParity(seed=0), Digits(image_size=8, seed=0)
    for part in ("train", "val", "test"):
        mine, theirs = data.load(part), digits.load(part)  # type: ignore[arg-type]
        assert torch.equal(mine.entries["label"], theirs.entries["label"] % 2)
        assert torch.equal(mine.images, theirs.images)
    assert data.num_classes == 2 and data.class_names == ["even", "odd"]


def test_fewer_digits_are_drawn_by_the_seed() -> None:
    few = [DigitsParity(size=100, seed=seed).load("train") for seed in (1, 1, 2)]
    assert [len(f) for f in few] == [100] * 3
    assert torch.equal(few[0].images, few[1].images) and not torch.equal(few[0].images, few[2].images)
    assert len(DigitsParity(size=100, seed=1).load("val")) == 179
    with pytest.raises(ValueError, match="there are 1259 training images"):
        DigitsParity(size=2000).load("train")
    with pytest.raises(ValueError, match="at least 1"):
        DigitsParity(size=0)


# ---------------------------------------------------------------------- draws


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(4, 30),
    batch=st.integers(1, 2),
    world=st.integers(1, 2),
    steps=st.integers(1, 12),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_ranks_share_the_batch_of_one_process(
    size: int, batch: int, world: int, steps: int, epoch: int, seed: int
) -> None:
    ranks = [ReplacementSampler(size, batch, seed, steps, rank=r, world=world) for r in range(world)]
    whole = ReplacementSampler(size, batch * world, seed, steps, rank=0, world=1)
    for sampler in (*ranks, whole):
        sampler.set_epoch(epoch)
    one, parts = draws(whole), [draws(sampler) for sampler in ranks]
    assert len(one) == len(whole) == steps
    for step, drawn in enumerate(one):
        assert len(set(drawn)) == len(drawn) == batch * world and set(drawn) <= set(range(size))
        assert [parts[i % world][step][i // world] for i in range(len(drawn))] == drawn


def test_each_step_draws_from_all() -> None:
    """In an epoch without replacement, eight examples in steps of four are all seen in two steps: here as by chance."""
    sampler = ReplacementSampler(8, 4, seed=1, steps=4000, rank=0, world=1)
    found = draws(sampler)
    counts = Counter(i for batch in found for i in batch)
    assert stats.chisquare([counts[i] for i in range(8)]).pvalue > 1e-4
    shared = Counter(len(set(a) & set(b)) for a, b in zip(found[::2], found[1::2], strict=True))
    expected = [2000 * stats.hypergeom(8, 4, 4).pmf(k) for k in range(5)]
    assert stats.chisquare([shared[k] for k in range(5)], expected).pvalue > 1e-4
    sampler.set_epoch(1)
    assert draws(sampler) != found


def test_an_epoch_goes_on_where_it_stopped() -> None:
    whole = draws(ReplacementSampler(9, 2, 3, 10, rank=1, world=2))
    sampler = ReplacementSampler(9, 2, 3, 10, rank=1, world=2)
    sampler.consumed = 6 * 4
    assert draws(sampler) == whole[6:]
    assert draws(sampler) == whole, "skipped once"


def test_an_epoch_is_as_long_as_the_set_unless_told() -> None:
    assert len(ReplacementSampler(11, 2, rank=0, world=1)) == 5
    with pytest.raises(ValueError, match="at least one step"):
        ReplacementSampler(11, 2, steps=0, rank=0, world=1)


def test_batches_can_be_replayed() -> None:
    sampler = ReplacementSampler(9, 2, 0, 3, rank=0, world=1, replays=2)
    found = draws(sampler)
    assert len(sampler) == 6 and found[::2] == found[1::2]
