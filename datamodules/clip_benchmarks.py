"""The benchmarks on which prompts of CLIP are compared, in CoOp's layouts and with its split files.

Protocols: *base to novel*: the classes, in the order of their labels, are cut in two halves (the first one larger where
their number is odd); the first is trained on with a few images a class, both are tested on, each among its own classes.
*All*: trained and tested on all classes; so for transfer to another dataset, or to ImageNet's variants.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.captions import CLASS_TEXTS, TEMPLATE, Captions
from datamodules.domains import Entry
from datamodules.emoji import CLASSES, STYLES, drawings
from datamodules.images import ImageDataModule, ImageSet, OnCorrupt, cache_at, check_image_size

SUFFIXES = (".jpg", ".jpeg", ".png")
Part = Literal["train", "val", "test"]
Protocol = Literal["base_to_novel", "all"]
#: Sentences about a class where no file has better ones (Radford et al., the seven templates of their notebook).
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


# ---------------------------------------------------------------------- few shots, sentences, halves


def few_shots(label: Tensor, shots: int, seed: int) -> Tensor:
    """Positions of ``shots`` examples of each class (all, where a class has fewer), sorted.

    What is drawn of a class depends on the seed, the class and its examples only, so base classes get the same images
    whether or not the others are there.
    """
    chosen = []
    for each in label.unique(sorted=True).tolist():
        where = (label == each).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + each)
        chosen.append(where[torch.randperm(len(where), generator=generator)[:shots]])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def halves(classes: int) -> list[list[int]]:
    """The base classes, ceil(K / 2) of them, and the novel ones."""
    base = math.ceil(classes / 2)
    return [list(range(base)), list(range(base, classes))]


def _divided(protocol: str, classes: int) -> tuple[list[str], list[list[int]]]:
    """Names of the test's domains and the classes of each."""
    if protocol not in ("base_to_novel", "all"):
        raise ValueError(f"protocol must be base_to_novel or all, not '{protocol}'")
    if protocol == "all":
        return ["all"], [list(range(classes))]
    if classes < 2:
        raise ValueError(f"there is {classes} class: nothing to divide into base and novel")
    return ["base", "novel"], halves(classes)


def _drawn(label: Tensor, base: int, part: Part, shots: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions of a part's images that are taken, and their labels and domains; ``base``: classes of the first."""
    domain = (label >= base).long()
    chosen = torch.arange(len(label))
    if part == "train":  # novel classes have no part in training
        chosen = (domain == 0).nonzero().squeeze(1)
    if part != "test" and shots:
        chosen = chosen[few_shots(label[chosen], shots if part == "train" else min(shots, 4), seed)]
    return chosen, {"label": label[chosen], "domain": domain[chosen]}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def read_sentences(
    file: Path, class_names: Sequence[str], class_texts: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Sentences about each class, of a JSON file {class: [sentence, ...]}; other classes in it are ignored.

    Names are compared without case, underscores taken for blanks; what a class is called in texts serves as well.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another content, a class without sentences, or unequal numbers of them; names the classes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} with sentences about the classes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(v, list) and all(isinstance(s, str) and s.strip() for s in v) for v in content.values()
    ):
        raise ValueError(f'{file} must hold {{"class": ["sentence", ...], ...}}, sentences not empty')
    known = {_plain(name): sentences for name, sentences in content.items()}
    for name, text in zip(class_names, class_texts or class_names, strict=True):
        known.setdefault(_plain(name), known.get(_plain(text), []))
    missing = [name for name in class_names if not known[_plain(name)]]
    if missing:
        raise ValueError(f"{file} has no sentences about {', '.join(missing[:8])}" + (" ..." if missing[8:] else ""))
    found = {name: known[_plain(name)] for name in class_names}
    counts = {name: len(sentences) for name, sentences in found.items()}
    if len(set(counts.values())) > 1:
        usual = max(set(counts.values()), key=list(counts.values()).count)
        odd = [f"{name} {count}" for name, count in counts.items() if count != usual]
        named = ", ".join(odd[:8])
        raise ValueError(f"{file} has {usual} sentences about most classes, but of {named}: give all alike")
    return found


