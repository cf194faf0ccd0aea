"""``python -m tests.benchmarks``: what the loop and the techniques cost, as ratios measured side by side in one run.

Times are medians over pairs of steps that follow each other at once, with the quartiles of the ratio, so what else the
machine does falls on both. Memory is what a whole step has allocated at its peak, beyond the weights and the momentum
that stand before it. The techniques are also measured as their papers' codes compute them, in the same place
and with the same layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.exact_resume import ExactResume
from callbacks.layers import backbone_of, find_layers
from callbacks.nonfinite import StopOnNonFinite
from callbacks.perturbation import Perturbation
from callbacks.report import Report
from callbacks.statistics import gradient_reversal
from callbacks.style import DSU, AdvStyle, EFDMix, MixStyle
from datamodules.images import ImageDataModule, ImageSet
from recipes._loggers import MetricsCSV
from recipes._progress import Progress
from recipes._run import quiet
from recipes.classifier import Classifier

# ---------------------------------------------------------------------- what is measured on


class Noise(ImageDataModule):
    """Random images in memory, through the project's own loader."""

    def __init__(self, size: int, batch_size: int, image_size: int) -> None:
        super().__init__(batch_size, seed=0)
        self.size, self.image_size, self.num_classes = size, image_size, 10
        self.class_names, self.domain_names = [str(i) for i in range(10)], ["all"]

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        images = torch.randint(0, 256, (self.size, 3, self.image_size, self.image_size), dtype=torch.uint8)
        label = torch.arange(self.size) % 10
        return ImageSet(images, {"label": label, "domain": torch.zeros_like(label)})


def classifier(backbone: str, image_size: int) -> Classifier:
    torch.manual_seed(0)
    return Classifier(backbone, num_classes=10, image_size=image_size)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(middle), float(low), float(high)


def shown(values: Sequence[float]) -> str:
    middle, low, high = quartiles(values)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


class Peak:
    """Bytes allocated at the peak between :meth:`start` and :meth:`stop`, beyond what stood before."""

    def start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> int:
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
        in_time = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Addr"], e["args"]["Bytes"]) for e in events)
        held: dict[int, int] = {}
        now = peak = 0
        for *_, address, change in in_time:
            if change > 0:
                held[address] = change
                now += change
            else:  # what stood before is no gain, and the profiler is wrong about its size
                now -= held.pop(address, 0)
            peak = max(peak, now)
        return peak


# ---------------------------------------------------------------------- the loop


def plain_step(module: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    loss = module.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()  # a plain loop shows its loss, too


class BareLoopBetween(Callback):
    """After each step of the trainer, the same step of a plain loop; both timed, from one fetch to the next."""

    def __init__(self, module: LightningModule, optimizer: torch.optim.Optimizer, batches: Iterator[Any]) -> None:
        self.module, self.optimizer, self.batches = module, optimizer, batches
        self.pairs: list[tuple[float, float]] = []
        self._begun: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        own = None if self._begun is None else now - self._begun
        begun = time.perf_counter()
        plain_step(self.module, self.optimizer, next(self.batches))
        bare = time.perf_counter() - begun
        if own is not None:
            self.pairs.append((own, bare))
        self._begun = time.perf_counter()


class PeakOfAStep(Callback):
    """Memory of the third step, with the fetch of the batch after it."""

    def __init__(self) -> None:
        self.peak, self.bytes = Peak(), 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.peak.start()
        if batch_idx == 3:
            self.bytes = self.peak.stop()


def fit(module: LightningModule, data: ImageDataModule, between: Callback) -> None:
    """A run as the command line sets it up; its lines go to stderr."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        progress = Progress("val/acc", terminal=False)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[between, ExactResume(), Report(), StopOnNonFinite(), progress],
            logger=MetricsCSV(Path(folder)),
            log_every_n_steps=10,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)


def plain_optimizer(module: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def loop_ratios(backbone: str, batch: int, image_size: int, steps: int) -> tuple[list[float], float]:
    """A step of trainer and recipe, as the command line sets them up, over a plain loop's: times and peak memory."""
    module, twin = classifier(backbone, image_size), classifier(backbone, image_size)
    data, batches = (Noise(batch * n, batch, image_size) for n in (steps + 1, steps + 2))
    between = BareLoopBetween(twin, plain_optimizer(twin), iter(batches.train_dataloader()))
    fit(module, data, between)

    module, twin = classifier(backbone, image_size), classifier(backbone, image_size)
    own, bare, optimizer = PeakOfAStep(), PeakOfAStep(), plain_optimizer(twin)
    fit(module, Noise(batch * 4, batch, image_size), own)
    for i, images in enumerate(Noise(batch * 4, batch, image_size).train_dataloader()):
        bare.on_train_batch_start(None, twin, images, i)  # type: ignore[arg-type]  # it doesn't ask the trainer
        plain_step(twin, optimizer, images)
    return [mine / theirs for mine, theirs in between.pairs[2:]], own.bytes / bare.bytes


# ---------------------------------------------------------------------- the techniques


def published_shift(x: Tensor, theta: Tensor | None, adv_weight: float = 0.2) -> Tensor:
    """AdvStyle (or, without theta, DSU) as the released code computes it."""
    mean, std = x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-6).sqrt()
    normal = (x - mean) / std
    if theta is None:
        width_mean, width_std = ((s.var(0, keepdim=True) + 1e-6).sqrt() for s in (mean, std))
    else:
        width_mean, width_std = gradient_reversal(theta, adv_weight)[:, None, :, None, None]
    return normal * (std + torch.randn_like(std) * width_std) + mean + torch.randn_like(mean) * width_mean


