"""W&B as a user finds it: an offline run of each core recipe, groups of a claim, runs that go on, the best weights."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, checkpoint, commit, config, metrics
from wandb_files import Tracked, offline_files, tracked

Run = Callable[..., Result]
SMALL = (
    "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 1,
    "--trainer.limit_test_batches", 1, "--trainer.log_every_n_steps", 1,
)  # fmt: skip
#: Class, and settings with which it takes seconds.
CORE = {
    "advstyle": ("DomainGeneralizer", ("--data.image_size", 32)),
    "coprompt": ("CoPrompt", ()),
    "noise_mask": ("NoiseMaskPolicy", ("--model.pretrain_epochs", 1, "--data.train_size", 200)),
    "scalelong": ("Diffusion", ("--model.sample_steps", 2, "--model.test_samples", 16, "--model.warmup_steps", 1)),
    "adversarial_training": ("AdversarialTrainer", ("--model.steps", 1)),
    "attention_at": ("AttentionClassifier", ("--data.max_tokens", 32)),
}
QUICK = ("adversarial_training",)


def check(run: Path, tracked: Tracked) -> None:
    """What W&B has of a run is what its folder has."""
    # settings
    resolved = config(run)
    assert tracked.config["git_commit"].startswith(commit())
    for part in ("model", "data", "trainer", "checkpoint", "seed_everything"):
        assert tracked.config[part] == json.loads(json.dumps(resolved[part])), part
    # numbers: every value of metrics.csv, at its optimizer step
    rows = metrics(run)
    columns = {key for row in rows for key in row} - {"step", "epoch"}
    assert columns <= tracked.keys and "epoch" in tracked.keys
    for key in columns:
        written = [(int(row["step"]), float(row[key])) for row in rows if key in row]
        curve = [(step, float(value)) for step, value in tracked.curve(key)]
        assert repr(curve) == repr(written), key  # nan is nan here
        assert repr(float(tracked.summary[key])) == repr(written[-1][1])
    steps = [row["_step"] for row in tracked.rows]
    assert steps == sorted(set(steps))
    trained = [row["trainer/global_step"] for row in tracked.rows if "trainer/global_step" in row]
    assert trained == sorted(trained)
    # pictures: every one in plots/ was logged, and its file is there
    pictures = {re.sub(r"-\d+$", "", file.stem) for file in (run / "plots").glob("*.png")}
    logged = {key.split("/")[1] for key in tracked.keys if key.startswith("plots/") and key.endswith("/filenames")}
    assert pictures and pictures <= logged, (pictures, logged)
    for row in tracked.rows:
        for key, value in row.items():
            if key.endswith("/filenames"):
                assert all((tracked.file.parent / "files" / name).is_file() for name in value)
    # the best weights: their place and checksum, and no copy of them
    (artifact,) = tracked.artifacts
    assert artifact.type == "model" and set(artifact.aliases) == {"best", "latest"}
    (entry,) = artifact.manifest.contents
    best = run / "checkpoints" / "best.ckpt"
    assert entry.ref == best.resolve().as_uri() and entry.size == best.stat().st_size
    assert entry.digest == base64.b64encode(hashlib.md5(best.read_bytes()).digest()).decode()
    assert not [file for file in (run / "wandb").rglob("*") if file.suffix in (".ckpt", ".pt")]
    assert tracked.code == 0


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CORE]
)
def test_offline_run_of_a_core_recipe(cli: Run, name: str) -> None:
    model, small = CORE[name]
    words = ("fit", *SMALL, *small)
    result = cli(*words, model=f"recipes.{name}.module.{model}", name=name, data=False, wandb="offline", pictures=True)
    assert result.code == 0, result.err
    (file,) = offline_files(result.run)
    run = tracked(file)
    assert (run.id, run.group, run.kind, run.config["recipe"]) == (result.run.name, name, "fit", name)
    assert f"wandb sync {file.parent}" in result.out
    check(result.run, run)
    monitor = config(result.run)["checkpoint"]["monitor"]
    assert monitor is None or {monitor} < run.keys
    assert "train/loss" in run.keys and any(key.startswith("test/") for key in run.keys)


def test_run_that_goes_on_is_the_same_run(cli: Run) -> None:
    """Offline nobody tells the second file how far the first one counted, and W&B drops numbers that it has already."""
    stop = ("--trainer.callbacks", "Signal", "--trainer.callbacks.step", 7)
    first = cli("fit", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1, *stop, wandb="offline")
    assert first.code == 130
    again = cli("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", wandb="offline")
    assert again.code == 0 and again.run == first.run
    one, two = (tracked(file) for file in offline_files(first.run))
    assert one.id == two.id == first.run.name and one.code == 130 and two.code == 0
    assert max(row["_step"] for row in one.rows) < min(row["_step"] for row in two.rows)
    curve = one.curve("train/loss") + two.curve("train/loss")
    assert [step for step, _ in curve] == list(range(24))
    written = [(int(row["step"]), float(row["train/loss"])) for row in metrics(first.run) if "train/loss" in row]
    assert curve == written
    assert checkpoint(first.run)["global_step"] == 24


def test_failed_run_is_known_as_failed(cli: Run) -> None:
    result = cli("fit", "--trainer.callbacks", "Explode", "--trainer.callbacks.step", 3, wandb="offline")
    assert result.code == 1
    (file,) = offline_files(result.run)
    assert tracked(file).code == 1


def test_place_of_a_run_is_as_the_environment_says(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RUN_GROUP": "advstyle/faces", "JOB_TYPE": "plain", "NAME": "plain, seed 3", "TAGS": "seed-3"}
    for name, value in place.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (file,) = offline_files(cli("fit", wandb="offline").run)
    run = tracked(file)
    assert (run.group, run.kind, run.name, run.tags) == ("advstyle/faces", "plain", "plain, seed 3", ["seed-3"])


class Taken:
    """Stands in for a run of W&B, which takes numbers only."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, data: dict[str, Any], step: int) -> None:
        if any(not isinstance(value, (int, float)) for value in data.values()):
            raise ValueError("no picture")
        self.rows.append({**data, "_step": step})

    def finish(self, exit_code: int) -> None:
        self.rows.append({"code": exit_code})


