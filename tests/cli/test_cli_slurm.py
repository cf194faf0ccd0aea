"""Clusters: SLURM's requeue, the job scripts of configs/cluster, and ranks that torchrun or SLURM starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import HOME, Result, checkpoint, metrics, same
from fake_slurm import SBATCH, calls, directives, install, parse
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes._cli import CONFIGS, run

Run = Callable[..., Result]
FIT = ("fit", "--trainer.max_epochs", 3, "--trainer.log_every_n_steps", 1, "--ckpt_path", "last?", "--data", "ToyData")
USR1 = ("--trainer.callbacks", "Signal", "--trainer.callbacks.name", "SIGUSR1", "--trainer.callbacks.step")
JOB = {
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "recipe", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A fake SLURM on the PATH; its folder."""
    place = tmp_path / "slurm"
    os.environ["PATH"] = f"{install(place)}{os.pathsep}{os.environ['PATH']}"
    return place


@pytest.fixture
def task(slurm: Path) -> Path:
    """This process is the only rank of a SLURM job."""
    os.environ |= JOB
    return slurm


def equal_runs(a: Path, b: Path) -> None:
    x, y = checkpoint(a), checkpoint(b)
    assert x["global_step"] == y["global_step"] > 0
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(x[part], y[part]), part
    assert metrics(a) == metrics(b)


# ---------------------------------------------------------------------- the requeue


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (17, ()),
        (11, ()),  # the last step of an epoch
        (7, ("--trainer.accumulate_grad_batches", 3)),
        (5, ("--trainer.val_check_interval", 0.5)),  # is followed by a validation
    ],
)
def test_requeued_job_goes_on_as_if_it_had_never_been_stopped(
    cli: Run, task: Path, tmp_path: Path, step: int, words: tuple[object, ...]
) -> None:
    whole = cli(*FIT, *words, "--trainer.default_root_dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    first = cli(*FIT, *USR1, step, *words)
    assert first.code == 128 + signal.SIGUSR1, first.err
    assert calls(task, "scontrol") == [["requeue", "4242"]]
    assert "SLURM requeues job 4242, which goes on from there" in first.out and first.error_lines == []
    assert step < checkpoint(first.run)["global_step"] <= step + 3
    assert not list(first.run.rglob("hpc_ckpt*"))
    os.environ["SLURM_RESTART_COUNT"] = "1"
    second = cli(*FIT, *USR1, step, *words)  # SLURM runs the same job script again
    assert second.code == 0 and len(calls(task, "scontrol")) == 1, second.err
    (a,) = (tmp_path / "whole" / "toy").iterdir()
    equal_runs(a, second.run)  # in the same folder


def test_task_of_an_array_is_requeued_by_its_own_name(cli: Run, task: Path) -> None:
    os.environ |= {"SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": "3"}
    cli(*FIT, *USR1, 4)
    assert calls(task, "scontrol") == [["requeue", "4000_3"]]


def test_job_that_would_begin_anew_each_time_is_not_requeued(cli: Run, task: Path) -> None:
    words = [word for word in FIT if word not in ("--ckpt_path", "last?")]
    result = cli(*words, *USR1, 4)
    assert result.code == 138 and checkpoint(result.run)["global_step"] == 5 and not calls(task, "scontrol")
    assert "the job isn't requeued: without 'fit --ckpt_path last?' it would begin anew" in result.err


def test_job_that_never_saved_is_requeued_once(cli: Run, task: Path) -> None:
    """The signal comes before training, in the validation that Lightning begins with: a place of no progress."""
    early = ("--trainer.callbacks", "tests.cli.test_cli_slurm.Early")
    assert cli(*FIT, *early).code == 138 and len(calls(task, "scontrol")) == 1
    os.environ["SLURM_RESTART_COUNT"] = "1"
    result = cli(*FIT, *early)
    assert result.code == 138 and len(calls(task, "scontrol")) == 1
    assert "it was requeued before, and still hadn't saved anything" in result.err


def test_slurm_that_refuses_is_quoted(cli: Run, task: Path) -> None:
    (task / "refuse").write_text("Requested operation is presently disabled")
    result = cli(*FIT, *USR1, 4)
    assert result.code == 138 and checkpoint(result.run)["global_step"] == 5
    assert "SLURM doesn't requeue job 4242 (Requested operation is presently disabled)" in result.err


def test_requeue_can_be_switched_off_as_lightning_has_it(cli: Run, task: Path) -> None:
    plugin = "lightning.pytorch.plugins.environments.SLURMEnvironment"
    result = cli(*FIT, *USR1, 4, "--trainer.plugins", plugin, "--trainer.plugins.auto_requeue", "false")
    assert result.code == 138 and not calls(task, "scontrol") and "auto_requeue is off" in result.err


def test_cancelled_job_is_not_requeued(cli: Run, task: Path) -> None:
    """``scancel`` sends SIGTERM: the run saves, and that is all."""
    result = cli(*FIT, "--trainer.callbacks", "Signal", "--trainer.callbacks.name", "SIGTERM",
                 "--trainer.callbacks.step", 4)  # fmt: skip
    assert result.code == 143 and checkpoint(result.run)["global_step"] == 5 and not calls(task, "scontrol")


def test_signal_has_no_meaning_of_ours_outside_slurm(cli: Run) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, _: seen.append(signum))
    try:
        assert cli(*FIT, *USR1, 4).code == 0 and seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---------------------------------------------------------------------- the job scripts


