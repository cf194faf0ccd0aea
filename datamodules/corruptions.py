"""Common corruptions (Hendrycks and Dietterich, arXiv 1903.12261): trained on clean images, tested on corrupted ones.

Each corruption is a domain, so a classifier's test gives accuracy for each (``test/acc_fog``) and their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.cifar import CIFAR10, CIFAR100
from datamodules.imagenet import JPEG, ImageNet
from datamodules.images import ImageSet, choose
from datamodules.splits import class_folders

#: The fifteen of the benchmark, then the four that its authors keep for validation.
CORRUPTIONS = tuple(
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression speckle_noise gaussian_blur spatter saturate".split()
)
SEVERITIES = (1, 2, 3, 4, 5)


def _checked(corruptions: Sequence[str] | None, severities: Sequence[int]) -> tuple[list[int], list[int]]:
    chosen = choose("corruption", CORRUPTIONS[:15] if corruptions is None else corruptions, CORRUPTIONS)
    return chosen, sorted(int(name) for name in _severities(severities))


def _severities(severities: Sequence[int]) -> list[str]:
    known = [str(s) for s in SEVERITIES]
    return [known[i] for i in choose("severity", [str(s) for s in severities], known)]


class Stacked:
    """Images (H, W, 3) in several files of arrays, read where they lie; indexed as one uint8 (N, 3, H, W).

    Args:
        files: arrays uint8 (M, H, W, 3).
        rows: which rows of each file; as many of each.
    """

    def __init__(self, files: Sequence[Path], rows: Tensor) -> None:
        self.files = [np.load(file, mmap_mode="r") for file in files]
        self.rows = rows
        height, width = self.files[0].shape[1:3]
        self.shape = torch.Size((len(self.files) * len(rows), 3, height, width))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of positions (B,)."""
        file, row = index // len(self.rows), self.rows[index % len(self.rows)]
        found = [self.files[f][r] for f, r in zip(file.tolist(), row.tolist(), strict=True)]
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


class CIFAR10C(CIFAR10):
    """CIFAR-10-C: trained and validated on CIFAR-10, tested on its test images, corrupted.

    Args:
        root: folder of CIFAR-10.
        corrupted: folder of CIFAR-10-C: ``fog.npy`` and so on, 50,000 images each, and ``labels.npy``.
        corruptions: which; the fifteen of the benchmark if omitted.
        severities: which, 1 to 5.

    Other arguments: see :class:`datamodules.cifar.CIFAR10`.

    Raises:
        FileNotFoundError: naming what is missing and where to get it.
        ValueError: for a corruption or severity that doesn't exist, or a file of another size.
    """

    link = "https://zenodo.org/records/2535967"
    per_severity = 10_000

    def __init__(
        self,
        root: str,
        corrupted: str,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = SEVERITIES,
        **cifar: Any,
    ) -> None:
        super().__init__(root, **cifar)
        self.corrupted = Path(corrupted).expanduser()
        self.corruptions, self.severities = _checked(corruptions, severities)
        self.domain_names = ["clean", *CORRUPTIONS]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        if part != "test":
            return super().load(part)
        files = [self.corrupted / f"{CORRUPTIONS[i]}.npy" for i in self.corruptions]
        for file in (*files, self.corrupted / "labels.npy"):
            if not file.is_file():
                name = "CIFAR-100-C" if self.num_classes == 100 else "CIFAR-10-C"
                raise FileNotFoundError(f"{file} is not there: get {name} from {self.link}")
        label = torch.from_numpy(np.load(self.corrupted / "labels.npy")).long()
        size = self.per_severity
        rows = torch.cat([torch.arange((s - 1) * size, s * size) for s in self.severities])
        images = Stacked(files, rows)
        for file, array in zip((*files, self.corrupted / "labels.npy"), (*images.files, label), strict=True):
            if len(array) != size * len(SEVERITIES):
                raise ValueError(
                    f"{file} has {len(array)} rows, but should have {size * len(SEVERITIES)}: fetch it again"
                )
        domain = torch.tensor(self.corruptions).add(1).repeat_interleave(len(rows))
        return ImageSet(images, {"label": label[rows].repeat(len(files)), "domain": domain})


class CIFAR100C(CIFAR10C, CIFAR100):
    """CIFAR-100-C: as :class:`CIFAR10C`, of CIFAR-100."""

    classes, layout, read = CIFAR100.classes, CIFAR100.layout, CIFAR100.read
    link = "https://zenodo.org/records/3555552"


class ImageNetC(ImageNet):
    """ImageNet-C: trained and validated on ImageNet, tested on its validation images, corrupted (224x224 pixels).

    Args:
        root: folder of ImageNet.
        corrupted: folder of ImageNet-C: ``fog/3/n01440764/*.JPEG``, or ``weather/fog/3/...`` as its archives unpack.
        corruptions: which; the fifteen of the benchmark if omitted.
        severities: which, 1 to 5.

    Other arguments: see :class:`datamodules.imagenet.ImageNet`.
    """

    link = "https://zenodo.org/records/2235448"

    def __init__(
        self,
        root: str,
        corrupted: str,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = SEVERITIES,
        **imagenet: Any,
    ) -> None:
        super().__init__(root, **imagenet)
        self.corrupted = Path(corrupted).expanduser()
        self.corruptions, self.severities = _checked(corruptions, severities)
        self.domain_names = ["clean", *CORRUPTIONS]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        if part != "test":
            return super().load(part)
        files: list[Path] = []
        labels, domains = [], []
        for number in self.corruptions:
            name = CORRUPTIONS[number]
            folder = next((f for f in (self.corrupted / name, *self.corrupted.glob(f"*/{name}")) if f.is_dir()), None)
            for severity in self.severities:
                if folder is None or not (folder / str(severity)).is_dir():
                    where = self.corrupted / name / str(severity)
                    raise FileNotFoundError(f"{where} is not there: get ImageNet-C from {self.link}")
                found, label = class_folders(folder / str(severity), self.class_names, JPEG)
                files += found
                labels.append(label)
                domains.append(torch.full_like(label, number + 1))
        return self.image_set(files, {"label": torch.cat(labels), "domain": torch.cat(domains)})
