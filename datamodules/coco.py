"""MS-COCO 2014: photographs with captions, in the official layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from datamodules.images import ImageDataModule, ImageSet, cache_at, check_image_size
from datamodules.sampling import Draw
from datamodules.splits import hold_out


class CaptionedFiles(ImageSet):
    """Files with captions. Adds ``text``, a list: one of an image's captions, a function of (seed, epoch, index).

    Args:
        files, size, crop, cache: see :class:`datamodules.images.ImageSet`.
        captions: of each file, at least one.
        seed: of the choice; None: the first caption.
    """

    def __init__(
        self,
        files: Sequence[Path],
        captions: Sequence[Sequence[str]],
        size: tuple[int, int],
        crop: float,
        seed: int | None,
        cache: Path | None = None,
    ) -> None:
        nothing = torch.zeros(len(files), dtype=torch.int64)
        super().__init__(files, {"label": nothing, "domain": nothing}, size, crop=crop, cache=cache)
        self.captions, self.seed = captions, seed

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__getitems__(draws)
        return {**batch, "text": [self._one(draw) for draw in draws]}

    def _one(self, draw: Draw) -> str:
        own = self.captions[draw.position]
        if self.seed is None:
            return own[0]
        return own[int(np.random.default_rng((self.seed, draw.epoch, draw.position)).integers(len(own)))]


class COCOCaptions(ImageDataModule):
    """MS-COCO 2014 (Lin et al., arXiv 1405.0312) with captions: 82,783 training images; its 40,504 of validation test.

    The shorter side is scaled to ``image_size`` and the middle is cut out. Batches have ``text``, a list: in training
    one of an image's captions (five, mostly), drawn anew in each epoch; in evaluation the first. There is one class.

    Args:
        root: folder with ``annotations``, ``train2014`` and ``val2014``.
        image_size: side of the square that is cut out.
        val_size: training images held out for validation; the same ones in all runs.
        num_workers: processes that decode.
        flip: off: captions speak of left and right.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for counts other than the official ones.
    """

    crop = 1.0
    counts: ClassVar[dict[str, int]] = {"train": 82_783, "val": 40_504}
    layout = "annotations/captions_{train,val}2014.json, train2014/*.jpg and val2014/*.jpg"
    source = "https://cocodataset.org/#download (2014 Train and Val images, Train/Val annotations)"

    def __init__(
        self,
        root: str,
        image_size: int = 256,
        val_size: int = 1000,
        num_workers: int = 8,
        flip: bool = False,
        cache: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, flip=flip, **common)
        self.cache = cache_at(cache)
        check_image_size(image_size)
        if val_size < 1:
            raise ValueError(f"val_size must be at least 1, not {val_size}")
        self.root, self.image_size, self.val_size = Path(root).expanduser(), image_size, val_size
        self.num_classes, self.class_names, self.domain_names = 1, ["photo"], ["coco"]

    def _missing(self, what: Path) -> FileNotFoundError:
        return FileNotFoundError(f"{what} is not there: COCOCaptions expects {self.layout}; get it from {self.source}")

    def official(self, part: Literal["train", "val"]) -> tuple[list[Path], list[list[str]]]:
        """Files of a part of the release, in the order of their names, and captions of each, in the file's order."""
        file, folder = self.root / "annotations" / f"captions_{part}2014.json", self.root / f"{part}2014"
        if not file.is_file():
            raise self._missing(file)
        if not folder.is_dir():
            raise self._missing(folder)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            captions: dict[str, list[str]] = {name: [] for name in sorted(names.values())}
            for row in content["annotations"]:
                captions[names[row["image_id"]]].append(" ".join(row["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{file} isn't COCO's file of captions, or is cut short: get it from {self.source}"
            ) from None
        there = {each.name for each in folder.iterdir()}
        found = [name for name, own in captions.items() if own and name in there]
        if len(found) != self.counts[part]:
            raise ValueError(
                f"COCO has {self.counts[part]} captioned images of {part}2014, but {len(found)} are in {self.root}: "
                f"the download is incomplete; get it from {self.source}"
            )
        return [folder / name for name in found], [captions[name] for name in found]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        files, captions = self.official("val" if part == "test" else "train")
        if part != "test":
            kept, held = hold_out(torch.zeros(len(files), dtype=torch.int64), self.val_size)
            chosen = (held if part == "val" else kept).tolist()
            files, captions = [files[i] for i in chosen], [captions[i] for i in chosen]
        size = (self.image_size, self.image_size)
        return CaptionedFiles(files, captions, size, self.crop, self.seed if part == "train" else None, self.cache)
