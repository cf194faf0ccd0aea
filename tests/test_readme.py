"""The README's commands and its example, as a reader would take them."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes._cli import HOME, run
from tests.laws import laws
from tests.processes import model_of

TEXT = (HOME / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"`(my_technique\.py)`.*?```python\n(.*?)```\n\n```bash\n(.*?)\n```", TEXT, re.S)

DIAGNOSTIC = re.search(r"`(my_diagnostic\.py)`.*?```python\n(.*?)```\n\n```bash\n(.*?)\n```", TEXT, re.S)


def commands() -> list[str]:
    """Every ``python -m recipes.<name> fit ...`` of the README that needs nothing but the settings to be tried."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
    lines = [line.partition(" # ")[0].strip() for line in blocks.splitlines()]
    found = [line for line in lines if re.match(r"python -m recipes\.\w+ fit", line)]
    return [line for line in found if not any(word in line for word in ("--ckpt_path", "my.yaml", "--print_config"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert EXAMPLE is not None and DIAGNOSTIC is not None
    for example in (EXAMPLE, DIAGNOSTIC):
        (tmp_path / example[1]).write_text(example[2], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_there_are_commands_to_try() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [w.replace("configs/", f"{HOME}/configs/") for w in shlex.split(command)[2:]]
    name = words[0].removeprefix("recipes.")
    assert run(model_of(name), name, [*words[1:], "--print_config"]) == 0, capsys.readouterr().err


def test_the_example_runs_as_typed(folder: Path) -> None:
    assert EXAMPLE is not None
    words = [sys.executable, *shlex.split(EXAMPLE[3])[1:], "--trainer.fast_dev_run", "true"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    left = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    assert left == ["my_diagnostic.py", "my_technique.py"]


def test_the_example_of_a_diagnostic_runs_as_typed(folder: Path) -> None:
    assert DIAGNOSTIC is not None
    words = [sys.executable, *shlex.split(DIAGNOSTIC[3])[1:], "--trainer.max_epochs", "1", "--wandb", "off"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run_folder,) = (folder / "runs" / "classifier").iterdir()
    assert (run_folder / "plots" / "weight_norms.png").is_file()
    assert "weight_norms/backbone.fc.weight" in (run_folder / "metrics.csv").read_text()


def test_the_example_obeys_the_laws(folder: Path, tmp_path: Path) -> None:
    cutout = importlib.import_module("my_technique").Cutout
    laws.no_trace("classifier", cutout)
    laws.zero_is_nothing("classifier", functools.partial(cutout, **cutout.zero))
    laws.off_at_evaluation("classifier", cutout)
    laws.resume_is_exact("classifier", cutout, tmp_path, 5)
    laws.accumulates("classifier", cutout)


def test_the_example_is_short() -> None:
    assert EXAMPLE is not None
    assert len([line for line in EXAMPLE[2].splitlines() if line.strip()]) <= 30


def test_the_example_of_a_users_own_network_runs_as_typed() -> None:
    block = re.search(r"your own if it names\nthem:\n\n```python\n(.*?)```", TEXT, re.S)
    assert block is not None
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block[1], names)
    torch.manual_seed(0)
    plain, folded = names["Mine"]().backbone.up.weight, names["module"].backbone.up.weight
    assert not names["module"].backbone.skip._forward_hooks
    assert torch.equal(folded[:, :8], plain[:, :8]) and torch.allclose(folded[:, 8:], 0.5**0.5 * plain[:, 8:])


def test_links_and_pictures_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (HOME / target).exists(), target
