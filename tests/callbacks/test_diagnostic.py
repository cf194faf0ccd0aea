"""What diagnostics share: when they look, at which examples, where their numbers and pictures go."""

from __future__ import annotations

import base64
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from callbacks.diagnostic import Diagnostic, label_of, log_steps, logits_of, losses_of
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
