"""``python -m tests.cli.killer toy OUT``: a run killed with SIGKILL again and again, beside one that isn't.

One process imports torch and Lightning and forks one child for each attempt, which runs the command line as a process
of its own would: starting Python takes longer than training here. All attempts are the same command, with
``--ckpt_path last?``, as a cluster's requeue gives it. Attempt i is killed when the run reaches the i-th of some steps
drawn at random, at a random moment of it: in the step, in the middle of writing a checkpoint, or while it starts.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import callbacks.report
from recipes import _app, _atomic
from recipes._checkpoints import _load
from recipes._cli import run
from tests.cli.conftest import TOY, metrics, same
from tests.processes import model_of

#: What makes each core recipe small: a few dozen steps of some milliseconds.
_RESNET = ("--model.backbone_args", "{channels: [8, 8, 16, 16], stem_width: 8}", "--model.channels_last", "false")
SMALL: dict[str, tuple[str, ...]] = {
    "toy": ("--data", "ToyData", "--data.size", "96", "--trainer.max_epochs", "4"),
    "advstyle": (*_RESNET, "--data.image_size", "32", "--data.batch_size", "16"),
    "coprompt": ("--data.shots", "4",),
    "noise_mask": (*_RESNET, "--data.train_size", "160", "--data.batch_size", "16", "--model.pretrain_epochs", "2",
                   "--model.compare", "false"),
    "scalelong": ("--model.network_args", "{block_out_channels: [8, 16, 16], layers_per_block: 1, norm_num_groups: 8, "
                  "attention_head_dim: 8, down_block_types: [DownBlock2D, DownBlock2D, DownBlock2D], up_block_types: "
                  "[UpBlock2D, UpBlock2D, UpBlock2D]}", "--data.batch_size", "16", "--model.warmup_steps", "10",
                  "--model.test_samples", "0", "--model.sample_steps", "2", "--model.num_samples", "4"),
    "adversarial_training": (*_RESNET[:2], "--data.batch_size", "32", "--model.steps", "2"),
    "attention_at": ("--model.embedding_dim", "16", "--model.hidden", "16", "--data.batch_size", "8",
                     "--data.max_tokens", "32"),
}  # fmt: skip
#: The same for all but the toy.
SHORT = ("--trainer.max_epochs", "4", "--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "2")
WHERE = ("step", "bytes", "written", "replaced", "start")


def dotted(recipe: str) -> str:
    return TOY if recipe == "toy" else model_of(recipe)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """Ends this process where it is told to, and keeps in shared memory how many optimizer steps are done, how many
    seconds passed before the first, and in how many the parent shall end it.

    Args:
        seen: shared memory of 24 bytes.
        step: from which on; -1: never.
        where: ``step``: some moment within a step or what follows it; ``bytes``, ``written``, ``replaced``: while a
            checkpoint is written, when it is written and not in its place, right after it is in its place; ``start``:
            before the first step.
        draw: draws the moment.
    """

    def __init__(self, seen: mmap.mmap, step: int, where: str, draw: random.Random) -> None:
        self.seen, self.step, self.where, self.draw = seen, step, where, draw
        self.began, self.lasted, self.forked = 0.0, 0.02, 0.0
        self.armed = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if not self.began:
            self.seen[8:16] = struct.pack("d", now - self.forked)
        self.lasted, self.began = (now - self.began if self.began else self.lasted), now
        if self.where == "start" or (self.where == "step" and self.armed and trainer.global_step > self.step + 2):
            die()  # the parent is late
        if trainer.global_step < self.step or self.step < 0 or self.armed:
            return
        self.armed = True
        if self.where == "step":
            self.in_seconds(self.draw.uniform(0, 2 * min(self.lasted, 1)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen[:8] = struct.pack("q", trainer.global_step)

    def in_seconds(self, delay: float) -> None:
        """Ask the parent to end this process then: it can do so in the middle of anything."""
        self.seen[16:] = struct.pack("d", max(delay, 1e-6))

    def patch(self) -> None:
        """Hang this on every trainer, behind all other callbacks but the checkpoints, and on what writes those."""
        self.forked = time.monotonic()
        if self.where == "start":
            self.in_seconds(self.draw.uniform(0, struct.unpack("d", self.seen[8:16])[0]))
        init, put, save = _app.AtomicTrainer.__init__, _atomic.put_in_place, torch.save

        def __init__(trainer: Any, **options: Any) -> None:
            init(trainer, **options)
            trainer.callbacks.insert(len(trainer.callbacks) - 2, self)

        def put_in_place(new: Path, place: Path) -> None:
            if self.armed and self.where == "written":
                die()
            put(new, place)
            if self.armed and self.where == "replaced":
                die()

        def torch_save(checkpoint: Any, opened: Any) -> None:
            if self.armed and self.where == "bytes":
                opened = _Dying(opened, self.draw.randrange(_atomic._bytes_of(checkpoint) + 2000))
            save(checkpoint, opened)

        _app.AtomicTrainer.__init__ = __init__  # type: ignore[method-assign]
        _atomic.put_in_place = put_in_place
        _atomic.torch = type(sys)("torch")  # type: ignore[assignment]
        _atomic.torch.__dict__.update(torch.__dict__, save=torch_save)


class _Dying:
    """A file that ends the process after so many bytes."""

    def __init__(self, opened: Any, left: int) -> None:
        self.opened, self.left = opened, left

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self.left:
            self.opened.write(memoryview(data).cast("B")[: self.left])
            self.opened.flush()
            die()
        self.left -= size
        return int(self.opened.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened, name)


def attempt(recipe: str, argv: list[str], log: Path, kill: Kill) -> int:
    """Run the command in a forked child; its exit code, negative where a signal ended it."""
    kill.seen[16:] = bytes(8)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
            kill.patch()
            code = run(dotted(recipe), recipe, argv)
            sys.stdout.flush()
        finally:
            os._exit(code)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        delay = struct.unpack("d", kill.seen[16:])[0]
        if delay:
            kill.seen[16:] = bytes(8)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def the_run(root: Path, recipe: str) -> Path | None:
    """The run that has a checkpoint; those killed before their first one are left aside."""
    found = [f.parent.parent for f in root.glob(f"{recipe}/*/checkpoints/last.ckpt")]
    assert len(found) < 2, f"went on in another folder: {found}"
    return found[0] if found else None


def torment(recipe: str, out: Path, kills: int, every: int, seed: int, more: list[str]) -> dict[str, Any]:
    """Kill a run so many times and let it end.

    Returns:
        What was found; ``problems`` is empty where all is well.
    """
    draw = random.Random(f"{recipe} {seed}")
    words = [*SMALL[recipe], *(SHORT if recipe != "toy" else ()), *more]
    argv = ["fit", *words, "--trainer.log_every_n_steps", "1", "--last_every_n_steps", str(every), "--wandb", "off",
            "--test_after_fit", "false", "--trainer.accelerator", "cpu", "--ckpt_path", "last?",
            "--trainer.default_root_dir"]  # fmt: skip
    seen = mmap.mmap(-1, 24)
    began = time.monotonic()
    code = attempt(recipe, [*argv, str(out / "whole")], out / "whole.log", Kill(seen, -1, "", draw))
    whole = the_run(out / "whole", recipe)
    if code != 0 or whole is None:
        raise RuntimeError(f"the run that isn't killed ends with {code}: {(out / 'whole.log').read_text()[-2000:]}")
    reference = _load(whole / "checkpoints" / "last.ckpt")
    steps = sorted(draw.randrange(reference["global_step"] - 2 * every) for _ in range(kills))
    kinds = [WHERE[i % len(WHERE)] for i in range(kills)]
    draw.shuffle(kinds)
    found: dict[str, Any] = {"recipe": recipe, "steps": reference["global_step"], "every": every, "kills": 0,
                             "where": dict.fromkeys(WHERE, 0), "lost": [], "opened": 0, "problems": []}  # fmt: skip
    problems = found["problems"]
    root, saved = out / "killed", 0
    for i, (step, where) in enumerate(zip(steps, kinds, strict=True)):
        seen[:8] = struct.pack("q", saved)
        kill = Kill(seen, step, where, random.Random(f"{recipe} {seed} {i}"))
        code = attempt(recipe, [*argv, str(root)], out / "killed.log", kill)
        if code != -signal.SIGKILL:
            problems.append(f"attempt {i}, to be killed ({where}) at step {step}, ended with {code}")
            continue
        found["kills"] += 1
        found["where"][where] += 1
        here = the_run(root, recipe)
        done, saved = struct.unpack("q", seen[:8])[0], 0
        for file in root.glob(f"{recipe}/*/checkpoints/*.ckpt"):
            try:
                content = _load(file)
                found["opened"] += 1
            except Exception as error:
                problems.append(f"after kill {i} ({where}): {error}")
                continue
            if file.name == "last.ckpt":
                saved = content["global_step"]
        found["lost"].append(max(done - saved, 0))
        if done - saved > every:
            problems.append(f"kill {i} ({where}): {done} steps were done, {saved} are saved")
        if here is not None and not set(range(saved)) <= {int(r["step"]) for r in metrics(here)}:
            problems.append(f"kill {i} ({where}): metrics.csv lacks steps before {saved}")
    code = attempt(recipe, [*argv, str(root)], out / "killed.log", Kill(seen, -1, "", draw))
    here = the_run(root, recipe)
    if code != 0 or here is None:
        problems.append(f"the last attempt ended with {code}: {(out / 'killed.log').read_text()[-1500:]}")
        return found
    final = _load(here / "checkpoints" / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        if not same(reference[part], final[part]):
            problems.append(f"{part} of last.ckpt differ from those of the run that wasn't killed")
    for file in (whole / "checkpoints").glob("best*.ckpt"):
        other = here / "checkpoints" / file.name
        if not other.is_file() or not same(_load(file)["state_dict"], _load(other)["state_dict"]):
            problems.append(f"{file.name} differs from that of the run that wasn't killed")
    if metrics(whole) != metrics(here):
        a, b = metrics(whole), metrics(here)
        first = next((x for x in zip(a, b, strict=False) if x[0] != x[1]), (len(a), len(b)))
        problems.append(f"metrics.csv differs: {first}")
    left = [f.name for f in here.rglob(f"*{_atomic.PARTIAL}")]
    if left:
        problems.append(f"left behind: {left}")
    found["seconds"] = round(time.monotonic() - began)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=SMALL)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given, more = parser.parse_known_args()
    given.out.mkdir(parents=True)
    torch.set_num_threads(1)
    callbacks.report.save_figure = lambda *_: None  # type: ignore[assignment]  # takes longer than training
    _app.import_plugs()
    __import__(dotted(given.recipe).rpartition(".")[0])
    found = torment(given.recipe, given.out, given.kills, given.every, given.seed, more)
    print(json.dumps(found))
    return int(bool(found["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
