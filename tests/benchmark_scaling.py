"""What a step costs on several ranks, and what they say to each other: a part of ``tests.benchmarks``.

Ranks are gloo processes with one thread each, on this machine. Where there are more of them than cores they share the
cores, so the time of a step shows what DDP and the techniques' messages cost *and* that the processes wait for a core;
it doesn't show a cluster's network. What is sent doesn't depend on the machine: a rank that all-reduces B bytes with
n - 1 others sends and receives ``2 (n - 1) / n B`` (a ring); a broadcast of B bytes brings each rank B.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.processes import model_of, ranks

HOME = Path(__file__).parents[1]
#: The core recipes' default configs, and what is changed in them here; the steps are the first ones.
DEFAULTS: dict[str, list[str]] = {
    "advstyle": [],
    "advstyle with SAM": ["--trainer.callbacks+=SAM"],
    "coprompt": [],
    "noise_mask": ["--model.stage", "pretrain", "--model.pretrain_epochs", "50", "--model.compare", "false"],
    "scalelong": [],
    "adversarial_training": ["--trainer.callbacks", "null"],  # evaluation alone
    "attention_at": ["--trainer.callbacks", "null"],
}
#: Configs of the papers' protocols: recipe, config, and what the model otherwise takes from the data.
PAPERS: list[tuple[str, str, dict[str, Any]]] = [
    ("advstyle", "pacs", {"num_classes": 7, "image_size": 224}),
    ("coprompt", "imagenet", {"class_names": ["a", "b"]}),
    ("noise_mask", "radimagenet", {"num_classes": 165, "image_size": 224}),
    ("scalelong", "cifar10", {"image_size": 32}),
    ("scalelong", "imagenet256", {"image_size": 32, "in_chans": 4, "num_classes": 1000}),
    ("adversarial_training", "cifar10_standard", {"num_classes": 10, "image_size": 32}),
    ("adversarial_training", "cifar10_trades", {"num_classes": 10, "image_size": 32}),
    ("attention_at", "imdb", {"num_classes": 2, "vocabulary": ["<pad>", "<unk>", *(f"w{i}" for i in range(20_000))]}),
]
#: Steps before those that are measured.
WARM = 3


class Listener(Callback):
    """Times steps and counts what this rank hands to the others, by kind; writes both at the end.

    Args:
        file: where to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.times: list[float] = []
        #: Bytes handed over by kind since the steps that are measured began.
        self.bytes: Counter[str] = Counter()
        self._originals: dict[str, Any] = {}
        self._in_hook = False

    def _count(self, name: str, *args: Any, **options: Any) -> Any:
        if self._in_hook:  # counted there
            return self._originals[name](*args, **options)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, options)) if isinstance(t, torch.Tensor)]
        if name == "all_gather":  # what it gives, and what it is given, which comes last
            tensors = tensors[-1:]
        kind = {"_broadcast_coalesced": "buffers"}.get(name, name)
        self.bytes[kind] += sum(t.nbytes for t in tensors)
        return self._originals[name](*args, **options)

    def _hook(self, state, bucket):  # torch compares annotations, and here they would be strings
        self.bytes["gradients"] += bucket.buffer().nbytes
        self._in_hook = True
        try:
            return allreduce_hook(state, bucket)
        finally:
            self._in_hook = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(None, self._hook)
        for name in ("all_reduce", "all_gather", "broadcast", "_broadcast_coalesced") if trainer.world_size > 1 else ():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, functools.partial(self._count, name))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == WARM:
            self.bytes.clear()
        if len(self.times) == trainer.max_steps:
            self._end(pl_module)

    def _end(self, module: LightningModule) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        times = [b - a for a, b in zip(self.times[WARM - 1 :], self.times[WARM:], strict=False)]
        per_step = {kind: count / len(times) for kind, count in self.bytes.items()}
        trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        self.file.write_text(json.dumps({"times": times, "bytes": per_step, "trained": trained}))


# ---------------------------------------------------------------------- measured


def one_rank(recipes: Sequence[str], steps: int, folder: Path) -> None:
    """Train each recipe's default config for some steps; called in each of the processes."""
    torch.set_num_threads(1)
    from recipes._cli import run

    rank, world = os.environ["LOCAL_RANK"], int(os.environ["WORLD_SIZE"])
    for recipe in recipes:
        words = ["fit", *DEFAULTS[recipe], "--wandb", "off", "--test_after_fit", "false"]
        words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(world), "--trainer.max_epochs", "50"]
        words += ["--trainer.strategy", "ddp" if world > 1 else "auto", "--trainer.enable_checkpointing", "false"]
        words += ["--trainer.max_steps", str(steps + WARM), "--trainer.limit_val_batches", "0"]
        words += ["--trainer.default_root_dir", str(folder / "runs"), "--trainer.num_sanity_val_steps", "0"]
        words += ["--trainer.callbacks+=tests.benchmark_scaling.Listener"]
        words += ["--trainer.callbacks.file", str(folder / f"{recipe}-{world}-{rank}.json")]
        name = recipe.split(" ")[0]
        code = run(model_of(name), name, words)
        if code:
            raise SystemExit(code)


