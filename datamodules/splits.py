"""Splits that the releases don't make: validation images held out of training, and labels for a part only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.images import ImageDataModule, ImageSet, OnCorrupt

Part = Literal["train", "val", "test"]


def hold_out(label: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions (N - size,) that stay and (size,) that are held out, as many of each class as of any other.

    Args:
        label: (N,) class numbers.
        size: how many to hold out; what doesn't divide evenly goes to the first classes.
        seed: of the choice; it depends on nothing else.

    Raises:
        ValueError: if a class hasn't that many.
    """
    classes = label.unique(sorted=True)
    generator = torch.Generator().manual_seed(seed)
    held = []
    for number, each in enumerate(classes):
        where = (label == each).nonzero().squeeze(1)
        share = size // len(classes) + (number < size % len(classes))
        if not 0 <= share <= len(where):
            raise ValueError(
                f"{size} of {len(label)} examples can't be chosen evenly: class {int(each)} has {len(where)}"
            )
        held.append(where[torch.randperm(len(where), generator=generator)[:share]])
    chosen = torch.zeros(len(label), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def keep_labels(label: Tensor, labelled: int | None, seed: int = 0) -> Tensor:
    """Labels (N,) of which only ``labelled``, spread evenly over the classes, are kept; the others are -1."""
    if labelled is None:
        return label
    _, kept = hold_out(label, labelled, seed)
    result = torch.full_like(label, -1)
    result[kept] = label[kept]
    return result


class HeldOut(ImageDataModule):
    """Data whose release has a training and a test part; validation images are held out of the training part.

    Args:
        val_size: images held out, as many of each class; the same ones in all runs.
        train_size: train on so many of the rest, as many of each class; all if omitted.
        labelled: of the training images only so many keep their label, as many of each class; the others get -1, which
            is what semi-supervised objectives take (``vat``). Chosen by the seed of the run.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for sizes out of range.
    """

    memory_gb = 0.0
    on_corrupt: OnCorrupt = "error"
    crop = 0.0

    def __init__(
        self, val_size: int = 1000, train_size: int | None = None, labelled: int | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        for name, value in {"val_size": val_size, "train_size": train_size, "labelled": labelled}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.val_size, self.train_size, self.labelled = val_size, train_size, labelled

    def official(self, part: Literal["train", "test"]) -> tuple[Any, Tensor]:
        """Images (uint8 (N, C, H, W), or N files) and labels (N,) of a part of the release, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must define official(part)")

    def load(self, part: Part) -> ImageSet:
        images, label = self.official("test" if part == "test" else "train")
        if part != "test":
            kept, held = hold_out(label, self.val_size)
            if part == "train" and self.train_size is not None:
                kept = kept[hold_out(label[kept], self.train_size)[1]]
            chosen = held if part == "val" else kept
            label = label[chosen]
            images = images[chosen] if isinstance(images, Tensor) else [images[i] for i in chosen.tolist()]
        if part == "train":
            label = keep_labels(label, self.labelled, self.seed)
        return self.image_set(images, {"label": label, "domain": torch.zeros_like(label)})

    def image_set(self, images: Any, entries: dict[str, Tensor]) -> ImageSet:
        if isinstance(images, Tensor):
            return ImageSet(images, entries)
        size = (self.image_size, self.image_size)
        return ImageSet(images, entries, size, self.memory_gb, self.on_corrupt, self.crop, self.cache)


def class_folders(folder: Path, names: Sequence[str], suffixes: Sequence[str], below: str = ".") -> tuple[Any, Tensor]:
    """Files in one folder per class (in its subfolder ``below``), classes numbered as named, and labels (N,).

    Raises:
        FileNotFoundError: for a class without a folder.
    """
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(names):
        inside = folder / name / below
        if not inside.is_dir():
            raise FileNotFoundError(f"{inside} is not there: the dataset is incomplete")
        found = [file for file in sorted(inside.iterdir()) if file.suffix.lower() in suffixes]
        files += found
        labels += [number] * len(found)
    return files, torch.tensor(labels, dtype=torch.int64)
