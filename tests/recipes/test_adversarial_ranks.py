"""Two ranks, started by the command: the evaluator finds what one process finds; free training resumes exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ranks

SMALL = ["--model.backbone", "cnn4", "--model.backbone_args", "{width: 4}", "--wandb", "off", "--data.batch_size", "32"]
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def call(verb: str, root: Path, *words: str) -> Path:
    """The folder of the run."""
    command = [sys.executable, "-m", "recipes.adversarial_training", verb, *SMALL, *words]
    command += ["--trainer.default_root_dir", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return max((root / "adversarial_training").iterdir(), key=lambda folder: folder.stat().st_mtime)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = call(
        "fit",
        tmp_path_factory.mktemp("trained"),
        *("--trainer.max_epochs", "3", "--model.steps", "1", "--model.eps", "0.05", "--model.lr", "0.2"),
        *("--test_after_fit", "false", "--trainer.callbacks.every_n_epochs", "6", "--trainer.callbacks.val_steps", "2"),
    )
    return run / "checkpoints" / "last.ckpt"


def test_the_evaluator_shares_the_work_and_finds_the_same(trained: Path, tmp_path: Path) -> None:
    """The same examples, the same random starts, counts added up: on a budget that the ranks can't share evenly."""
    settings = ["--ckpt_path", str(trained), "--trainer.callbacks.budget", "41", "--trainer.callbacks.steps", "5"]
    results: list[Any] = []
    for name, words in (("one", []), ("two", TWO)):
        folder = call("test", tmp_path / name, *settings, *words)
        results.append(json.loads((folder / "robustness.json").read_text()))
    one, two = results
    assert one["examples"] == two["examples"] == 41
    assert one["accuracy"] == two["accuracy"] and one["curve"] == two["curve"]
    assert one["accuracy"]["clean"] > one["accuracy"]["robust"] > 0, "or all would be equal anyway"


RANK = """
import contextlib, os, pathlib, sys, torch
from callbacks.free import FreeAdversary
from tests.laws import cells, laws

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
two = {"devices": 2, "strategy": "ddp", "max_epochs": 2}

def fit(*more, **options):
    module, technique = cells.recipe("classifier"), FreeAdversary(0.1, 3)
    runner = cells.trainer(technique, *more, **two)
    runner.fit(module, datamodule=cells.data("classifier", size=24), **options)
    return {**cells.weights(module), "carried": technique.carried, "state": technique.state_dict()["carried"]}

whole = fit()
with contextlib.suppress(KeyError):
    fit(laws.Kill(folder / "there.ckpt", 13))
again = fit(ckpt_path=folder / "there.ckpt", weights_only=True)
assert not cells.differing(whole, again)
torch.save(whole, folder / f"{os.environ['RANK']}.pt")
"""


def test_free_training_resumes_on_two_ranks(tmp_path: Path) -> None:
    """3 batches of 3 replays, stopped between two replays: the carried perturbations of both ranks are kept."""
    ends = ranks([sys.executable, "-c", RANK, str(tmp_path)], 2, tmp_path, 200)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert not torch.equal(first["carried"], second["carried"]), "each rank's own"
    assert torch.equal(first["state"][0::2], first["carried"]) and torch.equal(first["state"], second["state"])
    assert torch.equal(second["state"][1::2], second["carried"])