def measure(recipes: Sequence[str], worlds: Sequence[int], steps: int, folder: Path) -> dict[tuple[str, int], Any]:
    """What :class:`Listener` found of a recipe's first rank, by recipe and number of ranks.

    Raises:
        RuntimeError: if a rank fails.
    """
    found: dict[tuple[str, int], Any] = {}
    for world in worlds:
        command = [sys.executable, "-m", "tests.benchmark_scaling", str(folder), str(steps), *recipes]
        for rank, end in enumerate(ranks(command, world, folder, 3600)):
            if end.code:
                raise RuntimeError(f"rank {rank} of {world} ended with {end.code}: {end.err[-600:]}")
        for recipe in recipes:
            found[recipe, world] = json.loads((folder / f"{recipe}-{world}-0.json").read_text())
    return found


def on_the_wire(of: dict[str, float], world: int) -> float:
    """Bytes that a rank sends in a step, of what it hands over: reduced or gathered in a ring, the rest as it is."""
    ring = 2 * (world - 1) / world
    factor = {"gradients": ring, "all_reduce": ring, "all_gather": world - 1.0}
    return sum(count * factor.get(kind, 1.0) for kind, count in of.items())


# ---------------------------------------------------------------------- computed


def of_paper(recipe: str, config: str, data: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the gradients and of the buffers that DDP sends in a step of a paper's config, without techniques."""
    import importlib

    module, _, name = model_of(recipe).rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    model = dict(yaml.safe_load((HOME / "configs" / recipe / f"{config}.yaml").read_text())["model"])
    for key in ("pretrained", "vae", "embeddings"):
        model.pop(key, None)
    if recipe == "coprompt":
        model["technique"] = "coprompt"
    torch.manual_seed(0)
    network = cls(**{**model, **data})
    gradients = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    left_out = getattr(network, "_ddp_params_and_buffers_to_ignore", ())
    buffers = sum(b.nbytes for n, b in network.named_buffers() if n not in left_out)
    return gradients, buffers


# ---------------------------------------------------------------------- the tables


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB" if count >= 1000 else f"{count:.0f} B"


def scaling_table(quick: bool, steps: int) -> None:
    """Prints both tables.

    Args:
        quick: two recipes and two ranks.
        steps: that are measured.
    """
    recipes = ["coprompt", "scalelong"] if quick else list(DEFAULTS)
    worlds = [1, 2] if quick else [1, 2, 4]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(recipes, worlds, steps, Path(folder))
    print(f"median of {steps} steps, batch of each rank as in the default config, {os.cpu_count()} cores")
    heads = [f"{n} ranks" if n > 1 else "step, 1 rank" for n in worlds]
    print(f"\n| recipe | {' | '.join(heads)} | trained weights | handed over a step by a rank of {worlds[-1]} | sent |")
    print("|" + " -- |" * (len(worlds) + 4))
    for recipe in recipes:
        times = [statistics.median(found[recipe, world]["times"]) for world in worlds]
        cells = [f"{1e3 * times[0]:.0f} ms", *(f"{t / times[0]:.2f} x" for t in times[1:])]
        last = found[recipe, worlds[-1]]
        parts = ", ".join(f"{kind} {_size(n)}" for kind, n in sorted(last["bytes"].items(), key=lambda x: -x[1]))
        sent = on_the_wire(last["bytes"], worlds[-1])
        print(f"| {recipe} | {' | '.join(cells)} | {_size(last['trained'])} | {parts} | {_size(sent)} |", flush=True)
    if quick:
        return
    print("\n| paper's config | gradients a step | buffers | sent by a rank of 2 | 8 | 64 |")
    print("|" + " -- |" * 6)
    for recipe, config, data in PAPERS:
        gradients, buffers = of_paper(recipe, config, data)
        of = {"gradients": float(gradients), "buffers": float(buffers)}
        cells = [_size(on_the_wire(of, world)) for world in (2, 8, 64)]
        print(f"| {recipe}, {config} | {_size(gradients)} | {_size(buffers)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    one_rank(sys.argv[3:], int(sys.argv[2]), Path(sys.argv[1]))
