"""What a run leaves behind, what it shows, and what goes to W&B."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Result, checkpoint, commit, config, metrics
from wandb_files import finished

Run = Callable[..., Result]


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and "wandb" not in f.parts}


# ---------------------------------------------------------------------- the folder


def test_folder_of_a_run(cli: Run) -> None:
    result = cli("fit", "--model.width", 24, pictures=True)
    assert result.code == 0 and result.err == ""
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", result.run.name) and result.run.parent.name == "toy"
    assert files(result.run) == {
        "config.yaml", "metrics.csv", "run.log", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "plots/inputs.png", "plots/curves.png", "plots/test.png",
    }  # fmt: skip
    assert f"plots  {result.run / 'plots'}" in result.out


def test_two_runs_have_two_folders(cli: Run) -> None:
    cli("fit", "--trainer.max_epochs", 1)
    assert len(cli("fit").runs) == 2


def test_resolved_config_runs_again_and_gives_the_same(cli: Run, tmp_path: Path) -> None:
    first = cli("fit", "--model.width", 24, "--trainer.callbacks+=Noise", "--trainer.callbacks.sigma", 0.5)
    head = (first.run / "config.yaml").read_text().splitlines()[0]
    assert head.startswith("# toy fit, lightning ") and commit() in head
    other = tmp_path / "other"
    again = cli("fit", "--config", first.run / "config.yaml", "--trainer.default_root_dir", other, data=False)
    assert again.code == 0 and "sigma is 0.5" in again.out
    (run,) = (other / "toy").iterdir()
    a, b = config(first.run), config(run)
    assert a.pop("trainer") | {"default_root_dir": ""} == b.pop("trainer") | {"default_root_dir": ""} and a == b
    assert torch.equal(checkpoint(first.run)["state_dict"]["head.weight"], checkpoint(run)["state_dict"]["head.weight"])
    assert metrics(first.run) == metrics(run)


def test_metrics_csv_holds_every_logged_value(cli: Run) -> None:
    result = cli("fit", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 4)
    rows = metrics(result.run)
    assert [int(r["step"]) for r in rows if "train/loss" in r] == [3, 7, 11, 15, 19, 23]
    assert [(int(r["step"]), int(r["epoch"])) for r in rows if "val/acc" in r] == [(11, 0), (23, 1)]
    assert len([r for r in rows if "test/acc" in r]) == 1
    shown = dict(re.findall(r"^  ([\w/ ]+?) +([\d.]+)$", result.out, re.M))
    accuracy = [float(r["val/acc"]) for r in rows if "val/acc" in r]
    assert float(shown["val/acc"]) == pytest.approx(accuracy[-1], abs=1e-4)
    assert float(shown["best val/acc"]) == pytest.approx(max(accuracy), abs=1e-4)
    assert float(shown["test/acc"]) == pytest.approx(float(rows[-1]["test/acc"]), abs=1e-4)


def test_log_holds_the_command_and_what_was_shown(cli: Run) -> None:
    result = cli("fit", "--trainer.max_epochs", 2)
    log = (result.run / "run.log").read_text()
    assert "command: toyrun.py fit --data ToyData" in log
    for line in result.out.splitlines():
        assert line in log


def test_end_says_where_everything_is(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("fit")
    table = result.out[result.out.index("where everything is") :]
    run = result.run.relative_to(tmp_path)
    assert f"run   {run}" in table
    assert f"best  {run}/checkpoints/best.ckpt" in table and f"last  {run}/checkpoints/last.ckpt" in table


def test_runs_go_below_the_working_directory_by_default(
    cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("fit", "--data", "ToyData", "--trainer.max_epochs", 1, "--wandb", "off", raw=True)
    assert result.code == 0 and len(list((tmp_path / "runs" / "toy").iterdir())) == 1


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_fast_dev_run_leaves_nothing_behind(
    cli: Run, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = cli(verb, "--trainer.fast_dev_run", "true", wandb="auto")
    assert result.code == 0, result.err
    assert set(tmp_path.rglob("*")) == before
    assert {"fit": "train/loss", "validate": "val/acc", "test": "test/acc", "predict": ""}[verb] in result.out
    assert "where everything is" not in result.out


def test_dry_run_has_one_temporary_folder_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import _run

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_run, "rank", lambda: 1)  # torchrun hands the first one's folder to nobody
    _run.Run.begin("toy", "fit", tmp_path / "runs", temporary=True).end()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("verb", "metric"), [("validate", "val/acc"), ("test", "test/acc")])
def test_evaluation_has_a_folder_and_a_table(cli: Run, verb: str, metric: str) -> None:
    result = cli(verb)
    assert result.code == 0 and metric in result.out
    assert "warning: no --ckpt_path: these are the weights the model starts with" in result.err
    assert files(result.run) == {"config.yaml", "metrics.csv", "run.log"} and metric in metrics(result.run)[0]


def test_predictions_are_joined_and_load_safely(cli: Run) -> None:
    cli("fit")
    result = cli("predict", "--ckpt_path", "last")
    assert result.code == 0
    (file,) = result.root.glob("toy/*/predictions.pt")
    assert str(file) in result.out
    found = torch.load(file, weights_only=True)
    assert found["index"].tolist() == list(range(32)) and found["prediction"].shape == (32,)


def test_own_logger_and_switches(cli: Run) -> None:
    assert "metrics.csv" not in files(cli("fit", "--trainer.logger", "false").run)


def test_without_checkpoints_none_is_written(cli: Run) -> None:
    result = cli("fit", "--trainer.enable_checkpointing", "false", "--test_after_fit", "false")
    assert files(result.run) == {"config.yaml", "metrics.csv", "run.log"} and "test/acc" not in result.out


# ---------------------------------------------------------------------- bad data


def test_missing_dataset(cli: Run) -> None:
    result = cli("fit", "--data.root", "/nope")
    assert result.code == 2 and result.err == "error: /nope has no toys; get them at a toy shop\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_loss_that_is_not_finite_stops_the_run(cli: Run, workers: int) -> None:
    """Step and examples are those of the seeded order, and the saved batch is the one that the step saw."""
    result = cli("fit", "--data.nan_at", 50, "--data.num_workers", workers, "--trainer.max_epochs", 2)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).view(12, 8)
    step = int((order == 50).any(1).nonzero())
    examples = ", ".join(map(str, order[step].tolist()))
    file = result.run / f"nonfinite-step{step}-rank0.pt"
    said = f"error: the loss is nan at step {step} (epoch 0, batch {step}, examples {examples}); the batch is in {file}"
    assert result.code == 2 and result.error_lines == [said] and "Traceback" not in result.err
    saved = torch.load(file, weights_only=True)
    assert (saved["step"], saved["epoch"], saved["batch_idx"]) == (step, 0, step) and not saved["loss"].isfinite()
    assert saved["batch"]["index"].tolist() == order[step].tolist()
    assert saved["batch"]["image"].isnan().any(-1).any(-1).any(-1).tolist() == [i == 50 for i in order[step].tolist()]
    assert not (result.run / "checkpoints" / "last.ckpt").exists()  # nothing that is lost already is saved


def test_error_in_a_loader_worker_is_one_line(cli: Run) -> None:
    result = cli("fit", "--data.num_workers", 1, "--data.corrupt_at", 3)
    assert result.code == 2 and result.error_lines == ["error: toy 3 can't be read"] and "Traceback" not in result.err


# ---------------------------------------------------------------------- what is shown


def test_output_is_our_lines_only(cli: Run) -> None:
    result = cli("fit", "--trainer.max_epochs", 2)
    lines = result.out.splitlines()
    assert lines[0] == "toy: ToyNet, 355 parameters, ToyData, cpu"
    assert re.fullmatch(
        r"epoch 1/2  train/loss \d\.\d{4}  val/acc \d\.\d{4}  [\d,]+ images/s  eta \d+:\d\d", lines[1]
    ), lines[1]
    assert re.fullmatch(r"epoch 2/2  train/loss \d\.\d{4}  val/acc \d\.\d{4}  [\d,]+ images/s", lines[2]), lines[2]
    assert lines[3] == "metrics" and result.err == ""


def test_lines_within_long_epochs(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import recipes._progress

    monkeypatch.setattr(recipes._progress, "PLAIN_EVERY", 0.05)
    result = cli("fit", "--model.wait", 0.02)
    line = r"^epoch 1/1  batch (\d+)/12  train/loss [\d.]+  ([\d,]+) images/s  eta \d+:\d\d$"
    found = re.findall(line, result.out, re.M)
    assert len(found) >= 3
    # 8 images every 20 ms and a little: 400 images/s at most
    assert all(100 < float(rate.replace(",", "")) <= 400 for _, rate in found)


def test_users_warning_is_one_line(cli: Run) -> None:
    result = cli("fit", "--trainer.callbacks", "Warn")
    assert result.code == 0 and result.err == "warning: look at this\n"
    assert "look at this" in (result.run / "run.log").read_text()


def test_logging_is_afterwards_as_it_was(cli: Run) -> None:
    import logging

    loggers = [logging.getLogger(n) for n in ("recipes", "callbacks", "lightning.pytorch", "lightning.fabric")]
    before = [(each.level, each.propagate, list(each.handlers)) for each in loggers]
    cli("fit")
    cli("fit", "--trainer.callbacks", "Explode")
    assert [(each.level, each.propagate, list(each.handlers)) for each in loggers] == before
    assert "RECIPES_RUN_FOLDER" not in os.environ


# ---------------------------------------------------------------------- W&B


def test_wandb_logs_offline_without_account_network_or_question(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr("builtins.input", no_network)
    at = commit()
    result = cli("fit", wandb="auto", pictures=True)
    assert result.code == 0 and result.err == ""
    (folder,) = result.run.glob("wandb/offline-run-*")
    assert f"wandb sync {folder}" in result.out
    logged: dict[str, Any] = {}
    history: set[str] = set()
    (file,) = folder.glob("*.wandb")
    for record in finished(file):
        for part in (record.config, record.run.config):
            logged |= {item.key: json.loads(item.value_json) for item in part.update}
        history |= {item.key or item.nested_key[0] for item in record.history.item}
    assert logged["git_commit"].startswith(at) and logged["recipe"] == "toy"
    assert logged["model"]["width"] == 16 and logged["data"]["class_path"] == "tests.cli.toy.ToyData"
    assert {"train/loss", "val/acc", "test/acc", "plots/inputs", "plots/curves", "plots/test"} <= history
    assert metrics(result.run)  # beside the CSV


@pytest.mark.parametrize("mode", ["disabled", "off by switch"])
def test_wandb_can_be_off(cli: Run, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    if mode == "disabled":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    result = cli("fit", wandb="auto" if mode == "disabled" else "off")
    assert result.code == 0 and not (result.run / "wandb").exists() and metrics(result.run)
    assert "wandb sync" not in result.out and result.err == ""


@pytest.mark.parametrize(
    ("switch", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "off"),
        ("auto", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),  # no key: it would ask
        ("online", {"WANDB_API_KEY": "k"}, "online"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, "offline"),
        ("off", {"WANDB_MODE": "online", "WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_wandb_switch(monkeypatch: pytest.MonkeyPatch, switch: str, environment: dict[str, str], expected: str) -> None:
    import recipes._loggers

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(recipes._loggers, "reachable", lambda url: True)
    assert recipes._loggers.wandb_mode(switch)[0] == expected


def test_wandb_falls_back_to_offline_where_the_server_is_out_of_reach(
    cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # a port that nothing listens on
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for proxy in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.delenv(proxy, raising=False)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        result = cli("fit", wandb="online")
    assert result.code == 0 and "W&B logs offline: http://127.0.0.1" in result.out and "wandb sync" in result.out


def test_yaml_off_is_the_switch(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("wandb: off\n")
    result = cli("fit", "--config", tmp_path / "x.yaml", "--data", "ToyData", "--print_config", raw=True)
    assert yaml.safe_load(result.out)["wandb"] == "off"
