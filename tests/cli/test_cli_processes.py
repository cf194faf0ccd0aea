"""What only a process of its own can show: a terminal, a newcomer's first run, and several ranks."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from conftest import HOME, Result, checkpoint, config, metrics, same

Run = Callable[..., Result]
TWO_RANKS = (
    "fit", "--data", "ToyData", "--wandb", "off", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1,
    "--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp",
)  # fmt: skip


def on_a_terminal(words: Sequence[str], seconds: float = 120) -> tuple[int, str]:
    """Exit code and everything written by a command whose streams are a terminal of 100 columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(HOME)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, "-m", *words])
    out, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not piece:
                break
            out += piece
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out.decode()


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    words = ["--data", "ToyData", "--trainer.default_root_dir", str(root), "--wandb", "off", "--model.wait", "0.05"]
    code, out = on_a_terminal(["tests.cli.toyrun", "fit", *words, "--trainer.max_epochs", "2"])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert code == 0, plain
    states = [re.sub(r"\s+", " ", part) for part in re.split(r"[\r\n]+", plain)]
    bars = [s for s in states if s.startswith("epoch ")]
    full = r"epoch 2/2 \S+ \d+/12 train/loss [\d.]+ val/acc [\d.]+ [\d,]+ images/s eta 0:0\d"
    assert any(re.match(full, state) for state in bars), bars
    assert "\x1b[?25h" in out[out.rindex("\x1b[?25l") :]  # the cursor is shown again
    (run,) = (root / "toy").iterdir()
    end = [s for s in states[states.index("metric value") :] if s]
    assert f"run {run}" in end and f"best {run}/checkpoints/best.ckpt" in end  # in one piece, longer than a line
    assert "epoch 1/2  train/loss" in (run / "run.log").read_text()
    assert "Warning" not in plain and "💡" not in plain


def test_newcomers_first_run_is_clean(command: Run, tmp_path: Path) -> None:
    """The toy as a process: no terminal, no account, nothing but our lines, and nothing on stderr."""
    words = ("fit", "--data", "ToyData", "--trainer.max_epochs", 1, "--trainer.default_root_dir")
    result = command(*words, tmp_path / "runs")
    assert result.code == 0 and result.err == ""
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "toy:", "epoch", "metrics", "best", "test/acc", "train/loss", "val/acc",
        "where", "run", "best", "last", "plots", "W&B",
    ]  # fmt: skip
    assert "\x1b" not in result.out


def test_directory_that_hides_a_package_is_named(tmp_path: Path) -> None:
    """``python -m`` puts the working directory first: a package of the same name there is found instead of ours."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(HOME)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    hidden = call("-m", "recipes.advstyle", "fit")
    assert hidden.returncode == 2 and f"hides our package 'callbacks': {tmp_path / 'callbacks'}" in hidden.stderr
    assert call("-m", "recipes.advstyle", "--help").returncode == 0


# ---------------------------------------------------------------------- two ranks


def two_started_by_hand(*commands: Sequence[object]) -> list[tuple[int, str, str]]:
    """Commands run one after the other by two ranks that something else than Lightning starts, as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = json.dumps([list(map(str, words)) for words in commands])
    ranks = []
    for rank in range(2):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = {**os.environ, **place, "WORLD_SIZE": "2"}
        words = [sys.executable, "-m", "tests.cli.ranks", text]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        ranks.append(subprocess.Popen(words, cwd=HOME, env=environment, text=True, **pipes))
    ends = [process.communicate(timeout=120) for process in ranks]
    return [(process.returncode, *end) for process, end in zip(ranks, ends, strict=True)]


def test_two_ranks_share_a_folder_stop_together_and_go_on(command: Run, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # only the first rank gets the signal, in the middle of the second epoch (6 steps each)
    words = ("--trainer.callbacks", "Signal", "--trainer.callbacks.step", 7, "--trainer.callbacks.name", "SIGTERM")
    result = command(*TWO_RANKS, "--trainer.default_root_dir", stopped, *words)
    assert result.code == 143 and result.out.count("stopped by SIGTERM") == 1, result.err
    assert not still_running(str(stopped))
    (b,) = (stopped / "toy").iterdir()
    assert checkpoint(b)["global_step"] in (8, 9, 10)
    assert int(config(b)["trainer"]["devices"]) == 2

    go_on = ("fit", "--ckpt_path", "last", "--trainer.callbacks", "null", "--trainer.default_root_dir", stopped)
    predict = ("predict", "--ckpt_path", "last", "--trainer.default_root_dir", whole)
    ends = two_started_by_hand((*TWO_RANKS, "--trainer.default_root_dir", whole), go_on, predict)
    assert [(code, err) for code, _, err in ends] == [(0, ""), (0, "")]
    assert ends[0][1].count("epoch 1/2") == 1 and "2 ranks" in ends[0][1] and ends[1][1] == ""  # the first one speaks
    (prediction,) = (whole / "toy").glob("*/predictions-0.pt")
    parts = [torch.load(prediction.with_name(f"predictions-{rank}.pt"), weights_only=True) for rank in range(2)]
    assert [part["index"].tolist() for part in parts] == [list(range(32))] * 2  # the toy's test data isn't cut by rank
    (a,) = (f for f in (whole / "toy").iterdir() if f != prediction.parent)
    assert {f.name for f in a.iterdir()} == {"config.yaml", "metrics.csv", "run.log", "plots", "checkpoints"}
    x, y = checkpoint(a), checkpoint(b)
    assert x["global_step"] == y["global_step"] == 12
    assert same(x["state_dict"], y["state_dict"]) and same(x["optimizer_states"], y["optimizer_states"])
    assert metrics(a) == metrics(b)


def still_running(text: str) -> list[str]:
    """Processes whose command line holds a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # ended meanwhile
            continue
        if text in line and "pytest" not in line.split()[2:3]:
            found.append(line)
    return found


def test_bad_input_on_two_ranks_is_one_line(command: Run, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    result = command(*TWO_RANKS, "--trainer.default_root_dir", root, "--data.nan_at", 50)
    assert result.code == 2 and len(result.error_lines) == 1, result.err
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    place = int((order == 50).nonzero())
    rank, step = place % 2, place // 16
    batch = order[rank::2][8 * step : 8 * step + 8].tolist()
    (run,) = (root / "toy").iterdir()
    file = run / f"nonfinite-step{step}-rank{rank}.pt"
    said = f"rank {rank}: the loss is nan at step {step} (epoch 0, batch {step}, examples {', '.join(map(str, batch))})"
    assert said in result.error_lines[0]
    assert torch.load(file, weights_only=True)["batch"]["index"].tolist() == batch
    assert not still_running(str(root)) and not list(run.glob("checkpoints/last.ckpt"))