class FewShot(ImageDataModule):
    """What the benchmarks share: the protocol, few shots, sentences, how images are decoded.

    Args:
        root: folder of the dataset.
        shots: training images of each class, drawn by the run's seed; 0: all. Validation has at most 4 of each.
        protocol: ``base_to_novel``: domains of the test are ``base`` and ``novel``; ``all``: one domain.
        sentences: a JSON file {class: [sentence, ...]}, the same number of each; seven templates if omitted.
        image_size: images are scaled until this fits, and the middle is cut out.

    Other arguments: see :class:`datamodules.domains.DomainBenchmark` and :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for settings out of range, or a split file that doesn't fit.
        FileNotFoundError: naming what is missing, the layout and where to get it.
    """

    template: str = "a photo of a {}."
    layout: ClassVar[str]
    source: ClassVar[str] = "the steps of CoOp's DATASETS.md (github.com/KaiyangZhou/CoOp)"
    crop = 1.0

    def __init__(
        self,
        root: str,
        shots: int = 16,
        protocol: Protocol = "base_to_novel",
        sentences: str | None = None,
        image_size: int = 224,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = False,
        translate: float = 0.0,
        transform: nn.Module | None = None,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        eval_batch_size: int | None = 100,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size)
        if shots < 0:
            raise ValueError(f"shots must not be negative (0: all images), but is {shots}")
        check_image_size(image_size)
        self.root, self.shots, self.protocol = Path(root).expanduser(), shots, protocol
        self.image_size, self.on_corrupt, self.memory_gb = image_size, on_corrupt, memory_gb
        self.cache = cache_at(cache)
        if not self.root.is_dir():
            raise self.missing(self.root)
        self.class_names = self.read_classes()
        self.class_texts = [self.called(name) for name in self.class_names]
        self.num_classes = len(self.class_names)
        self.domain_names, self.domain_classes = _divided(protocol, self.num_classes)
        if sentences is not None:
            self.class_sentences = read_sentences(Path(sentences).expanduser(), self.class_names, self.class_texts)
        else:
            texts = zip(self.class_names, self.class_texts, strict=True)
            self.class_sentences = {name: [t.format(text) for t in TEMPLATES] for name, text in texts}

    # ------------------------------------------------------------------ what a benchmark says

    def called(self, name: str) -> str:
        """What a class is called in texts."""
        return name.replace("_", " ")

    def read_classes(self) -> list[str]:
        """The names of the classes, in the order of their labels."""
        raise NotImplementedError(f"{type(self).__name__} must define read_classes()")

    def entries(self, part: Part) -> list[Entry]:
        """The images of a part, in a fixed order."""
        raise NotImplementedError(f"{type(self).__name__} must define entries(part)")

    # ------------------------------------------------------------------ reading

    def missing(self, what: Path) -> FileNotFoundError:
        name = type(self).__name__
        return FileNotFoundError(f"{what} is not there: {name} expects {self.layout}; get it by {self.source}")

    def folder(self, *names: str) -> Path:
        """The first of these folders below root that exists."""
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise self.missing(self.root / names[0])

    def load(self, part: Part) -> ImageSet:
        entries = self.entries(part)
        label = torch.tensor([entry.label for entry in entries], dtype=torch.int64)
        chosen, of = _drawn(label, len(self.domain_classes[0]), part, self.shots, self.seed)
        files = [entries[i].file for i in chosen.tolist()]
        size = (self.image_size, self.image_size)
        return ImageSet(files, of, size, self.memory_gb, self.on_corrupt, self.crop, self.cache)


class EmojiFewShot(ImageDataModule):
    """The same protocol on embedded data: 17 classes of emoji, 9 base and 8 novel, in five drawing styles mixed.

    Trained on a few drawings of each base class, of concepts that the small CLIP saw, too, when it was trained;
    validated (on base and novel, 4 of each class) and tested on concepts that it never saw. Sentences about a class are
    keywords of its training concepts.

    Args:
        shots: training drawings of each class, drawn by the run's seed; 0: all. Validation has at most 4 of each.
        protocol: ``base_to_novel``: domains of the test are ``base`` and ``novel``; ``all``: one domain.
        sentences: a JSON file {class: [sentence, ...]}, in place of the keywords.
        image_size: drawings are 32 pixels high; another size scales them once, when they are read.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.
    """

    template = TEMPLATE

    def __init__(
        self,
        shots: int = 16,
        protocol: Protocol = "base_to_novel",
        sentences: str | None = None,
        image_size: int = 32,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0625,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = 100,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size)
        if shots < 0:
            raise ValueError(f"shots must not be negative (0: all images), but is {shots}")
        check_image_size(image_size)
        self.shots, self.image_size = shots, image_size
        self.class_names, self.num_classes = list(CLASSES), len(CLASSES)
        self.class_texts = [CLASS_TEXTS.get(name, name) for name in CLASSES]
        self.domain_names, self.domain_classes = _divided(protocol, self.num_classes)
        self._captions = Captions()
        file = Path(sentences).expanduser() if sentences is not None else None
        self.class_sentences = read_sentences(file, CLASSES) if file else self._captions.sentences()

    def load(self, part: Part) -> ImageSet:
        captions, images, labels = self._captions, [], []
        wanted = np.flatnonzero(captions.split == part)
        for style in STYLES:
            drawn, present = drawings(style, captions.concept, self.image_size)
            here = torch.from_numpy(wanted[present[wanted]])
            images.append(drawn[here])
            labels.append(torch.from_numpy(captions.label)[here])
        chosen, of = _drawn(torch.cat(labels), len(self.domain_classes[0]), part, self.shots, self.seed)
        return ImageSet(torch.cat(images)[chosen], of)


