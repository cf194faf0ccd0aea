"""Fashion-MNIST: a part of it comes with the project, all of it is read from its official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.images import check_image_size
from datamodules.splits import HeldOut

EMBEDDED = Path(__file__).parent / "embedded"
FILE = EMBEDDED / "fashion" / "fashion.npz"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class GreySquares(HeldOut):
    """28x28 grey pixels in ten classes: a part that comes with the project, or all of the official idx files.

    Arguments: see :class:`FashionMNIST`.
    """

    in_chans = 1
    classes: ClassVar[tuple[str, ...]]
    #: What comes with the project: ``{train,test}_{images,labels}``.
    file: ClassVar[Path]
    #: What people call it, torchvision's class for it, and the name of its only domain.
    called: ClassVar[str]
    reader: ClassVar[str]
    domain: ClassVar[str]

    def __init__(self, root: str | None = None, download: bool = False, image_size: int = 28, **split: Any) -> None:
        super().__init__(**split)
        check_image_size(image_size)
        if download and root is None:
            raise ValueError(f"download needs root: the folder to fetch {self.called} to")
        self.root, self.download, self.image_size = (
            None if root is None else Path(root).expanduser(),
            download,
            image_size,
        )
        self.num_classes, self.class_names, self.domain_names = len(self.classes), list(self.classes), [self.domain]

    def read(self, part: Literal["train", "test"], download: bool) -> Any:
        """torchvision's dataset; RuntimeError where files are missing."""
        from torchvision import datasets

        return getattr(datasets, self.reader)(str(self.root), part == "train", download=download)

    def prepare_data(self) -> None:
        if self.download:
            self.read("train", True)
            self.read("test", True)

    def official(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        if self.root is None:
            with np.load(self.file) as arrays:
                images, label = (torch.from_numpy(arrays[f"{part}_{what}"]) for what in ("images", "labels"))
        else:
            try:
                found = self.read(part, False)
            except RuntimeError:
                raise FileNotFoundError(
                    f"{self.root / self.reader / 'raw'} hasn't the files of {self.called} (train-images-idx3-ubyte "
                    "and three more): fetch them with --data.download true, or leave --data.root out"
                ) from None
            images, label = found.data, found.targets
        images = images.unsqueeze(1)
        if self.image_size != 28:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return images, label.long()


class FashionMNIST(GreySquares):
    """Photographs of clothing, 28x28 pixels, grey, in ten classes (arXiv 1708.07747).

    Without ``root`` what comes with the project: 10,000 images of the official training set, of which ``val_size``
    validate, and 2,000 of the official test set. With it all 60,000 and 10,000.

    Args:
        root: folder of the official files (``FashionMNIST/raw/*-ubyte`` below it, as torchvision lays them out).
        download: fetch them to ``root``.
        image_size: images are 28 pixels high; another size scales them once, when they are read.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`.
    """

    classes, file = CLASSES, FILE
    called, reader, domain = "Fashion-MNIST", "FashionMNIST", "fashion"
