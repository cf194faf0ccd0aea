"""Points of two classes on the two sides of a plane, with few of them near it: data whose solution is known.

The data of the perceptron in Sclocchi, Geiger and Wyart, arXiv 2301.13703 (their code's ``depleted_sign``): the first
coordinate has the density |x|^chi exp(-x^2 / 2), the others are standard normal, the label is the first one's sign. The
larger chi, the fewer points lie near the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import PartsDataModule, Set
from datamodules.sampling import Draw, ReplacementSampler

_PARTS = {"train": 0, "val": 1, "test": 2}


def depleted_sign(count: int, d: int, chi: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Points float32 (count, d) and their labels int64 (count,), 1 where the first coordinate is positive, else 0.

    x_1 = +-sqrt(2 Gamma((chi + 1) / 2)): half the square of a number of that density has the gamma distribution.

    Raises:
        ValueError: for chi of -1 or below, which has no density, or no coordinates.
    """
    if not chi > -1 or d < 1:
        raise ValueError(f"chi must be above -1, and d at least 1: {chi} and {d}")
    x = generator.standard_normal((count, d))
    label = generator.integers(0, 2, count)
    x[:, 0] = np.sqrt(2 * generator.gamma((chi + 1) / 2, size=count)) * (2 * label - 1)
    return torch.from_numpy(x).float(), torch.from_numpy(label).long()


class Vectors(Dataset[dict[str, Tensor]]):
    """Vectors ``input`` float32 (N, d) in memory, with further entries (N,); a batch is fetched as a whole."""

    def __init__(self, input: Tensor, entries: dict[str, Tensor]) -> None:
        self.input, self.entries = input, entries

    def __len__(self) -> int:
        return len(self.input)

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        draw = draw if isinstance(draw, tuple) else Draw(0, draw)
        return {name: values[0] for name, values in self.__getitems__([draw]).items()}

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """The batch of these draws."""
        index = torch.tensor([draw.position for draw in draws])
        return {"input": self.input[index], **{n: v[index] for n, v in self.entries.items()}, "index": index}

    def plain(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples, which are always as they are."""
        return self.__getitems__([Draw(0, i) for i in positions])


class Redrawn(PartsDataModule[Set]):
    """A DataModule whose training batches are drawn anew at each step (:class:`ReplacementSampler`).

    Stands before the data's own class: ``class Parity(Redrawn, Digits)``.
    """

    #: Training steps of an epoch; None: as many as it takes to see as many examples as there are.
    epoch_steps: int | None = None

    def order(self, examples: Set) -> ReplacementSampler:
        return ReplacementSampler(len(examples), self.batch_size, self.seed, self.epoch_steps, replays=self.replays)


class Depleted(Redrawn[Vectors]):
    """Points on the two sides of a plane; see the head of this file. All are drawn by the seed.

    A batch has ``input`` float32 (B, d), ``label`` (0 or 1), ``domain`` (0) and ``index``. Training batches are drawn
    anew at each step.

    Args:
        d: coordinates.
        chi: how few points lie near the plane: their density there goes with the distance to this power; above -1.
        size: points to train on (the paper's P).
        val_size: points to validate on.
        test_size: points to test on.
        epoch_steps: training steps of an epoch.

    Other arguments: see :class:`datamodules.loading.PartsDataModule`.

    Raises:
        ValueError: for a setting out of range.
    """

    unit = "points"
    #: A vector is an image of one pixel, to a model that asks for sizes.
    image_size = 1

    def __init__(
        self,
        d: int = 16,
        chi: float = 0.0,
        size: int = 128,
        val_size: int = 2000,
        test_size: int = 10000,
        batch_size: int = 2,
        epoch_steps: int = 1000,
        num_workers: int = 0,
        seed: int | None = None,
        eval_batch_size: int | None = 1000,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        if not chi > -1 or d < 1 or min(size, val_size, test_size, epoch_steps) < 1:
            raise ValueError(
                f"chi must be above -1, d, the sizes and epoch_steps at least 1: {chi}, {d}, "
                f"{size}, {val_size}, {test_size} and {epoch_steps}"
            )
        self.d, self.chi, self.epoch_steps = d, chi, epoch_steps
        self.sizes = {"train": size, "val": val_size, "test": test_size}
        self.in_chans = d
        self.num_classes, self.class_names, self.domain_names = 2, ["minus", "plus"], ["all"]

    def load(self, part: Literal["train", "val", "test"]) -> Vectors:
        generator = np.random.default_rng((2301, self.seed, _PARTS[part]))
        points, label = depleted_sign(self.sizes[part], self.d, self.chi, generator)
        return Vectors(points, {"label": label, "domain": torch.zeros_like(label)})
