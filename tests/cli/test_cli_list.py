"""``python -m recipes`` and the ``recipes`` script: the list, the names, and what they start."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HOME

from recipes.__main__ import main, read_cards, table


def test_list_shows_every_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main([]) == 0
    out = capsys.readouterr().out
    for head in ("name", "paper", "perturbs", "plugs in", "data", "run time"):
        assert head in out.splitlines()[0]
    names = {f.parent.name for f in (HOME / "recipes").glob("*/module.py")}
    assert names == {line.split()[0] for line in out.split("\n\n")[0].splitlines()[2:] if not line.startswith(" ")}
    assert "2301.12643" in out and "claim <name>" in out
    assert max(map(len, out.splitlines())) <= 160


def test_every_card_is_complete() -> None:
    for name, card in read_cards().items():
        for field in ("Title", "Paper", "Perturbs", "Plugs in", "Claim", "Data", "Run time", "Command"):
            assert card.get(field), f"{name} has no '{field}'"
        assert card["Command"] == f"python -m recipes.{name} fit"


def test_cards_are_read_from_docstrings(tmp_path: Path) -> None:
    for name, text in (("b", "Title.\n\nPaper: one\n  two\nOther: x\nData: d"), ("a", ""), ("_c", "Title")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f'"""{text}"""\nimport nothing_that_exists\n')
    cards = read_cards(tmp_path)
    assert list(cards) == ["a", "b"]
    assert cards["b"] == {"Title": "Title.", "Paper": "one two Other: x", "Data": "d"}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_table_keeps_its_width_and_its_words(width: int) -> None:
    cards = {"one": {"Paper": "a long title of a paper " * 4, "Perturbs": "features", "Data": "some data"}}
    lines = table(cards, width).splitlines()
    assert max(map(len, lines)) <= width
    starts = [m for m in range(len(lines[1])) if lines[1][m] == "-" and (m == 0 or lines[1][m - 1] == " ")]
    paper = " ".join(line[starts[1] : starts[2]].strip() for line in lines[2:]).strip()
    assert paper == cards["one"]["Paper"].strip()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("advstile", "did you mean 'advstyle'?"),
        ("recipes.advstyl", "did you mean 'advstyle'?"),
        ("clam", "did you mean 'claim'?"),
        ("zzzz", "the recipes are: adversarial_training, advstyle, "),
    ],
)
def test_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    assert main([name, "fit"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: no recipe '{name}'\nhint: ") and hint in err and len(err.splitlines()) == 2


def test_script_runs_a_recipe_as_python_m_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    assert main(["advstyle", "--help"]) == 0
    assert "python -m recipes.advstyle fit" in capsys.readouterr().out
    assert main(["advstyle", "fti"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err
    assert main(["classifier", "fit", "--model.wdith", "3"]) == 2
    assert "unknown: --model.wdith 3" in capsys.readouterr().err
    assert sys.argv is before


def test_script_is_declared() -> None:
    text = (HOME / "pyproject.toml").read_text()
    assert 'recipes = "recipes.__main__:main"' in text
    for point in importlib.metadata.entry_points(group="console_scripts", name="recipes"):
        assert point.value == "recipes.__main__:main"


def test_claim_is_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["claim", "--help"])
    assert end.value.code == 0 and "recipes claim" in capsys.readouterr().out


LIGHT = [("recipes",), ("recipes", "x"), ("recipes.advstyle", "--help"), ("recipes.advstyle", "fti")]


@pytest.mark.parametrize("words", LIGHT, ids=[" ".join(w) for w in LIGHT])
def test_help_list_and_typing_mistakes_import_nothing_heavy(words: tuple[str, ...]) -> None:
    """Under half a second is asked for; a busy machine is allowed twice that, best of three."""
    seconds, err = [], ""
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", *words], cwd=HOME, capture_output=True, text=True, timeout=60
        )
        seconds.append(time.perf_counter() - begun)
        err = done.stderr
        if seconds[-1] < 0.5:
            break
    lines = [line for line in err.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert "recipes" in imported and not imported & {"torch", "lightning", "numpy", "wandb", "yaml", "jsonargparse"}
    assert min(seconds) < 1.0


def test_long_help_is_there_in_time() -> None:
    """Under 8 s is asked for on a warm, idle machine."""
    command = [sys.executable, "-m", "recipes.advstyle", "fit", "--help"]
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and time.perf_counter() - begun < 25
    for option in ("--model.backbone", "--data", "--trainer.callbacks", "--ckpt_path", "--wandb", "--checkpoint.mode"):
        assert option in done.stdout, option
    assert not [line for line in done.stdout.splitlines() if line.strip().startswith("--model.num_classes ")]