# ---------------------------------------------------------------------- one split file


class Split(FewShot):
    """A dataset with one of CoOp's split files, ``{"train": [[path, label, class], ...], "val": ..., "test": ...}``."""

    split_file: ClassVar[str]
    #: Where the paths of the split file begin, CoOp's name first, then those of torchvision's copy.
    images: ClassVar[tuple[str, ...]]

    def _split(self) -> Mapping[str, list[tuple[str, int, str]]]:
        file = self.root / self.split_file
        if not file.is_file():
            raise self.missing(file)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return {p: [(str(f), int(k), str(n)) for f, k, n in content[p]] for p in ("train", "val", "test")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no split file of CoOp's ({error!r}): fetch it again") from error

    def read_classes(self) -> list[str]:
        names: dict[int, str] = {}
        for lines in self._split().values():
            for _, label, name in lines:
                if names.setdefault(label, name) != name:
                    raise ValueError(f"{self.split_file}: class {label} is '{names[label]}' and '{name}'")
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{self.split_file}: labels must be 0 to {len(names) - 1} without a gap")
        return [names[label] for label in sorted(names)]

    def entries(self, part: Part) -> list[Entry]:
        folder = self.folder(*self.images)
        return [Entry(folder / path, label) for path, label, _ in self._split()[part]]


def _layout(images: str, split: str) -> str:
    return f"{images} and {split}"


class Caltech101(Split):
    """Caltech-101 without its background and face classes: 100 classes."""

    images = ("101_ObjectCategories", "caltech101/101_ObjectCategories")
    split_file = "split_zhou_Caltech101.json"
    layout = _layout("101_ObjectCategories/<class>/*.jpg", split_file)


class OxfordPets(Split):
    """Oxford-IIIT Pets: 37 breeds."""

    images = ("images", "oxford-iiit-pet/images")
    split_file = "split_zhou_OxfordPets.json"
    layout = _layout("images/*.jpg", split_file)
    template = "a photo of a {}, a type of pet."


class StanfordCars(Split):
    """Stanford Cars: 196 models."""

    images = ("stanford_cars", ".")
    split_file = "split_zhou_StanfordCars.json"
    layout = _layout("cars_train/*.jpg, cars_test/*.jpg", split_file)


class Flowers102(Split):
    """Oxford Flowers: 102 classes."""

    images = ("jpg", "flowers-102/jpg")
    split_file = "split_zhou_OxfordFlowers.json"
    layout = _layout("jpg/*.jpg", split_file)
    template = "a photo of a {}, a type of flower."


class Food101(Split):
    """Food-101: 101 dishes."""

    images = ("images", "food-101/images")
    split_file = "split_zhou_Food101.json"
    layout = _layout("images/<class>/*.jpg", split_file)
    template = "a photo of {}, a type of food."


class SUN397(Split):
    """SUN397: 397 scenes."""

    images = ("SUN397", ".")
    split_file = "split_zhou_SUN397.json"
    layout = _layout("SUN397/<letter>/<class>/*.jpg", split_file)


class DTD(Split):
    """Describable Textures: 47 classes."""

    images = ("images", "dtd/dtd/images", "dtd/images")
    split_file = "split_zhou_DescribableTextures.json"
    layout = _layout("images/<class>/*.jpg", split_file)
    template = "{} texture."


class EuroSAT(Split):
    """EuroSAT: 10 kinds of land from above."""

    images = ("2750", "eurosat/2750")
    split_file = "split_zhou_EuroSAT.json"
    layout = _layout("2750/<class>/*.jpg", split_file)
    template = "a centered satellite photo of {}."


class UCF101(Split):
    """UCF101: 101 actions, the middle frame of each video."""

    images = ("UCF-101-midframes",)
    split_file = "split_zhou_UCF101.json"
    layout = _layout("UCF-101-midframes/<class>/*.jpg", split_file)
    template = "a photo of a person doing {}."


class FGVCAircraft(FewShot):
    """FGVC Aircraft: 100 variants, with the split of its release."""

    layout = "images/*.jpg, variants.txt and images_variant_{train,val,test}.txt"
    template = "a photo of a {}, a type of aircraft."

    def _data(self) -> Path:
        inner = self.root / "fgvc-aircraft-2013b" / "data"  # torchvision's copy
        return inner if inner.is_dir() else self.root

    def _lines(self, name: str) -> list[str]:
        file = self._data() / name
        if not file.is_file():
            raise self.missing(file)
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def read_classes(self) -> list[str]:
        return self._lines("variants.txt")

    def entries(self, part: Part) -> list[Entry]:
        number = {name: i for i, name in enumerate(self.class_names)}
        found = []
        for line in self._lines(f"images_variant_{part}.txt"):
            image, _, variant = line.partition(" ")
            if variant not in number:
                raise ValueError(f"images_variant_{part}.txt: '{variant}' is not in variants.txt")
            found.append(Entry(self._data() / "images" / f"{image}.jpg", number[variant]))
        return found


# ---------------------------------------------------------------------- ImageNet and its variants


def _synsets(file: Path, error: FileNotFoundError) -> dict[str, str]:
    """Lines ``synset name`` of CoOp's classnames.txt, in the order of the synsets."""
    if not file.is_file():
        raise error
    pairs = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs) or not pairs:
        raise ValueError(f"{file} must hold lines 'synset name'")
    return dict(sorted((synset, name.strip()) for synset, name in pairs))


