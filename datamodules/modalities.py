"""Embedded data of several modalities: clothing, digits, emoji and slices of a head, told apart by one classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.emoji import CLASSES as EMOJI
from datamodules.emoji import FOLDER, STYLES, EmojiDomains
from datamodules.fashion import EMBEDDED, FashionMNIST, GreySquares
from datamodules.images import ImageDataModule, ImageSet, check_image_size, choose
from datamodules.mnist import MNIST
from datamodules.splits import Part

BRAIN = EMBEDDED / "brain" / "brain.npz"
BANDS = 6
#: Where the slices of a band go, counted from below; one is left out between two parts, and the rest trains.
BLOCKS = ("train",) * 6 + ("",) + ("test",) * 4 + ("",) + ("val",) * 3 + ("",)
#: This style draws the first concept, which trains, just as it draws the second, which validates.
TWINS = ("fluent_mono", "red_haired_person", "adult")
#: A slice is used if so many of its 64x64 pixels are brighter than that.
SEEN, BRIGHTER = 100, 20


class Modality(NamedTuple):
    """What a modality's classes are called, and how a part of it is read."""

    classes: tuple[str, ...]
    #: uint8 images (N, C, H, W) and labels (N,) of a part, in a fixed order.
    read: Callable[[Part], tuple[Tensor, Tensor]]
    #: Whether it has images of its own for validation; else they are held out of those that train.
    validates: bool


def _squares(data: type[GreySquares]) -> Modality:
    def read(part: Part) -> tuple[Tensor, Tensor]:
        return data().official("test" if part == "test" else "train")

    return Modality(data.classes, read, False)


def _emoji(part: Part) -> tuple[Tensor, Tensor]:
    drawn = EmojiDomains(STYLES, STYLES).part(part)
    assert isinstance(drawn.images, Tensor)
    with np.load(FOLDER / "concepts.npz") as arrays:
        concept = arrays["concept"].tolist().index(TWINS[1])
    kept = (drawn.entries["domain"] != STYLES.index(TWINS[0])) | (drawn.entries["concept"] != concept)
    return drawn.images[kept], drawn.entries["label"][kept]


def _brain(part: Part) -> tuple[Tensor, Tensor]:
    with np.load(BRAIN) as arrays:
        images = arrays["images"]
    used = np.flatnonzero((images > BRIGHTER).sum((1, 2)) >= SEEN)
    chosen, label = [], []
    for band, slices in enumerate(np.array_split(used, BANDS)):
        goes_to = BLOCKS + ("train",) * (len(slices) - len(BLOCKS))
        own = [int(place) for place, where in zip(slices, goes_to, strict=True) if where == part]
        chosen += own
        label += [band] * len(own)
    return torch.from_numpy(images[chosen]).unsqueeze(1), torch.tensor(label)


MODALITIES: Mapping[str, Modality] = {
    "fashion": _squares(FashionMNIST),
    "mnist": _squares(MNIST),
    "emoji": Modality(EMOJI, _emoji, True),
    "brain": Modality(tuple(f"band {band}" for band in range(1, BANDS + 1)), _brain, True),
}


