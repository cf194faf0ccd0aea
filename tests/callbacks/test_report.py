"""The pictures of a run: which are written, when, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from callbacks.perturbation import Batch, Perturbation
from callbacks.report import Report, _titles, draw_curves, draw_inputs, draw_mistakes, draw_test
from callbacks.style import DSU
from tests.laws import cells


class Darken(Perturbation):
    """Makes the images black."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["image"] = torch.zeros_like(batch["image"])


def fit(folder: Path, *callbacks: Any, **options: Any) -> Report:
    report = Report()
    module = cells.recipe("classifier", class_names=["a", "b", "c"], domain_names=["all"])
    runner = cells.trainer(report, *callbacks, max_epochs=2, default_root_dir=folder, **options)
    runner.fit(module, datamodule=cells.Images())
    runner.test(module, datamodule=cells.Images(), verbose=False)
    return report


def test_a_run_leaves_its_pictures(tmp_path: Path) -> None:
    fit(tmp_path, DSU())
    assert sorted(f.name for f in (tmp_path / "plots").iterdir()) == ["curves.png", "inputs.png", "test.png"]
    for file in (tmp_path / "plots").iterdir():
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, file.name


def test_what_the_step_saw_stands_below_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[torch.Tensor, torch.Tensor, list[str]]] = []
    monkeypatch.setattr("callbacks.report.draw_inputs", lambda *a: drawn.append(a) or draw_inputs(*a))
    fit(tmp_path, Darken())
    fit(tmp_path, DSU())
    (clean, seen, titles), (same, as_is, _) = drawn
    assert clean.shape == (4, 32, 32, 3) and clean.mean() > 0.2 and not seen.any()
    assert torch.equal(same, as_is)  # features are perturbed, not the input
    order = cells.Images().train_dataloader()
    first = next(iter(order))
    torch.testing.assert_close(clean, first["image"].permute(0, 2, 3, 1))
    assert titles == [f"{'abc'[label]}\nall" for label in first["label"]]


def test_a_dry_run_and_other_ranks_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "plots").exists()
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(tmp_path, logger=False)
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("first", [True, False])
def test_every_rank_reads_the_metrics(first: bool) -> None:
    """Reading reduces those that are synced: a rank that doesn't leaves the others waiting in a collective."""
    reads = []

    class Rank:
        is_global_zero, fast_dev_run, current_epoch = first, False, 2

        @property
        def callback_metrics(self) -> dict[str, torch.Tensor]:
            reads.append(first)
            return {"val/acc": torch.tensor(0.5)}

    report = Report()
    report.on_train_epoch_end(Rank(), LightningModule())  # type: ignore[arg-type]  # what it asks of a trainer
    assert reads == [first]
    assert report.state_dict()["history"] == ({"val/acc": [[3, 0.5]]} if first else {})


def test_pictures_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, list[Any]]] = []

    class Fake(WandbLogger):
        def __init__(self) -> None:
            """No run of W&B is wanted."""

        experiment = name = version = save_dir = None  # type: ignore[assignment]

        def log_metrics(self, *a: Any, **k: Any) -> None: ...
        def log_hyperparams(self, *a: Any, **k: Any) -> None: ...
        def log_graph(self, *a: Any, **k: Any) -> None: ...
        def finalize(self, *a: Any) -> None: ...
        def save(self) -> None: ...
        def after_save_checkpoint(self, *a: Any) -> None: ...
        def log_image(self, key: str, images: list[Any], *a: Any, **k: Any) -> None:
            logged.append((key, images))

    fit(tmp_path, logger=Fake())
    assert [key for key, _ in logged] == ["plots/inputs", "plots/curves", "plots/test"]
    assert all(Path(file).is_file() for _, images in logged for file in images)


def test_curves_go_on_after_a_resume(tmp_path: Path) -> None:
    first = fit(tmp_path)
    again = Report()
    again.load_state_dict(first.state_dict())
    module = cells.recipe("classifier")
    runner = cells.trainer(again, max_epochs=1, default_root_dir=tmp_path)
    runner.fit(module, datamodule=cells.Images())
    assert len(again._history["val/acc"]) == 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 12, 30])
