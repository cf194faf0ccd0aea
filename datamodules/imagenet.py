"""ImageNet, Tiny ImageNet and ImageNet scaled to 64x64 pixels, in their official layouts."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.images import IMAGENET_CROP, ImageSet, cache_at
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
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`. Classes
    are numbered in the order of ``wnids.txt``, sorted.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for counts other than the official ones.
    """

    counts = {"train": 100_000, "test": 10_000}

    def __init__(
        self,
        root: str,
        image_size: int = 64,
        memory_gb: float = 4.0,
        val_size: int = 2000,
        cache: str | None = None,
        **split: Any,
    ) -> None:
        super().__init__(val_size, **split)
        self.cache = cache_at(cache)
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
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for a number of classes other than a thousand, or validation images that aren't sorted by class.
    """

    crop = IMAGENET_CROP
    classes = 1000

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        val_size: int = 10_000,
        num_workers: int = 8,
        cache: str | None = None,
        **split: Any,
    ) -> None:
        super().__init__(val_size, num_workers=num_workers, **split)
        self.cache = cache_at(cache)
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


def read_array(file: Path, name: str) -> np.ndarray:
    """An array of an npz file, read where it lies if it isn't compressed; nothing is unpickled.

    Raises:
        KeyError, OSError, ValueError, zipfile.BadZipFile: if the file is damaged or hasn't that array.
    """
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type == zipfile.ZIP_STORED:
        with file.open("rb") as opened:
            opened.seek(member.header_offset + 26)  # the lengths of two fields that precede the content
            opened.seek(sum(struct.unpack("<HH", opened.read(4))), 1)
            if np.lib.format.read_magic(opened) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(opened)
                if not fortran and not dtype.hasobject:
                    return np.memmap(file, dtype, "r", opened.tell(), shape)
    with np.load(file, allow_pickle=False) as arrays:
        return arrays[name]


class Planes:
    """Rows of several arrays, each an image in channel planes, indexed as one uint8 (N, 3, side, side).

    Args:
        arrays: uint8 (M, 3 * side * side).
        rows: (N,) which rows, counted over all arrays.
        side: of the images.
    """

    def __init__(self, arrays: Sequence[np.ndarray], rows: Tensor, side: int) -> None:
        self.arrays, self.rows = list(arrays), rows
        self.starts = torch.tensor([0, *(len(array) for array in arrays)]).cumsum(0)
        self.shape = torch.Size((len(rows), 3, side, side))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, side, side) of positions (B,)."""
        rows = self.rows[index]
        array = torch.searchsorted(self.starts, rows, right=True) - 1
        found = [self.arrays[a][r] for a, r in zip(array.tolist(), (rows - self.starts[array]).tolist(), strict=True)]
        return torch.from_numpy(np.stack(found)).view(-1, *self.shape[1:])


class ImageNet64(HeldOut):
    """ImageNet scaled to 64x64 pixels (Chrabaszcz, Loshchilov and Hutter, arXiv 1707.08819): a thousand classes.

    1,281,167 training images; its 50,000 validation images test. Files that aren't compressed are read where they lie;
    else the images of a part are kept in memory (15.7 GB for training).

    Args:
        root: folder with ``train_data_batch_1.npz`` to ``train_data_batch_10.npz`` and ``val_data.npz``.
        val_size: training images held out for validation.

    Other arguments: see :class:`datamodules.splits.HeldOut` and :class:`datamodules.images.ImageDataModule`. Classes
    are numbered as in the files, which is not the order of :class:`ImageNet`; they have no other names.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for a file with other contents, or counts other than the official ones.
    """

    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": tuple(f"train_data_batch_{i}.npz" for i in range(1, 11)),
        "test": ("val_data.npz",),
    }
    counts = {"train": 1_281_167, "test": 50_000}
    source = "https://image-net.org/download-images (downsampled image data, 64x64, npz format; after registration)"

    def __init__(self, root: str, val_size: int = 10_000, **split: Any) -> None:
        super().__init__(val_size, **split)
        self.root, self.image_size, self.num_classes = Path(root).expanduser(), 64, 1000
        self.class_names, self.domain_names = [str(i) for i in range(1, 1001)], ["imagenet64"]
        self._read: dict[str, tuple[np.ndarray, Tensor]] = {}

    def _contents(self, name: str) -> tuple[np.ndarray, Tensor]:
        """Images uint8 (M, 12288) and labels (M,) of a file, which is opened once: training and validation share it."""
        file = self.root / name
        if name not in self._read:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is not there: ImageNet64 expects train_data_batch_{{1..10}}.npz and val_data.npz; get "
                    f"them from {self.source}"
                )
            try:
                images, label = read_array(file, "data"), np.array(read_array(file, "labels"))
            except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(
                    f"{file} can't be read ({' '.join(str(error).split())}): get it from {self.source}"
                ) from None
            wanted = (label.size, 3 * self.image_size**2)
            known = np.isin(label, np.arange(1, self.num_classes + 1)).all()
            if images.dtype != np.uint8 or images.shape != wanted or label.ndim != 1 or not known:
                raise ValueError(
                    f"{file} must hold data uint8 (N, {wanted[1]}) and labels (N,) of 1 to {self.num_classes}, but has "
                    f"data {images.dtype} {images.shape} and labels {label.dtype} {label.shape}"
                    + ("" if known else ", others among them")
                )
            self._read[name] = images, torch.from_numpy(label).long() - 1
        return self._read[name]

    def official(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Rows (N,), counted over the files that were opened, in that order, and labels (N,)."""
        for name in self.files[part]:
            self._contents(name)
        rows, labels, start = [], [], 0
        for name, (images, label) in self._read.items():
            if name in self.files[part]:
                rows.append(torch.arange(start, start + len(images)))
                labels.append(label)
            start += len(images)
        if sum(map(len, rows)) != self.counts[part]:
            raise ValueError(
                f"ImageNet has {self.counts[part]} images of {part}, but {sum(map(len, rows))} are in {self.root}: the "
                f"download is incomplete; get it from {self.source}"
            )
        return torch.cat(rows), torch.cat(labels)

    def image_set(self, images: Any, entries: dict[str, Tensor]) -> ImageSet:
        return ImageSet(Planes([array for array, _ in self._read.values()], images, self.image_size), entries)
