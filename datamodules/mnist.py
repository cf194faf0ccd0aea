"""MNIST: a part of it comes with the project, all of it is read from its official files."""

from __future__ import annotations

from typing import Any

from datamodules.fashion import EMBEDDED, GreySquares

FILE = EMBEDDED / "mnist" / "mnist.npz"


class MNIST(GreySquares):
    """Handwritten digits, 28x28 pixels, grey, in ten classes (LeCun et al., 1998).

    Without ``root`` what comes with the project: 8,000 images, of which ``val_size`` validate, and 2,000 that test, 200
    of each class; that split is the project's own (see ``embedded/mnist/README.md``). With it all 60,000 and 10,000.

    Args:
        root: folder of the official files (``MNIST/raw/*-ubyte`` below it, as torchvision lays them out).
        download: fetch them to ``root``.
        image_size: images are 28 pixels high; another size scales them once, when they are read.
        flip: off: a mirrored digit is another one.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`.
    """

    classes = tuple(str(i) for i in range(10))
    file = FILE
    called, reader, domain = "MNIST", "MNIST", "mnist"

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        image_size: int = 28,
        flip: bool = False,
        **split: Any,
    ) -> None:
        super().__init__(root, download, image_size, flip=flip, **split)
