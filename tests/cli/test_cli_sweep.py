"""``python -m recipes sweep``: which runs, what is run, what comes out, and what is kept."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HOME, checkpoint, metrics
from fake_slurm import calls, install

from recipes import _sweep
from recipes._cli import CONFIGS, run
from recipes._jobs import Jobs
from recipes._sweep import main, read, settings
from tests.processes import model_of

#: Instead of a training: writes what a run writes, fails or waits as it's told, and notes that it was started.
FAKE = """
import os, pathlib, signal, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
root = pathlib.Path(sys.argv[sys.argv.index("--trainer.default_root_dir") + 1])
assert sys.argv[sys.argv.index("--ckpt_path") + 1] == "last?"
x, saved = given["x"], root / "saved"
with open(pathlib.Path(__file__).with_name("started"), "a") as started:
    print(x, os.environ.get("WANDB_RUN_GROUP"), os.environ.get("CUDA_VISIBLE_DEVICES") or "none",
          "SLURM_NTASKS" in os.environ, "again" if saved.exists() else "afresh",
          os.getpid(), os.getppid(), file=started)
def stop(*_):
    time.sleep(float(os.environ.get("SAVING", 0)))
    saved.touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if x == os.environ.get("KILLED"):
    os.kill(os.getpid(), 9)
if x == os.environ.get("NOISY"):
    print("no text:", flush=True)
    sys.stdout.buffer.write(bytes([255, 10]))
if x == os.environ.get("BAD"):
    sys.exit("error: it broke")
if x == os.environ.get("SLOW") and not saved.exists():
    time.sleep(60)
(root / "fake" / "run").mkdir(parents=True, exist_ok=True)
(root / "fake" / "run" / "metrics.csv").write_text(f"epoch,step,val/acc\\n0,5,0.1\\n1,9,{float(x) / 10}\\n")
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A sweep file whose program is the fake; ``sweep(method="random", ...)`` replaces entries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "fake.py").write_text(FAKE)

    def write(**change: Any) -> Path:
        content = {
            "program": "fake.py",
            "method": "grid",
            "metric": {"name": "val/acc", "goal": "maximize"},
            "command": ["${env}", "python", str(tmp_path / "${program}"), "--flag", "${args}"],
            "parameters": {"x": {"values": [1, 3, 2]}, "model.y": {"value": "b c"}},
        }
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**content, **change}, sort_keys=False))
        return file

    return write


def started(folder: Path) -> list[list[str]]:
    """What was started: x, W&B's group, graphics card, whether SLURM's words are there, afresh or again, processes."""
    file = folder / "started"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as opened:
        return list(csv.DictReader(opened))


# ---------------------------------------------------------------------- which runs


