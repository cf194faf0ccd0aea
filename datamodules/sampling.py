"""The order of the data: a function of (seed, epoch), cut by rank, that goes on exactly where a checkpoint stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One example of one epoch: what augmentation depends on, beside the seed."""

    epoch: int
    position: int


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class TrainBatches(Sampler[list[Draw]]):
    """Shuffled batches of training, without the last incomplete one.

    The order of an epoch comes from a generator of its own, seeded by (seed, epoch). Step k takes the k-th block of
    ``batch_size * world`` examples, of which rank r gets every world-th from its own first: so two ranks with batch b
    see what one process with batch 2b sees. ``consumed`` examples of the epoch (counted over all ranks, so that the
    number of ranks may change) are skipped once, which is how a run resumes in mid-epoch.

    Args:
        size: examples in the set.
        batch_size: per rank.
        seed: of the order.
        rank: of this process; asked of torch.distributed if omitted.
        world: number of ranks; likewise.
        replays: each batch comes so many times in a row; :attr:`replayed` of the first one's are skipped once.

    Raises:
        ValueError: if the set is smaller than one step of all ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        replays: int = 1,
    ) -> None:
        here = ranks()
        self.rank = here[0] if rank is None else rank
        self.world = here[1] if world is None else world
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.step = batch_size * self.world
        if size < self.step:
            raise ValueError(
                f"{size} training images don't fill one step of {self.world} x {batch_size}: lower --data.batch_size"
            )
        self.epoch = 0
        self.consumed = 0
        self.replays, self.replayed = replays, 0

    @property
    def sampler(self) -> TrainBatches:
        """Lightning calls ``set_epoch`` on the batch sampler's sampler: that is this object too."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.step * self.replays

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        first, self.consumed = self.consumed, 0
        skipped, self.replayed = self.replayed, 0
        epoch = self.epoch
        for start in range(first, self.size - self.step + 1, self.step):
            batch = [Draw(epoch, i) for i in order[start : start + self.step][self.rank :: self.world]]
            for _ in range(skipped, self.replays):
                yield batch
            skipped = 0


class EvalBatches(Sampler[list[Draw]]):
    """Every example once, in order, in the same number of batches on all ranks and without padding.

    Batches differ in size by at most one, so no example is counted twice and no rank waits for another.

    Args:
        size: examples in the set; at least one per rank.
        batch_size: the largest batch per rank (of 1, two where the ranks' shares differ).
        rank: of this process; asked of torch.distributed if omitted.
        world: number of ranks; likewise.
    """

    def __init__(self, size: int, batch_size: int, rank: int | None = None, world: int | None = None) -> None:
        here = ranks()
        rank = here[0] if rank is None else rank
        world = here[1] if world is None else world
        if size < world:
            raise ValueError(f"{size} images can't be shared by {world} ranks: evaluate on fewer")
        batches = math.ceil(math.ceil(size / world) / batch_size)
        own = np.arange(rank, size, world)
        self.batches = [part.tolist() for part in np.array_split(own, min(batches, size // world))]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            yield [Draw(0, i) for i in batch]
