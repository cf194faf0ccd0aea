"""Every file in configs/ is one that its recipe takes, and every recipe has what all recipes have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes.__main__ import FIELDS, read_cards
from recipes._cli import CONFIGS, run
from tests.processes import model_of

RUNS = sorted(f for f in CONFIGS.glob("*/*.yaml") if f.stem != "sweep" and not f.stem.startswith("claim"))


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_config_is_taken_whole(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = file.parent.name
    assert run(model_of(recipe), recipe, ["fit", "--config", str(file), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)

    def within(given: object, taken: object, path: str = "") -> None:
        if isinstance(given, dict):
            for key, value in given.items():
                assert isinstance(taken, dict) and key in taken, f"{path}.{key}"
                within(value, taken[key], f"{path}.{key}")
        elif isinstance(given, list):
            assert isinstance(taken, list) and len(given) == len(taken), path
            for i, value in enumerate(given):
                within(value, taken[i], f"{path}[{i}]")
        elif not path.endswith("class_path"):
            assert given == taken, path

    within(yaml.safe_load(file.read_text()), printed)


@pytest.mark.parametrize("recipe", sorted(read_cards()))
def test_a_recipe_has_a_full_card_a_default_and_a_sweep(recipe: str) -> None:
    card = read_cards()[recipe]
    assert card["Title"]
    assert [field for field in FIELDS if not card.get(field)] == []
    assert card["Command"] == f"python -m recipes.{recipe} fit"
    assert (CONFIGS / recipe / "default.yaml").is_file()
    sweep = yaml.safe_load((CONFIGS / recipe / "sweep.yaml").read_text())
    assert sweep["program"] == f"recipes.{recipe}" and sweep["metric"]["name"].startswith("val/")


def test_names_of_a_recipe_come_lazily() -> None:
    code = "import sys, recipes.advstyle, recipes.classifier; assert 'torch' not in sys.modules"
    code += "; recipes.advstyle.DomainGeneralizer"
    subprocess.run([sys.executable, "-c", code], check=True)
