"""``predict --images FOLDER``: a table of the user's own images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes._cli import run

MODEL = "recipes.adversarial_training.module.AdversarialTrainer"
SMALL = ("--model.backbone", "cnn4", "--model.backbone_args", "{width: 4}", "--wandb", "off")


def call(verb: str, root: Path, *words: str, model: str = MODEL, name: str = "adversarial_training") -> int:
    return run(model, name, [verb, *SMALL, "--trainer.default_root_dir", str(root), *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    short = ("--trainer.max_epochs", "3", "--model.lr", "0.2", "--trainer.callbacks", "[]")
    more = ("--test_after_fit", "false", "--model.eps", "0.02", "--checkpoint.monitor", "val/acc")
    assert call("fit", root, *short, *more) == 0
    return root


def test_a_best_checkpoint_that_nothing_measures_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("fit", tmp_path, "--trainer.callbacks", "[]") == 2
    said = capsys.readouterr().err
    assert "add --trainer.callbacks+=RobustAccuracy, or choose by --checkpoint.monitor val/acc" in said


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for name, shape in (("b.png", (20, 30, 3)), ("a.JPG", (16, 16, 3)), ("below/c.webp", (9, 9)), ("d.gif", (12, 8))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name, "jpeg" if name[0] == "a" else None)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_of_images_becomes_a_table(trained: Path, pictures: Path) -> None:
    assert call("predict", trained, "--ckpt_path", "last", "--images", str(pictures)) == 0
    (file,) = trained.glob("adversarial_training/*/predictions.csv")
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [Path(row["file"]).relative_to(pictures).as_posix() for row in rows] == [
        "a.JPG",
        "b.png",
        "below/c.webp",
        "d.gif",
    ]
    assert all(row["class"] in "0123456789" and 0.1 <= float(row["confidence"]) <= 1 for row in rows)
    assert {row["holds"] for row in rows} <= {"yes", "no"} and list(rows[0]) == ["file", "class", "confidence", "holds"]
    assert not list(file.parent.glob("*.pt"))
    assert call("predict", trained, "--ckpt_path", "last", "--images", str(pictures), "--model.eps", "1.0") == 0
    newest = max(trained.glob("adversarial_training/*/predictions.csv"), key=lambda f: f.stat().st_mtime)
    with newest.open(newline="") as opened:
        assert [row["holds"] for row in csv.DictReader(opened)].count("no") >= 3, "a radius at which nothing holds"


def test_a_classifier_has_no_holds(trained: Path, pictures: Path, tmp_path: Path) -> None:
    model = "recipes.classifier.module.Classifier"
    words = ("--images", str(pictures), "--data", "Digits")
    assert call("predict", tmp_path, *words, model=model, name="classifier") == 0
    (file,) = tmp_path.glob("classifier/*/predictions.csv")
    assert file.read_text().splitlines()[0] == "file,class,confidence"


@pytest.mark.parametrize(("folder", "words"), [("nowhere", "there is no folder"), ("empty", "there is no image in")])
def test_folders_without_images_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert call("predict", trained, "--ckpt_path", "last", "--images", str(tmp_path / folder)) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_a_broken_image_is_named(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "broken.png").write_bytes(b"nothing")
    assert call("predict", trained, "--ckpt_path", "last", "--images", str(pictures)) == 2
    assert "broken.png can't be read as an image" in capsys.readouterr().err
