"""Anybody's own images, in a folder per part and a folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.images import IMAGES, ImageDataModule, ImageSet, OnCorrupt, cache_at, check_image_size
from datamodules.splits import Part, hold_out


class Folders(ImageDataModule):
    """Images in ``<root>/{train,val,test}/<class>/``, or in folders in these; classes are the folders of ``train``.

    Classes are numbered in the order of their names. Folders and files whose name starts with a dot are left out.

    Args:
        root: folder with ``train`` and, for testing, ``test``; for training also ``val``, unless ``val_size`` is given.
        image_size: images are squashed to a square of this side.
        val_size: so many images of ``train`` validate, as many of each class; the same ones in all runs.
        crop: if not 0, images aren't squashed: they are scaled so that this many times ``image_size`` just fits, and
            the middle is cut out; 8/7 is what is usual on ImageNet.
        on_corrupt: ``error``: stop at a file that is no image; ``skip``: count such files and go on.
        memory_gb: images are decoded once, if a part takes no more than this (per rank); else at every fetch, for which
            ``num_workers`` is needed.
        cache: folder in which decoded images are kept; loader workers, ranks and later runs read them from there.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.

    Raises:
        FileNotFoundError: for a missing folder, or one without classes or images.
        ValueError: for a class that training hasn't, or a size out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        val_size: int | None = None,
        crop: float = 0.0,
        on_corrupt: OnCorrupt = "error",
        memory_gb: float = 4.0,
        cache: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_image_size(image_size)
        if val_size is not None and val_size < 1:
            raise ValueError(f"val_size must be at least 1, not {val_size}")
        if crop and crop < 1:
            raise ValueError(f"crop must be 0 or at least 1, not {crop}")
        self.root = Path(root).expanduser()
        self.image_size, self.val_size, self.crop = image_size, val_size, crop
        self.on_corrupt, self.memory_gb, self.cache = on_corrupt, memory_gb, cache_at(cache)
        self.class_names = self._classes("train")
        self.num_classes, self.domain_names = len(self.class_names), [self.root.resolve().name or "images"]

    def _classes(self, part: Part) -> list[str]:
        """The class folders of a part."""
        folder = self.root / part
        if not folder.is_dir():
            instead = ", or hold images out of train with --data.val_size" if part == "val" else ""
            raise FileNotFoundError(f"there is no folder {folder}: make it, with a folder of images per class{instead}")
        found = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not found:
            raise FileNotFoundError(f"{folder} has no folders: put the images of each class into one of its own")
        return found

    def _listed(self, part: Part) -> tuple[list[Path], Tensor]:
        """The images of a part's folder, and their classes."""
        files: list[Path] = []
        labels: list[int] = []
        for name in self._classes(part):
            folder = self.root / part / name
            if name not in self.class_names:
                raise ValueError(
                    f"{folder}: {self.root / 'train'} has no class '{name}', but {', '.join(self.class_names[:10])}"
                    + (" and others" if self.num_classes > 10 else "")
                )
            found = [
                file
                for file in sorted(folder.rglob("*"))
                if file.suffix.lower() in IMAGES
                and file.is_file()
                and not any(step.startswith(".") for step in file.relative_to(folder).parts)
            ]
            if not found and part == "train":
                raise FileNotFoundError(
                    f"there is no image in {folder} (looked for {', '.join(IMAGES)}): fill it, or remove the class"
                )
            files += found
            labels += [self.class_names.index(name)] * len(found)
        if not files:
            raise FileNotFoundError(f"there is no image in {self.root / part} (looked for {', '.join(IMAGES)})")
        return files, torch.tensor(labels, dtype=torch.int64)

    def _split(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of ``train``'s images that train, and of those that validate."""
        assert self.val_size is not None
        if (self.root / "val").is_dir():
            raise ValueError(
                f"val_size would hold images out of {self.root / 'train'}, but there is {self.root / 'val'}: leave "
                "one of the two out"
            )
        share = -(-self.val_size // self.num_classes)
        least, name = min(zip(label.bincount().tolist(), self.class_names, strict=True))
        if least <= share:
            raise ValueError(
                f"val_size {self.val_size} takes {share} images of a class, but '{name}' has {least}: lower "
                "--data.val_size, so that some are left to train on"
            )
        return hold_out(label, self.val_size)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        files, label = self._listed("train" if part == "val" and self.val_size is not None else part)
        if part != "test" and self.val_size is not None:
            chosen = self._split(label)[part == "val"]
            files, label = [files[i] for i in chosen.tolist()], label[chosen]
        size = (self.image_size, self.image_size)
        entries = {"label": label, "domain": torch.zeros_like(label)}
        return ImageSet(files, entries, size, self.memory_gb, self.on_corrupt, self.crop, self.cache)
