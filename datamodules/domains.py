"""Benchmarks of domain generalization, read in their official layouts and with their official splits.

All have the same two switches: ``sources`` are trained and validated on, ``targets`` are tested on. One source and the
other domains as targets is single-source generalization (the default), all but one as sources is leave one domain out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from datamodules.images import ImageDataModule, ImageSet, OnCorrupt, cache_at, check_image_size, choose

SUFFIXES = (".jpg", ".jpeg", ".png")
Part = Literal["train", "val", "test"]


class Entry(NamedTuple):
    """One image of a benchmark: its file and the number of its class."""

    file: Path
    label: int


class DomainBenchmark(ImageDataModule):
    """What the benchmarks share: the protocol, the counts, and how images are decoded.

    Args:
        root: folder of the dataset.
        sources: domains of training and validation; the benchmark's first if omitted.
        targets: domains of testing; all others if omitted.
        image_size: images are squashed to a square of this side.
        on_corrupt: ``error``: stop at a file that is no image; ``skip``: count such files and go on.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.
        num_workers: processes that decode; needed where images don't fit in memory.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for a domain that doesn't exist (lists those that do), or counts other than published.
        FileNotFoundError: naming what is missing, the layout and where to get it.
    """

    domains: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    layout: ClassVar[str]
    source: ClassVar[str]
    #: Images of each domain, as published; a domain that isn't here isn't checked.
    counts: ClassVar[Mapping[str, int]] = {}

    def __init__(
        self,
        root: str,
        sources: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0625,
        transform: nn.Module | None = None,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size, crop_scale)
        self.root = Path(root).expanduser()
        sources = self.domains[:1] if sources is None else sources
        self.sources = choose("domain", sources, self.domains)
        rest = [domain for domain in self.domains if domain not in sources]
        self.targets = choose("domain", rest if targets is None else targets, self.domains)
        both = [self.domains[i] for i in self.targets if i in self.sources]
        if both:
            raise ValueError(f"'{both[0]}' can't be source and target: it would test on images of training")
        check_image_size(image_size)
        self.image_size, self.on_corrupt, self.memory_gb = image_size, on_corrupt, memory_gb
        self.cache = cache_at(cache)
        self.domain_names, self.class_names = list(self.domains), list(self.classes)
        self.num_classes = len(self.class_names)

    # ------------------------------------------------------------------ what a benchmark says

    def entries(self, domain: str, part: Part) -> list[Entry]:
        """The images of a domain for one part, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must define entries(domain, part)")

    def whole(self, domain: str) -> int:
        """How many images a domain has in all, to be compared with ``counts``."""
        return sum(len(self.entries(domain, part)) for part in ("train", "val"))

    # ------------------------------------------------------------------ reading

    def missing(self, what: Path) -> FileNotFoundError:
        name = type(self).__name__
        return FileNotFoundError(f"{what} is not there: {name} expects {self.layout}; get it from {self.source}")

    def folder(self, *names: str) -> Path:
        """The first of these folders below root that exists.

        Raises:
            FileNotFoundError: if none does.
        """
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise self.missing(self.root / names[0])

    def list_file(self, file: Path, images: Path, first: int = 0) -> list[Entry]:
        """Lines ``path label`` of an official list, labels counted from ``first``."""
        if not file.is_file():
            raise self.missing(file)
        found = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isdigit():
                raise ValueError(f"{file}, line {number}: expected a path and a number, not '{line.strip()}'")
            found.append(Entry(images / path, int(label) - first))
        return found

    def class_folders(self, folder: Path) -> list[Entry]:
        """Images in one folder per class, classes numbered in the order of their names, as everybody does."""
        names = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if len(names) != self.num_classes:
            raise ValueError(
                f"{folder} has {len(names)} folders, but {type(self).__name__} has {self.num_classes} classes"
            )
        return [Entry(file, label) for label, name in enumerate(names) for file in self._images(folder / name)]

    def _images(self, folder: Path) -> Iterator[Path]:
        return (f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES)

    def load(self, part: Part) -> ImageSet:
        if not self.root.is_dir():
            raise self.missing(self.root)
        files: list[Path] = []
        labels: list[int] = []
        domains: list[int] = []
        for number in self.targets if part == "test" else self.sources:
            domain = self.domains[number]
            wanted = self.counts.get(domain)
            if wanted is not None and (there := self.whole(domain)) != wanted:
                raise ValueError(
                    f"{type(self).__name__} has {wanted} images of '{domain}', but {there} are in {self.root}: "
                    f"the download is incomplete or another edition; get it from {self.source}"
                )
            for entry in self.entries(domain, part):
                if not 0 <= entry.label < self.num_classes:
                    raise ValueError(
                        f"{entry.file}: class {entry.label}, but {type(self).__name__} has {self.num_classes}"
                    )
                files.append(entry.file)
                labels.append(entry.label)
                domains.append(number)
        entries = {"label": torch.tensor(labels, dtype=torch.int64), "domain": torch.tensor(domains, dtype=torch.int64)}
        size = (self.image_size, self.image_size)
        return ImageSet(files, entries, size, self.memory_gb, self.on_corrupt, cache=self.cache)


