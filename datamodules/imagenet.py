"""ImageNet and Tiny ImageNet, in their official layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.images import IMAGENET_CROP
from datamodules.splits import HeldOut, class_folders

JPEG = (".jpeg", ".jpg")


class TinyImageNet(HeldOut):
    """Tiny ImageNet (Stanford CS231N): 200 classes, 100,000 training images of 64x64 pixels.

    The labels of its test part were never released, so its validation part (10,000 images) tests, as everybody does.

    Args:
        root: folder ``tiny-imagenet-200``, or the one that holds it.
        image_size: images are scaled to this many pixels.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch.
        val_size: training images held out for validation.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`. Classes
    are numbered in the order of ``wnids.txt``, sorted.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for counts other than the official ones.
    """

    counts = {"train": 100_000, "test": 10_000}

    def __init__(
        self, root: str, image_size: int = 64, memory_gb: float = 4.0, val_size: int = 2000, **split: Any
    ) -> None:
        super().__init__(val_size, **split)
        given = Path(root).expanduser()
        self.root = given / "tiny-imagenet-200" if (given / "tiny-imagenet-200").is_dir() else given
        self.image_size, self.memory_gb, self.num_classes = image_size, memory_gb, 200
        self.domain_names = ["tiny_imagenet"]
        self.wnids = sorted(self._lines("wnids.txt"))
        words = dict(line.split("\t", 1) for line in self._lines("words.txt"))
        self.class_names = [words.get(wnid, wnid).split(",")[0] for wnid in self.wnids]
        if len(self.wnids) != 200:
            raise ValueError(f"{self.root / 'wnids.txt'} names {len(self.wnids)} classes, but Tiny ImageNet has 200")

    def _lines(self, name: str) -> list[str]:
        file = self.root / name
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is not there: TinyImageNet expects tiny-imagenet-200/{{wnids.txt,words.txt,"
                "train/<class>/images/*.JPEG,val/images/*.JPEG,val/val_annotations.txt}; get it from "
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
            )
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def official(self, part: Literal["train", "test"]) -> tuple[list[Path], Tensor]:
        if part == "train":
            files, label = class_folders(self.root / "train", self.wnids, JPEG, "images")
        else:
            number = {wnid: i for i, wnid in enumerate(self.wnids)}
            rows = [line.split("\t")[:2] for line in self._lines("val/val_annotations.txt")]
            files = [self.root / "val" / "images" / name for name, _ in rows]
            label = torch.tensor([number[wnid] for _, wnid in rows])
        if len(files) != self.counts[part]:
            raise ValueError(
                f"Tiny ImageNet has {self.counts[part]} images of {part}, but {len(files)} are in {self.root}: the "
                "download is incomplete; get it from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
            )
        return files, label


class ImageNet(HeldOut):
    """ImageNet (ILSVRC 2012): a thousand classes, 1,281,167 training images; its 50,000 validation images test.

    The shorter side is scaled to 8/7 of ``image_size`` (256 for 224) and the middle is cut out, in training, too; for
    random crops give ``transform`` (torchvision v2, of the image that was cut out).

    Args:
        root: folder with ``train`` and ``val``, in each a folder per class (``n01440764`` and so on).
        image_size: side of the square that is cut out.
        val_size: training images held out for validation.
        num_workers: processes that decode.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for a number of classes other than a thousand, or validation images that aren't sorted by class.
    """

    crop = IMAGENET_CROP
    classes = 1000

    def __init__(
        self, root: str, image_size: int = 224, val_size: int = 10_000, num_workers: int = 8, **split: Any
    ) -> None:
        super().__init__(val_size, num_workers=num_workers, **split)
        self.root, self.image_size, self.num_classes = Path(root).expanduser(), image_size, self.classes
        self.domain_names = ["imagenet"]
        folder = self.root / "train"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: ImageNet expects train/<class>/*.JPEG and val/<class>/*.JPEG; get it from "
                "https://image-net.org (ILSVRC 2012, after registration)"
            )
        self.class_names = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if len(self.class_names) != self.classes:
            raise ValueError(f"{folder} has {len(self.class_names)} folders, but ImageNet has {self.classes} classes")

    def official(self, part: Literal["train", "test"]) -> tuple[list[Path], Tensor]:
        folder = self.root / ("val" if part == "test" else "train")
        if part == "test" and any(folder.glob("ILSVRC2012_val_*")):
            raise ValueError(
                f"the images in {folder} aren't sorted by class: torchvision.datasets.ImageNet(root, 'val') does that, "
                "with ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_val.tar in root"
            )
        return class_folders(folder, self.class_names, JPEG)