def test_picture_that_wandb_does_not_take_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And so is the number of the last step, where the disk is full; the numbers that are kept are bounded."""
    from recipes._loggers import Wandb

    class Few(Wandb):
        again = 2

    log = Few(tmp_path / "last_step", project="x", offline=True, save_dir=str(tmp_path))
    (tmp_path / "last_step.partial").mkdir()  # can't be written
    run = log._experiment = Taken()  # type: ignore[assignment]
    log._thread.start()
    for step in range(3):
        log.log_metrics({"loss": 0.5}, step)
        log.log_image("picture", [str(tmp_path / "nowhere.png")])
        log.log({"a": 1.0, "table": object()})
    log.log_reference("best", tmp_path / "nowhere.ckpt", ["best"], {})
    log.close(0, 10.0)
    assert not log.off and not log.moved and run.rows[-1] == {"code": 0}
    assert [row["_step"] for row in run.rows if "loss" in row] == [0, 2, 4]
    assert [row["_step"] for row in run.rows if "a" in row] == [1, 3, 5]
    assert [step for step, _ in log._numbers] == [4, 5]
    assert len([line for line in caplog.messages if "doesn't take everything" in line]) == 1


def test_wandb_that_was_switched_off_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import _loggers

    ended: list[bool] = []
    monkeypatch.setattr(_loggers, "_abandon", lambda: ended.append(True))
    log = _loggers.Wandb(tmp_path / "last_step", project="x", offline=True, save_dir=str(tmp_path))
    run = log._experiment = Taken()  # type: ignore[assignment]
    log._thread.start()
    log.switch_off("a test")
    log.close(0, 10.0)
    assert ended == [True] and not run.rows


CLAIM = """\
claim: a test
baseline: plain
technique: twice
metric: val/loss
direction: min
seeds: [1, 2, 3, 4, 5]
arms:
  plain: {{recipe: classifier, args: []}}
  twice: {{recipe: classifier, args: [--model.lr, 0.1]}}
shared: [{shared}]
"""


@pytest.mark.slow
def test_cells_of_a_claim_are_one_group(tmp_path: Path) -> None:
    """Arms are job types, seeds tags; tracking changes neither what a cell is called nor whether it is known."""
    from dataclasses import replace

    from recipes import _claim

    (tmp_path / "classifier").mkdir()
    shared = ["--data", "Digits", "--model.backbone", "resnet10t", *map(str, SMALL)]
    (tmp_path / "classifier" / "claim_test.yaml").write_text(CLAIM.format(shared=", ".join(map(json.dumps, shared))))
    claim = replace(_claim.read("classifier/test", tmp_path), seeds=[1, 2])
    out = tmp_path / "out" / "test"
    out.mkdir(parents=True)
    _claim.run_claim(claim, out, jobs=1, say=lambda text: None, wandb="offline")
    found = [tracked(file) for file in (tmp_path / "out").rglob("*.wandb") if "latest-run" not in file.parts]
    assert {(run.group, run.kind, *run.tags) for run in found} == {
        ("classifier/test", arm, f"seed-{seed}") for arm in ("plain", "twice") for seed in (1, 2)
    }
    said: list[str] = []
    _claim.run_claim(claim, out, jobs=1, say=said.append)  # untracked, and nothing is left to train
    assert said[0] == "4 of 4 cells are trained already"


def test_claim_hands_the_place_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a stand-in for the training."""
    import sys

    from recipes import _claim

    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, pathlib, sys\n"
        "words = sys.argv[1:]\n"
        "folder = pathlib.Path(words[words.index('--trainer.default_root_dir') + 1]) / 'x' / 'y'\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'metrics.csv').write_text('step,val/acc\\n1,0.5\\n')\n"
        "place = {k: v for k, v in os.environ.items() if k.startswith('WANDB_')}\n"
        "(folder / 'place.json').write_text(json.dumps([words[words.index('--wandb') + 1], place]))\n"
    )
    options = ["--wandb", "off", "--trainer.default_root_dir", str(tmp_path / "cell")]
    cell = _claim.Cell("ours", 4, [sys.executable, str(program), *options], tmp_path / "cell")
    trainer = _claim.Trainer(1, "val/acc", "v", wandb="offline", group="advstyle/faces")
    record = trainer.train(cell)
    switch, place = json.loads((tmp_path / "cell" / "x" / "y" / "place.json").read_text())
    assert switch == "offline" and record["command"] == cell.command[1:]
    del place["WANDB_CONFIG_DIR"]  # the tests' own
    assert place == {
        "WANDB_RUN_GROUP": "advstyle/faces", "WANDB_JOB_TYPE": "ours",
        "WANDB_NAME": "ours, seed 4", "WANDB_TAGS": "seed-4",
    }  # fmt: skip
