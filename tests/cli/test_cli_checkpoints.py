"""Which checkpoint is meant, what is taken from it, and which are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Result, checkpoint, config, metrics, same

Run = Callable[..., Result]


@pytest.fixture
def trained(cli: Run) -> Path:
    """A run of the toy recipe with settings that differ from the defaults; returns its folder."""
    result = cli("fit", "--model.width", 24, "--model.lr", 0.2, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    return result.run


def make_older(run: Path, seconds: float = 100) -> None:
    for file in (run / "checkpoints").iterdir():
        os.utime(file, (file.stat().st_atime - seconds, file.stat().st_mtime - seconds))


# ---------------------------------------------------------------------- which one


def test_best_and_last_are_what_they_say(cli: Run, trained: Path) -> None:
    accuracy = {int(row["epoch"]): float(row["val/acc"]) for row in metrics(trained) if "val/acc" in row}
    best, last = checkpoint(trained, "best"), checkpoint(trained, "last")
    assert best["epoch"] == max(accuracy, key=lambda epoch: (accuracy[epoch], -epoch))
    assert last["epoch"] == 1 and last["global_step"] == 24
    for name, state in (("best", best), ("last", last)):
        result = cli("validate", "--ckpt_path", name)
        assert result.code == 0 and f"{accuracy[state['epoch']]:.4f}" in result.out


def test_path_of_a_checkpoint(cli: Run, trained: Path) -> None:
    result = cli("test", "--ckpt_path", trained / "checkpoints" / "best.ckpt")
    assert result.code == 0 and "test/acc" in result.out


def test_newest_run_is_meant(cli: Run, trained: Path) -> None:
    make_older(trained)
    newer = cli("fit", "--model.width", 8)
    assert newer.code == 0
    found = yaml.safe_load(cli("test", "--ckpt_path", "last", "--print_config").out)
    assert found["model"]["width"] == 8
    make_older(next(run for run in newer.runs if run != trained), 200)
    found = yaml.safe_load(cli("test", "--ckpt_path", "best", "--print_config").out)
    assert found["model"]["width"] == 24


def test_missing_checkpoints(cli: Run) -> None:
    for name, hint in (("last", "--ckpt_path last? starts afresh"), ("best", "train first: fit")):
        result = cli("fit", "--ckpt_path", name)
        assert result.code == 2 and f"has a '{name}' checkpoint" in result.error_lines[0] and hint in result.err
    result = cli("fit", "--ckpt_path", "nope.ckpt")
    assert result.code == 2 and result.error_lines == ["error: there is no checkpoint nope.ckpt"]


def test_last_with_a_question_mark_starts_afresh_or_goes_on(cli: Run) -> None:
    words = ("fit", "--data", "ToyData", "--ckpt_path", "last?", "--trainer.max_epochs")
    first = cli(*words, 1)
    assert first.code == 0 and "goes on from" not in first.out
    assert checkpoint(first.run)["global_step"] == 12
    second = cli(*words, 2)
    assert second.code == 0 and "goes on from" in second.out and "epoch 1/2" not in second.out
    assert checkpoint(second.run)["global_step"] == 24  # one folder


def test_resuming_goes_on_in_the_folder_of_the_run_and_best_starts_a_new_one(cli: Run, trained: Path) -> None:
    result = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert result.code == 0 and result.run == trained
    assert yaml.safe_load((trained / "config.1.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert config(trained)["trainer"]["max_epochs"] == 3
    log = (trained / "run.log").read_text()
    assert log.count("command: ") == 2
    result = cli("fit", "--ckpt_path", "best", "--trainer.max_epochs", 4)
    assert result.code == 0 and len(result.runs) == 2


def test_dry_run_of_a_resumed_run_leaves_it_alone(cli: Run, trained: Path) -> None:
    before = {f: f.read_bytes() for f in trained.rglob("*") if f.is_file()}
    result = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--trainer.fast_dev_run", "true")
    assert result.code == 0, result.err
    assert {f: f.read_bytes() for f in trained.rglob("*") if f.is_file()} == before and result.run == trained


def test_one_best_file_also_after_a_kill(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``best.ckpt`` that is newer than the ``last.ckpt`` a run goes on from is replaced, not joined by a second."""
    from recipes._stop import LastCheckpoint

    save = LastCheckpoint.save

    def killed_between_best_and_last(self: LastCheckpoint, trainer: Any) -> None:
        if trainer.global_step == 12:
            raise RuntimeError("killed")
        save(self, trainer)

    with monkeypatch.context() as patched:
        patched.setattr(LastCheckpoint, "save", killed_between_best_and_last)
        killed = cli("fit", "--trainer.max_epochs", 2, "--last_every_n_steps", 10)
    steps = [checkpoint(killed.run, name)["global_step"] for name in ("best", "last")]
    assert steps == [12, 10]  # the last doesn't know of the best
    result = cli("fit", "--ckpt_path", "last")
    assert result.code == 0, result.err
    assert sorted(f.name for f in (result.run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    kept = cli("fit", "--ckpt_path", "best", "--trainer.max_epochs", 6, "--checkpoint.save_top_k", 2)
    names = sorted(f.name for f in (kept.runs[-1] / "checkpoints").iterdir())
    assert names[-1] == "last.ckpt" and 2 <= len(names) <= 3


# ---------------------------------------------------------------------- what is taken from it


def test_settings_rank_default_checkpoint_file_flag(cli: Run, trained: Path, tmp_path: Path) -> None:
    def model(*words: object) -> dict:
        result = cli("validate", "--ckpt_path", "last", *words, "--print_config")
        assert result.code == 0, result.err
        return yaml.safe_load(result.out)["model"]

    file = tmp_path / "file.yaml"
    file.write_text("model: {lr: 0.3, wait: 0.125}\n")
    assert model() == {"width": 24, "lr": 0.2, "wait": 0.0, "layer": "body"}
    assert model("--config", file) == {"width": 24, "lr": 0.3, "wait": 0.125, "layer": "body"}
    assert model("--config", file, "--model.lr", 0.4) == {"width": 24, "lr": 0.4, "wait": 0.125, "layer": "body"}
    assert cli("validate", "--ckpt_path", "last", "--model.lr", 0.777).code == 0
    (evaluated,) = (f for f in trained.parent.iterdir() if f != trained)
    assert config(evaluated)["model"]["lr"] == 0.777  # and not 0.2


def test_checkpoint_ranks_above_the_default_config(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import recipes._app

    (tmp_path / "configs" / "toy").mkdir(parents=True)
    (tmp_path / "configs" / "toy" / "default.yaml").write_text("model: {width: 7, lr: 0.7}\ndata: ToyData\n")
    monkeypatch.setattr(recipes._app, "CONFIGS", tmp_path / "configs")
    first = cli("fit", "--model.lr", 0.1, data=False)
    assert config(first.run)["model"]["width"] == 7 and config(first.run)["model"]["lr"] == 0.1
    (tmp_path / "configs" / "toy" / "default.yaml").write_text("model: {width: 9, lr: 0.9}\ndata: ToyData\n")
    found = yaml.safe_load(cli("test", "--ckpt_path", "last", "--print_config").out)
    assert (found["model"]["width"], found["model"]["lr"]) == (7, 0.1)


def test_where_runs_go_and_dry_runs_are_of_the_call_and_not_of_the_checkpoint(
    cli: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained.parent.parent.rename(tmp_path / "moved")
    file = tmp_path / "moved" / "toy" / trained.name / "checkpoints" / "last.ckpt"
    result = cli("validate", "--ckpt_path", file, "--wandb", "off", raw=True)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "runs" / "toy").iterdir())) == 1
    text = cli("validate", "--ckpt_path", file, "--print_config", raw=True).out
    assert yaml.safe_load(text)["trainer"]["default_root_dir"] == "runs"


def test_weights_that_dont_fit_are_one_line(cli: Run, trained: Path) -> None:
    result = cli("test", "--ckpt_path", "last", "--model.width", 32)
    assert result.code == 2 and len(result.error_lines) == 1 and "Traceback" not in result.err
    assert "the checkpoint doesn't fit this model: size mismatch for body.1.weight" in result.err


def test_api_checkpoint_without_our_stamp_gives_its_model_settings(cli: Run, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.ckpt"
    torch.save({k: v for k, v in checkpoint(trained).items() if k != "recipe"}, file)
    found = yaml.safe_load(cli("test", "--ckpt_path", file, "--data", "ToyData", "--print_config").out)
    assert found["model"]["width"] == 24


# ---------------------------------------------------------------------- which are refused


def test_checkpoint_of_another_recipe(cli: Run, trained: Path) -> None:
    file = trained / "checkpoints" / "last.ckpt"
    result = cli("test", "--ckpt_path", file, model="tests.cli.toy.OtherNet", name="other")
    assert result.code == 2 and len(result.error_lines) == 1
    assert "was saved by the recipe 'toy' (tests.cli.toy.ToyNet)" in result.err and "test --ckpt_path" in result.err


def test_files_that_are_no_checkpoints(cli: Run, trained: Path, tmp_path: Path) -> None:
    class Anything:
        pass

    text, other, unsafe = (tmp_path / f"{name}.ckpt" for name in ("text", "other", "unsafe"))
    text.write_text("hello")
    torch.save({"weights": torch.zeros(2)}, other)
    torch.save({**checkpoint(trained), "extra": tmp_path}, unsafe)  # a Path is none of torch's safe types
    for file, message in ((text, "can be read"), (other, "no 'state_dict'"), (unsafe, "will not load safely")):
        result = cli("test", "--ckpt_path", file)
        assert result.code == 2 and len(result.error_lines) == 1 and message in result.err, result.err
    assert "keep to numbers, strings" in result.err


def test_checkpoints_hold_plain_values_only(trained: Path) -> None:
    for name in ("best", "last"):
        stamp = checkpoint(trained, name)["recipe"]  # read with weights_only=True
        assert stamp["name"] == "toy" and stamp["model"] == "tests.cli.toy.ToyNet"
        assert stamp["config"]["model"]["width"] == 24


@pytest.mark.parametrize("recipe", ["advstyle", "classifier"])
def test_checkpoints_of_recipes_load_with_weights_only_and_with_or_without_techniques(
    cli: Run, recipe: str, tmp_path: Path
) -> None:
    model = {"advstyle": "recipes.advstyle.module.DomainGeneralizer", "classifier": "recipes.classifier.Classifier"}
    small = ("--model.backbone", "resnet10t", "--data.image_size", 32, "--data.batch_size", 32)
    short = ("--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1)
    with_it = ("--trainer.callbacks", "null", "--trainer.callbacks+=AdvStyle")

    def call(*words: object) -> Result:
        return cli(*words, model=model[recipe], name=recipe)

    result = call("fit", "--data", "EmojiDomains", *small, *short, *with_it)
    assert result.code == 0, result.err
    weights = checkpoint(result.run)["state_dict"]
    own = [key for key in weights if key.startswith("perturbations.")]
    assert own and checkpoint(result.run, "best")["state_dict"].keys() == weights.keys()
    without = call("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", "--trainer.max_epochs", 2)
    assert without.code == 0, without.err
    assert "perturbations.adv_style of the checkpoint put aside: not part of this run" in without.out
    assert not [key for key in checkpoint(without.run)["state_dict"] if key.startswith("perturbations.")]
    again = call("fit", "--ckpt_path", "last", *with_it, "--trainer.max_epochs", 3)
    assert again.code == 0, again.err
    assert "perturbations.adv_style of the checkpoint starts fresh: not in the checkpoint" in again.out
    assert same(sorted(checkpoint(again.run)["state_dict"]), sorted(weights))
