"""Label noise: who gets which label, and that training and diagnostics see the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from callbacks.diagnostic import Diagnostic
from callbacks.label_noise import LabelNoise, hashed, noisy_labels
from tests.callbacks.small import Net, images, trainer
from tests.laws import cells

MASK = 2**64 - 1


def splitmix(index: int, seed: int) -> int:
    """SplitMix64 in plain integers: the number at place ``index`` of a stream, its upper 31 bits."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) >> 33


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**63 - 1))
def test_the_hash_is_splitmix(index: int, seed: int) -> None:
    assert int(hashed(torch.tensor([index]), seed)) == splitmix(index, seed)


def test_the_hash_gives_the_published_numbers() -> None:
    # the first outputs of the reference implementation for seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hashed(torch.arange(3), 1234567).tolist() == [number >> 33 for number in published]


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(2, 12), st.integers(0, 2**31))
def test_a_share_is_redrawn_uniformly(p: float, classes: int, seed: int) -> None:
    n = 20_000
    index, label = torch.arange(n), torch.zeros(n, dtype=torch.long)
    found = noisy_labels(label, index, p, classes, seed)
    wanted = p * (1 - 1 / classes)
    assert abs(float((found != 0).double().mean()) - wanted) < 5 * (0.25 / n) ** 0.5
    counts = torch.bincount(found, minlength=classes)
    assert len(counts) == classes
    slack = 5 * (n * p / classes) ** 0.5 + 1
    assert all(abs(int(c) - n * p / classes) < slack for c in counts[1:])


def test_it_depends_on_index_and_seed_alone() -> None:
    index = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    label = index % 7
    whole = noisy_labels(label, index, 0.5, 7, 3)
    parts = [noisy_labels(label[i::2], index[i::2], 0.5, 7, 3) for i in range(2)]
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])
    other = noisy_labels(label, index, 0.5, 7, 4)
    assert 0.4 < float((whole != other).double().mean()) < 0.9
    # a label that is redrawn at p is redrawn to the same at a larger one: studies over p are nested
    more = noisy_labels(label, index, 0.8, 7, 3)
    changed = whole != label
    assert torch.equal(more[changed], whole[changed])


def test_unknown_labels_stay_and_the_dtype_too() -> None:
    label = torch.tensor([-1, 2, -1, 3], dtype=torch.int32)
    found = noisy_labels(label, torch.arange(4), 1.0, 5, 0)
    assert found.dtype == torch.int32 and found[[0, 2]].tolist() == [-1, -1]


class Seen(Diagnostic):
    """Notes the labels that training saw and those that a diagnostic sees, by index."""

    def __init__(self, **options: Any) -> None:
        super().__init__(share=None, **options)
        self.trained: dict[int, set[int]] = {}
        self.looked: dict[str, dict[int, int]] = {"train": {}, "val": {}}

    def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
        return []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        for i, y in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
            self.trained.setdefault(i, set()).add(y)

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        for part, seen in self.looked.items():
            for batch in self.examples(trainer, part, range(12)):
                seen |= dict(zip(batch["index"].tolist(), batch["label"].tolist(), strict=True))
        return {}


def test_diagnostics_see_what_training_saw() -> None:
    seen, data = Seen(), cells.Images()
    cells.trainer(LabelNoise(1.0, seed=3), seen, max_epochs=3).fit(cells.recipe("classifier"), datamodule=data)
    assert seen.trained == {i: {y} for i, y in seen.looked["train"].items()} and len(seen.trained) == 12
    clean = {i: int(y) for i, y in enumerate(data.part("train").entries["label"])}
    assert seen.looked["train"] != clean
    assert seen.looked["val"] == {i: int(y) for i, y in enumerate(data.part("val").entries["label"])}
    wanted = noisy_labels(torch.tensor([clean[i] for i in range(12)]), torch.arange(12), 1.0, 3, _seed(3))
    assert [seen.looked["train"][i] for i in range(12)] == wanted.tolist()


def _seed(seed: int) -> int:
    from callbacks.perturbation import fold_seed

    return fold_seed(seed, "label_noise")


def test_the_number_of_classes_is_the_datas_the_modules_or_given() -> None:
    net = cells.recipe("classifier")
    for technique, classes in ((LabelNoise(), 3), (LabelNoise(num_classes=2), 2)):
        cells.trainer(technique).fit(net, datamodule=cells.Images())
        found = technique.labels(torch.zeros(999, dtype=torch.long), torch.arange(999))
        assert int(found.max()) == classes - 1
    with pytest.raises(ValueError, match="give num_classes"):
        trainer(LabelNoise()).fit(Net(), images())


def test_what_it_cannot_work_on_it_says() -> None:
    for settings_ in ({"p": -0.1}, {"p": 1.1}, {"p": float("nan")}, {"num_classes": 1}):
        with pytest.raises(ValueError, match="must"):
            LabelNoise(**settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'label' and 'index'"):
        trainer(LabelNoise(num_classes=2)).fit(Net(), images())  # these batches have no index
