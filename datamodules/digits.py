"""Scikit-learn's handwritten digits: the smallest real image data, for the quickest runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.images import ImageDataModule, ImageSet, check_image_size, choose


class Digits(ImageDataModule):
    """1797 digits of 8x8 pixels in ten classes (UCI), of which 1259 train, 179 validate and 359 test.

    The split is drawn once per class with a fixed seed, so every run tests on the same digits. One domain.

    Args:
        image_size: 8 pixels are scaled to this many.
        flip: off: a mirrored digit is another one.
        classes: only these digits, numbered anew from 0 in this order; all ten if omitted.

    Other arguments: see :class:`datamodules.images.ImageDataModule`.
    """

    in_chans = 1

    def __init__(
        self,
        image_size: int = 16,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = False,
        translate: float = 0.0625,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, flip, translate, transform, eval_batch_size)
        check_image_size(image_size)
        self.image_size = image_size
        digits = [str(i) for i in range(10)]
        self.classes = list(range(10)) if classes is None else choose("digit", [str(c) for c in classes], digits)
        self.num_classes, self.class_names = len(self.classes), [digits[c] for c in self.classes]
        self.domain_names = ["digits"]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        from sklearn.datasets import load_digits

        data = load_digits()
        number = torch.full((10,), -1)
        number[self.classes] = torch.arange(len(self.classes))
        label = number[torch.from_numpy(data.target).long()]
        chosen = []
        for positions in (np.flatnonzero(data.target == c) for c in self.classes):
            order = np.random.default_rng(1797).permutation(positions)
            test, val = round(0.2 * len(order)), round(0.1 * len(order))
            chosen.append({"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}[part])
        index = torch.from_numpy(np.sort(np.concatenate(chosen)))
        images = torch.from_numpy(data.images).float()[index].mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        if self.image_size != 8:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=False)
        return ImageSet(images, {"label": label[index], "domain": torch.zeros_like(index)})
