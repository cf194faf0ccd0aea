"""CelebA: faces of celebrities, aligned, with forty attributes, in torchvision's layout and the official partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from datamodules.images import ImageDataModule, ImageSet, OnCorrupt, Window, cache_at, check_image_size, choose

ATTRIBUTES = tuple(
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young".split()
)
#: What the partition's numbers mean, in their order.
PARTS = ("train", "val", "test")


class CelebA(ImageDataModule):
    """CelebA (Liu et al., arXiv 1411.7766): 162,770 faces train, 19,867 validate and 19,962 test.

    As papers on diffusion do (DDIM's code), the 128x128 pixels around x 89, y 121 of the aligned image (178x218) are
    cut out and scaled.

    Args:
        root: folder ``celeba``, or the one that holds it.
        image_size: what is cut out is scaled to this many pixels.
        attribute: its absence and its presence are the two classes; if omitted there is one class, ``face``.
        on_corrupt: ``error``: stop at a file that is no image; ``skip``: count such files and go on.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and where to get it.
        ValueError: for an attribute that doesn't exist (lists those that do), or counts other than the official ones.
    """

    crop: Window = (89 - 64, 121 - 64, 89 + 64, 121 + 64)
    counts: ClassVar[dict[str, int]] = {"train": 162_770, "val": 19_867, "test": 19_962}
    layout = "celeba/{list_eval_partition.txt,list_attr_celeba.txt,img_align_celeba/*.jpg}"
    source = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (aligned and cropped images)"

    def __init__(
        self,
        root: str,
        image_size: int = 64,
        attribute: str | None = None,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        cache: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_image_size(image_size)
        if attribute is not None:
            choose("attribute", [attribute], ATTRIBUTES)
        given = Path(root).expanduser()
        self.root = given / "celeba" if (given / "celeba").is_dir() else given
        self.image_size, self.attribute = image_size, attribute
        self.on_corrupt, self.memory_gb, self.cache = on_corrupt, memory_gb, cache_at(cache)
        self.class_names = ["face"] if attribute is None else [f"not {attribute}", attribute]
        self.num_classes, self.domain_names = len(self.class_names), ["celeba"]

    def _lines(self, name: str) -> list[str]:
        file = self.root / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: CelebA expects {self.layout}; get it from {self.source}")
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _present(self) -> dict[str, int]:
        """1 for the images that have the attribute, 0 for the others."""
        lines = self._lines("list_attr_celeba.txt")
        try:
            _, names, *rows = lines  # how many images there are, what the attributes are called
            column = 1 + names.split().index(str(self.attribute))
            return {cells[0]: int(cells[column] == "1") for cells in map(str.split, rows)}
        except (ValueError, IndexError):
            raise ValueError(
                f"{self.root / 'list_attr_celeba.txt'} hasn't '{self.attribute}' for all images: get it from "
                f"{self.source}"
            ) from None

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        number = str(PARTS.index(part))
        rows = [line.split() for line in self._lines("list_eval_partition.txt")]
        names = [row[0] for row in rows if row[-1] == number]
        folder = self.root / "img_align_celeba"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: CelebA expects {self.layout}; get it from {self.source}")
        there = {file.name for file in folder.iterdir()}
        found = [name for name in names if name in there]
        if len(found) != self.counts[part]:
            raise ValueError(
                f"CelebA has {self.counts[part]} images of {part}, but {len(found)} are in {self.root}: the download "
                f"is incomplete; get it from {self.source}"
            )
        label = torch.zeros(len(found), dtype=torch.int64)
        if self.attribute is not None:
            present = self._present()
            try:
                label = torch.tensor([present[name] for name in found])
            except KeyError as error:
                raise ValueError(
                    f"{self.root / 'list_attr_celeba.txt'} has no image {error.args[0]}: get it from {self.source}"
                ) from None
        size = (self.image_size, self.image_size)
        files = [folder / name for name in found]
        entries = {"label": label, "domain": torch.zeros_like(label)}
        return ImageSet(files, entries, size, self.memory_gb, self.on_corrupt, self.crop, self.cache)
