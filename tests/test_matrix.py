"""``python -m recipes matrix`` in a reduced form, and that crashes, broken laws and bare errors are seen as such."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from callbacks.perturbation import Batch, Perturbation
from recipes import _matrix
from recipes.__main__ import main as recipes
from recipes._cli import HOME
from tests.laws import cells, matrix

KINDS = {name: matrix.kind(cls) for name, cls in matrix.found().items()}
RECIPES = sorted(cells.recipes())
SINGLES: list[_matrix.Cell] = [(recipe, (name,)) for recipe in RECIPES for name in KINDS]
PAIRS: list[_matrix.Cell] = [(recipe, pair) for recipe in RECIPES for pair in _matrix.pairs(recipe, KINDS)]

#: What once crashed or broke a law.
MENDED: list[_matrix.Cell] = [("clip", ("RobustAccuracy",)), ("lazy_to_rich", ("LabelNoise", "SAM"))]


def one_in(n: int, cells_: list[_matrix.Cell]) -> list[_matrix.Cell]:
    """A choice that goes by the cell's name alone, so a new callback doesn't change which of the others are tried."""
    return [cell for cell in cells_ if zlib.crc32(repr(cell).encode()) % n == 0]


def named(cell: _matrix.Cell) -> str:
    return f"{cell[0]}-{'+'.join(cell[1])}"


def tried(recipe: str, *names: str) -> _matrix.Finding:
    folder = Path.cwd()  # see the fixture
    return matrix.run(recipe, [name if name in KINDS else f"{__name__}.{name}" for name in names], folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------- the matrix, reduced


@pytest.mark.parametrize("cell", [*one_in(48, SINGLES), *one_in(560, PAIRS), *MENDED], ids=named)
def test_a_cell_plugs_in_or_refuses_where_that_is_known(cell: _matrix.Cell) -> None:
    recipe, names = cell
    finding = matrix.run(recipe, names, Path.cwd())
    known = any(matrix.apart(recipe, name) for name in names)
    assert finding["verdict"] == ("refuses" if known else "plugs in"), finding["reason"]
    assert bool(finding["reason"]) == known and "\n" not in finding["reason"]


def test_what_is_apart_says_so() -> None:
    for (recipe, name), words in matrix.APART.items():
        finding = matrix.run(recipe, [name], Path.cwd())
        assert finding["verdict"] == "refuses" and words in finding["reason"], (recipe, name, finding["reason"])


def test_every_callback_is_in_the_matrix_or_left_out_with_a_reason() -> None:
    for recipe in RECIPES:
        importlib.import_module(f"recipes.{recipe}.module")
    for cls in cells._below(Callback):
        package, _, module = cls.__module__.partition(".")
        public = not cls.__name__.startswith("_") and not module.startswith(
            "_"
        )  # recipes/_*.py: the command line's own
        if package in ("callbacks", "recipes", "datamodules") and public:
            assert (cls.__name__ in KINDS) != (cls.__name__ in matrix.EXCLUDED), cls
    assert {"technique", "diagnostic", "other"} == set(KINDS.values())
    assert {"SAM", "Grokking", "Report", "LinearProbe", "SkipMonitor", "RobustAccuracy"} <= KINDS.keys()


# ---------------------------------------------------------------------- what is bad is seen


class Bare(Perturbation):
    """Raises what it is told."""

    zero: ClassVar = {"every_n_steps": 1}
    error: ClassVar[BaseException] = KeyError("image")

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        raise self.error


class Torch(Bare):
    """An error of torch, which says ValueError too."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        torch.distributions.Normal(torch.tensor(0.0), torch.tensor(-1.0), validate_args=True)  # others switch it off


class Deep(Bare):
    error: ClassVar = RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)")


class Terse(Bare):
    error: ClassVar = ValueError("bad shape")


class Lines(Bare):
    error: ClassVar = ValueError("this can't go together\nwith what is there")


