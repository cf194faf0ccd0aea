"""Fashion-MNIST: a part of it comes with the project, all of it is read from its official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.splits import HeldOut

FILE = Path(__file__).parent / "embedded" / "fashion" / "fashion.npz"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionMNIST(HeldOut):
    """Photographs of clothing, 28x28 pixels, grey, in ten classes (arXiv 1708.07747).

    Without ``root`` what comes with the project: 10,000 images of the official training set, of which ``val_size``
    validate, and 2,000 of the official test set. With it all 60,000 and 10,000.

    Args:
        root: folder of the official files (``FashionMNIST/raw/*-ubyte`` below it, as torchvision lays them out).
        download: fetch them to ``root``.
        image_size: images are 28 pixels high; another size scales them once, when they are read.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`.
    """

    in_chans = 1

    def __init__(self, root: str | None = None, download: bool = False, image_size: int = 28, **split: Any) -> None:
        super().__init__(**split)
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, not {image_size}")
        if download and root is None:
            raise ValueError("download needs root: the folder to fetch Fashion-MNIST to")
        self.root, self.download, self.image_size = (
            None if root is None else Path(root).expanduser(),
            download,
            image_size,
        )
        self.num_classes, self.class_names, self.domain_names = 10, list(CLASSES), ["fashion"]

    def prepare_data(self) -> None:
        if self.download:
            from torchvision.datasets import FashionMNIST as Official

            for train in (True, False):
                Official(str(self.root), train, download=True)

    def official(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        if self.root is None:
            with np.load(FILE) as arrays:
                images, label = (torch.from_numpy(arrays[f"{part}_{what}"]) for what in ("images", "labels"))
        else:
            from torchvision.datasets import FashionMNIST as Official

            try:
                found = Official(str(self.root), part == "train")
            except RuntimeError:
                raise FileNotFoundError(
                    f"{self.root / 'FashionMNIST' / 'raw'} hasn't the files of Fashion-MNIST (train-images-idx3-ubyte "
                    "and three more): fetch them with --data.download true, or leave --data.root out"
                ) from None
            images, label = found.data, found.targets
        images = images.unsqueeze(1)
        if self.image_size != 28:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return images, label.long()
