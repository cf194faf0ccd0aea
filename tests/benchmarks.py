"""``python -m tests.benchmarks [TABLE]``: what loop and techniques cost, as ratios measured side by side in one run.

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
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.exact_resume import ExactResume
from callbacks.layers import backbone_of, find_layers
from callbacks.nonfinite import StopOnNonFinite
from callbacks.perturbation import Perturbation
from callbacks.report import Report
from callbacks.statistics import gradient_reversal
from callbacks.style import DSU, AdvStyle, EFDMix, MixStyle
from callbacks.weights import SAM
from datamodules.images import ImageDataModule, ImageSet
from recipes._loggers import MetricsCSV
from recipes._progress import Progress
from recipes._run import quiet
from recipes.adversarial_training import AdversarialTrainer
from recipes.classifier import Classifier
from recipes.coprompt import CoPrompt
from tests.benchmark_attention import attention_table
from tests.benchmark_data import SIDE, data_table
from tests.benchmark_diagnostics import diagnostic_table
from tests.benchmark_masks import mask_table
from tests.benchmark_scaling import scaling_table
from tests.benchmark_skips import skip_table

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


def fit(module: LightningModule, data: ImageDataModule, between: Callback, *techniques: Callback) -> None:
    """A run as the command line sets it up; its lines go to stderr."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        progress = Progress("val/acc", terminal=False)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[between, ExactResume(), Report(), *techniques, StopOnNonFinite(), progress],
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


def pairs_of_steps(
    module: Any, twin: Any, techniques: list[Callback], batch: int, steps: int
) -> list[tuple[float, float]]:
    """Times of steps of the trainer, and of the same step of a plain loop on a twin between them."""
    side = module.example_input_array.shape[-1]
    data, batches = (Noise(batch * n, batch, side) for n in (steps + 1, steps + 2))
    between = BareLoopBetween(twin, plain_optimizer(twin), iter(batches.train_dataloader()))
    fit(module, data, between, *techniques)
    return between.pairs[2:]


def loop_ratios(backbone: str, batch: int, image_size: int, steps: int) -> tuple[list[float], float]:
    """A step of trainer and recipe, as the command line sets them up, over a plain loop's: times and peak memory."""
    pairs = pairs_of_steps(classifier(backbone, image_size), classifier(backbone, image_size), [], batch, steps)

    module, twin = classifier(backbone, image_size), classifier(backbone, image_size)
    own, bare, optimizer = PeakOfAStep(), PeakOfAStep(), plain_optimizer(twin)
    fit(module, Noise(batch * 4, batch, image_size), own)
    for i, images in enumerate(Noise(batch * 4, batch, image_size).train_dataloader()):
        bare.on_train_batch_start(None, twin, images, i)  # type: ignore[arg-type]  # it doesn't ask the trainer
        plain_step(twin, optimizer, images)
    return [mine / theirs for mine, theirs in pairs], own.bytes / bare.bytes


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


# ---------------------------------------------------------------------- adversarial training

EPS, ALPHA, TAKEN = 8 / 255, 2 / 255, 10
#: TRADES' own radius, step and deviation of the start.
RADIUS, SIZE, NOISE = 0.031, 0.007, 0.001


