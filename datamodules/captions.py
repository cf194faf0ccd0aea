"""Embedded data for pictures with captions: emoji in five drawing styles with their Unicode names and CLDR keywords."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.emoji import CLASSES, FOLDER, STYLES, drawings
from datamodules.images import ImageDataModule, ImageSet, check_image_size
from datamodules.sampling import Draw

#: What the classes of :class:`datamodules.EmojiDomains` are called in a caption: words that captions use for them.
CLASS_TEXTS = {
    "aquatic": "fish sea animal",
    "bug": "insect bug",
    "clothing": "clothing clothes",
    "face": "smiling face",
    "mammal": "animal",
    "meal": "food",
    "plant": "plant flower",
    "produce": "fruit vegetable",
    "sport": "sport ball",
    "vehicle": "vehicle car",
}
TEMPLATE = "a photo of a {}."
#: Sentences of each class, from the keywords of its training concepts.
SENTENCES = 16
_PEOPLE = ("1f468", "1f469", "1f9d1")


def words(text: str) -> list[str]:
    """The words of a text as captions have them: lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower().replace("’", ""))


def family(codepoints: str) -> str:
    """What an emoji is but for man, woman or person, skin, and the variation selector: those are drawn nearly alike."""
    points = [p for p in codepoints.lower().split("-") if p not in ("fe0f", "2640", "2642")]
    points = ["1f9d1" if p in _PEOPLE else p for p in points if not "1f3fb" <= p <= "1f3ff" or len(p) != 5]
    return "-".join(points).removesuffix("-200d")


class Captions:
    """Names and keywords of 1,644 emoji, and which of them are concepts of :class:`datamodules.EmojiDomains`.

    Attributes:
        name, keywords: of each emoji.
        concept: (1644,) position among the 650 concepts, or -1.
        held: (1644,) ``val`` or ``test`` where the emoji, or one drawn nearly alike, is such a concept; else ``train``.
    """

    def __init__(self) -> None:
        with np.load(FOLDER / "captions.npz") as captions, np.load(FOLDER / "concepts.npz") as concepts:
            self.name = [" ".join(words(str(name))) for name in captions["name"]]
            self.keywords = [[" ".join(words(k)) for k in str(line).split("|")] for line in captions["keywords"]]
            self.concept: np.ndarray = captions["concept"]
            held = {family(str(p)): str(s) for p, s in zip(concepts["codepoints"], concepts["split"], strict=True)}
            for points, split in zip(concepts["codepoints"], concepts["split"], strict=True):
                if split == "test":  # over what else has the same family
                    held[family(str(points))] = "test"
            self.held = np.array([held.get(family(str(p)), "train") for p in captions["codepoints"]])
            self.label = np.where(self.concept >= 0, concepts["label"][self.concept], -1)
            self.split = np.where(self.concept >= 0, concepts["split"][self.concept], "none")

    def vocabulary(self) -> list[str]:
        """Words that at least two emoji of training use, the commonest first; templates' and classes' words, too."""
        used = Counter[str]()
        for i in np.flatnonzero(self.held == "train"):
            used.update({w for text in (self.name[i], *self.keywords[i]) for w in words(text)})
        known = [word for word, count in sorted(used.items(), key=lambda item: (-item[1], item[0])) if count > 1]
        more = [w for text in (TEMPLATE.format(""), *CLASSES, *CLASS_TEXTS.values()) for w in words(text)]
        return list(dict.fromkeys([*known, *more]))

    def sentences(self) -> dict[str, list[str]]:
        """Sentences about each class: what it is called and three keywords of one of its training concepts.

        The concepts are drawn once and for all, from those of the training split alone.
        """
        rng = np.random.default_rng(2306)
        found: dict[str, list[str]] = {}
        for number, name in enumerate(CLASSES):
            own = np.flatnonzero((self.label == number) & (self.split == "train"))
            chosen = rng.permutation(np.resize(rng.permutation(own), SENTENCES))
            called = CLASS_TEXTS.get(name, name)
            found[name] = [f"{called}, {', '.join(rng.permutation(self.keywords[i])[:3])}" for i in chosen]
        return found


def caption(name: str, keywords: Sequence[str], rng: np.random.Generator) -> str:
    """One of the many captions of an emoji: its name or not, and some of its keywords in any order.

    Half of them stand in the template.
    """
    kept = [k for k in keywords if rng.random() < 0.5] or [keywords[int(rng.integers(len(keywords)))]]
    parts = [name] * int(rng.random() < 0.5) + [kept[i] for i in rng.permutation(len(kept))]
    text = ", ".join(parts)
    return TEMPLATE.format(text) if rng.random() < 0.5 else text


class CaptionSet(ImageSet):
    """Images whose captions are drawn anew each time: a function of (seed, epoch, index). Adds ``text``, a list."""

    def __init__(self, images: Tensor, entries: dict[str, Tensor], captions: Captions, seed: int) -> None:
        super().__init__(images, entries)
        self.captions, self.seed = captions, seed

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__getitems__(draws)
        texts = []
        for draw, emoji in zip(draws, batch["concept"].tolist(), strict=True):
            rng = np.random.default_rng((self.seed, draw.epoch, draw.position))
            texts.append(caption(self.captions.name[emoji], self.captions.keywords[emoji], rng))
        return {**batch, "text": texts}


class EmojiCaptions(ImageDataModule):
    """1,644 emoji in five drawing styles with captions, to train a CLIP; comes with the project (see its README).

    The concepts of the validation and the test split of :class:`datamodules.EmojiDomains` are kept out of training, by
    code point, and with them what is drawn nearly alike (the same profession as man or woman). Validated and tested on
    those, in all styles, by their 17 classes. Training batches have ``text``, a list of captions, and ``concept``,
    the number of the emoji; evaluation batches have ``label`` and ``domain`` (the style).

    Args:
        image_size: drawings are 32 pixels high; another size scales them once, when they are read.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.125,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size)
        check_image_size(image_size)
        self.image_size = image_size
        self.num_classes, self.class_names, self.domain_names = len(CLASSES), list(CLASSES), list(STYLES)
        self._captions = Captions()
        self.vocabulary = self._captions.vocabulary()
        self.class_texts = [CLASS_TEXTS.get(name, name) for name in CLASSES]
        self.template = TEMPLATE

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        captions, images, parts = self._captions, [], []
        chosen = np.flatnonzero(captions.held == "train" if part == "train" else captions.split == part)
        for number, style in enumerate(STYLES):
            drawn, present = drawings(style, captions.concept, self.image_size)
            here = torch.from_numpy(chosen[present[chosen]])
            images.append(drawn[here])
            label = torch.from_numpy(captions.label)[here]
            parts.append({"label": label, "domain": torch.full_like(label, number), "concept": here})
        entries = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        if part == "train":
            return CaptionSet(torch.cat(images), entries, captions, self.seed)
        return ImageSet(torch.cat(images), entries)
