"""Odd and even digits: two classes, each of which is five, so that a network has something to learn."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from datamodules.depleted import Redrawn
from datamodules.digits import Digits
from datamodules.images import ImageSet


class DigitsParity(Redrawn[ImageSet], Digits):
    """Scikit-learn's handwritten digits as they are, label 1 for the odd ones; batches are drawn anew at each step.

    The parity task of arXiv 2301.13703, there of MNIST.

    Args:
        size: so many of the 1259 training images, drawn by the seed; all if omitted.
        image_size: 8 pixels are scaled to this many.
        epoch_steps: training steps of an epoch; as many as it takes to see as many images as there are if omitted.

    Other arguments: see :class:`datamodules.loading.PartsDataModule`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        size: int | None = None,
        image_size: int = 8,
        batch_size: int = 16,
        epoch_steps: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        eval_batch_size: int | None = 500,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers, seed, translate=0.0, eval_batch_size=eval_batch_size)
        if (size is not None and size < 1) or (epoch_steps is not None and epoch_steps < 1):
            raise ValueError(f"size and epoch_steps must be at least 1, not {size} and {epoch_steps}")
        self.size, self.epoch_steps = size, epoch_steps
        self.num_classes, self.class_names = 2, ["even", "odd"]

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        whole = super().load(part)
        keep = torch.arange(len(whole))
        if part == "train" and self.size is not None:
            if self.size > len(whole):
                raise ValueError(f"there are {len(whole)} training images, not {self.size}: lower --data.size")
            keep = torch.from_numpy(np.sort(np.random.default_rng(self.seed).permutation(len(whole))[: self.size]))
        entries = {name: values[keep] for name, values in whole.entries.items()}
        assert isinstance(whole.images, torch.Tensor)
        return ImageSet(whole.images[keep], {**entries, "label": entries["label"] % 2})