def published_pgd(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """PGD training as most codes have it: crafting by ``backward()``, which computes the weights' gradients, too."""
    x, y = batch["image"], batch["label"]
    net.eval()
    moved = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(TAKEN):
        moved.requires_grad_()
        F.cross_entropy(net(moved), y).backward()
        assert moved.grad is not None
        moved = (moved + ALPHA * moved.grad.sign()).detach()
        moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    net.train()
    _update(F.cross_entropy(net(moved), y), optimizer)


def published_trades(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """TRADES as released: the clean images go through the network in each step, and three times in training mode."""
    x, y = batch["image"], batch["label"]
    divergence = nn.KLDivLoss(reduction="sum")
    net.eval()
    moved = x.detach() + NOISE * torch.randn_like(x)
    for _ in range(TAKEN):
        moved.requires_grad_()
        loss = divergence(F.log_softmax(net(moved), 1), F.softmax(net(x), 1))
        moved = moved.detach() + SIZE * torch.autograd.grad(loss, [moved])[0].sign()
        moved = torch.min(torch.max(moved, x - RADIUS), x + RADIUS).clamp(0, 1)
    net.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(net(x), y)
    robust = divergence(F.log_softmax(net(moved), 1), F.softmax(net(x), 1)) / len(x)
    _update(natural + 6.0 * robust, optimizer)


def published_fast(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """FGSM-RS as released: crafted in training mode by ``backward()``."""
    x, y = batch["image"], batch["label"]
    delta = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1) - x
    delta.requires_grad_()
    F.cross_entropy(net(x + delta), y).backward()
    assert delta.grad is not None
    delta = (delta + 1.25 * EPS * delta.grad.sign()).clamp(-EPS, EPS).detach()
    _update(F.cross_entropy(net((x + delta).clamp(0, 1)), y), optimizer)


def published_sam(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """SAM as davda54 has it: two full passes."""
    optimizer.zero_grad()
    F.cross_entropy(net(batch["image"]), batch["label"]).backward()
    weights = [p for p in net.parameters() if p.grad is not None]
    with torch.no_grad():
        length = torch.stack([p.grad.norm() for p in weights]).norm()  # type: ignore[union-attr]  # chosen above
        moves = [p.grad * (0.05 / (length + 1e-12)) for p in weights]  # type: ignore[operator]  # likewise
        for p, e in zip(weights, moves, strict=True):
            p.add_(e)
    optimizer.zero_grad()
    F.cross_entropy(net(batch["image"]), batch["label"]).backward()
    with torch.no_grad():
        for p, e in zip(weights, moves, strict=True):
            p.sub_(e)
    optimizer.step()


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


Step = Callable[[nn.Module, torch.optim.Optimizer, Any], None]


class Case(NamedTuple):
    """A row: the recipe's objective (none: the technique on plain training) and the published step."""

    name: str
    objective: str | None
    make: Callable[[Any], Perturbation]
    published: Step
    channels_last: bool = False
    bf16: bool = False


def _own(module: Any) -> Perturbation:
    return module._craft


ADVERSARIAL = [
    Case("FGSM-RS", "fast", _own, published_fast),
    Case("PGD-10", "standard", _own, published_pgd),
    Case("PGD-10, channels_last", "standard", _own, published_pgd, True),
    Case("PGD-10, channels_last, bf16-mixed", "standard", _own, published_pgd, True, True),
    Case("TRADES-10", "trades", _own, published_trades),
    Case("TRADES-10, channels_last", "trades", _own, published_trades, True),
    Case("SAM", None, lambda module: SAM(), published_sam),
]


def adversarial_ratios(case: Case, net: str, batch: int, steps: int) -> tuple[list[float], list[float], float, float]:
    """Steps of ours and of the published arithmetic over plain ones: times and peak memory.

    Layout and precision are of ours alone: the released codes have neither.
    """
    objective, published = case.objective, case.published

    def fresh(objective: str | None) -> Any:
        torch.manual_seed(0)
        if objective is None:
            return Classifier(net, num_classes=10, image_size=32)
        return AdversarialTrainer(net, num_classes=10, image_size=32, objective=objective, eps=EPS)  # type: ignore[arg-type]

    plain, ours, theirs = fresh(None), fresh(objective), fresh(None)
    technique = case.make(ours)
    if case.channels_last:
        ours.backbone.to(memory_format=torch.channels_last)
    data = {"image": torch.rand(batch, 3, 32, 32), "label": torch.arange(batch) % 10}
    networks = {"plain": plain, "ours": ours, "theirs": theirs}
    optimizers = {name: plain_optimizer(network) for name, network in networks.items()}

    def one(name: str) -> None:
        if name == "theirs":
            published(theirs, optimizers[name], data)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16 and name == "ours"):
                step(networks[name], optimizers[name], dict(data), technique if name == "ours" else None)

    times: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(steps + 1):
        technique._step = (0, i)
        for name in networks:
            begun = time.perf_counter()
            one(name)
            times[name].append(time.perf_counter() - begun)
    memory = {}
    for name in networks:
        peak = Peak()
        peak.start()
        one(name)
        memory[name] = peak.stop()
    own, other = ([a / b for a, b in zip(times[k][1:], times["plain"][1:], strict=True)] for k in ("ours", "theirs"))
    return own, other, memory["ours"] / memory["plain"], memory["theirs"] / memory["plain"]


def adversarial_table(batch: int, steps: int, nets: Sequence[str]) -> None:
    print("\n| step over the plain step | time, ours | time, published | ours / published | memory, ours | published |")
    print("| -- | -- | -- | -- | -- | -- |")
    for net in nets:
        for case in ADVERSARIAL:
            own, other, memory, theirs = adversarial_ratios(case, net, batch, steps)
            share = quartiles([a / b for a, b in zip(own, other, strict=True)])[0]
            cells = f"{shown(own)} | {shown(other)} | {share:.2f} | {memory:.2f} | {theirs:.2f}"
            print(f"| {case.name}, {net} | {cells} |", flush=True)


# ---------------------------------------------------------------------- prompts


def prompter(clip: str, classes: int, technique: str) -> CoPrompt:
    torch.manual_seed(0)  # open_clip draws random weights
    names = [f"class {i}" for i in range(classes)]
    depth = 3 if clip == "emoji" else 9
    return CoPrompt(clip, technique=technique, class_names=names, depth=depth)  # type: ignore[arg-type]


def prompt_ratios(clip: str, classes: int, batch: int, steps: int) -> tuple[list[float], list[float], float, float]:
    """CoPrompt's step over MaPLe's and one teacher's forward pass, the same over MaPLe's alone, and memory in CLIPs.

    Returns:
        Both ratios of each pair of steps; all weights, and the peak of a step with them, as multiples of the CLIP's.
    """
    module, maple = (prompter(clip, classes, technique) for technique in ("coprompt", "maple"))
    side = module.example_input_array.shape[-1]  # type: ignore[union-attr]
    image, view = (torch.rand(batch, 3, side, side) for _ in range(2))
    data = {"image": image, "view": view, "label": torch.arange(batch) % classes}
    module._sentences()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (module, maple)]

    def taught() -> None:
        module._taught = None
        module.teacher_features(view)
        module._taught = None

    def step_of(network: CoPrompt, optimizer: torch.optim.Optimizer) -> None:
        plain_step(network, optimizer, data)
        network._taught = None

    runs: list[Callable[[], None]] = [
        lambda: step_of(module, optimizers[0]),
        lambda: step_of(maple, optimizers[1]),
        taught,
    ]
    over_both, over_maple = [], []
    for i in range(steps + 1):
        times = []
        for run in runs:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        if i:
            over_both.append(times[0] / (times[1] + times[2]))
            over_maple.append(times[0] / times[1])
    own = sum(p.nbytes for p in module.clip.parameters())
    weights = sum(p.nbytes for p in module.parameters())
    peak = Peak()
    peak.start()
    runs[0]()
    return over_both, over_maple, weights / own, (weights + peak.stop()) / own


def prompt_table(batch: int, steps: int, clips: Sequence[tuple[str, int]]) -> None:
    print("\n| CoPrompt's step | over MaPLe's and a teacher's pass | over MaPLe's | weights / CLIP's | peak / CLIP's |")
    print("| -- | -- | -- | -- | -- |")
    for clip, classes in clips:
        both, maple, weights, peak = prompt_ratios(clip, classes, batch, steps)
        cells = f"{shown(both)} | {shown(maple)} | {weights:.2f} | {peak:.2f}"
        print(f"| {clip}, {classes} classes | {cells} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it works")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps for each row")
    parts = ("all", "loop", "adversarial", "prompts", "skips", "masks", "attention", "diagnostics", "data", "scaling")
    about = "which of the tables (all: all but data and scaling, which start processes of their own)"
    parser.add_argument("part", nargs="?", choices=parts, default="all", help=about)
    args = parser.parse_args(argv)
    net, batch, size, n = ("resnet10t", 8, 32, 3) if args.quick else ("resnet18", 64, 64, args.steps)
    where = f"{net}, batch {batch}, {size}x{size}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    if args.part in ("all", "loop"):
        style_table(where, net, batch, size, n)
    if args.part in ("all", "adversarial"):
        nets, batch, n = (("cnn4",), 8, 2) if args.quick else (("cnn4", "resnet18"), 64, max(n // 2, 3))
        where = f"batch {batch}, 32x32, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        print(f"\n{where}; median (quartiles) of {n} pairs")
        with quiet():
            adversarial_table(batch, n, nets)
    if args.part in ("all", "prompts"):
        clips = [("emoji", 9)] if args.quick else [("emoji", 9), ("ViT-B-16", 10), ("ViT-B-16", 50)]
        n = 2 if args.quick else max(args.steps // 3, 3)
        where = f"batch 4, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        print(f"\n{where}; median (quartiles) of {n} pairs")
        with quiet(), tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder  # sentences of random weights aren't worth keeping
            prompt_table(4, n, clips)
    if args.part in ("all", "skips"):
        names = ["small U-ViT", "small U-Net"] if args.quick else ["U-ViT-S/2", "U-Net"]
        batch, n = (2, 2) if args.quick else (1, max(args.steps // 6, 3))
        where = f"batch {batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        print(f"\n{where}; median (quartiles) of {n} pairs")
        with quiet():
            skip_table(names, n, batch, shown)
    if args.part in ("all", "masks"):
        batch, n = (8, 3) if args.quick else (64, args.steps)
        where = f"{net}, batch {batch}, {size}x{size}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        print(f"\n{where}; median (quartiles) of {n} pairs")
        with quiet():
            mask_table(
                lambda module, twin, techniques: pairs_of_steps(module, twin, techniques, batch, n + 2),
                lambda: classifier(net, size),
                shown,
            )
    if args.part in ("all", "attention"):
        size, tokens, hidden, n = (4, 16, 8, 2) if args.quick else (32, 128, 128, args.steps)
        where = f"BiLSTM {hidden}, batch {size}, {tokens} tokens, {torch.get_num_threads()} thread(s)"
        print(f"\n{where}, torch {torch.__version__}; median (quartiles) of {n} pairs")
        with quiet():
            attention_table(size, tokens, hidden, n, shown)
    if args.part in ("all", "diagnostics"):
        net, batch, size, count = ("resnet10t", 8, 32, 96) if args.quick else ("resnet18", 64, 32, 320 * args.steps)
        where = f"{net}, {count} images of {size}x{size}, batch {batch}, {torch.get_num_threads()} thread(s)"
        print(f"\n{where}, torch {torch.__version__}")
        with quiet():
            diagnostic_table(lambda: classifier(net, size), lambda: Noise(count, batch, size))
    if args.part == "data":
        net, batch = ("resnet10t", 8) if args.quick else ("resnet18", 64)
        print(f"\n{net}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
        with quiet():
            data_table(lambda: classifier(net, SIDE), batch, args.quick)
    if args.part == "scaling":
        print(f"\n1 thread for each rank, torch {torch.__version__}")
        scaling_table(args.quick, 3 if args.quick else args.steps)
    return 0


def style_table(where: str, net: str, batch: int, size: int, n: int) -> None:
    rows: list[tuple[str, Callable[[], Perturbation], Callable[..., Tensor]]] = [
        ("MixStyle, mixing", lambda: MixStyle(p=1.0), published_mixstyle),
        ("EFDMix, mixing", lambda: EFDMix(p=1.0), published_efdmix),
        ("DSU, drawing", lambda: DSU(p=1.0), published_shift),
        ("AdvStyle, identity", lambda: AdvStyle(p_identity=1.0, p_dsu=0.0), lambda x, theta: x),
        ("AdvStyle, DSU", lambda: AdvStyle(p_identity=0.0, p_dsu=1.0), lambda x, theta: published_shift(x, None)),
        ("AdvStyle, adversarial", lambda: AdvStyle(p_identity=0.0, p_dsu=0.0), published_shift),
    ]
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
