"""Ctrl-C and SIGTERM: the exit codes, ``last.ckpt``, and a run that goes on as if it had never been stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import HOME, Result, checkpoint, metrics, same

Run = Callable[..., Result]
FIT = ("fit", "--trainer.max_epochs", 3, "--trainer.log_every_n_steps", 1)
SIGNAL = ("--trainer.callbacks", "Signal", "--trainer.callbacks.step")
GO_ON = ("fit", "--ckpt_path", "last", "--trainer.callbacks", "null")


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, optimizer, schedulers and metrics.csv of two runs are the same, bit for bit."""
    x, y = checkpoint(a), checkpoint(b)
    assert x["global_step"] == y["global_step"] > 0 and x["epoch"] == y["epoch"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(x[part], y[part]), part
    assert metrics(a) == metrics(b)
    assert same(checkpoint(a, "best")["state_dict"], checkpoint(b, "best")["state_dict"])


@pytest.fixture
def whole(cli: Run, tmp_path: Path) -> Callable[..., Path]:
    """The same run, never stopped, in a folder of its own; returns the run's folder."""

    def call(*words: object) -> Path:
        result = cli(*FIT, *words, "--trainer.default_root_dir", tmp_path / "whole")
        assert result.code == 0, result.err
        (run,) = (tmp_path / "whole" / "toy").iterdir()
        return run

    return call


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (0, ()),
        (5, ()),
        (10, ()),  # 12 steps an epoch
        (11, ()),
        (12, ()),
        (35, ()),
        (17, ("--data.num_workers", 2)),
        (7, ("--trainer.accumulate_grad_batches", 3)),
        (8, ("--trainer.accumulate_grad_batches", 5)),  # the last window of an epoch is a short one
        (5, ("--trainer.val_check_interval", 0.5)),  # is followed by a validation
        (9, ("--trainer.val_check_interval", 0.25)),
        (20, ("--trainer.limit_train_batches", 7)),
        (13, ("--trainer.check_val_every_n_epoch", 2)),
        (17, ("--trainer.precision", "bf16-mixed")),
    ],
)
def test_stopped_run_goes_on_as_if_it_had_never_been_stopped(
    cli: Run, whole: Callable[..., Path], step: int, words: tuple[object, ...]
) -> None:
    a = whole(*words)
    b = cli(*FIT, *SIGNAL, step, *words)
    assert b.code == 130, b.err
    stopped_at = checkpoint(b.run)["global_step"]
    assert step < stopped_at <= step + 3  # an epoch's last step and a validation are waited for
    b = cli(*GO_ON)
    assert b.code == 0, b.err
    assert_equal_runs(a, b.run)  # in the same folder


def test_run_can_be_stopped_again_and_again(cli: Run, whole: Callable[..., Path]) -> None:
    a = whole()
    codes = [cli(*FIT, *SIGNAL, 3).code]
    codes += [cli("fit", "--ckpt_path", "last", *SIGNAL, step).code for step in (4, 16, 30)]
    assert codes == [130] * 4
    b = cli(*GO_ON)
    assert b.code == 0 and (b.run / "config.1.yaml").is_file()
    assert_equal_runs(a, b.run)


def test_signal_in_a_validation_waits_for_its_end(cli: Run, whole: Callable[..., Path]) -> None:
    a = whole()
    b = cli(*FIT, *SIGNAL, 20, "--trainer.callbacks.validation", "true", "--trainer.callbacks.name", "SIGTERM")
    assert b.code == 143, b.err
    assert checkpoint(b.run)["global_step"] == 24
    b = cli(*GO_ON)
    assert b.code == 0, b.err
    assert_equal_runs(a, b.run)


def test_what_a_stopped_run_says(cli: Run) -> None:
    result = cli(*FIT, *SIGNAL, 15)
    last = result.run / "checkpoints" / "last.ckpt"
    assert f"stopped by SIGINT at step 16; saved {last}" in result.out
    assert "go on with: python -m recipes.toy fit --ckpt_path last" in result.out
    assert result.err.strip() == "" and not list(result.run.rglob("*.partial"))
    assert "stopped by SIGINT" in (result.run / "run.log").read_text()


def test_signal_where_nothing_can_be_saved_ends_at_once(cli: Run) -> None:
    fit = cli("fit", "--trainer.fast_dev_run", "true", *SIGNAL, 0)
    assert fit.code == 130 and "stopped by SIGINT; nothing to save" in fit.out and not fit.runs
    result = cli("validate", "--trainer.callbacks", "Signal", "--trainer.callbacks.step", 0,
                 "--trainer.callbacks.validation", "true", "--trainer.callbacks.name", "SIGTERM")  # fmt: skip
    assert result.code == 143


