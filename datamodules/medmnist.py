"""MedMNIST: the twelve sets of 2D images, from their official files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from datamodules.imagenet import read_array
from datamodules.images import ImageDataModule, ImageSet, check_image_size, choose

SOURCE = "https://zenodo.org/records/10519652/files/{file}?download=1"


class Facts(NamedTuple):
    """What is in a set: how many images of each part, their channels, and what the labels mean."""

    train: int
    val: int
    test: int
    channels: int
    classes: tuple[str, ...]


ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)
#: As the package medmnist 3.0.2 has them (``medmnist/info.py``).
SETS: Mapping[str, Facts] = {
    "pathmnist": Facts(
        89_996,
        10_004,
        7_180,
        3,
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
    ),
    "chestmnist": Facts(
        78_468,
        11_219,
        22_433,
        1,
        tuple(
            "atelectasis cardiomegaly effusion infiltration mass nodule pneumonia pneumothorax consolidation edema "
            "emphysema fibrosis pleural hernia".split()
        ),
    ),
    "dermamnist": Facts(
        7_007,
        1_003,
        2_005,
        3,
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
    ),
    "octmnist": Facts(
        97_477, 10_832, 1_000, 1, ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
    ),
    "pneumoniamnist": Facts(4_708, 524, 624, 1, ("normal", "pneumonia")),
    "retinamnist": Facts(1_080, 120, 400, 3, ("0", "1", "2", "3", "4")),
    "breastmnist": Facts(546, 78, 156, 1, ("malignant", "normal, benign")),
    "bloodmnist": Facts(
        11_959,
        1_712,
        3_421,
        3,
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
    ),
    "tissuemnist": Facts(
        165_466,
        23_640,
        47_280,
        1,
        (
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
    ),
    "organamnist": Facts(34_561, 6_491, 17_778, 1, ORGANS),
    "organcmnist": Facts(12_975, 2_392, 8_216, 1, ORGANS),
    "organsmnist": Facts(13_932, 2_452, 8_827, 1, ORGANS),
}
#: Several labels an image.
MULTI = "chestmnist"


class Pictures:
    """Rows of an array, grey or coloured, as channels and size are wanted; they are read when they are asked for.

    Args:
        array: uint8 (N, H, W) or (N, H, W, 3).
        channels: 1 or 3; grey becomes three equal channels, colour its luminance.
        size: of the images.
    """

    def __init__(self, array: np.ndarray, channels: int, size: int) -> None:
        self.array = array
        self.shape = torch.Size((len(array), channels, size, size))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, C, size, size) of positions (B,)."""
        images = torch.from_numpy(np.array(self.array[index.numpy()]))
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if images.shape[1] > self.shape[1]:
            images = rgb_to_grayscale(images)
        if images.shape[-1] != self.shape[-1]:
            images = F.interpolate(images, self.shape[-2:], mode="bilinear", antialias=True)
        return images.expand(-1, self.shape[1], -1, -1).contiguous()


class MedMNIST(ImageDataModule):
    """One of the twelve 2D sets of MedMNIST v2 (arXiv 2110.14795), in 28 pixels or the larger sizes of MedMNIST+.

    Trained, validated and tested on the official parts, whose sizes are checked: the three organ sets are those of
    2024, without the blank images that earlier releases had. ``retinamnist``'s grades are classes like any others here.
    Files that aren't compressed are read where they lie; else the images of a part are kept in memory.

    Args:
        flag: ``pathmnist``, ``chestmnist``, ``dermamnist``, ``octmnist``, ``pneumoniamnist``, ``retinamnist``,
            ``breastmnist``, ``bloodmnist``, ``tissuemnist``, ``organamnist``, ``organcmnist`` or ``organsmnist``.
        root: folder with ``<flag>.npz`` or, of the larger sizes, ``<flag>_<size>.npz``.
        size: of the images in the file.
        image_size: images are scaled to this many pixels; omitted: as they are.
        in_chans: 3: grey images get three equal channels; 1: colours their luminance; omitted: as the set has it.
        task: ``chestmnist`` alone has several labels an image (14 findings), which a classifier of one label can't
            learn. ``binary`` makes it two classes: no finding, or any of the 14. So its accuracy is not to be compared
            with what is published of the 14.
        flip: mirror training images at random; omitted: but for the organ sets, in which left and right are classes.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: for a missing file, with its address.
        ValueError: for a flag that doesn't exist, ``chestmnist`` without a task, or a file with other contents.
    """

    def __init__(
        self,
        flag: str,
        root: str,
        size: Literal[28, 64, 128, 224] = 28,
        image_size: int | None = None,
        in_chans: Literal[1, 3] | None = None,
        task: Literal["binary"] | None = None,
        flip: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(flip=not flag.startswith("organ") if flip is None else flip, **common)
        choose("set", [flag], list(SETS))
        if size not in (28, 64, 128, 224):
            raise ValueError(f"MedMNIST comes in 28, 64, 128 and 224 pixels, not {size}: set image_size to scale it")
        check_image_size(image_size)
        if in_chans not in (None, 1, 3):
            raise ValueError(f"in_chans must be 1 or 3, not {in_chans}")
        if flag == MULTI and task != "binary":
            raise ValueError(
                f"{MULTI} has 14 labels an image, but classifiers here learn one: --data.task binary asks whether "
                "there is any finding"
            )
        if flag != MULTI and task is not None:
            raise ValueError(f"a task is for {MULTI} alone: '{flag}' has one label an image, so leave task out")
        self.flag, self.facts, self.size = flag, SETS[flag], size
        file = f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"
        self.file, self.source = Path(root).expanduser() / file, SOURCE.format(file=file)
        self.image_size, self.in_chans = image_size or size, in_chans or self.facts.channels
        self.class_names = ["no finding", "finding"] if flag == MULTI else list(self.facts.classes)
        self.num_classes, self.domain_names = len(self.class_names), [flag]

    def _arrays(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels of a part, as they are in the file."""
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is not there: get it from {self.source}, and set root to its folder")
        try:
            images, label = (read_array(self.file, f"{part}_{what}") for what in ("images", "labels"))
        except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{self.file} can't be read ({' '.join(str(error).split())}): get it from {self.source}"
            ) from None
        return images, np.array(label)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        images, label = self._arrays(part)
        wanted = getattr(self.facts, part)
        if len(images) != wanted:
            raise ValueError(
                f"{self.flag} has {wanted} images of {part}, but {len(images)} are in {self.file}: it is incomplete "
                f"or of an earlier release; get it from {self.source}"
            )
        shape = (wanted, self.size, self.size) + ((3,) if self.facts.channels == 3 else ())
        labels = len(self.facts.classes) if self.flag == MULTI else 1
        most = 1 if self.flag == MULTI else len(self.facts.classes) - 1
        if images.dtype != np.uint8 or images.shape != shape or label.shape != (wanted, labels):
            raise ValueError(
                f"{self.file} must hold {part}_images uint8 {shape} and {part}_labels {(wanted, labels)}, but has "
                f"{images.dtype} {images.shape} and {label.shape}: get it from {self.source}"
            )
        if label.min() < 0 or label.max() > most:
            raise ValueError(
                f"{self.file} has {part}_labels from {label.min()} to {label.max()}, but those of {self.flag} are 0 to "
                f"{most}: get it from {self.source}"
            )
        number = torch.from_numpy(label.astype(np.int64))
        number = number.amax(1) if self.flag == MULTI else number[:, 0]
        pictures = Pictures(images, self.in_chans, self.image_size)
        return ImageSet(pictures, {"label": number, "domain": torch.zeros_like(number)})
