"""Text recipes by their command: a run's folder, a checkpoint's own words, predictions, what bad input gets."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.text import Mails
from recipes._cli import run
from recipes.attention_at import AttentionClassifier
from tests.laws import cells
from tests.laws.cells import VOCABULARY, Words

MODEL = "recipes.attention_at.module.AttentionClassifier"
SMALL = ["--model.hidden", "8", "--model.embedding_dim", "8", "--data.max_tokens", "30", "--trainer.max_epochs", "1"]
SMALL += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "2"]


def command(folder: Path, verb: str, *words: str) -> int:
    common = ["--trainer.default_root_dir", str(folder), "--wandb", "off", "--trainer.accelerator", "cpu"]
    return run(MODEL, "attention_at", [verb, *words, *common])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    light = ["--trainer.callbacks.examples", "20", "--trainer.callbacks+=WordSubstitution"]
    assert command(folder, "fit", *SMALL, "--trainer.callbacks", "Explanations", *light) == 0
    return folder


def the_run(root: Path) -> Path:
    return min((f for f in (root / "attention_at").iterdir() if f.is_dir()), key=lambda f: f.stat().st_ctime_ns)


def test_a_run_leaves_what_the_readme_says(trained: Path) -> None:
    there = {f.relative_to(the_run(trained)).as_posix() for f in the_run(trained).rglob("*")}
    plots = {f"plots/{name}" for name in ("attention.html", "explanations.png", "substitutions.png", "curves.png")}
    assert plots | {"explanations.csv", "substitutions.csv", "checkpoints/best.ckpt", "metrics.csv"} <= there
    header, *rows = (the_run(trained) / "metrics.csv").read_text().splitlines()
    for name in ("test/f1", "test/tau", "test/attention_acc", "test/synonym_acc", "val/auc", "test/acc_easy-ham-2"):
        assert name in header.split(","), name
    assert rows


def test_the_words_are_in_the_checkpoint_and_belong_to_the_training_split(trained: Path) -> None:
    saved = torch.load(the_run(trained) / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    words = list(saved["vocabulary"])
    assert words[:2] == ["<pad>", "<unk>"] and words == Mails(max_tokens=30).vocabulary
    # a tracker would be told of thousands of words
    assert not AttentionClassifier(vocabulary=words, hidden=2, embedding_dim=2)._log_hyperparams


def test_predictions_of_a_file_need_no_training_data(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text('Win money now, click here!\nRe: the kernel patch, "quoted"\nzzz qqq\n')
    read = Mails.read

    def no_training(self: Mails, part: str) -> Any:
        assert part != "train", "the words come from the checkpoint"
        return read(self, part)  # type: ignore[arg-type]

    monkeypatch.setattr(Mails, "read", no_training)
    last = the_run(trained) / "checkpoints" / "last.ckpt"
    assert command(trained, "predict", "--ckpt_path", str(last), "--texts", str(file)) == 0
    (found,) = (trained / "attention_at").glob("*/predictions.csv")
    rows = list(csv.DictReader(found.open(encoding="utf-8")))
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    assert rows[1]["text"] == 'Re: the kernel patch, "quoted"'
    assert all(row["class"] in ("ham", "spam") and 0.5 <= float(row["confidence"]) <= 1 for row in rows)
    module = AttentionClassifier.load_from_checkpoint(last, weights_only=True)
    data = Mails(max_tokens=30)
    data.use_vocabulary(module.vocabulary)
    data.predict_texts = file
    (batch,) = data.predict_dataloader()
    with torch.no_grad():
        sure = dict(zip(batch["index"].tolist(), module.eval()(batch).softmax(-1).amax(-1).tolist(), strict=True))
    assert [float(row["confidence"]) for row in rows] == pytest.approx([sure[i] for i in range(3)], abs=1e-4)


def test_the_same_test_comes_out_of_the_checkpoint(trained: Path) -> None:
    last = str(the_run(trained) / "checkpoints" / "last.ckpt")
    assert command(trained, "test", "--ckpt_path", last, "--trainer.callbacks", "null") == 0
    newest = max((trained / "attention_at").iterdir(), key=lambda f: f.stat().st_ctime_ns)
    values = []
    for folder in (the_run(trained), newest):
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        values.append([row["test/f1"] for row in rows if row.get("test/f1")])
    assert values[0] == values[1] != []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "--texts", "nowhere.txt"], "nowhere.txt"),
        (["fit", "--data", "Digits", "--model.vocabulary", "[a]"], "vocabulary"),
        (["fit", "--model.technique", "attention_ta"], "attention_ta"),
        (["fit", "--model.xi", "-1"], "xi and lam must not be negative"),
        (["fit", "--model.vectors", "nowhere.vec"], "nowhere.vec"),
        (["fit", "--data.labelled", "20"], "needs a label for each text"),
        (["fit", "--config", "sst"], "SST expects trees/{train,dev,test}.txt"),
    ],
)
def test_bad_input_gets_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "sst" in words or "Digits" in words or words[0] == "predict" else SMALL
    assert command(tmp_path, words[0], *words[1:], *small) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0], lines


def test_recipes_of_images_refuse_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--texts", "some.txt", "--trainer.default_root_dir", str(tmp_path), "--wandb", "off"]
    assert run("recipes.classifier.module.Classifier", "classifier", words) == 2
    assert "can't read texts: leave --texts out" in capsys.readouterr().err


def test_words_start_from_vectors_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "small.vec"
    file.write_text("3 4\nw3 1 2 3 4\nw5 0.5 0 0 -1\nother 9 9 9 9\n")
    made = {}
    for vectors in (None, str(file)):
        module = cells.recipe("attention_at", embedding_dim=4, vectors=vectors)
        cells.trainer(max_epochs=0).fit(module, datamodule=cells.data("attention_at"))
        made[vectors] = module.backbone.embed.weight.detach()
    table, other = made[str(file)], made[None]
    assert table[VOCABULARY.index("w3")].tolist() == [1, 2, 3, 4]
    assert table[VOCABULARY.index("w5")].tolist() == [0.5, 0, 0, -1]
    rest = [i for i in range(len(VOCABULARY)) if VOCABULARY[i] not in ("w3", "w5")]
    assert torch.equal(table[rest], other[rest]) and not table[0].any()


def test_a_checkpoints_words_take_the_place_of_the_datas(tmp_path: Path) -> None:
    """Trained on one vocabulary, tested through data that built another: the checkpoint's counts, everywhere."""
    own = [*VOCABULARY[:2], *VOCABULARY[:1:-1][:20]]
    module = cells.recipe("attention_at", vocabulary=own)
    data = cells.data("attention_at")
    data.use_vocabulary(own)
    first = cells.trainer(max_epochs=1)
    first.fit(module, datamodule=data)
    first.save_checkpoint(tmp_path / "own.ckpt")
    wanted = first.test(module, datamodule=data, verbose=False)
    other, again = cells.recipe("attention_at"), Words()
    found = cells.trainer().test(
        other, datamodule=again, ckpt_path=tmp_path / "own.ckpt", verbose=False, weights_only=True
    )
    assert other.vocabulary == own == list(again.vocabulary) and found == wanted
    assert torch.equal(other.backbone.embed.weight, module.backbone.embed.weight)


