"""Embedded data with real domains: emoji of the same concepts as five vendors draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.images import ImageDataModule, ImageSet, check_image_size, choose

FOLDER = Path(__file__).parent / "embedded" / "emoji"
STYLES = ("noto", "twemoji", "fluent", "openmoji", "fluent_mono")
CLASSES = tuple(
    "aquatic bird bug building clock clothing face hand heart mammal meal person plant produce sport tool "
    "vehicle".split()
)


def _arrays(name: str, style: str) -> dict[str, np.ndarray]:
    file = FOLDER / f"{name}.npz"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: install the project again, or leave the style '{style}' out")
    with np.load(file) as arrays:
        return dict(arrays)


def _images(style: str) -> Tensor:
    return torch.from_numpy(_arrays(style, style)["images"]).permute(0, 3, 1, 2).contiguous()


def _scaled(images: Tensor, size: int) -> Tensor:
    """Images uint8 (N, 3, H, W) in another size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def drawings(style: str, concept: np.ndarray, size: int) -> tuple[Tensor, np.ndarray]:
    """All emoji of ``captions.npz`` in one style: uint8 (N, 3, size, size), and whether the style has them: bool (N,).

    Args:
        concept: (N,) position among the concepts of :class:`EmojiDomains`, -1 for the other emoji, in their order.
    """
    more = _arrays(f"{style}_more", style)
    images = torch.empty(len(concept), 3, 32, 32, dtype=torch.uint8)
    present = np.ones(len(concept), dtype=bool)
    ours = concept >= 0
    images[torch.from_numpy(ours)] = _images(style)[torch.from_numpy(concept[ours])]
    images[torch.from_numpy(~ours)] = torch.from_numpy(more["images"]).permute(0, 3, 1, 2)
    present[~ours] = more["present"]
    return _scaled(images, size), present


class EmojiDomains(ImageDataModule):
    """650 emoji concepts in 17 classes, drawn in five styles (the domains); comes with the project (see its README).

    The split of the concepts, 455 for training, 66 for validation and 129 for testing, is fixed in the file and the
    same in all styles. Training and validation see the source styles, testing the target styles.

    Args:
        sources: styles of training and validation.
        targets: styles of testing; all others if omitted.
        concepts: ``unseen``: test on concepts that no style showed in training; ``known``: on those of training, drawn
            in the target styles.
        image_size: drawings are 32 pixels high; another size scales them once, when they are read.
        translate: shift training images by up to this part of the side.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        ValueError: for a style that doesn't exist, or sources among the targets of known concepts.
    """

    def __init__(
        self,
        sources: Sequence[str] = ("noto",),
        targets: Sequence[str] | None = None,
        concepts: Literal["unseen", "known"] = "unseen",
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0625,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size, crop_scale)
        self.sources = choose("style", sources, STYLES)
        rest = [style for style in STYLES if style not in sources]
        if targets is None and not rest:
            raise ValueError("all styles are sources, so none is left to test on: name targets, or fewer sources")
        self.targets = choose("style", rest if targets is None else targets, STYLES)
        if concepts not in ("unseen", "known"):
            raise ValueError(f"concepts must be unseen or known, not '{concepts}'")
        check_image_size(image_size)
        both = [STYLES[i] for i in self.targets if i in self.sources]
        if concepts == "known" and both:
            raise ValueError(
                f"with known concepts, '{both[0]}' can't be source and target: it would test on training images"
            )
        self.concepts = concepts
        self.image_size = image_size
        self.num_classes, self.class_names, self.domain_names = len(CLASSES), list(CLASSES), list(STYLES)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        with np.load(FOLDER / "concepts.npz") as arrays:
            split, label = arrays["split"], torch.from_numpy(arrays["label"])
        wanted = "train" if part == "test" and self.concepts == "known" else part
        chosen = torch.from_numpy(np.flatnonzero(split == wanted))
        images, labels, domains, concepts = [], [], [], []
        for domain in self.targets if part == "test" else self.sources:
            images.append(self._drawn(domain, chosen))
            labels.append(label[chosen])
            domains.append(torch.full_like(chosen, domain))
            concepts.append(chosen)
        entries = {"label": torch.cat(labels), "domain": torch.cat(domains), "concept": torch.cat(concepts)}
        return ImageSet(torch.cat(images), entries)

    def _drawn(self, style: int, chosen: Tensor) -> Tensor:
        """These concepts in one style, in the size that is wanted."""
        return _scaled(_images(STYLES[style])[chosen], self.image_size)


class EmojiRetrieval(EmojiDomains):
    """The same concept found in another drawing style: instance retrieval across domains, on embedded data.

    Trained to tell the 455 training concepts apart in the source styles. Tested on the 129 concepts that no style
    showed in training: each, as a target style draws it, is a query; the gallery is all of them in the source styles.
    Validated in the same way on 66 further concepts, the first source's against the other sources'. Labels are
    concepts, cameras are styles.

    Args:
        sources: at least two styles.
        targets: styles of the queries; all others if omitted.

    Other arguments: see :class:`EmojiDomains`.
    """

    def __init__(
        self,
        sources: Sequence[str] = ("noto", "twemoji", "fluent", "openmoji"),
        targets: Sequence[str] | None = None,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0625,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            sources,
            targets,
            "unseen",
            image_size,
            batch_size,
            num_workers,
            seed,
            flip,
            translate,
            transform,
            eval_batch_size,
            crop_scale,
        )
        if len(self.sources) < 2:
            raise ValueError(
                "retrieval is trained on at least two source styles: of one there is one drawing per concept"
            )
        both = [STYLES[i] for i in self.targets if i in self.sources]
        if both:
            raise ValueError(
                f"'{both[0]}' can't be source and target: its drawings would be found in the gallery as they are"
            )
        with np.load(FOLDER / "concepts.npz") as arrays:
            self.class_names = arrays["concept"][arrays["split"] == "train"].tolist()
        self.num_classes = len(self.class_names)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        if part == "train":
            drawings = super().load(part)
            drawings.entries["label"] = torch.unique(drawings.entries["concept"], return_inverse=True)[1]
            return drawings
        targets, sources = self.targets, self.sources
        if part == "val":
            targets, sources = sources[:1], sources[1:]
        with np.load(FOLDER / "concepts.npz") as arrays:
            chosen = torch.from_numpy(np.flatnonzero(arrays["split"] == part))
        images, parts = [], []
        for target in targets:  # a gallery for each, so that every domain is a retrieval of its own
            for style in (target, *sources):
                images.append(self._drawn(style, chosen))
                of = {"domain": target, "camera": style, "query": style == target}
                parts.append({"label": chosen, **{name: torch.full_like(chosen, value) for name, value in of.items()}})
        return ImageSet(torch.cat(images), {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