def spread(label: Tensor, size: int | None) -> Tensor:
    """Positions of ``size`` images, sorted: as many of each class as possible, a class that has fewer with all it has.

    All positions if ``size`` is None or more than there are. The choice depends on nothing else, and what is chosen
    stays so in a larger size.
    """
    count = label.bincount()
    if size is None or size >= len(label):
        return torch.arange(len(label))
    each = 0  # of every class that has so many
    while int(count.clamp(max=each + 1).sum()) <= size:
        each += 1
    share = count.clamp(max=each)
    more = (count > each).nonzero().squeeze(1)[: size - int(share.sum())]
    share[more] += 1
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for number, wanted in enumerate(share.tolist()):
        where = (label == number).nonzero().squeeze(1)
        chosen.append(where[torch.randperm(len(where), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


def coloured(images: Tensor, size: int) -> Tensor:
    """uint8 images (N, 1 or 3, H, W) as (N, 3, size, size)."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1).contiguous()


class Modalities(ImageDataModule):
    """Kinds of images that look nothing alike under one label space, as a stand-in for CT, MR and ultrasound.

    The classes are those of all modalities (``fashion: Coat``, ``mnist: 7``), the domains are the modalities, so that
    accuracy is reported for each. All comes with the project:

    * ``fashion``: clothing in 10 classes. Of 10,000 official training images ``val_size`` validate; 2,000 test.
    * ``mnist``: digits in 10 classes. Of 8,000 ``val_size`` validate; 2,000 test (see ``embedded/mnist/README.md``).
    * ``emoji``: 650 concepts in 17 classes, each in five styles; a concept is in one part (2,274 drawings can train,
      330 validate and 645 test).
    * ``brain``: axial slices of the MNI152 template in six classes, bands of height. It is one head, and neighbouring
      slices are nearly the same: in each band a block of 4 slices tests and one of 3 validates, both among slices of
      the same band that train, with one slice left out in between (71 train, 18 validate, 24 test). That a network
      tells heights apart here doesn't mean that it would on another head.

    Which images are chosen doesn't depend on the run's seed.

    Args:
        modalities: which there are.
        held_out: one that isn't trained on, validated or tested, for a linear probe (:meth:`probe_sets`).
        train_size: so many images of each modality train, as many of each class as possible; all if None. A modality
            that has fewer gives what it has.
        val_size: likewise for validation.
        test_size: likewise for testing.
        image_size: images are scaled once, when they are read. Digits and clothing have 28 pixels, emoji 32, slices 64.
        flip: off: a mirrored digit is another one.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for a modality that doesn't exist, none to train on, or a size out of range.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("fashion", "mnist", "emoji", "brain"),
        held_out: str | None = None,
        train_size: int | None = 2000,
        val_size: int = 500,
        test_size: int | None = 1000,
        image_size: int = 32,
        flip: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(flip=flip, **common)
        known = list(MODALITIES)
        choose("modality", modalities, known)
        if held_out is not None:
            choose("modality", [held_out], known)
        self.trained, self.held_out = [name for name in modalities if name != held_out], held_out
        if not self.trained:
            raise ValueError(f"nothing is left to train on without '{held_out}': name more modalities")
        self.sizes: dict[Part, int | None] = {"train": train_size, "val": val_size, "test": test_size}
        for part, size in self.sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{part}_size must be at least 1, not {size}")
        check_image_size(image_size)
        self.image_size, self.domain_names = image_size, self.trained
        self.class_names = [f"{name}: {each}" for name in self.trained for each in MODALITIES[name].classes]
        self.num_classes = len(self.class_names)

    def read(self, name: str, part: Part) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, 3, H, W) of one modality and their labels (N,), counted from 0.

        Raises:
            ValueError: if validation leaves no image to train on.
        """
        modality = MODALITIES[name]
        if modality.validates or part == "test":
            images, label = modality.read(part)
        else:
            images, label = modality.read("train")
            validate = torch.zeros(len(label), dtype=torch.bool)
            validate[spread(label, self.sizes["val"])] = True
            if bool(validate.all()):
                raise ValueError(f"'{name}' has {len(label)} images to train and validate on: lower val_size")
            own = validate if part == "val" else ~validate
            images, label = images[own], label[own]
        chosen = spread(label, self.sizes[part])
        return coloured(images[chosen], self.image_size), label[chosen]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        images, labels, domains, first = [], [], [], 0
        for domain, name in enumerate(self.trained):
            own, label = self.read(name, part)
            images.append(own)
            labels.append(label + first)
            domains.append(torch.full_like(label, domain))
            first += len(MODALITIES[name].classes)
        return ImageSet(torch.cat(images), {"label": torch.cat(labels), "domain": torch.cat(domains)})

    def probe_sets(self) -> tuple[ImageSet, ImageSet]:
        """Training and test images of the modality that is held out, as they are, its classes counted from 0.

        Raises:
            ValueError: if none is.
        """
        if self.held_out is None:
            raise ValueError(
                f"no modality is held out to probe: set --data.held_out to one of: {', '.join(MODALITIES)}"
            )
        images, label = self.read(self.held_out, "train")
        test_images, test_label = self.read(self.held_out, "test")
        return (
            ImageSet(images, {"label": label, "domain": torch.zeros_like(label)}),
            ImageSet(test_images, {"label": test_label, "domain": torch.zeros_like(test_label)}),
        )
