"""``python -m tests.benchmarks``: what the loop and the techniques cost, as ratios measured side by side in one run.

Times are medians over pairs of steps that follow each other at once, with the quartiles of the ratio, so what else the
machine does falls on both. Memory is what a forward pass keeps for the backward pass, each storage counted once.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.exact_resume import ExactResume
from callbacks.layers import find_layers
from callbacks.nonfinite import StopOnNonFinite
from callbacks.perturbation import Perturbation
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


# ---------------------------------------------------------------------- the loop


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
        loss = self.module.loss(next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # a plain loop shows its loss, too
        bare = time.perf_counter() - begun
        if own is not None:
            self.pairs.append((own, bare))
        self._begun = time.perf_counter()


def loop_ratio(backbone: str, batch: int, image_size: int, steps: int) -> list[float]:
    """Time of a step of trainer and recipe, as the command line sets them up, over a plain loop's."""
    module, twin = classifier(backbone, image_size), classifier(backbone, image_size)
    data = Noise(batch * (steps + 1), batch, image_size)
    plain = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    between = BareLoopBetween(twin, plain, iter(Noise(batch * (steps + 2), batch, image_size).train_dataloader()))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[between, ExactResume(), StopOnNonFinite(), Progress("val/acc", terminal=False)],
            logger=MetricsCSV(Path(folder)),
            log_every_n_steps=10,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
    return [own / bare for own, bare in between.pairs[2:]]


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


def published_mixstyle(x: Tensor, _: Any = None) -> Tensor:
    mean, std = x.mean((2, 3), keepdim=True).detach(), (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    lam = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1, 1))
    order = torch.randperm(len(x))
    mixed_mean, mixed_std = (lam * s + (1 - lam) * s[order] for s in (mean, std))
    return (x - mean) / std * mixed_std + mixed_mean


def published_efdmix(x: Tensor, _: Any = None) -> Tensor:
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    values, order = torch.sort(flat, dim=-1)
    lam = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1))
    other = values[torch.randperm(len(x))].gather(-1, order.argsort(-1))
    return (flat + (other - flat.detach()) * (1 - lam)).view_as(x)


def step(
    module: LightningModule, optimizer: torch.optim.Optimizer, batch: Any, technique: Perturbation | None
) -> float:
    """Seconds of one step."""
    begun = time.perf_counter()
    if technique is not None:
        technique.perturb(module, batch)
    loss = module.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    if technique is not None:
        technique.restore(module)
    optimizer.step()
    return time.perf_counter() - begun


def kept(module: LightningModule, batch: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module.loss(batch)  # kept until all is counted, so that no address is used twice
    del loss
    return sum(storages.values())


def technique_ratios(
    make: Callable[[], Perturbation],
    published: Callable[..., Tensor],
    learned: bool,
    batch: int,
    net: str,
    size: int,
    n: int,
) -> tuple[list[float], list[float], float, float]:
    """Step time over the plain step's, ours and the published arithmetic's, and memory likewise."""
    plain = classifier(net, size)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    technique = make()
    technique.attach(ours)
    layers = [name.replace("_", ".") if "." in name else name for name in technique.hung(ours)]  # type: ignore[attr-defined]
    thetas: list[nn.Parameter] = []
    for layer, module in zip(find_layers(theirs, layers).values(), technique.hung(ours).values(), strict=True):  # type: ignore[attr-defined]
        theta = nn.Parameter(torch.full((2, module.channels), 0.1)) if learned else None
        thetas += [theta] if theta is not None else []
        layer.register_forward_hook(lambda _, args, output, theta=theta: published(output, theta))
    data = {"image": torch.rand(batch, 3, size, size), "label": torch.arange(batch) % 10}
    nets = {"plain": plain, "ours": ours, "theirs": theirs}
    optimizers = {
        name: torch.optim.SGD([*net.parameters(), *(thetas if name == "theirs" else [])], 0.001, 0.9)
        for name, net in nets.items()
    }
    times: dict[str, list[float]] = {name: [] for name in nets}
    for i in range(n + 2):
        for name, network in nets.items():
            technique._step = (0, i)
            taken = step(network, optimizers[name], dict(data), technique if name == "ours" else None)
            if i >= 2:
                times[name].append(taken)
    technique.perturb(ours, dict(data))
    memory = {name: kept(network, data) for name, network in nets.items()}
    technique.restore(ours)
    own, other = ([a / b for a, b in zip(times[k], times["plain"], strict=True)] for k in ("ours", "theirs"))
    return own, other, memory["ours"] / memory["plain"], memory["theirs"] / memory["plain"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it works")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps for each row")
    args = parser.parse_args(argv)
    net, batch, size, n = ("resnet10t", 8, 32, 3) if args.quick else ("resnet18", 64, 64, args.steps)
    all_layers = {"p_identity": 0.0, "p_dsu": 0.0}
    rows: list[tuple[str, Callable[[], Perturbation], Callable[..., Tensor], bool]] = [
        ("MixStyle, mixing", lambda: MixStyle(p=1.0), published_mixstyle, False),
        ("EFDMix, mixing", lambda: EFDMix(p=1.0), published_efdmix, False),
        ("DSU, drawing", lambda: DSU(p=1.0), lambda x, _: published_shift(x, None), False),
        ("AdvStyle, identity", lambda: AdvStyle(p_identity=1.0, p_dsu=0.0), lambda x, _: x, True),
        ("AdvStyle, DSU", lambda: AdvStyle(p_identity=0.0, p_dsu=1.0), lambda x, _: published_shift(x, None), True),
        ("AdvStyle, adversarial", lambda: AdvStyle(**all_layers), published_shift, True),
    ]
    where = f"{net}, batch {batch}, {size}x{size}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"{where}; median (quartiles) of {n} pairs\n")
    print("| step over the plain step | time, ours | time, published arithmetic | kept memory, ours | published |")
    print("| -- | -- | -- | -- | -- |")
    with quiet():
        own = loop_ratio(net, batch, size, n + 2)
        print(f"| Lightning and recipe over a bare loop | {shown(own)} | | | |", flush=True)
        averaged: list[list[float]] = []
        for label, make, published, learned in rows:
            ours, theirs, memory, memory_theirs = technique_ratios(make, published, learned, batch, net, size, n)
            cells = f"{shown(ours)} | {shown(theirs)} | {memory:.3f} | {memory_theirs:.3f}"
            print(f"| {label} | {cells} |", flush=True)
            if label.startswith("AdvStyle"):
                averaged.append([quartiles(ours)[0], quartiles(theirs)[0], memory, memory_theirs])
    mean = [sum(column) / len(column) for column in zip(*averaged, strict=True)]
    print(f"| AdvStyle, averaged over its branches | {' | '.join(f'{value:.3f}' for value in mean)} |")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