def test_handlers_are_put_back(cli: Run) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli("fit").code == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_last_every_n_steps_survives_a_hard_kill(cli: Run, whole: Callable[..., Path]) -> None:
    """A run that dies goes on from what it saved within the epoch; what it logged later is dropped."""
    a = whole()
    b = cli(*FIT, "--last_every_n_steps", 5, "--trainer.callbacks", "Explode", "--trainer.callbacks.step", 18)
    assert b.code == 1 and checkpoint(b.run)["global_step"] == 15
    assert max(int(row["step"]) for row in metrics(b.run)) == 17
    b = cli(*GO_ON, "--last_every_n_steps", 0)
    assert b.code == 0, b.err
    assert_equal_runs(a, b.run)


#: A recipe with two techniques on it: of styles and of weights, and augmentation that loader workers draw.
STACKED = (
    "fit", "--data", "EmojiDomains", "--data.image_size", 32, "--data.batch_size", 16, "--data.translate", 0.1,
    "--model.backbone", "resnet10t", "--model.backbone_args", "{channels: [8, 8, 16, 16], stem_width: 8}",
    "--model.channels_last", "false", "--test_after_fit", "false", "--trainer.max_epochs", 2,
    "--trainer.limit_train_batches", 8, "--trainer.limit_val_batches", 1, "--trainer.log_every_n_steps", 1,
    "--trainer.callbacks", "null", "--trainer.callbacks+=AdvStyle", "--trainer.callbacks+=SAM",
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stacked")


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_other_number_of_workers_in_the_middle_of_an_epoch(cli: Run, kept: Path, before: int, after: int) -> None:
    """Stopped in the middle of an epoch and resumed with another number of workers, techniques stacked."""

    def call(*words: object) -> Result:
        return cli(*STACKED, *words, model="recipes.advstyle.module.DomainGeneralizer", name="advstyle")

    if not (kept / "whole").exists():
        assert call("--trainer.default_root_dir", kept / "whole").code == 0
    (whole,) = (kept / "whole" / "advstyle").iterdir()
    stop = ("--trainer.callbacks+=Signal", "--trainer.callbacks.step", 4)
    b = call("--data.num_workers", before, *stop)
    assert b.code == 130 and checkpoint(b.run)["global_step"] == 5, b.err
    b = call("--ckpt_path", "last", "--data.num_workers", after)
    assert b.code == 0, b.err
    assert_equal_runs(whole, b.run)
    assert any(key.startswith("perturbations.") for key in checkpoint(whole)["state_dict"])


def test_averages_of_an_epoch_are_of_all_of_it(cli: Run, whole: Callable[..., Path]) -> None:
    """What is averaged over an epoch's steps counts those before the stop, whatever it is, and stopped how often."""
    logs = ("--trainer.callbacks", "Averages")
    a = whole(*logs)
    b = cli(*FIT, *logs, "--trainer.callbacks+=Signal", "--trainer.callbacks.step", 15)
    for step in (16, 18):
        b = cli("fit", "--ckpt_path", "last", *logs, "--trainer.callbacks+=Signal", "--trainer.callbacks.step", step)
        assert b.code == 130, b.err
    b = cli("fit", "--ckpt_path", "last", *logs)
    assert b.code == 0, b.err
    assert_equal_runs(a, b.run)
    (row,) = (row for row in metrics(a) if row["epoch"] == "1" and "mean" in row)
    assert {k: float(row[k]) for k in ("mean", "most", "least", "total", "rare")} == {
        "mean": 17.5, "most": 23.0, "least": 12.0, "total": 210.0, "rare": 15.75
    }  # fmt: skip


def start(root: Path, *words: object) -> subprocess.Popen[str]:
    argv = ["fit", "--data", "ToyData", "--wandb", "off", "--trainer.default_root_dir", str(root), *map(str, words)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.toyrun", *argv],
        cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], text: str, seconds: float = 60) -> None:
    assert process.stdout is not None
    end = time.monotonic() + seconds
    for line in process.stdout:
        if text in line:
            return
        assert time.monotonic() < end
    raise AssertionError(f"never said '{text}': {process.stderr.read() if process.stderr else ''}")


def test_ctrl_c_saves_and_ends_the_process_with_130(tmp_path: Path) -> None:
    """SIGTERM's 143 is tested on two ranks."""
    root = tmp_path / "runs"
    process = start(root, "--model.wait", 0.05, "--trainer.max_epochs", 1000)
    wait_for(process, "epoch 1/1000")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping at the next complete step" in err and "Traceback" not in err
    (run,) = (root / "toy").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] % 12 != 0  # mid-epoch
    assert "go on with: python -m recipes.toy fit --ckpt_path last" in out


def test_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    words = ("--model.wait", 60, "--trainer.max_epochs", 1, "--trainer.num_sanity_val_steps", 0)
    process = start(tmp_path / "runs", *words, "--trainer.callbacks", "Noise")
    wait_for(process, "sigma is")  # said when training starts
    time.sleep(1)  # in the first, long step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
