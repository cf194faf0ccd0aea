"""What the data costs: images/s of each DataModule, and the share of a training's time that is spent waiting for them.

Rates are medians over rounds in which all that is compared takes turns, after an epoch that isn't counted. Waiting is
the time inside the loader's ``next`` over the time of the training's steps; not counted are the first batch of a run,
for which workers start, and what happens between two epochs.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from datamodules import (
    MNIST,
    Depleted,
    Digits,
    EmojiCaptions,
    EmojiDomains,
    EmojiFewShot,
    FashionMNIST,
    Folders,
    Mails,
    Modalities,
)
from datamodules.loading import PartsDataModule
from datamodules.sampling import TrainBatches
from recipes._cli import CONFIGS, run
from tests.laws.cells import trainer
from tests.processes import model_of

#: Width and height of the generated images, least and most.
LEAST, MOST = (96, 96), (160, 120)
#: Side to which they are scaled, and shares of the area that windows have.
SIDE, WINDOWS = 64, (0.5, 1.0)
CLASSES = 10
#: More waiting than this share is measured with workers, too.
GOAL = 0.03


# ---------------------------------------------------------------------- the tree


def picture(seed: int) -> Image.Image:
    """Like a photograph in what it takes to decode: smooth colours, edges, and some noise."""
    rng = np.random.default_rng(seed)
    width, height = (int(rng.integers(a, b + 1)) for a, b in zip(LEAST, MOST, strict=True))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    slope = np.linspace(-40, 40, width, dtype=np.int16)[None, :, None]
    noise = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
    return Image.fromarray((smooth + slope + noise).clip(0, 255).astype(np.uint8))


def make_tree(root: Path, count: int) -> Path:
    """JPEGs in ``train/<class>/``, as many in each class."""
    for name in range(CLASSES):
        (root / "train" / str(name)).mkdir(parents=True)

    def write(i: int) -> None:
        picture(i).save(root / "train" / str(i % CLASSES) / f"{i:05}.jpg", quality=90)

    if not sys.stderr.isatty():
        print(f"writing {count} JPEGs below {root}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in track(pool.map(write, range(count)), "writing JPEGs", count, disable=not sys.stderr.isatty()):
            pass
    return root


# ---------------------------------------------------------------------- rates


class Loaded(NamedTuple):
    """Something that batches can be taken from."""

    name: str
    loader: Any
    count: Callable[[Any], int]


def of_batch(batch: Any) -> int:
    """Examples in a batch, of ours or of pairs."""
    return len(batch["index"] if isinstance(batch, dict) else batch[1])


def training(name: str, data: PartsDataModule[Any]) -> Loaded:
    data.setup("fit")
    return Loaded(name, data.train_dataloader(), of_batch)


def folder_like_ours(root: Path, workers: int, batch: int) -> Loaded:
    """What is written without us: ImageFolder, transforms on each image, the default DataLoader."""
    draws = [v2.RandomResizedCrop(SIDE, WINDOWS, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps = [v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC), *draws, v2.ToDtype(torch.float32, scale=True)]
    examples = ImageFolder(str(root / "train"), v2.Compose(steps))
    loader: Any = DataLoader(
        examples, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return Loaded("plain", loader, of_batch)


def ours(root: Path, workers: int, batch: int, held: int, cache: Path | None) -> Folders:
    return Folders(
        str(root),
        SIDE,
        val_size=held,
        memory_gb=0.0,
        cache=None if cache is None else str(cache),
        batch_size=batch,
        num_workers=workers,
        crop_scale=WINDOWS,
        seed=0,
    )


def rates(loaded: Sequence[Loaded], rounds: int, seconds: float) -> dict[str, float]:
    """Examples per second of each, as medians over rounds in which they take turns."""
    found: dict[str, list[float]] = {each.name: [] for each in loaded}
    endless = {each.name: batches(each.loader) for each in loaded}
    for each in loaded:
        for _ in range(min(len(each.loader), 20)):  # workers start, files come into the system's memory
            next(endless[each.name])
    for _ in range(rounds):
        for each in loaded:
            seen, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                seen += each.count(next(endless[each.name]))
            found[each.name].append(seen / (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in found.items()}


def batches(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        order = loader.batch_sampler
        if isinstance(order, TrainBatches):
            order.set_epoch(epoch)
        yield from loader
        epoch += 1


def padding(data: Mails) -> tuple[float, float]:
    """The share of a training epoch's tokens that are padding: batches of similar lengths, and shuffled ones."""
    shares = []
    for bucketed in (True, False):
        if not bucketed:
            data.lengths = lambda examples: None  # type: ignore[assignment,method-assign,return-value]
        masks = [batch["attention_mask"] for batch in training("", data).loader]
        shares.append(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    return shares[0], shares[1]


# ---------------------------------------------------------------------- waiting


class Waiting:
    """Notes when the training loader was asked for a batch, and when it gave it."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[float, float]]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        plain, epochs = DataLoader.__iter__, self.epochs

        class Timed:
            def __init__(self, iterator: Any) -> None:
                self.iterator = iterator
                epochs.append([])

            def __iter__(self) -> Timed:
                return self

            def __next__(self) -> Any:
                begun = time.perf_counter()
                batch = next(self.iterator)
                epochs[-1].append((begun, time.perf_counter()))
                return batch

        def timed(loader: Any) -> Any:
            iterator = plain(loader)
            return Timed(iterator) if isinstance(loader.batch_sampler, TrainBatches) else iterator

        DataLoader.__iter__ = timed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            DataLoader.__iter__ = plain  # type: ignore[method-assign]

    def share(self) -> tuple[float, float]:
        """Of the time of the steps, and the milliseconds that a step takes."""
        waited = whole = 0.0
        steps = 0
        for number, times in enumerate(self.epochs):
            times = times if number else times[1:]
            if len(times) > 1:
                waited += sum(end - begun for begun, end in times[:-1])
                whole += times[-1][0] - times[0][0]
                steps += len(times) - 1
        return waited / whole, 1000 * whole / steps


def waiting_of(module: LightningModule, data: Any, steps: int, folder: str) -> tuple[float, float]:
    """In a run of the trainer alone."""
    watch = Waiting()
    runner = trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, default_root_dir=folder)
    with watch.watching():
        runner.fit(module, datamodule=data)
    return watch.share()


def waiting_of_recipe(recipe: str, workers: int, steps: int, folder: str) -> tuple[float, float]:
    """In ``python -m recipes.<recipe> fit``, the default run, its first steps."""
    watch = Waiting()
    words = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1, "limit_test_batches": 1}
    argv = [f"--trainer.{name}={value}" for name, value in words.items()]
    with watch.watching():
        argv += ["--trainer.default_root_dir", folder, "--wandb", "off"]
        code = run(model_of(recipe), recipe, ["fit", *argv, f"--data.num_workers={workers}"])
    if code:
        raise RuntimeError(f"{recipe} ended with {code}")
    return watch.share()


# ---------------------------------------------------------------------- the tables


def embedded() -> dict[str, Callable[[int], PartsDataModule[Any]]]:
    """The data that comes with the project, with their own settings."""
    return {
        cls.__name__: lambda workers, cls=cls: cls(num_workers=workers, seed=0)  # type: ignore[misc]
        for cls in (
            Digits,
            MNIST,
            FashionMNIST,
            Modalities,
            EmojiDomains,
            EmojiCaptions,
            EmojiFewShot,
            Depleted,
            Mails,
        )
    }


def data_table(network: Callable[[], LightningModule], batch: int, quick: bool) -> None:
    """Rates, padding and waiting.

    Args:
        network: makes the classifier of images of :data:`SIDE` pixels that is trained on the tree.
        batch: its batch size.
        quick: little of everything.
    """
    count, held, rounds, seconds, steps = (200, 40, 1, 0.05, 3) if quick else (20_000, 1000, 5, 2.0, 40)
    workers = (0,) if quick else (0, 2)
    names = list(embedded())[:1] + ["Mails"] if quick else list(embedded())
    every = sorted(file.parent.name for file in CONFIGS.glob("*/default.yaml"))
    recipes = ["adversarial_training"] if quick else every
    with tempfile.TemporaryDirectory() as folder:
        root = make_tree(Path(folder) / "tree", count)
        print(f"\n{count} JPEGs of {LEAST[0]}x{LEAST[1]} to {MOST[0]}x{MOST[1]}, to {SIDE}x{SIDE}, batch {batch}")
        print("| JPEGs, workers | images/s, ImageFolder | ours | ours, cached | ours / ImageFolder | cached |")
        print("| -- | -- | -- | -- | -- | -- |")
        for number in workers:
            places = {"ours": None, "cached": Path(folder) / "cache"}
            modules = {name: ours(root, number, batch, held, place) for name, place in places.items()}
            loaded = [folder_like_ours(root, number, batch)] + [training(n, data) for n, data in modules.items()]
            found = rates(loaded, rounds, seconds)
            over = [found[name] / found["plain"] for name in modules]
            cells = " | ".join([f"{value:.0f}" for value in found.values()] + [f"{value:.2f}" for value in over])
            print(f"| tree, {number} | {cells} |", flush=True)

        print("\n| embedded data | " + " | ".join(f"examples/s, {number} workers" for number in workers) + " |")
        print("| -- |" + " -- |" * len(workers))
        for name in names:
            cells = []
            for number in workers:
                found = rates([training(name, embedded()[name](number))], rounds, seconds / 4)
                cells.append(f"{found[name]:.0f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)

        bucketed, shuffled = padding(Mails(seed=0))
        print("\n| texts | padding, batches of similar lengths | shuffled |\n| -- | -- | -- |")
        print(f"| Mails | {bucketed:.3f} | {shuffled:.3f} |", flush=True)

        print("\n| training, workers | waiting for data, share of the time | ms/step |\n| -- | -- | -- |")
        for number in workers:
            for cached in (False, True):
                data = ours(root, number, batch, held, Path(folder) / "cache" if cached else None)
                share, step = waiting_of(network(), data, steps, folder)
                name = "JPEGs, cached" if cached else "JPEGs"
                print(f"| {name}, {number} | {share:.4f} | {step:.1f} |", flush=True)
        for recipe in recipes:
            config = yaml.safe_load((CONFIGS / recipe / "default.yaml").read_text())
            for number in workers:
                share, step = waiting_of_recipe(recipe, number, steps, folder)
                print(f"| {recipe}, {config['data']['class_path']}, {number} | {share:.4f} | {step:.1f} |", flush=True)
                if share < GOAL:
                    break
