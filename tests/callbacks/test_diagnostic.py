"""What diagnostics share: when they look, at which examples, where their numbers and pictures go."""

from __future__ import annotations

import base64
import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from callbacks.diagnostic import (
    CACHED,
    SMALL,
    SWEEP,
    Diagnostic,
    gathered,
    inner,
    label_of,
    log_steps,
    logits_of,
    losses_of,
    squared_length,
    take,
)
from callbacks.perturbation import Batch, Perturbation
from callbacks.report import Report, new_figure
from recipes._loggers import MetricsCSV
from tests.laws import cells
from tests.laws.diagnostics import Own, own_data


class Labels(Diagnostic):
    """The mean label and brightness of eight training examples."""

    def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
        return [0, 3]

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        (batch,) = self.examples(trainer, "train", self.positions(trainer, "train", 8))
        label, image = label_of(batch), batch["image"] if isinstance(batch, dict) else batch[0]
        self.seen = image
        return {"label": float(label.float().mean()), "bright": float(image.mean())}

    def conclude(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        points = self.history[f"{self.name}/bright"]
        return {"change": points[-1][1] - points[0][1]}

    def draw(self) -> Any:
        figure = new_figure(3, 2)
        figure.subplots().plot(*zip(*self.history[f"{self.name}/label"], strict=True))
        return figure


@given(st.integers(3, 60), st.integers(0, 10**6))
def test_steps_are_few_and_even_in_the_logarithm(count: int, total: int) -> None:
    steps = log_steps(count, total)
    assert steps == sorted(set(steps)) and len(steps) <= count + 1
    assert steps[0] == 0 and steps[-1] == total and (total == 0 or 1 in steps)
    ratio = max(total, 1) ** (1 / (count - 2))
    for before, after in zip(steps[1:], steps[2:], strict=False):
        assert after <= (before + 0.5) * ratio + 0.51


def test_numbers_go_to_the_csv_and_pictures_onto_one_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = MetricsCSV(tmp_path)
    looks = [Labels(), Labels(name="again")]
    runner = cells.trainer(Report(), *looks, max_epochs=2, logger=logger, default_root_dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="callbacks.diagnostic"):
        runner.fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    logger.save()
    assert looks[0].steps == [0, 3, 6]  # the last step, too
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    step, value = rows[0].index("step"), rows[0].index("labels/label")
    found = {int(row[step]): float(row[value]) for row in rows[1:] if row[value]}
    assert list(found) == [-1, 2, 5]  # counted as Lightning does: what is after three steps is number 2
    assert all(v == looks[0].history["labels/label"][0][1] for v in found.values())
    assert looks[0].history["labels/change"] == [[6, 0.0]]
    page = (tmp_path / "plots" / "diagnostics.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2 and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert "again/label" in page and (tmp_path / "plots" / "labels.png").is_file()
    assert re.search(r"labels: 3 measurements, [\d.]+ s, [\d.]+ % of the training's own time", caplog.text)


def test_examples_are_plain_fixed_and_of_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(run: int, **more: Any) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(run))
        labels, data = Labels(**more), cells.data("classifier")
        cells.trainer(labels).fit(cells.recipe("classifier"), datamodule=data)
        whole = data.part("train").plain(range(len(data.part("train"))))["image"]  # type: ignore[attr-defined]
        assert all(any(torch.equal(a, b) for b in whole) for a in labels.seen)
        return labels.seen

    assert torch.equal(seen(1), seen(1)) and not torch.equal(seen(1), seen(2))
    assert torch.equal(seen(1, seed=7), seen(2, seed=7))


def test_training_data_are_seen_as_techniques_change_them() -> None:
    class AllOnes(Perturbation):
        site = "data"

        def as_trained(self, module: LightningModule, batch: Batch) -> None:
            batch["label"] = torch.ones_like(batch["label"])

        def perturb(self, module: LightningModule, batch: Batch) -> None:
            self.as_trained(module, batch)

    labels = Labels()
    cells.trainer(AllOnes(), labels).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    assert [v for _, v in labels.history["labels/label"]] == [1.0, 1.0]


def test_a_users_loaders_are_read_and_what_cant_be_is_said() -> None:
    labels = Labels()
    cells.trainer(labels).fit(Own(), own_data(1), own_data(2))
    assert len(labels.seen) == 8 and labels.history["labels/label"]

    class Endless(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(3, 32, 32), 0

    with pytest.raises(ValueError, match="dataset with a length"):
        cells.trainer(Labels(), max_steps=2).fit(Own(), DataLoader(Endless(), 4), own_data(2))


def test_logits_and_losses_of_batches_of_both_kinds() -> None:
    module = Own().eval()
    image, label = next(iter(own_data(2)))
    as_dict = {"image": image, "label": label}
    assert torch.equal(logits_of(module, as_dict), logits_of(module, (image, label)))
    wanted = -logits_of(module, as_dict).log_softmax(1)[torch.arange(4), label]
    torch.testing.assert_close(losses_of(module, as_dict), wanted)
    with pytest.raises(ValueError, match="whole numbers as labels"):
        label_of({"image": image})
    with pytest.raises(ValueError, match="needs logits"):
        logits_of(torch.nn.Identity(), as_dict)


def test_a_users_random_data_are_drawn_alike_each_time() -> None:
    class Noisy(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> Any:
            return torch.rand(3, 32, 32) + random.random() + np.random.rand(), i % 3

    labels = Labels()
    cells.trainer(labels, max_epochs=2).fit(Own(), DataLoader(Noisy(), 4), own_data(2))
    assert len({value for _, value in labels.history["labels/bright"]}) == 1
    before = torch.get_rng_state()
    first, second = (take(Noisy(), None, positions)[0] for positions in ([3, 4], [4]))
    assert torch.equal(first[1], second[0]), "what is drawn depends on the examples beside it"
    assert torch.equal(before, torch.get_rng_state())


def test_unlabelled_examples_are_left_out_where_others_have_labels() -> None:
    runner, labels = _fitted(cells.data("classifier")), Labels()
    entries = runner.datamodule.part("train").entries  # type: ignore[attr-defined]
    everything = labels.positions(runner, "train", 12)
    assert sorted(everything) == list(range(12))
    entries["label"][[0, 2, 5, 7]] = -1
    assert labels.positions(runner, "train", 12) == [i for i in everything if i not in (0, 2, 5, 7)]
    entries["label"][:] = -1
    assert labels.positions(runner, "train", 12) == everything, "where none is labelled, labels aren't what is wanted"


def _fitted(data: Any) -> Trainer:
    runner = cells.trainer()
    runner.fit(cells.recipe("classifier"), datamodule=data)
    return runner


def test_losses_of_one_logit_and_of_unlabelled_examples() -> None:
    class Two(torch.nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.outputs = outputs

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, : self.outputs]

    image, label = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 1, 0, 1])
    z = image.flatten(1)[:, 0]
    wanted = torch.where(label == 1, -z.sigmoid().log(), -(1 - z.sigmoid()).log())
    torch.testing.assert_close(losses_of(Two(1), (image, label)), wanted)
    with pytest.raises(ValueError, match="some of these have no label"):
        losses_of(Two(3), (image, torch.tensor([0, 1, -1, 0, 1])))
    for bad in ([image], (image, label.float()), {"image": image, "label": label.float()}):
        with pytest.raises(ValueError, match="whole numbers as labels"):
            losses_of(Two(3), bad)


@pytest.mark.parametrize("counts", [(3, 3), (4, 3), (5, 1), (1, 4), (0, 2)])
def test_rows_of_ranks_with_different_numbers_are_all_gathered(
    counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's part, with what the other rank would send."""
    own = [torch.arange(c * 2.0).view(c, 2) + 100 * r for r, c in enumerate(counts)]
    most = max(counts)
    padded = [torch.cat([rows, torch.zeros(most - len(rows), 2)]) for rows in own]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.copy_(torch.tensor(counts)))
    monkeypatch.setattr(
        dist, "all_gather", lambda parts, mine: [p.copy_(q) for p, q in zip(parts, padded, strict=True)]
    )
    wanted = [own[r][i] for i in range(most) for r in range(2) if i < counts[r]]
    assert torch.equal(gathered(own[0], torch.device("cpu")), torch.stack(wanted))


def test_large_examples_pass_in_the_training_batches_size() -> None:
    runner, labels = _fitted(cells.data("classifier")), Labels()
    assert labels.chunk(runner, "train") == 256  # 3,072 numbers each
    labels._elements = 3 * 224 * 224
    assert labels.chunk(runner, "train") == 6 and 6 * labels._elements <= SMALL
    labels._elements = 10**7
    assert labels.chunk(runner, "train") == cells.BATCH


def test_where_few_examples_cost_too_much_it_looks_less_often(caplog: pytest.LogCaptureFixture) -> None:
    """12 examples of a step of 4, 2 epochs: 6 steps, 72 passes; half of them pay 36 passes, 3 looks at 12 examples."""

    class Often(Labels):
        def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
            return list(range(7))

        def prepare(self, trainer: Trainer, module: LightningModule) -> None:
            self.count = self.affordable(trainer, 12, 1)

    often = Often(share=0.5)
    with caplog.at_level(logging.INFO, logger="callbacks.diagnostic"):
        cells.trainer(often, max_epochs=2).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    assert often.steps == [0, 3, 6] and often.count == 12
    assert "often: 3 of 7 measurements, at 12 examples" in caplog.text
    dear = Often(share=0.01)
    cells.trainer(dear, max_epochs=2).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    assert dear.steps == [0, 6] and dear.count == 12


def test_a_run_that_goes_on_keeps_its_examples_however_long_it_is_now(tmp_path: Path) -> None:
    class Some(Labels):
        def prepare(self, trainer: Trainer, module: LightningModule) -> None:
            self.count = self.affordable(trainer, 1000, 1)

    first, longer, afresh = Some(share=2.0), Some(share=2.0), Some(share=2.0)
    runner = cells.trainer(first, max_epochs=1)
    runner.fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    for diagnostic, file in ((longer, tmp_path / "a.ckpt"), (afresh, None)):
        runner = cells.trainer(diagnostic, max_epochs=2)
        runner.fit(cells.recipe("classifier"), datamodule=cells.data("classifier"), ckpt_path=file)
    assert longer.count == first.count == 36 and afresh.count == 72


class Wide(LightningModule):
    """Two layers on images of 32 x 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(3072, width), torch.nn.Linear(width, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(image.flatten(1)))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return losses_of(self, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("width", [40, 200])
def test_vectors_as_long_as_the_weights_count_unless_they_stay_in_the_cache(width: int) -> None:
    class Sweeps(Labels):
        def prepare(self, trainer: Trainer, module: LightningModule) -> None:
            self.sweeps = self.sweep(trainer)
            self.plain = self.affordable(trainer, 12, 1)
            self.afforded = None
            self.count = self.affordable(trainer, 12, 1, 0.01)
            self.left = len(self._planned)

    torch.manual_seed(0)
    looks, module = Sweeps(share=1.5), Wide(width)
    cells.trainer(looks, max_epochs=2).fit(module, datamodule=cells.data("classifier"))
    number = sum(p.numel() for p in module.parameters())
    operations = 2 * (3072 * width + 3 * width)  # a product and a sum for each weight of a layer
    wanted = SWEEP * max(number - CACHED, 0) / operations
    assert looks.sweeps == pytest.approx(wanted) and (wanted > 10) == (width == 200)
    # 6 steps of 4 examples pay 1.5 * 3 * 24 passes for the two looks
    assert looks.plain == 12 and looks.count == 12 and looks.left == 2

    class Dear(Sweeps):
        def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
            return list(range(7))

        def prepare(self, trainer: Trainer, module: LightningModule) -> None:
            self.count = self.affordable(trainer, 12, 1, 1.0)

    dear = Dear(share=3.0)  # 216 passes: 12 of examples and a sweep at each look
    torch.manual_seed(0)
    other = Wide(width)
    cells.trainer(dear, max_epochs=2).fit(other, datamodule=cells.data("classifier"))
    assert len(dear.steps) == (7 if width == 40 else int(216 / (12 + wanted)))
    # counting operations leaves no trace
    torch.manual_seed(0)
    bare = Wide(width)
    cells.trainer(max_epochs=2).fit(bare, datamodule=cells.data("classifier"))
    for weight, own, its in zip(bare.parameters(), other.parameters(), module.parameters(), strict=True):
        assert torch.equal(weight, own) and torch.equal(weight, its)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    assert not torch.nn.modules.module._global_forward_hooks


@given(st.integers(1, 3), st.integers(1, 2 * CACHED), st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_long_vectors_are_summed_in_float64(rows: int, length: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, length, generator=g), torch.randn(rows, length, generator=g)
    assert inner(a, b) == pytest.approx(float((a.double() * b.double()).sum()), rel=1e-9, abs=1e-6)
    assert float(squared_length(a)) == pytest.approx(float(a.double().square().sum()), rel=1e-12)
    assert squared_length(a).dtype == torch.float64
