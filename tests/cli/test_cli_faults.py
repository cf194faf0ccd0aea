"""What a cluster does to a run: ranks that fail or vanish, a loss that isn't finite, images that do, W&B that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import HOME, Result, checkpoint, config, metrics
from PIL import Image
from wandb_files import offline_files, records, tracked

Run = Callable[..., Result]
FAIL = "tests.cli.faulty.Fail"
#: Two epochs of six steps each.
TWO_RANKS = (
    "fit", "--data", "ToyData", "--wandb", "off", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1,
    "--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp", "--last_every_n_steps", 2,
)  # fmt: skip


# ---------------------------------------------------------------------- ranks


def running(text: str) -> list[int]:
    """Ids of processes whose command line holds a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if text in line and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def two_ranks(root: Path, *words: object, torchrun: bool = False, seconds: float = 240) -> tuple[Result, float]:
    """How a run of two ranks ended, and how long after the moment of its failure the last of its processes did."""
    argv = [sys.executable, "-m"]
    if torchrun:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv += ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "-m"]
    argv += ["tests.cli.toyrun", *map(str, TWO_RANKS), "--trainer.default_root_dir", str(root), *map(str, words)]
    moment = root.parent / "moment"
    environment = {**os.environ, "FAULT_MOMENT": str(moment)}
    process = subprocess.Popen(
        argv,
        cwd=HOME,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        while running(str(root)) and time.time() < moment.stat().st_mtime + 60:
            time.sleep(0.1)
        took = time.time() - moment.stat().st_mtime if moment.exists() else 0.0
        return Result(process.returncode, out, err, root), took
    finally:
        for pid in running(str(root)):  # none, unless the test fails
            os.kill(pid, signal.SIGKILL)


def fault(**settings: object) -> list[object]:
    words: list[object] = ["--trainer.callbacks", FAIL]
    for name, value in settings.items():
        words += [f"--trainer.callbacks.{name}", value]
    return words


CASES = [
    (launcher, rank, where, how)
    for launcher in ("lightning", "torchrun")
    for rank in (0, 1)
    for where, how in (
        ("step", "raise"), ("callback", "raise"), ("validation", "raise"), ("start", "raise"),
        ("step", "sleep"), ("step", "kill"), ("end", "raise"),
    )
]  # fmt: skip
QUICK = [("lightning", 1, "step", "kill"), ("torchrun", 1, "step", "sleep")]


@pytest.mark.parametrize(
    ("launcher", "rank", "where", "how"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_one_rank_fails_and_all_end_with_its_error(
    tmp_path: Path, launcher: str, rank: int, where: str, how: str
) -> None:
    """With ``sleep`` the other rank never comes to a collective operation, as with one that NCCL waits in."""
    step = 0 if where in ("start", "validation") else 3
    words = fault(where=where, rank=rank, step=step, how=how)
    result, took = two_ranks(tmp_path / "runs", *words, torchrun=launcher == "torchrun")
    assert took < 30 and not running(str(tmp_path / "runs"))
    dead = how == "kill" and rank == 0 and launcher == "lightning"  # the very process that was started
    assert result.code == (-signal.SIGKILL if dead else 1), result.err
    at = {"step": 3, "callback": 3, "validation": 6, "start": 0, "end": 12}[where]
    said = f"RuntimeError: boom in {where} at step {at}" if how != "kill" else f"rank {rank} is gone without a word"
    who = " (rank 1)" if rank and how != "kill" else ""
    assert result.error_lines == [f"error: {said}{who}"], result.err
    if how != "kill" and not (where == "end" and rank):  # by then the first rank may have closed its log
        assert f"boom in {where}" in (log := (result.run / "run.log").read_text()) and "Traceback" in log
    rows = [int(row["step"]) for row in metrics(result.run)] if rank or how != "kill" else []
    if rows:  # every step that was done before is in metrics.csv, but for the failing one
        assert sorted({step for step in rows if step < at}) == list(range(at)), rows  # of validations, too
    if step == 3 and where != "end" and how != "sleep":
        assert checkpoint(result.run)["global_step"] == 2


class Strategy:
    """What a rank's connection to the first one takes of a trainer; ``sent`` is shared by the ranks."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        self.world_size, self.global_rank, self.sent, self.broadcasts = 2, rank, sent, 0
        self.strategy = self

    def setup_environment(self) -> None:
        pass

    def broadcast(self, what: Any) -> Any:
        self.broadcasts += 1
        if self.global_rank == 0:
            self.sent[:] = [what]
        return self.sent[0]


def connect(rank: int, sent: list[Any], begins: str = "") -> tuple[Any, Strategy]:
    from recipes._ranks import Ranks
    from recipes._stop import Signals

    ranks, strategy = Ranks(Signals(), lambda verdict: None, begins), Strategy(rank, sent)
    ranks.follow(strategy)  # type: ignore[arg-type]
    strategy.setup_environment()
    return ranks, strategy


@pytest.mark.parametrize("seconds", [0.0, 0.8])
def test_error_of_another_rank_after_the_first_has_ended_well(seconds: float) -> None:
    """All were told of it before, and then the first rank says it; or nobody was, and then the rank itself does."""
    from recipes._ranks import verdict_of

    sent: list[Any] = []
    (first, _), (second, _) = connect(0, sent), connect(1, sent)
    second.tell(verdict_of(1, RuntimeError("boom")))
    time.sleep(seconds)
    told = first.end()
    begun = time.monotonic()
    agreed = second.agreed()
    second.end()
    assert time.monotonic() - begun < 1 and agreed == told
    assert (told is not None and told.rank == 1 and first.says(told)) if seconds else told is None


def test_rank_that_does_not_reach_the_first_goes_on_with_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """The environment is set up for the test after training, too: then no rank is in a collective operation alone."""
    sent: list[Any] = [(1, "", "")]  # a port that nothing listens at
    ranks, strategy = connect(1, sent)
    strategy.setup_environment()
    assert not ranks.connected and strategy.broadcasts == 1
    assert "rank 1 isn't watched" in caplog.text
    ranks.end()


def test_ranks_that_begin_with_other_checkpoints() -> None:
    sent: list[Any] = []
    first, _ = connect(0, sent, "begins with b.ckpt of step 4")
    with pytest.raises(ValueError, match=r"rank 1 begins with a.ckpt of step 3, the first rank begins with b.ckpt"):
        connect(1, sent, "begins with a.ckpt of step 3")
    first.end()


@pytest.mark.parametrize(
    ("message", "weight"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", 0),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.2\nncclRemoteError: ", 0),
        ("NCCL error: unhandled cuda error, NCCL version 2.2\nncclUnhandledCudaError: out of memory", 2),
    ],
)
def test_error_that_another_ranks_end_left_behind(message: str, weight: int) -> None:
    from recipes._ranks import verdict_of

    assert verdict_of(1, RuntimeError(message)).weight == weight


def test_signal_while_the_run_is_being_closed(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import recipes._run

    end, codes = recipes._run.Run.end, []

    def ends(self: Any, code: int = 0) -> None:
        codes.append(code)
        if len(codes) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the handler's exception comes here
        end(self, code)

    monkeypatch.setattr(recipes._run.Run, "end", ends)
    result = cli("fit", "--trainer.fast_dev_run", "true")
    assert (result.code, result.err, codes) == (143, "", [0, 143])


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_notebook_find_unused_parameters_true"])
def test_strategy_that_copies_this_process(cli: Run, name: str) -> None:
    result = cli("fit", "--trainer.strategy", name, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    kind = "_".join(name.split("_")[:2])
    said = f"error: {kind} can't start the ranks of a recipe: use --trainer.strategy {name.replace(kind, 'ddp')}"
    assert result.code == 2 and result.err.splitlines() == [said] and result.runs == []


@pytest.mark.slow
def test_error_in_a_loaders_worker_of_one_rank(tmp_path: Path) -> None:
    result, _ = two_ranks(tmp_path / "runs", "--data.num_workers", 1, "--data.corrupt_at", 50)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    rank = int((order == 50).nonzero()) % 2
    said = f"error: toy 50 can't be read{' (rank 1)' if rank else ''}"
    assert result.code == 2 and result.error_lines == [said] and "Traceback" not in result.err
    assert not running(str(tmp_path / "runs"))


def test_nan_on_one_rank_stops_all_before_it_is_saved(tmp_path: Path) -> None:
    """What is saved is the epoch's end before; the step that is nan and the one that runs beside it aren't lost."""
    result, _ = two_ranks(
        tmp_path / "runs", "--trainer.callbacks", "tests.cli.faulty.Poison", "--trainer.callbacks.step", 7
    )
    assert result.code == 2 and len(result.error_lines) == 1, result.err
    line = result.error_lines[0]
    assert "rank 1: the loss is nan at step 7 (epoch 1, batch 1" in line and "rank 0" not in line
    assert (result.run / "nonfinite-step7-rank1.pt").is_file()
    saved = checkpoint(result.run)
    assert saved["global_step"] == 6 and all(t.isfinite().all() for t in saved["state_dict"].values())
    assert [int(row["step"]) for row in metrics(result.run) if "train/loss" in row] == list(range(8))
    assert not running(str(tmp_path / "runs"))


# ---------------------------------------------------------------------- images


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of 16 images of 16 pixels in each part."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for i in range(16):
                pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return tmp_path / "photographs"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_image_lost_in_the_middle_of_training(cli: Run, photographs: Path, workers: int, how: str) -> None:
    lost = photographs / "train" / "dog" / "07.png"
    lose = ("--trainer.callbacks", "tests.cli.faulty.Lose", "--trainer.callbacks.file", lost)
    result = cli(
        "fit", "--data", "Folders", "--data.root", photographs, "--data.image_size", 16, "--data.batch_size", 8,
        "--data.memory_gb", 0, "--data.num_workers", workers, "--trainer.max_epochs", 3,
        *lose, "--trainer.callbacks.how", how, model="tests.cli.faulty.PhotoNet",
    )  # fmt: skip
    assert result.code == 2 and len(result.error_lines) == 1 and "Traceback" not in result.err, result.err
    assert str(lost) in result.error_lines[0]
    assert "--ckpt_path last" in result.err or "--data.on_corrupt skip" in result.err
    assert checkpoint(result.run)["epoch"] == 0  # that of the epoch before


# ---------------------------------------------------------------------- settings that were renamed


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import recipes._renamed

    table = {"toy": {"model.breadth": "model.width"}, "ToyData": {"amount": "size"}, "Noise": {"scale": "sigma"}}
    monkeypatch.setattr(recipes._renamed, "RENAMED", table)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model.breadth", 3), "--model.breadth is now --model.width"),
        (("--model.breadth=3",), "--model.breadth is now --model.width"),
        (("--data.amount", 3), "--data.amount is now --data.size"),
        (
            ("--trainer.callbacks+=Noise", "--trainer.callbacks.scale", 1),
            "--trainer.callbacks.scale is now --trainer.callbacks.sigma",
        ),
    ],
)
def test_flag_with_an_old_name(cli: Run, renamed: None, words: tuple[object, ...], said: str) -> None:
    result = cli("fit", *words)
    assert result.code == 2 and result.error_lines == [f"error: {said}"] and "hint: type --" in result.err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": {"breadth": 3}}, "model.breadth is now model.width"),
        (
            {"data": {"class_path": "tests.cli.toy.ToyData", "init_args": {"amount": 8}}},
            "data.init_args.amount is now data.init_args.size",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "Noise", "init_args": {"scale": 1}}]}},
            "trainer.callbacks[0].init_args.scale is now trainer.callbacks[0].init_args.sigma",
        ),
    ],
)
def test_config_with_an_old_name(cli: Run, renamed: None, settings: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = cli("fit", "--config", file)
    assert result.code == 2 and result.error_lines == [f"error: {file}: {said}"]
    assert "hint: change the name in that file" in result.err


def test_checkpoint_with_an_old_name_goes_on(cli: Run, renamed: None) -> None:
    run = cli("fit", "--model.width", 24).run
    file = run / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    stored = saved["recipe"]["config"]
    stored["model"]["breadth"] = stored["model"].pop("width")
    stored["data"]["init_args"]["amount"] = stored["data"]["init_args"].pop("size")
    torch.save(saved, file)
    result = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert "model.breadth -> model.width, data.init_args.amount -> data.init_args.size" in result.out
    assert config(run)["model"]["width"] == 24 and checkpoint(run)["global_step"] == 24


# ---------------------------------------------------------------------- W&B


@contextmanager
def server(answer: Callable[[str], float]) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """A server that says yes to everything, after the seconds that ``answer`` gives for a path (below 0: never)."""
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            wait = answer(self.path)
            if closing.wait(3600 if wait < 0 else wait):
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_any

        def log_message(self, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            pass

    here = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=here.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{here.server_address[1]}", here
    finally:
        closing.set()
        here.shutdown()
        here.server_close()


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


LONG = ("fit", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 1)


def complete(run: Path) -> bool:
    rows = metrics(run)
    steps = [int(row["step"]) for row in rows if "train/loss" in row]
    return steps == list(range(24)) and len([row for row in rows if "val/acc" in row]) == 2


def test_wandb_server_that_never_answers(cli: Run, account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda path: -1) as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        begun = time.monotonic()
        result = cli(*LONG, wandb="online")
        took = time.monotonic() - begun
    assert result.code == 0 and result.err == "" and complete(result.run)
    assert f"W&B logs offline: {url} doesn't answer" in result.out and "wandb sync" in result.out
    assert took < 30
    (file,) = offline_files(result.run)
    assert [step for step, _ in tracked(file).curve("train/loss")] == list(range(24))


@pytest.mark.slow
def test_wandb_server_that_answers_and_then_keeps_the_run_from_starting(
    cli: Run, account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(lambda path: 0 if "healthz" in path else -1) as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        begun = time.monotonic()
        result = cli(*LONG, wandb="online")
        took = time.monotonic() - begun
    assert result.code == 0 and complete(result.run) and took < 60
    lines = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert len(lines) == 1 and "W&B doesn't start" in lines[0] and lines[0].endswith("it logs offline")
    assert [step for step, _ in tracked(offline_files(result.run)[-1]).curve("train/loss")] == list(range(24))


@pytest.mark.slow
def test_wandb_server_that_dies(cli: Run, account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import recipes._run

    monkeypatch.setattr(recipes._run.Run, "patience", 8.0)
    seen: list[str] = []

    def answer(path: str) -> float:
        seen.append(path)
        return -1 if len(seen) > 3 else 0.0  # the run has begun

    with server(answer) as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        begun = time.monotonic()
        result = cli(*LONG, wandb="online")
        took = time.monotonic() - begun
    assert result.code == 0 and complete(result.run) and took < 60 and len(seen) > 3, (seen, result.err)
    found = [tracked(file, ended=False).curve("train/loss") for file in offline_files(result.run)]
    assert list(range(24)) in [[step for step, _ in curve] for curve in found], (found, result.err)


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_wandbs_process_dies_or_hangs(cli: Run, name: str) -> None:
    """Every number is in the file that can be synced: W&B's process is lost with all that it hadn't written."""
    words = ("--trainer.callbacks", "tests.cli.faulty.KillWandb", "--trainer.callbacks.name", name)
    begun = time.monotonic()
    result = cli(*LONG, *words, wandb="offline")
    assert time.monotonic() - begun < 60
    assert result.code == 0 and complete(result.run), result.err
    lines = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert len(lines) == 1 and "W&B was lost" in lines[0], result.err
    files = offline_files(result.run)
    assert len(files) == 2 and str(files[-1].parent) in lines[0].replace(str(Path.cwd()) + "/", "")
    last = tracked(files[-1])
    assert [step for step, _ in last.curve("train/loss")] == list(range(24)) and last.id == result.run.name
    assert last.config["model"]["width"] == 16 and last.code == 0
    records(files[0])  # what there is of it can be read


def test_logging_to_wandb_that_raises(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    log, calls = wandb.Run.log, [0]

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 5:
            raise RuntimeError("no more")
        return log(self, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", broken)
    result = cli(*LONG, wandb="offline")
    assert result.code == 0 and complete(result.run), result.err
    lines = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert lines == ["warning: W&B is switched off (no more); the metrics are in metrics.csv"]