class FewShotImageNet(FewShot):
    """ImageNet with CLIP's names of its 1,000 classes; its validation images test, as everybody does.

    Validated on up to 4 training images of each class, which are kept out of the shots.
    """

    layout = "images/{train,val}/<synset>/*.JPEG and classnames.txt"
    #: Folder of the images of each part, or None where there is none.
    parts: ClassVar[Mapping[str, str | None]] = {"train": "images/train", "val": "images/train", "test": "images/val"}

    def read_classes(self) -> list[str]:
        names = _synsets(self.root / "classnames.txt", self.missing(self.root / "classnames.txt"))
        self.synsets = [s for s in names if self._here(s, list(names))]
        if not self.synsets:
            raise self.missing(self.folder_of("test") / next(iter(names)))
        called = [names[synset] for synset in self.synsets]  # CLIP calls some classes alike, missiles and sunglasses
        return [n if called.count(n) == 1 else f"{n} ({s})" for n, s in zip(called, self.synsets, strict=True)]

    def called(self, name: str) -> str:
        return re.sub(r" \(n\d+\)$", "", name).replace("_", " ")

    def folder_of(self, part: Part) -> Path:
        below = self.parts[part]
        if below is None:
            raise ValueError(f"{type(self).__name__} has images to test on only: train on FewShotImageNet")
        return self.folder(below)

    def _place(self, synset: str, synsets: Sequence[str]) -> str:
        """The folder of a class below the part's."""
        return synset

    def _here(self, synset: str, synsets: Sequence[str]) -> bool:
        return (self.folder_of("test") / self._place(synset, synsets)).is_dir()

    def entries(self, part: Part) -> list[Entry]:
        folder, found = self.folder_of(part), []
        for label, synset in enumerate(self.synsets):
            place = folder / self._place(synset, self.synsets)
            if not place.is_dir():
                raise self.missing(place)
            files = [Entry(f, label) for f in sorted(place.iterdir()) if f.suffix.lower() in SUFFIXES]
            if part != "test":
                held = set(few_shots(torch.full((len(files),), label), min(4, len(files) // 2), 0).tolist())
                files = [f for i, f in enumerate(files) if (i in held) == (part == "val")]
            found += files
        return found


class ImageNetV2(FewShotImageNet):
    """ImageNet-V2 (matched frequency), to test on: 10,000 images of ImageNet's classes."""

    layout = "imagenetv2-matched-frequency-format-val/<0 to 999>/*.jpeg and classnames.txt"
    parts = {"train": None, "val": None, "test": "imagenetv2-matched-frequency-format-val"}

    def _place(self, synset: str, synsets: Sequence[str]) -> str:
        return str(list(synsets).index(synset))


class ImageNetSketch(FewShotImageNet):
    """ImageNet-Sketch, to test on: 50,889 sketches of ImageNet's classes."""

    layout = "images/<synset>/*.JPEG and classnames.txt"
    parts = {"train": None, "val": None, "test": "images"}


class ImageNetA(FewShotImageNet):
    """ImageNet-A, to test on: 7,500 images of 200 of ImageNet's classes, told apart among these."""

    layout = "imagenet-a/<synset>/*.jpg and classnames.txt"
    parts = {"train": None, "val": None, "test": "imagenet-a"}


class ImageNetR(FewShotImageNet):
    """ImageNet-R, to test on: 30,000 renditions of 200 of ImageNet's classes, told apart among these."""

    layout = "imagenet-r/<synset>/*.jpg and classnames.txt"
    parts = {"train": None, "val": None, "test": "imagenet-r"}
