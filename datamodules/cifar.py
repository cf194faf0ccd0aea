"""CIFAR-10, CIFAR-100 and SVHN: 32x32 pixels, read by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from datamodules.splits import HeldOut

DIGITS = tuple("0123456789")
CIFAR10_CLASSES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR100_CLASSES = tuple(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
)


class _Torchvision(HeldOut):
    """What the three share. Arguments: see :class:`CIFAR10`."""

    classes: ClassVar[tuple[str, ...]]
    layout: ClassVar[str]
    source: ClassVar[str]

    def __init__(
        self, root: str, download: bool = False, flip: bool = True, translate: float = 0.125, **split: Any
    ) -> None:
        super().__init__(flip=flip, translate=translate, **split)
        self.root, self.download, self.image_size = Path(root).expanduser(), download, 32
        self.num_classes, self.class_names = len(self.classes), list(self.classes)
        self.domain_names = [type(self).__name__]

    def read(self, part: Literal["train", "test"], download: bool) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, 32, 32) and labels (N,) of torchvision's dataset; RuntimeError where files are missing."""
        raise NotImplementedError(f"{type(self).__name__} must define read(part, download)")

    def prepare_data(self) -> None:
        if self.download:  # once on each machine
            self.read("train", True)
            self.read("test", True)

    def official(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        try:
            return self.read(part, False)
        except RuntimeError:
            raise FileNotFoundError(
                f"{self.root} hasn't the files of {type(self).__name__}, {self.layout}, or they are damaged: fetch "
                f"them with --data.download true, or from {self.source}"
            ) from None


class CIFAR10(_Torchvision):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of ten classes.

    Args:
        root: folder of the dataset.
        download: fetch it to ``root``.
        flip: mirror training images at random.
        translate: shift them at random by up to this part of the side; 4 pixels, as the papers do.

    Other arguments: see :class:`datamodules.splits.HeldOut` (1,000 training images validate, the rest trains) and
    :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing and where to get it.
    """

    classes: ClassVar[tuple[str, ...]] = CIFAR10_CLASSES
    layout = "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    source = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def read(self, part: Literal["train", "test"], download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR10 as Official

        return _cifar(Official(str(self.root), part == "train", download=download))


class CIFAR100(_Torchvision):
    """CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of a hundred classes.

    Arguments: see :class:`CIFAR10`.
    """

    classes = CIFAR100_CLASSES
    layout = "cifar-100-python/{train,test,meta}"
    source = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def read(self, part: Literal["train", "test"], download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR100 as Official

        return _cifar(Official(str(self.root), part == "train", download=download))


def _cifar(found: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


class SVHN(_Torchvision):
    """Street View House Numbers (Netzer et al., 2011): 73,257 training and 26,032 test digits; ``extra`` isn't used.

    Arguments: see :class:`CIFAR10`; not mirrored.
    """

    classes = DIGITS
    layout = "{train,test}_32x32.mat"
    source = "http://ufldl.stanford.edu/housenumbers/"

    def __init__(self, root: str, download: bool = False, flip: bool = False, **split: Any) -> None:
        super().__init__(root, download, flip, **split)

    def read(self, part: Literal["train", "test"], download: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import SVHN as Official

        found = Official(str(self.root), part, download=download)
        return torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels)
