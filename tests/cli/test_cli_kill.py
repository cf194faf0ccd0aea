"""SIGKILL at random moments: whole checkpoints, no more lost than the interval, and the weights of an unkilled run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HOME

#: Slow: twenty kills each; some two minutes a recipe on one idle core.
CORE = ("advstyle", "coprompt", "noise_mask", "scalelong", "adversarial_training", "attention_at")


def killed(recipe: str, out: Path, *words: object, seconds: float) -> dict[str, Any]:
    """What ``tests.cli.killer`` found."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.killer", recipe, str(out), *map(str, words)],
        cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert said, complaint
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def test_toy_killed_wherever_it_can_be(tmp_path: Path) -> None:
    found = killed("toy", tmp_path / "out", "--kills", 10, seconds=120)
    assert found["problems"] == []
    assert found["kills"] == 10 and set(found["where"].values()) == {2}
    assert found["opened"] >= 10 and 1 <= max(found["lost"]) <= found["every"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CORE)
def test_core_recipe_killed_twenty_times(tmp_path: Path, recipe: str) -> None:
    found = killed(recipe, tmp_path / "out", "--kills", 20, seconds=1500)
    print(json.dumps(found))
    assert found["problems"] == []
    assert found["kills"] == 20 and set(found["where"].values()) == {4}
    assert found["opened"] >= 20 and 1 <= max(found["lost"]) <= found["every"] == 3
