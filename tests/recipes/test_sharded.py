"""Weights sharded over two ranks (FSDP2 by ``ModelParallelStrategy``): the steps of DDP, checkpoints, and refusals.

Both ranks are started once and run all commands; the tests look at what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes._atomic import AtomicCheckpointIO
from recipes.coprompt.module import CoPrompt
from recipes.scalelong.module import Diffusion
from tests.processes import model_of, ranks

QUIET = ["--wandb", "off", "--trainer.enable_progress_bar", "false"]
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
SHARDED = ["--trainer.strategy", "ModelParallelStrategy"]
IN_SHARDS = [*SHARDED, "--trainer.strategy.save_distributed_checkpoint", "true"]
DDP = ["--trainer.strategy", "ddp"]
COPROMPT = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--test_after_fit", "false"]
SCALELONG = [
    *("--model.network", "uvit", "--model.lr", "0.001", "--model.warmup_steps", "2", "--model.sample_steps", "2"),
    *("--model.network_args", "{patch_size: 4, dim: 32, depth: 2, heads: 2}", "--model.num_samples", "3"),
    *("--model.test_samples", "0", "--data.batch_size", "8", "--trainer.gradient_clip_val", "0.5"),
    *("--trainer.callbacks", "SkipMonitor", "--trainer.callbacks.every_n_steps", "2"),
    *("--trainer.callbacks+=AdvStyle", "--trainer.callbacks+=LongSkipScaling", "--trainer.callbacks.mode", "ls"),
]
DIFFUSION = [*SCALELONG, *COPROMPT]
LAST = ["--ckpt_path", "last"]
#: Command by name: recipe, verb, folder, words.
COMMANDS: dict[str, tuple[str, str, str, list[str]]] = {
    "ddp": ("scalelong", "fit", "ddp", [*DIFFUSION, *TWO, *DDP, "--trainer.max_epochs", "2"]),
    "sharded": ("scalelong", "fit", "sharded", [*DIFFUSION, *TWO, *SHARDED, "--trainer.max_epochs", "2"]),
    "stopped": ("scalelong", "fit", "stopped", [*DIFFUSION, *TWO, *SHARDED, "--trainer.max_epochs", "1"]),
    "resumed": ("scalelong", "fit", "stopped", [*LAST, "--trainer.max_epochs", "2"]),
    "in shards": ("scalelong", "fit", "shards", [*DIFFUSION, *TWO, *IN_SHARDS, "--trainer.max_epochs", "1"]),
    "goes on": ("scalelong", "fit", "shards", [*LAST, "--trainer.max_epochs", "2"]),
    "samples": ("scalelong", "predict", "sharded", [*LAST, "--model.num_samples", "4"]),
    "prompts, ddp": ("coprompt", "fit", "ddp", [*COPROMPT, *TWO, *DDP, "--trainer.max_epochs", "2"]),
    "prompts": ("coprompt", "fit", "sharded", [*COPROMPT, *TWO, *SHARDED, "--trainer.max_epochs", "2"]),
    "prompts, stopped": ("coprompt", "fit", "stopped", [*COPROMPT, *TWO, *SHARDED, "--trainer.max_epochs", "1"]),
    "prompts, resumed": ("coprompt", "fit", "stopped", [*LAST, "--trainer.max_epochs", "2"]),
    # what refuses
    "weights move": ("scalelong", "fit", "sam", [*DIFFUSION, *TWO, *SHARDED, "--trainer.callbacks+=SAM"]),
    "averaged": (
        *("scalelong", "fit", "ema"),
        [*DIFFUSION, *TWO, *SHARDED, "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"],
    ),
    "looks on": (
        *("scalelong", "fit", "look"),
        [*DIFFUSION, *TWO, *SHARDED, "--trainer.callbacks+=GeneralizationMeasures"],
    ),
}
RANK = """
import json, sys, torch
import callbacks.report
from recipes._cli import run