class PACS(DomainBenchmark):
    """PACS (Li et al., ICCV 2017): 9,991 images of 7 classes in 4 domains.

    Sources are trained and validated on the official train and crossval lists, targets tested on all their images. One
    image that the release says is faulty is left out.
    """

    domains = ("photo", "art_painting", "cartoon", "sketch")
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    layout = "kfold/<domain>/<class>/*.jpg (or images/...) and splits/<domain>_{train,crossval}_kfold.txt"
    source = "https://dali-dl.github.io/project_iccv2017.html"
    counts = {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}
    faulty = "sketch/dog/n02103406_4068-1.png"

    def _list(self, domain: str, name: str) -> list[Entry]:
        images = self.folder("kfold", "images")
        lists = self.folder("splits", "Train val splits and h5py files pre-read", "files")
        return self.list_file(lists / f"{domain}_{name}_kfold.txt", images, first=1)

    def whole(self, domain: str) -> int:
        return len(self._list(domain, "train")) + len(self._list(domain, "crossval"))

    def entries(self, domain: str, part: Part) -> list[Entry]:
        lists = {"train": ("train",), "val": ("crossval",), "test": ("train", "crossval")}[part]
        found = [entry for name in lists for entry in self._list(domain, name)]
        return [entry for entry in found if not entry.file.as_posix().endswith(self.faulty)]


class VLCS(DomainBenchmark):
    """VLCS (Fang et al., ICCV 2013): 10,729 images of 5 classes from 4 datasets.

    Sources are trained and validated on the train and crossval folders, targets tested on the test folders, as the
    release divides them.
    """

    domains = ("PASCAL", "LABELME", "CALTECH", "SUN")
    classes = ("bird", "car", "chair", "dog", "person")
    layout = "<domain>/{train,crossval,test}/<class 0 to 4>/*.jpg"
    source = "https://drive.google.com/uc?id=1r0WL5DDqKfSPp9E3tRENwHaXNs1olLZd (linked by Dassl.pytorch)"

    def entries(self, domain: str, part: Part) -> list[Entry]:
        return self.class_folders(self.folder(f"{domain}/{'crossval' if part == 'val' else part}"))