@pytest.mark.parametrize("file", sorted((CONFIGS / "cluster").glob("*.sbatch")), ids=lambda f: f.stem)
def test_a_job_script_asks_for_what_slurm_has(file: Path) -> None:
    options, rest = parse("sbatch", SBATCH, directives(file))
    assert rest == [] and {"requeue", "nodes", "ntasks-per-node", "gpus-per-node", "time", "output"} <= options.keys()
    assert re.fullmatch(r"USR1@\d+", options["signal"]) and options["open-mode"] == "append"
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_command_of_the_job_script_is_one_that_the_recipe_takes(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "bin" / "python").write_text('#!/bin/sh\n[ $SLURM_PROCID != 0 ] || printf "%s\\n" "$@"\n')
    words = ["advstyle", "--config", "pacs", "--model.lr", "0.02", "--print_config"]
    script = CONFIGS / "cluster" / "slurm.sbatch"
    subprocess.run(["sbatch", "--wait", "--nodes=3", "--ntasks-per-node=1", script, *words], cwd=tmp_path, check=True)
    typed = (tmp_path / "slurm-4242.log").read_text().splitlines()
    assert typed[:3] == ["-m", "recipes.advstyle", "fit"]
    assert run("recipes.advstyle.module.DomainGeneralizer", "advstyle", typed[2:]) == 0
    taken = yaml.safe_load(capsys.readouterr().out)
    assert taken["trainer"]["num_nodes"] == 3 and int(taken["trainer"]["devices"]) == 1
    assert taken["trainer"]["default_root_dir"] == "runs/slurm-4242" and taken["model"]["lr"] == 0.02


def test_job_script_without_a_recipe_says_how(slurm: Path, tmp_path: Path) -> None:
    for name in ("slurm", "sweep"):
        done = subprocess.run(
            ["sbatch", "--wait", f"--output={name}.log", CONFIGS / f"cluster/{name}.sbatch"], cwd=tmp_path
        )
        assert done.returncode != 0 and "[options of" in (tmp_path / f"{name}.log").read_text()


# ---------------------------------------------------------------------- several ranks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def torchrun(nodes: int, each: int, words: list[object], timeout: float = 600) -> None:
    """As README says it: the same command on each node."""
    end = f"127.0.0.1:{free_port()}"
    commands = []
    for _ in range(nodes):
        options = ["--nnodes", nodes, "--nproc_per_node", each, "--rdzv_backend", "c10d", "--rdzv_endpoint", end]
        ranks = ["--trainer.num_nodes", nodes, "--trainer.devices", each]
        argv = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.cli.toyrun", *words, *ranks]
        commands.append(subprocess.Popen([*map(str, argv)], cwd=HOME, env={**os.environ, "PYTHONPATH": str(HOME)}))
    assert [command.wait(timeout) for command in commands] == [0] * nodes


def on_cpu(root: Path, epochs: int = 2) -> list[object]:
    options = ["--data", "ToyData", "--wandb", "off", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", 1]
    return ["fit", *options, "--trainer.max_epochs", epochs, "--trainer.default_root_dir", root]


def job(root: Path, log: Path, step: int, *options: str, timeout: float = 600) -> None:
    """The toy by the job script, in which the first rank gets SLURM's signal at a step."""
    verb, *words = map(str, [*on_cpu(root), *USR1, step])
    command = ["sbatch", "--wait", *options, f"--output={log}", CONFIGS / "cluster" / "slurm.sbatch", "toy", *words]
    subprocess.run(command, cwd=HOME, check=True, timeout=timeout)


def test_job_script_goes_on_after_its_requeue(slurm: Path, cli: Run, tmp_path: Path) -> None:
    """From ``sbatch`` to the end, by the script as it is."""
    whole = cli(*on_cpu(tmp_path / "runs"), raw=True)
    log, root = tmp_path / "job.log", tmp_path / "job"
    job(root, log, 15, "--nodes=1", "--ntasks-per-node=1")
    assert calls(slurm, "scontrol") == [["requeue", "4242"]] and len(calls(slurm, "srun")) == 2
    said = log.read_text()
    assert "stopped by SIGUSR1 at step 16" in said and said.count("SLURM requeues job 4242") == 1
    assert "goes on from" in said and said.count("where everything is") == 1
    (run_folder,) = (root / "toy").iterdir()
    equal_runs(whole.run, run_folder)


def test_two_ranks_of_torchrun(tmp_path: Path) -> None:
    torchrun(1, 2, on_cpu(tmp_path))
    (run_folder,) = (tmp_path / "toy").iterdir()
    assert checkpoint(run_folder)["global_step"] == 12
    assert "2 ranks" in (run_folder / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_the_same_by_every_launcher(slurm: Path, command: Run, tmp_path: Path, ranks: int) -> None:
    """Lightning's own, torchrun on one node and on two, and a SLURM job of two nodes that is requeued in between."""
    torchrun(1, ranks, on_cpu(tmp_path / "torchrun"))
    torchrun(2, ranks // 2, on_cpu(tmp_path / "nodes"))
    words = ("--trainer.devices", ranks, "--trainer.strategy", "ddp")
    ours = command(*on_cpu(tmp_path / "lightning"), *words, timeout=600)
    assert ours.code == 0, ours.err
    job(tmp_path / "job", tmp_path / "job.log", 4, "--nodes=2", f"--ntasks-per-node={ranks // 2}", timeout=600)
    assert len(calls(slurm, "scontrol")) == 1
    found = []
    for name in ("torchrun", "nodes", "lightning", "job"):
        (run_folder,) = (tmp_path / name / "toy").iterdir()  # one, of all ranks and both attempts
        found.append(run_folder)
    assert checkpoint(found[0])["global_step"] == 2 * 96 // (8 * ranks)
    for other in found[1:]:
        equal_runs(found[0], other)


class Early(Callback):
    """Sends this process SLURM's signal before anything is trained."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
