"""Person re-identification, read in its official layouts: trained on one dataset, tested on the same or on others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from datamodules.images import ImageDataModule, ImageSet, OnCorrupt, cache_at, choose

NAMES = ("market1501", "msmt17")
Part = Literal["train", "query", "gallery"]


class Person(NamedTuple):
    """One image: its file, the person's number and the camera's."""

    file: Path
    person: int
    camera: int


def _missing(what: Path, name: str, layout: str, source: str) -> FileNotFoundError:
    return FileNotFoundError(f"{what} is not there: {name} expects {layout}; get it from {source}")


def market1501(root: Path, part: Part) -> list[Person]:
    """Market-1501 (Zheng et al., ICCV 2015): images of ``<person>_c<camera>...jpg``; junk (person -1) is left out and
    distractors (person 0) stay in the gallery.

    Raises:
        FileNotFoundError: naming the folder that is missing.
    """
    base = next((root / name for name in ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501")
                 if (root / name).is_dir()), root)  # fmt: skip
    folder = base / {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[part]
    if not folder.is_dir():
        layout = "Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}/*.jpg"
        raise _missing(folder, "Market1501", layout, "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html")
    found = []
    for file in sorted(folder.glob("*.jpg")):
        numbers = re.match(r"(-?\d+)_c(\d)", file.name)
        if numbers is None:
            raise ValueError(f"{file}: expected a name like 0002_c1s1_000451_03.jpg")
        if int(numbers[1]) >= 0:
            found.append(Person(file, int(numbers[1]), int(numbers[2]) - 1))
    return found


def msmt17(root: Path, part: Part) -> list[Person]:
    """MSMT17 (Wei et al., CVPR 2018), V1 or V2 (faces masked), by its lists; as is the custom, list_val is left out.

    Raises:
        FileNotFoundError: naming the folder or list that is missing.
    """
    source = "https://www.pkuvmc.com/dataset.html (on request)"
    layout = "MSMT17_V1/{train,test}/... (or MSMT17_V2/mask_{train,test}_v2) with list_{train,query,gallery}.txt"
    editions = [(root / below / name, folders) for below in (".", "msmt17") for name, folders in (
        ("MSMT17_V1", ("train", "test")), ("MSMT17_V2", ("mask_train_v2", "mask_test_v2")))]  # fmt: skip
    base, (train, test) = next(((b, f) for b, f in editions if b.is_dir()), editions[0])
    file = base / f"list_{part}.txt"
    if not file.is_file():
        raise _missing(file if base.is_dir() else base, "MSMT17", layout, source)
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, person = line.strip().rpartition(" ")
        pieces = Path(path).name.split("_")
        if not person.isdigit() or len(pieces) < 3 or not pieces[2].isdigit():
            raise ValueError(f"{file}, line {number}: expected a path like 0000/0000_000_01_....jpg and a number")
        found.append(Person(base / (train if part == "train" else test) / path, int(person), int(pieces[2]) - 1))
    return found


_READ = {"market1501": market1501, "msmt17": msmt17}
#: Images (and persons of the training part) as published, after leaving out junk.
COUNTS: dict[str, dict[str, int]] = {
    "market1501": {"train": 12936, "query": 3368, "gallery": 15913, "persons": 751},
    "msmt17": {"train": 30248, "query": 11659, "gallery": 82161, "persons": 1041},
}


class _Persons(ImageDataModule):
    """Trained to tell the persons of one dataset apart; tested by queries against a gallery.

    Of each person's training images one in ten (where there are ten) validates: the accuracy of telling the training
    persons apart. Test batches hold queries and gallery, with ``camera`` and ``query`` (bool) beside ``label`` (the
    person's number) and ``domain`` (the dataset).

    Args:
        root: folder that holds the datasets' own folders.
        targets: datasets of testing: market1501, msmt17; the one of training if omitted.
        image_size: height in pixels; the width is half of it, as is the custom (256 x 128).
        on_corrupt: ``error``: stop at a file that is no image; ``skip``: count such files and go on.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for a dataset that doesn't exist (lists those that do), or counts other than published.
        FileNotFoundError: naming what is missing, the layout and where to get it.
    """

    trained_on: ClassVar[str]
    counts: ClassVar[Mapping[str, Mapping[str, int]]] = COUNTS

    def __init__(
        self,
        root: str,
        targets: Sequence[str] | None = None,
        image_size: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0,
        transform: nn.Module | None = None,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        eval_batch_size: int | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size)
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16, not {image_size}")
        self.root = Path(root).expanduser()
        self.targets = choose("dataset", [self.trained_on] if targets is None else targets, NAMES)
        self.image_size, self.on_corrupt, self.memory_gb = image_size, on_corrupt, memory_gb
        self.cache = cache_at(cache)
        self.domain_names = list(NAMES)
        self.num_classes = self.counts[self.trained_on]["persons"]
        self.class_names = [f"person {i}" for i in range(self.num_classes)]

    def _read(self, name: str, part: Part) -> list[Person]:
        found, wanted = _READ[name](self.root, part), self.counts[name][part]
        if len(found) != wanted:
            raise ValueError(
                f"{name} has {wanted} images for '{part}', but {len(found)} are in {self.root}: fetch it again"
            )
        return found

    def _training(self, part: str) -> ImageSet:
        people = self._read(self.trained_on, "train")
        _, label = np.unique([p.person for p in people], return_inverse=True)
        if label.max() + 1 != self.num_classes:
            raise ValueError(
                f"{self.trained_on} has {self.num_classes} training persons, but {label.max() + 1} are there"
            )
        held = np.zeros(len(people), dtype=bool)
        rng = np.random.default_rng(1501)
        for person in range(self.num_classes):
            order = rng.permutation(np.flatnonzero(label == person))
            held[order[: len(order) // 10]] = True
        chosen = np.flatnonzero(held == (part == "val"))
        people = [people[i] for i in chosen]
        entries = {
            "label": torch.from_numpy(label[chosen]).long(),
            "domain": torch.full((len(people),), NAMES.index(self.trained_on)),
            "camera": torch.tensor([p.camera for p in people]),
        }
        return self._images(people, entries)

    def _images(self, people: list[Person], entries: dict[str, torch.Tensor]) -> ImageSet:
        size = (self.image_size, self.image_size // 2)
        return ImageSet([p.file for p in people], entries, size, self.memory_gb, self.on_corrupt, cache=self.cache)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        if part != "test":
            return self._training(part)
        everyone: list[Person] = []
        domain: list[int] = []
        query: list[bool] = []
        for number in self.targets:
            for name in ("query", "gallery"):
                people = self._read(NAMES[number], name)  # type: ignore[arg-type]  # both are parts
                everyone += people
                domain += [number] * len(people)
                query += [name == "query"] * len(people)
        entries = {"label": [p.person for p in everyone], "camera": [p.camera for p in everyone]}
        columns = {**entries, "domain": domain, "query": query}
        return self._images(everyone, {name: torch.tensor(values) for name, values in columns.items()})


class Market1501(_Persons):
    __doc__ = "Market-1501: 12,936 training images of 751 persons, six cameras.\n\n" + (_Persons.__doc__ or "")
    trained_on = "market1501"


class MSMT17(_Persons):
    __doc__ = "MSMT17: 30,248 training images of 1,041 persons, 15 cameras.\n\n" + (_Persons.__doc__ or "")
    trained_on = "msmt17"