class OfficeHome(DomainBenchmark):
    """Office-Home (Venkateswara et al., CVPR 2017): 15,588 images of 65 classes in 4 domains.

    The release has no split: of each class of a source domain a tenth, drawn once and the same for all runs, validates
    and the rest trains; targets are tested on all their images.
    """

    domains = ("Art", "Clipart", "Product", "Real World")
    classes = tuple(
        "Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards "
        "Computer Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder "
        "Fork Glasses Hammer Helmet Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug "
        "Notebook Oven Pan Paper_Clip Pen Pencil Postit_Notes Printer Push_Pin Radio Refrigerator Ruler "
        "Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon TV Table Telephone ToothBrush Toys "
        "Trash_Can Webcam".split()
    )
    layout = "<domain>/<class>/*.jpg, domains Art, Clipart, Product, Real World"
    source = "https://www.hemanthdv.org/officeHomeDataset.html"
    counts = {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357}

    def entries(self, domain: str, part: Part) -> list[Entry]:
        found = self.class_folders(self.folder(domain, domain.replace(" ", "_")))
        if part == "test":
            return found
        labels = np.array([entry.label for entry in found])
        held = np.zeros(len(found), dtype=bool)
        rng = np.random.default_rng(2017)
        for label in range(self.num_classes):
            order = rng.permutation(np.flatnonzero(labels == label))
            held[order[: round(len(order) / 10)]] = True
        return [entry for entry, out in zip(found, held, strict=True) if out == (part == "val")]


class DigitsDG(DomainBenchmark):
    """Digits-DG (Zhou et al., AAAI 2020): 24,000 digits of 4 datasets, 600 of each class in each.

    Sources are trained and validated on the train and val folders, targets tested on both.
    """

    domains = ("mnist", "mnist_m", "svhn", "syn")
    classes = tuple("0123456789")
    layout = "<domain>/{train,val}/<digit>/*.jpg"
    source = "https://drive.google.com/uc?id=15V7EsHfCcfbKgsDmzQKj_DfXt_XYp_P7 (linked by Dassl.pytorch)"
    counts = {"mnist": 6000, "mnist_m": 6000, "svhn": 6000, "syn": 6000}

    def entries(self, domain: str, part: Part) -> list[Entry]:
        parts = ("train", "val") if part == "test" else (part,)
        return [entry for name in parts for entry in self.class_folders(self.folder(f"{domain}/{name}"))]


class DomainNet(DomainBenchmark):
    """DomainNet (Peng et al., ICCV 2019): 586,575 images of 345 classes in 6 domains.

    Trained on the official train lists (the cleaned edition). The official test lists of the sources validate, those of
    the targets test. Give workers: the images don't fit in memory. Classes go by their numbers in the lists.
    """

    domains: ClassVar[tuple[str, ...]] = ("real", "clipart", "infograph", "painting", "quickdraw", "sketch")
    classes = tuple(str(i) for i in range(345))
    layout = "<domain>/<class>/*.jpg and splits/<domain>_{train,test}.txt"
    source = "http://ai.bu.edu/M3SDA/ (cleaned version)"
    splits: ClassVar[tuple[str, ...]] = ("splits", ".")
    counts = {
        "clipart": 48129,
        "infograph": 51605,
        "painting": 72266,
        "quickdraw": 172500,
        "real": 172947,
        "sketch": 69128,
    }

    def entries(self, domain: str, part: Part) -> list[Entry]:
        name = "train" if part == "train" else "test"
        return self.list_file(self.folder(*self.splits) / f"{domain}_{name}.txt", self.root)


class MiniDomainNet(DomainNet):
    """mini-DomainNet (Zhou et al., IEEE TIP 2021): 126 classes and 4 domains of DomainNet, usually at 96 pixels."""

    domains = ("real", "clipart", "painting", "sketch")
    classes = tuple(str(i) for i in range(126))
    layout = "DomainNet's <domain>/<class>/*.jpg and splits_mini/<domain>_{train,test}.txt"
    source = "http://ai.bu.edu/M3SDA/ and, for splits_mini, Dassl.pytorch's DATASETS.md"
    splits: ClassVar[tuple[str, ...]] = ("splits_mini",)
    counts = {"clipart": 18703, "painting": 31202, "real": 65609, "sketch": 24492}