def test_a_grid_is_run_in_full_and_the_best_comes_first(
    sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep()
    assert main([str(file), "--jobs", "2", "--", "--more", "1"]) == 0
    out = capsys.readouterr().out
    assert {line[0] for line in started(tmp_path)} == {"1", "2", "3"}
    assert {line[1] for line in started(tmp_path)} == {"sweep-mine"}
    table = rows(tmp_path / "runs" / "sweeps" / "mine")
    assert [(row["val/acc"], row["x"], row["model.y"], row["state"]) for row in table] == [
        ("0.3", "3", "b c", "done"), ("0.2", "2", "b c", "done"), ("0.1", "1", "b c", "done"),
    ]  # fmt: skip
    lines = [line.split() for line in out.splitlines()]
    places = [i for i, words in enumerate(lines) if words and words[0] in ("0.3000", "0.2000", "0.1000")]
    assert [lines[i][0] for i in places] == ["0.3000", "0.2000", "0.1000"]
    assert "3/3  x=" in out and "eta 0 min" in out
    best = f"the best (val/acc 0.3000): python {tmp_path}/fake.py --flag --x=3 '--model.y=b c' --more 1"
    assert best in out.splitlines()
    for row in table:
        assert (Path(row["folder"]) / "output.txt").is_file()

    assert main([str(file), "--", "--more", "1"]) == 0  # nothing is left to do
    assert "3 of 3 are done already" in capsys.readouterr().out and len(started(tmp_path)) == 3
    file = sweep(parameters={"x": {"values": [1, 4]}, "model.y": {"value": "b c"}})  # keeps what it still has
    assert main([str(file), "--", "--more", "1"]) == 0 and [line[0] for line in started(tmp_path)[3:]] == ["4"]
    assert main([str(file), "--", "--more", "2"]) == 0 and len(started(tmp_path)) == 6  # another command, other runs


def test_a_goal_to_minimize_turns_the_table_around(sweep: Callable[..., Path], tmp_path: Path) -> None:
    assert main([str(sweep(metric={"name": "val/acc"})), "--out", "here"]) == 0
    assert [row["x"] for row in rows(tmp_path / "here")] == ["1", "2", "3"]


def test_draws_are_those_of_the_seed_and_within_bounds(sweep: Callable[..., Path]) -> None:
    parameters = {
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "drop": {"min": 0.0, "max": 0.5},
        "width": {"min": 4, "max": 6},
        "step": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25},
        "decay": {"distribution": "log_uniform", "min": -2, "max": 0},
        "shift": {"distribution": "normal", "mu": 5, "sigma": 0.1},
        "kind": {"values": ["a", "b"], "probabilities": [0.0, 1.0]},
        "seed": {"value": 7},
    }
    file = read(sweep(method="random", parameters=parameters))
    found = settings(file, 200, 0)
    assert found[:5] == settings(file, 5, 0) and found[:5] != settings(file, 5, 1)
    assert len({json.dumps(point) for point in found}) == 200
    assert all(1e-4 <= p["lr"] <= 1e-1 and 0 <= p["drop"] <= 0.5 and p["width"] in (4, 5, 6) for p in found)
    assert {p["step"] for p in found} == {0.0, 0.25, 0.5, 0.75, 1.0} and {p["width"] for p in found} == {4, 5, 6}
    assert all(math.exp(-2) - 1e-6 <= p["decay"] <= 1 and 4 < p["shift"] < 6 for p in found)
    assert {p["kind"] for p in found} == {"b"} and {p["seed"] for p in found} == {7}
    below = sum(p["lr"] < math.sqrt(1e-5) for p in found)  # the middle of the logarithms
    assert 70 < below < 130


def test_a_small_space_has_no_more_runs_than_points(sweep: Callable[..., Path]) -> None:
    file = read(sweep(method="random", run_cap=50))
    assert sorted(point["x"] for point in settings(file, None, 0)) == [1, 2, 3]
    assert len(settings(read(sweep(run_cap=2)), None, 0)) == 2