class InWords(Bare):
    error: ClassVar = ValueError("InWords needs words, which this recipe hasn't: leave it out")


class StopsEarly(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


class DrawsOnlyBesideSAM(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if any(type(c).__name__ == "SAM" for c in trainer.callbacks):
            torch.rand(1)


class MovesAWeightInTheTest(Callback):
    def on_test_end(self, trainer: Any, pl_module: LightningModule) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).add_(1e-3)


@pytest.mark.parametrize("name", ["Bare", "Torch", "Deep", "Terse", "Lines"])
def test_what_is_not_said_in_words_is_a_crash(name: str) -> None:
    finding = tried("classifier", name)
    assert finding["verdict"] == "crashes" and finding["traceback"], finding
    assert "\n" not in finding["reason"]
    assert tried("classifier", "SAM", name)["verdict"] == "crashes"


def test_a_reason_in_words_is_a_refusal() -> None:
    for names in (["InWords"], ["SAM", "InWords"], ["InWords", "Report"]):
        finding = tried("classifier", *names)
        assert (finding["verdict"], finding["reason"]) == ("refuses", str(InWords.error))


@pytest.mark.parametrize(
    ("name", "law", "words"),
    [
        ("wrong.LeaksGradient", "1", "crafting left a gradient"),
        ("wrong.RestoresOnlyAfterTheBackwardPass", "1", "left its mark"),
        ("wrong.NotNothingAtZero", "2", "losses differ"),
        ("wrong.MovesWeightsAtEvaluation", "3", "test changed the weights"),
        ("wrong.ForgetsWhenResumed", "5", "losses"),
        ("wrong.DropsAccumulated", "7", "micro-batch"),
        ("test_diagnostics.MovesAWeight", "1", "weights"),
        ("test_diagnostics.LeavesAHook", "1", "hooks"),
    ],
)
def test_a_broken_law_is_seen(name: str, law: str, words: str) -> None:
    finding = matrix.run("classifier", [f"tests.laws.{name}"], Path.cwd())
    assert finding["verdict"] == "breaks" and finding["reason"], finding
    assert words in (finding["laws"].get(law) or finding["reason"])


def test_so_it_is_of_callbacks_that_are_no_technique() -> None:
    assert "2 steps" in tried("classifier", "StopsEarly")["reason"]
    assert "test changed the weights" in tried("classifier", "MovesAWeightInTheTest")["reason"]
    assert "test changed the weights" in tried("classifier", "MovesAWeightInTheTest", "Sharpness")["reason"]
    assert "random stream" in tried("classifier", "DrawsOnlyBesideSAM", "SAM")["reason"]
    assert tried("classifier", "DrawsOnlyBesideSAM", "DSU")["verdict"] == "plugs in"


def test_a_law_that_two_break_together_is_seen() -> None:
    twice = ["tests.laws.wrong.RestoresInListOrder"] * 2
    assert "still in" in matrix.run("classifier", twice, Path.cwd())["laws"]["6"]
    nothing = ["SAM", "tests.laws.wrong.NotNothingAtZero"]
    assert "losses differ" in matrix.run("classifier", nothing, Path.cwd())["laws"]["2"]


# ---------------------------------------------------------------------- the command


def test_every_two_are_tried_once_and_techniques_on_the_classifier_in_both_orders() -> None:
    kinds = {"A": "technique", "B": "technique", "D": "diagnostic", "R": "other"}
    once = {("A", "B"), ("A", "D"), ("A", "R"), ("B", "D"), ("B", "R"), ("D", "R"), ("A", "A"), ("B", "B"), ("D", "D")}
    for recipe, wanted in (("advstyle", once), ("classifier", once | {("B", "A")})):
        found = _matrix.pairs(recipe, kinds)
        assert len(found) == len(set(found)) and set(found) == wanted


OWN = """
import os
from callbacks.perturbation import Perturbation

class Good(Perturbation):
    zero = {"size": 0.0}
    def __init__(self, size=0.1, **schedule):
        super().__init__(**schedule)
        self.size = size
    def perturb(self, module, batch):
        print("said on the way")
        batch["image"] = batch["image"] + self.size

class Dies(Good):
    def perturb(self, module, batch):
        os._exit(7)
"""


def test_a_users_own_techniques_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(OWN)
    (tmp_path / "callbacks").mkdir()  # hides nothing
    (tmp_path / "callbacks" / "__init__.py").write_text("raise RuntimeError('not ours')")
    words = ["--callbacks", "my_module.Dies,my_module.Good,DropGroups", "--recipes", "clip", "--jobs", "1"]
    command = [sys.executable, "-m", "recipes", "matrix", *words, "--out", "found"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "100"}
    )
    assert ended.returncode == 1, ended.stderr
    findings = json.loads((tmp_path / "found" / "matrix.json").read_text())
    assert [f["verdict"] for f in findings] == ["crashes", "plugs in", "refuses"]  # one that dies takes none with it
    assert findings[0]["reason"] == "its process ended with 7"
    assert findings[1]["laws"] == dict.fromkeys("12357", "holds")
    assert "Dies on clip crashes" in ended.stderr
    for text in (ended.stdout, (tmp_path / "found" / "matrix.md").read_text()):
        assert "3 cells: 1 plug in, 1 refuse, none broke a law, 1 crashed" in text
        assert "captioned data compares" in text
    assert (tmp_path / "found" / "matrix.png").stat().st_size > 1000
    assert not (tmp_path / "found" / "pairs.png").exists()