def test_any_number_of_images(channels: int, count: int, tmp_path: Path) -> None:
    clean = torch.rand(count, 8, 8, channels).expand(-1, -1, -1, 3)
    draw_inputs(clean, 1 - clean, ["class\ndomain"] * count).savefig(tmp_path / "x.png")


def test_long_names_do_not_run_into_each_other(tmp_path: Path) -> None:
    module = cells.recipe(
        "classifier", class_names=["x" * 40, "y" * 16, "z"], domain_names=["a_very_long_name_of_a_domain"]
    )
    batch = {"label": torch.tensor([0, 1, 2] * 4), "domain": torch.zeros(12, dtype=torch.int64)}
    titles = _titles(module, batch, 12)
    assert titles[:3] == [f"{name}\na_very_long_nam…" for name in ("x" * 15 + "…", "y" * 16, "z")]
    figure = draw_inputs(torch.rand(12, 8, 8, 3), torch.rand(12, 8, 8, 3), titles)
    figure.savefig(tmp_path / "x.png")
    boxes = [axis.title.get_window_extent() for axis in figure.axes[:12]]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(("domains", "classes"), [(1, 2), (5, 17), (2, 345)])
def test_any_number_of_classes(domains: int, classes: int, tmp_path: Path) -> None:
    confusion = torch.randint(0, 5, (domains, classes, classes))
    confusion[0] = 0  # a domain without images
    if domains == 1:
        confusion[0, 0, 0] = 3
    names = [f"domain {i}" for i in range(domains)], [f"class {i}" for i in range(classes)]
    figure = draw_test(confusion, *names)
    figure.savefig(tmp_path / "x.png")
    bars = figure.axes[0].patches
    shown = [float(c.diagonal().sum() / c.sum()) for c in confusion if c.sum() > 0]
    assert [bar.get_width() for bar in bars] == pytest.approx(shown)
    matrix = np.asarray(figure.axes[1].images[0].get_array())
    total = confusion.sum(0).double().numpy()
    np.testing.assert_allclose(matrix, total / np.maximum(total.sum(1, keepdims=True), 1))
    assert len(figure.axes[1].get_xticklabels()) == classes or classes > 40


def test_values_that_are_not_finite_are_drawn_around(tmp_path: Path) -> None:
    draw_curves({"train/loss": [[1, 2.0], [2, float("nan")]], "val/acc": [[1, 0.5]]}).savefig(tmp_path / "x.png")


def test_a_batch_without_images_draws_none(tmp_path: Path) -> None:
    report = Report()
    module = cells.recipe("classifier")
    runner = cells.trainer(report, default_root_dir=tmp_path)
    runner.strategy.connect(module)
    for batch in ({"text": ["x"]}, {"image": torch.zeros(2, 5, 4, 4)}, [torch.zeros(2)]):
        report.on_train_batch_start(runner, module, batch, 0)
        assert report._clean is None


def test_settings() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Report(images=0)


@pytest.mark.parametrize("count", [1, 9, 40])
def test_mistakes_are_drawn_the_surest_first(count: int, tmp_path: Path) -> None:
    mistakes = {i: (0.5 + i / 100, 0, torch.rand(3 if i % 2 else 1, 8, 8)) for i in range(count)}
    figure = draw_mistakes(mistakes, ["a class with a very long name"])
    figure.savefig(tmp_path / "mistakes.png")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == min(count, 32) and titles[0].endswith(f"{0.5 + (count - 1) / 100:.2f}")
    assert all("→ a class with a …" in title for title in titles)


def test_cosines_have_a_panel_of_their_own() -> None:
    history = {n: [[1.0, 0.5], [2.0, 0.6]] for n in ("train/loss", "val/acc", "val/cos_text_novel")}
    panels = [[line.get_label() for line in axis.get_lines()] for axis in draw_curves(history).axes]
    assert panels == [["train/loss"], ["val/acc"], ["val/cos_text_novel"]]