def test_a_run_goes_on_without_its_file_of_vectors(tmp_path: Path) -> None:
    file = tmp_path / "words.vec"
    file.write_text("".join(f"{word} {' '.join(['0.5'] * 8)}\n" for word in ("the", "money")))
    assert command(tmp_path, "fit", *SMALL, "--trainer.callbacks", "null", "--model.vectors", str(file)) == 0
    file.unlink()
    last = str(the_run(tmp_path) / "checkpoints" / "last.ckpt")
    assert command(tmp_path, "fit", "--ckpt_path", last, "--trainer.max_epochs", "2") == 0
    epochs = {row["epoch"] for row in csv.DictReader((the_run(tmp_path) / "metrics.csv").open())}
    assert "1" in epochs


def test_auc_is_of_two_classes(tmp_path: Path) -> None:
    watch = ModelCheckpoint(dirpath=tmp_path, monitor="val/auc")
    with pytest.raises(ValueError, match="val/auc is of two classes"):
        cells.trainer(watch, enable_checkpointing=True).fit(
            cells.recipe("attention_at"), datamodule=cells.data("attention_at")
        )


def test_predictions_of_pairs_have_their_queries(tmp_path: Path) -> None:
    class Pairs(Words):
        pairs = True

        def read(self, part: str) -> Any:
            found = super().read(part)
            return found._replace(query=[f"w1 w{i + 2}" for i in range(len(found.text))])

    module, data = cells.recipe("attention_at", pairs=True), Pairs()
    runner = cells.trainer()
    (found,) = runner.predict(module, datamodule=data)[:1]
    (file,) = module.save_predictions(found, tmp_path, "")
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert rows and all(row["query"] == f"w1 w{int(row['index']) + 2}" and row["text"] for row in rows)