class Canned:
    """Answers in place of a worker's process."""

    verdicts: ClassVar[dict[tuple[str, ...], str]] = {}

    def __init__(self, output: Path) -> None:
        self.closed = False

    def ask(self, question: dict[str, Any]) -> Any:
        if "describe" in question:
            return matrix._described(question["describe"])
        verdict = self.verdicts.get(tuple(question["callbacks"]), "plugs in")
        reason = "" if verdict == "plugs in" else f"{question['callbacks'][-1]} says | why"
        return {**question, "verdict": verdict, "reason": reason, "laws": {}, "seconds": 0.1}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> type[Canned]:
    monkeypatch.setattr(_matrix, "Worker", Canned)
    monkeypatch.setattr(Canned, "verdicts", {})
    return Canned


def test_the_table_and_the_exit_code(canned: type[Canned], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["matrix", "--callbacks", "SAM,DSU,Report", "--recipes", "clip,advstyle", "--pairs", "--out", "here"]
    assert recipes(command) == 0
    canned.verdicts |= {("DSU",): "refuses", ("SAM", "DSU"): "refuses", ("SAM", "Report"): "refuses"}
    assert recipes(command) == 0  # a refusal is no fault
    text = Path("here/matrix.md").read_text()
    assert "| DSU | 1 | 1 |" in text and "| SAM | + | + |" in text and "1. DSU says \\| why" in text
    assert "- SAM + Report on clip refuses: Report says" in text and "- SAM + DSU" not in text  # DSU does alone
    assert "Of those that refuse, 2 do because one of the two does by itself." in text
    assert Path("here/pairs.png").is_file()
    canned.verdicts |= {("SAM", "SAM"): "breaks"}
    capsys.readouterr()
    assert recipes(command) == 1
    assert "SAM + SAM on clip breaks" in capsys.readouterr().err


def test_bad_input_is_one_line(
    canned: type[Canned], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--callbacks", "MixStile"], "did you mean 'MixStyle'?"),
        (["--callbacks", "no_module.Mine"], "'no_module.Mine' can't be imported: No module named 'no_module'"),
        (["--callbacks", "json.JSONDecoder"], "no class below"),
        (["--recipes", "clasifier"], "did you mean 'classifier'?"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ):
        assert recipes(["matrix", *words]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(_matrix, "HOME", HOME / "nowhere")
    assert recipes(["matrix"]) == 2
    assert "run it in a clone of the repository" in capsys.readouterr().err