callbacks.report.save_figure = lambda *_: None
torch.set_num_threads(1)
print(json.dumps([run(*words) for words in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], str]:
    """The folder of all runs, each command's exit code, and what the first rank said on stderr."""
    root = tmp_path_factory.mktemp("sharded")
    words = []
    for recipe, verb, place, more in COMMANDS.values():
        given = [verb, *more, *QUIET, "--trainer.default_root_dir", str(root / place)]
        words.append([model_of(recipe), recipe, given])
    ends = ranks([sys.executable, "-c", RANK, json.dumps(words)], 2, root, 600)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    codes = [json.loads(end.out.splitlines()[-1]) for end in ends]
    assert codes[0] == codes[1]
    return root, dict(zip(COMMANDS, codes[0], strict=True)), ends[0].err


def last(root: Path, place: str, recipe: str) -> dict[str, Any]:
    """The last checkpoint of a run, whole."""
    (file,) = (root / place / recipe).glob("*/checkpoints/last.ckpt")
    return AtomicCheckpointIO().load_checkpoint(file, weights_only=True)


def tensors(checkpoint: dict[str, Any]) -> list[torch.Tensor]:
    """Weights, and the optimizer's state in the order of its parameters."""
    (optimizer,) = checkpoint["optimizer_states"]
    order = [number for group in optimizer["param_groups"] for number in group["params"]]
    states = [optimizer["state"][number] for number in order]
    # By name: shards are read in another order.
    named = [value for part in (checkpoint["state_dict"], *states) for _, value in sorted(part.items())]
    return [value for value in named if isinstance(value, torch.Tensor)]


def farthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two checkpoints."""
    assert a["state_dict"].keys() == b["state_dict"].keys() and a["global_step"] == b["global_step"] == 6
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_all_commands_end_as_they_should(done: tuple[Path, dict[str, int], str]) -> None:
    _, codes, said = done
    refuse = ["weights move", "averaged", "looks on"]
    assert codes == {name: 2 if name in refuse else 0 for name in COMMANDS}, said
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    whole = "needs whole weights on each rank: leave it out, or use --trainer.strategy ddp"
    assert errors == [f"{name} {whole}" for name in ("SAM", "EMAWeightAveraging", "GeneralizationMeasures")]


def call(monkeypatch: pytest.MonkeyPatch, recipe: str, verb: str, root: Path, *words: str) -> int:
    """A command in this process."""
    from recipes._cli import run

    given = [verb, *words, *QUIET, "--trainer.default_root_dir", str(root)]
    monkeypatch.setattr(sys, "argv", ["x", *given])
    return run(model_of(recipe), recipe, given)


def test_refuses_what_it_cannot_do(
    done: tuple[Path, dict[str, int], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "classifier", "fit", tmp_path, *SHARDED) == 2
    words = "the recipe classifier is not made for ModelParallelStrategy: use --trainer.strategy ddp"
    assert capsys.readouterr().err == f"error: {words}\n" and not list(tmp_path.iterdir())
    assert call(monkeypatch, "coprompt", "fit", done[0] / "ddp", *LAST, *SHARDED) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "would lose its optimizer's state: go on with --trainer.strategy ddp" in said


@pytest.mark.parametrize("recipe", ["scalelong", "coprompt"])
def test_steps_are_those_of_ddp(done: tuple[Path, dict[str, int], str], recipe: str) -> None:
    """Techniques with parameters of their own, clipping and a monitor of all gradients included."""
    a, b = (last(done[0], place, recipe) for place in ("ddp", "sharded"))
    assert farthest(a, b) < 2e-6


@pytest.mark.parametrize(("cls", "recipe"), [(Diffusion, "scalelong"), (CoPrompt, "coprompt")])
def test_opens_without_a_trainer(done: tuple[Path, dict[str, int], str], cls: type[Any], recipe: str) -> None:
    (file,) = (done[0] / "sharded" / recipe).glob("*/checkpoints/last.ckpt")
    module = cls.load_from_checkpoint(file, map_location="cpu", weights_only=True)
    saved = last(done[0], "sharded", recipe)["state_dict"]
    weights = module.state_dict()
    assert saved and all(torch.equal(weights[name], saved[name]) for name in saved if name in weights)


@pytest.mark.parametrize("recipe", ["scalelong", "coprompt"])
def test_resumes_exactly(done: tuple[Path, dict[str, int], str], recipe: str) -> None:
    assert farthest(last(done[0], "sharded", recipe), last(done[0], "stopped", recipe)) == 0.0


def test_resumes_exactly_from_a_folder_of_shards(done: tuple[Path, dict[str, int], str]) -> None:
    (folder,) = (done[0] / "shards" / "scalelong").glob("*/checkpoints/last.ckpt")
    assert sorted(f.name for f in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert farthest(last(done[0], "sharded", "scalelong"), last(done[0], "shards", "scalelong")) == 0.0


@pytest.mark.parametrize("place", ["sharded", "shards"])
def test_one_process_opens_it(
    done: tuple[Path, dict[str, int], str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two ranks saved, as one file or in shards; its samples are those that the ranks made together."""
    import numpy as np

    root = done[0] / place
    before = set((root / "scalelong").iterdir())
    words = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--model.num_samples", "4"]
    assert call(monkeypatch, "scalelong", "predict", root, *LAST, *words) == 0
    (folder,) = set((root / "scalelong").iterdir()) - before
    whole = np.load(folder / "samples.npz")["image"]
    (first,) = (done[0] / "sharded" / "scalelong").glob("*/samples-0.npz")
    parts = [np.load(first.with_name(f"samples-{rank}.npz")) for rank in range(2)]
    order = np.concatenate([part["index"] for part in parts]).argsort()
    together = np.concatenate([part["image"] for part in parts])[order]
    assert whole.shape == together.shape and np.abs(whole.astype(int) - together.astype(int)).max() <= 1