def test_what_only_wandb_can_is_said(
    sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep(method="bayes", early_terminate={"type": "hyperband"})
    assert main([str(file), "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert "method bayes: only W&B's server" in out and "early_terminate: only W&B's server" in out
    assert len(started(tmp_path)) == 1


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*/sweep.yaml")), ids=lambda f: f.parent.name)
def test_runs_of_a_recipes_sweep_are_ones_that_it_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = file.parent.name
    found = read(_sweep.find(name))
    command = _sweep.command_of(found, settings(found, 1, 0)[0])
    assert command[:4] == [sys.executable, "-m", f"recipes.{name}", "fit"]
    assert run(model_of(name), name, [*command[3:], "--ckpt_path", "last?", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] in (1, 2, 3)


# ---------------------------------------------------------------------- what goes wrong


def test_a_run_that_fails_stops_no_other_and_is_tried_again(
    sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD", "1")  # the first
    words = [str(sweep()), "--jobs", "1", "--out", "here"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "1/3  x=1 y=b c: failed: ended with 1: error: it broke" in out
    assert "1 of 3 failed; running the sweep again tries them again:" in out and "the best (val/acc 0.3000)" in out
    assert [(row["x"], row["val/acc"]) for row in rows(tmp_path / "here")] == [("3", "0.3"), ("2", "0.2"), ("1", "")]
    assert "it broke" in rows(tmp_path / "here")[-1]["state"]
    assert main([*words, "--report-only"]) == 1 and len(started(tmp_path)) == 3
    monkeypatch.delenv("BAD")
    assert main(words) == 0 and [line[0] for line in started(tmp_path)] == ["1", "3", "2", "1"]


def test_a_run_that_is_killed_when_tried_again_shows_no_old_error(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(sweep()), "--jobs", "1", "--out", "here", "--runs", "1"]
    monkeypatch.setenv("BAD", "1")
    assert main(words) == 1 and "it broke" in rows(tmp_path / "here")[0]["state"]
    monkeypatch.setenv("KILLED", "1")
    assert main(words) == 1 and len(started(tmp_path)) == 2
    (row,) = rows(tmp_path / "here")
    assert row["state"] == "not run"
    assert "it broke" in (Path(row["folder"]) / "output.txt").read_text()  # what an earlier try said is kept


def test_one_run_in_the_foreground_may_say_anything(
    sweep: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOISY", "1")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert main([str(sweep(metric={"name": "val/f1"})), "--trial", "0"]) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    said = capfd.readouterr()
    assert "no text:\n\ufffd\n" in said.out and "error: no 'val/f1' in" in said.err


def test_a_metric_that_is_not_logged_is_a_failure(
    sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep(metric={"name": "val/f1"})), "--runs", "1"]) == 1
    assert "no 'val/f1' in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({"program": None}, [], "it has no 'program'"),
        ({"metric": {"name": "x", "goal": "up"}}, [], "minimize or maximize"),
        ({"method": "tpe"}, [], "the method is grid, random or bayes, not 'tpe'"),
        ({"parameters": {"x": {"min": 0, "max": 1}}}, [], "a grid takes values"),
        ({"parameters": {"x": {"parameters": {"y": {"value": 1}}}}}, [], "--on wandb"),
        ({"method": "random", "parameters": {"x": {"distribution": "beta", "min": 0, "max": 1}}}, [], "'beta'"),
        ({"method": "random", "parameters": {"x": {"min": 0.5}}}, [], "parameter 'x' can't be drawn: 'max'"),
        ({"method": "random", "parameters": {"x": {"values": []}}}, [], "parameter 'x' can't be drawn"),
        (
            {"method": "random", "parameters": {"x": {"values": [1, 2], "probabilities": [1.0]}}},
            [],
            "parameter 'x' can't be drawn",
        ),
        ({"parameters": {"x": {"values": 3}}}, [], "a grid takes values"),
        ({"command": ["python", "${args_json}"]}, [], "only W&B's agent knows ${args_json}"),
        ({}, ["--trial", "3"], "there is no run 3: the sweep has 3, from 0 to 2"),
        ({}, ["--jobs", "0"], "expected a number of at least 1"),
        ({}, ["--on", "moon"], "invalid choice: 'moon'"),
        ({}, ["--out", "fake.py/x", "--runs", "1"], "fake.py/x"),
        ({}, ["--slurm", "partition"], "expected KEY=VALUE"),
        ({}, ["--slurm", "partition=gpu"], "add --on slurm"),
        ({}, ["--on", "wandb", "--", "--x", "1"], "W&B's agent runs the file as it is"),
        ({}, ["--on", "wandb"], "W&B's server is needed for this: no API key"),
        ({}, ["--on", "slurm"], "there is no sbatch here"),
    ],
)
def test_bad_input_is_one_line(
    sweep: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: list[str],
    said: str,
) -> None:
    assert main([str(sweep(**change)), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in error


def test_a_sweep_that_is_not_there_is_answered_at_once_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advstile"]) == 2 and "did you mean 'advstyle'?" in capsys.readouterr().err
    program = "import sys; from recipes.__main__ import main; assert main(['sweep', 'x']) == 2"
    program += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HOME)


def test_ctrl_c_ends_the_runs_which_then_go_on(tmp_path: Path) -> None:
    """The toy, stopped in mid-epoch. (That what goes on gives the same numbers is tested in test_cli_stop.)"""
    content = {
        "program": "tests.cli.toyrun",
        "method": "grid",
        "metric": {"name": "val/acc", "goal": "maximize"},
        "command": ["python", "-m", "${program}", "fit", "--data", "ToyData", "--wandb", "off", "${args}"],
        "parameters": {"model.lr": {"value": 0.02}, "trainer.max_epochs": {"value": 6}},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    options = ["--trainer.log_every_n_steps", "1", "--model.wait", "0.05"]
    words = [sys.executable, "-m", "recipes", "sweep", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "out")]
    first = subprocess.Popen([*words, "--", *options], cwd=HOME, stderr=subprocess.PIPE, text=True, env=os.environ)
    log: Path | None = None
    for _ in range(600):
        time.sleep(0.1)
        log = next((tmp_path / "out").glob("*/output.txt"), None)
        if log is not None and log.exists() and "epoch 1/6" in log.read_text():
            break
    assert log is not None
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130 and "stopped; the same command goes on with what's missing" in error
    assert "stopped by SIGTERM" in log.read_text() and not (log.parent / "trial.json").exists()
    subprocess.run([*words, "--", *options], cwd=HOME, check=True, timeout=120)
    assert "goes on from" in log.read_text()
    (again,) = (log.parent / "toy").iterdir()
    assert checkpoint(again)["global_step"] == 72  # six epochs of twelve steps, each once
    assert [int(row["step"]) for row in metrics(again) if "train/loss" in row] == list(range(72))
    assert [row["state"] for row in rows(tmp_path / "out")] == ["done"]


# ---------------------------------------------------------------------- where


def test_each_run_has_a_graphics_card_of_its_own(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'; echo 'GPU 1: H100 (UUID: GPU-b)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    assert main([str(sweep())]) == 0
    assert {line[2] for line in started(tmp_path)} == {"0", "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert main([str(sweep()), "--out", "other"]) == 0
    assert {line[2] for line in started(tmp_path)[3:]} == {"3"}


def test_runs_here_share_our_cores_and_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))  # of a node with more
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    environment = Jobs(2).environment
    assert environment["OMP_NUM_THREADS"] == "3" and "SLURM_NTASKS" not in environment
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Jobs(2).environment["OMP_NUM_THREADS"] == "5"


def test_runs_as_an_array_of_slurm_jobs(
    sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{install(tmp_path / 'slurm')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("BAD", "2")
    options = ["partition=gpu", "gpus_per_node=1", "cpus_per_task=4", "timeout_min=90"]
    assert main([str(sweep()), "--on", "slurm", "--jobs", "2", "--slurm", *options]) == 1
    out = capsys.readouterr().out
    (job,) = (tmp_path / "slurm" / "jobs").iterdir()
    asked = json.loads(job.read_text())["options"]
    wanted = {"array": "0-2%2", "partition": "gpu", "gpus-per-node": "1", "cpus-per-task": "4", "time": "90"}
    assert wanted.items() <= asked.items() and asked["signal"] == "USR2@120" and asked["job-name"] == "sweep-mine"
    assert sorted(line[0] for line in started(tmp_path)) == ["1", "2", "3"]
    assert {line[1] for line in started(tmp_path)} == {"sweep-mine"}
    assert {line[3] for line in started(tmp_path)} == {"False"}  # a run isn't told that it is a rank
    assert "1 of 3 failed" in out and "the best (val/acc 0.3000)" in out and calls(tmp_path / "slurm", "scancel") == []
    monkeypatch.delenv("BAD")
    assert main([str(sweep()), "--on", "slurm"]) == 0 and len(started(tmp_path)) == 4
    assert main([str(sweep()), "--on", "slurm", "--slurm", "colour=red", "--out", "other"]) == 2


def test_job_script_runs_one_of_each_task(sweep: Callable[..., Path], tmp_path: Path) -> None:
    os.environ["PATH"] = f"{install(tmp_path / 'slurm')}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(HOME)
    script, file = CONFIGS / "cluster" / "sweep.sbatch", sweep()
    subprocess.run(["sbatch", "--wait", "--array=1-2", script, file, "--seed", "0"], check=True)
    assert [line[0] for line in started(tmp_path)] == ["3", "2"]
    assert main([str(file), "--report-only"]) == 1  # one isn't run
    assert [row["state"] for row in rows(tmp_path / "runs" / "sweeps" / "mine")] == ["done", "done", "not run"]


def test_preempted_job_of_submitit_saves_and_goes_on(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By submitit's executor of local processes, whose preemption is that of SLURM's."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("SLOW", "3")
    every = _sweep.trials(read(sweep()), [{"x": 3, "model.y": "b"}], tmp_path / "out", [])
    done, told = submitit.local.local.LocalJob.done, []

    def preempt_once(self: Any, force_check: bool = False) -> bool:
        if not told and started(tmp_path):
            time.sleep(0.5)
            told.extend(map(int, started(tmp_path)[0][5:]))
            for process in told:  # the run and, which it is the child of, submitit's: SLURM tells all
                os.kill(process, signal.SIGUSR2)
        return bool(done(self))

    monkeypatch.setattr(submitit.local.local.LocalJob, "done", preempt_once)
    ended: list[Any] = []
    where = {"folder": tmp_path / "submitit", "options": {"timeout_min": 30}, "cluster": "local"}
    _sweep.run_on_cluster(every, None, "group", ended.append, **where)
    assert [line[4] for line in started(tmp_path)] == ["afresh", "again"]
    assert ended == every and every[0].value == 0.3


def test_preempted_run_has_more_time_to_save_than_one_that_is_stopped(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(Jobs, "grace", 0.1)
    monkeypatch.setenv("SLOW", "3")
    monkeypatch.setenv("SAVING", "0.5")
    (trial,) = _sweep.trials(read(sweep()), [{"x": 3, "model.y": "b"}], tmp_path / "out", [])
    job = _sweep.OnCluster(trial, "v", "group")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        while not started(tmp_path):
            time.sleep(0.05)
        time.sleep(0.2)  # its handler is there
        job.checkpoint()
        running.result(timeout=30)
    assert (trial.folder / "saved").exists()


def test_scancel_that_fails_keeps_no_other_job_running(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", f"{install(tmp_path / 'slurm')}{os.pathsep}{os.environ['PATH']}")
    scancel = tmp_path / "slurm" / "bin" / "scancel"
    scancel.write_text(f"{scancel.read_text().replace('exec ', '')}exit 1\n")
    every = [{"x": x, "model.y": "b"} for x in (3, 1, 2)]

    def interrupted(trial: _sweep.Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _sweep.run_on_cluster(
            _sweep.trials(read(sweep()), every, tmp_path / "out", []),
            None, "group", interrupted, folder=tmp_path / "submitit", options={},
        )  # fmt: skip
    assert len(calls(tmp_path / "slurm", "scancel")) == 2


def test_wandbs_agent_gets_the_very_same_file(
    sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    import recipes._loggers

    made: list[Any] = []
    monkeypatch.setattr(recipes._loggers, "wandb_mode", lambda switch: ("online", ""))
    monkeypatch.setattr(wandb, "sweep", lambda content, project: made.append((content, project)) or "abc123")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$WANDB_PROJECT" "$@" >> {tmp_path}/agents\necho gone wrong\nexit $CODE\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("CODE", "0")
    file = sweep()
    assert main([str(file), "--on", "wandb", "--jobs", "2", "--runs", "5"]) == 0
    assert made == [(yaml.safe_load(file.read_text()), "perturbation-recipes")]
    found = sorted((tmp_path / "agents").read_text().splitlines())
    start = "perturbation-recipes -m wandb agent --forward-signals --count"
    assert found == [f"{start} 2 abc123", f"{start} 3 abc123"]
    assert main([str(file), "--on", "wandb", "--jobs", "4", "--runs", "2"]) == 0  # no agent without a count
    assert (tmp_path / "agents").read_text().splitlines()[2:] == [f"{start} 1 abc123"] * 2
    monkeypatch.setenv("CODE", "4")
    assert main([str(file), "--on", "wandb"]) == 1
    assert "an agent ended with 4: gone wrong" in capsys.readouterr().err