def published_mixstyle(x: Tensor, theta: None) -> Tensor:
    mean, std = x.mean((2, 3), keepdim=True).detach(), (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    lam = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1, 1))
    order = torch.randperm(len(x))
    mixed_mean, mixed_std = (lam * s + (1 - lam) * s[order] for s in (mean, std))
    return (x - mean) / std * mixed_std + mixed_mean


def published_efdmix(x: Tensor, theta: None) -> Tensor:
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    values, order = torch.sort(flat, dim=-1)
    lam = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1))
    other = values[torch.randperm(len(x))].gather(-1, order.argsort(-1))
    return (flat + (other - flat.detach()) * (1 - lam)).view_as(x)


def step(module: Any, optimizer: torch.optim.Optimizer, batch: Any, technique: Perturbation | None) -> None:
    if technique is not None:
        technique.perturb(module, batch)
    loss = module.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    if technique is not None:
        technique.restore(module)
    optimizer.step()


class Ratios(NamedTuple):
    """Over the plain step: ours and the published arithmetic's."""

    time: list[float]
    published_time: list[float]
    memory: float
    published_memory: float


def technique_ratios(
    make: Callable[[], Any], published: Callable[..., Tensor], batch: int, net: str, size: int, steps: int
) -> Ratios:
    """A step with a technique and one with the published arithmetic after the same layers, over a plain one."""
    plain = classifier(net, size)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    technique = make()
    technique.attach(ours)
    hung = technique.hung(ours)
    names = [n for n in technique.default_layers(backbone_of(ours)) if n.replace(".", "_") in hung]
    learned = nn.ParameterList()
    for layer, own in zip(find_layers(theirs, names).values(), hung.values(), strict=True):
        theta = None
        if isinstance(technique, AdvStyle):
            theta = nn.Parameter(torch.full((2, own.channels), 0.1))
            learned.append(theta)
        layer.register_forward_hook(lambda _, args, output, theta=theta: published(output, theta))
    theirs.add_module("learned", learned)
    data = {"image": torch.rand(batch, 3, size, size), "label": torch.arange(batch) % 10}
    networks = {"plain": plain, "ours": ours, "theirs": theirs}
    optimizers = {name: plain_optimizer(network) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(steps + 2):
        technique._step = (0, i)
        for name, network in networks.items():
            begun = time.perf_counter()
            step(network, optimizers[name], dict(data), technique if name == "ours" else None)
            times[name].append(time.perf_counter() - begun)
    memory = {}
    for name, network in networks.items():
        peak = Peak()
        peak.start()
        step(network, optimizers[name], dict(data), technique if name == "ours" else None)
        memory[name] = peak.stop()
    own, other = ([a / b for a, b in zip(times[k][2:], times["plain"][2:], strict=True)] for k in ("ours", "theirs"))
    return Ratios(own, other, memory["ours"] / memory["plain"], memory["theirs"] / memory["plain"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it works")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps for each row")
    args = parser.parse_args(argv)
    net, batch, size, n = ("resnet10t", 8, 32, 3) if args.quick else ("resnet18", 64, 64, args.steps)
    rows: list[tuple[str, Callable[[], Perturbation], Callable[..., Tensor]]] = [
        ("MixStyle, mixing", lambda: MixStyle(p=1.0), published_mixstyle),
        ("EFDMix, mixing", lambda: EFDMix(p=1.0), published_efdmix),
        ("DSU, drawing", lambda: DSU(p=1.0), published_shift),
        ("AdvStyle, identity", lambda: AdvStyle(p_identity=1.0, p_dsu=0.0), lambda x, theta: x),
        ("AdvStyle, DSU", lambda: AdvStyle(p_identity=0.0, p_dsu=1.0), lambda x, theta: published_shift(x, None)),
        ("AdvStyle, adversarial", lambda: AdvStyle(p_identity=0.0, p_dsu=0.0), published_shift),
    ]
    where = f"{net}, batch {batch}, {size}x{size}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    with quiet():
        own, memory = loop_ratios(net, batch, size, n + 2)
        print(f"{where}; median (quartiles) of {n} pairs\n")
        print("| step over the plain step | time, ours | time, published arithmetic | peak memory, ours | published |")
        print("| -- | -- | -- | -- | -- |")
        print(f"| Lightning and recipe over a bare loop | {shown(own)} | | {memory:.3f} | |", flush=True)
        averaged: list[list[float]] = []
        for label, make, published in rows:
            found = technique_ratios(make, published, batch, net, size, n)
            cells = f"{shown(found.time)} | {shown(found.published_time)}"
            print(f"| {label} | {cells} | {found.memory:.3f} | {found.published_memory:.3f} |", flush=True)
            if label.startswith("AdvStyle"):
                medians = [quartiles(times)[0] for times in (found.time, found.published_time)]
                averaged.append([*medians, found.memory, found.published_memory])
    mean = [sum(column) / len(column) for column in zip(*averaged, strict=True)]
    print(f"| AdvStyle, averaged over its branches | {' | '.join(f'{value:.3f}' for value in mean)} |")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
