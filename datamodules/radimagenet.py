"""RadImageNet: CT, MR and ultrasound of eleven anatomies, 165 classes."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.images import ImageDataModule, ImageSet, OnCorrupt, cache_at, check_image_size

MODALITIES = ("CT", "MR", "US")
FOLDER = "radiology_ai"


class RadImageNet(ImageDataModule):
    """RadImageNet (Mei et al., doi 10.1148/ryai.210315): 1.35 million images, 165 classes; the domains are modalities.

    Trained, validated and tested on the release's lists. The classes are the list's ``label``, in alphabetical order.
    Names of files and columns are those that public code reads (``process.py`` of ogrenenmakine/Refined-RadImagenet,
    by an author of arXiv 2406.14568, among others): the release itself, which is given on request, wasn't at hand. What
    that code writes, ``{train,val,test}/<class>/*.png``, is read by :class:`datamodules.folders.Folders`. Some images
    are said to be empty or to be there more than once (issue 17 of BMEII-AI/RadImageNet); they are left as they are.

    Args:
        root: folder with ``radiology_ai`` and, in it or beside it, the lists.
        image_size: images are squashed to a square of this side.
        num_workers: processes that decode.
        on_corrupt: ``error``: stop at a file that is no image; ``skip``: count such files and go on.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for a list without the columns, a number of classes other than 165, or a file of no modality.
    """

    classes = 165
    layout = (
        "radiology_ai/<CT, MR or US>/<anatomy>/<pathology>/*.png (US without pathology) and "
        "RadiologyAI_{train,val,test}.csv with columns filename and label"
    )
    source = "https://www.radimagenet.com (on request)"

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        num_workers: int = 8,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        cache: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **common)
        check_image_size(image_size)
        given = Path(root).expanduser()
        self.root = given.parent if given.name == FOLDER and not (given / FOLDER).is_dir() else given
        self.image_size, self.on_corrupt, self.memory_gb = image_size, on_corrupt, memory_gb
        self.cache = cache_at(cache)
        self.class_names = sorted({label for _, label in self._rows("train")})
        if len(self.class_names) != self.classes:
            raise ValueError(
                f"{self._list('train')} names {len(self.class_names)} classes, but RadImageNet has {self.classes}"
            )
        self.num_classes, self.domain_names = self.classes, list(MODALITIES)

    def _missing(self, what: str) -> FileNotFoundError:
        return FileNotFoundError(f"{what}: RadImageNet expects {self.layout}; get it from {self.source}")

    def _list(self, part: str) -> Path:
        name = f"RadiologyAI_{part}.csv"
        for file in (self.root / name, self.root / FOLDER / name):
            if file.is_file():
                return file
        raise self._missing(f"{self.root / name} is not there")

    def _rows(self, part: str) -> list[tuple[str, str]]:
        """File, counted from root, and class of each image of a part."""
        file = self._list(part)
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = csv.reader(opened)
            columns = next(rows, [])
            try:
                name, label = columns.index("filename"), columns.index("label")
                return [(row[name], row[label]) for row in rows if row]
            except (ValueError, IndexError):
                raise ValueError(
                    f"{file} must have the columns filename and label in every row; its first row is {columns}"
                ) from None

    def _check(self, part: str, names: Sequence[str]) -> None:
        """FileNotFoundError if files aren't there; folders are listed, as asking for a million files takes minutes."""
        folders: dict[str, list[str]] = defaultdict(list)
        for name in names:
            folder, _, last = name.rpartition("/")
            folders[folder].append(last)
        missing = []
        for folder, wanted in folders.items():
            there = set(os.listdir(self.root / folder)) if (self.root / folder).is_dir() else set()
            missing += [self.root / folder / last for last in wanted if last not in there]
        if missing:
            what = f"{len(missing)} of the {len(names)} images in {self._list(part)} are missing, such as {missing[0]}"
            raise self._missing(what)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        rows = self._rows(part)
        number = {name: i for i, name in enumerate(self.class_names)}
        labels, domains = [], []
        for name, label in rows:
            modality = next((each for each in name.split("/")[:-1] if each in MODALITIES), None)
            if label not in number or modality is None:
                what = f"is of class '{label}', which training hasn't" if modality else f"is in none of {MODALITIES}"
                raise ValueError(f"{self._list(part)}: {name} {what}")
            labels.append(number[label])
            domains.append(MODALITIES.index(modality))
        self._check(part, [name for name, _ in rows])
        entries = {"label": torch.tensor(labels, dtype=torch.int64), "domain": torch.tensor(domains, dtype=torch.int64)}
        files = [self.root / name for name, _ in rows]
        size = (self.image_size, self.image_size)
        return ImageSet(files, entries, size, self.memory_gb, self.on_corrupt, cache=self.cache)
