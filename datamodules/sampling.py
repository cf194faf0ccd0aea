"""The order of the data: a function of (seed, epoch), cut by rank, that goes on exactly where a checkpoint stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

#: The same where each example has two lengths, and how many of a pool's steps are sorted by the second one together.
PAIRS_POOL, SECTION = 1600, 16
#: Steps whose examples are sorted by length together; fewer waste more on padding, more repeat each other's company.
POOL = 25


class Draw(NamedTuple):
    """One example of one epoch: what augmentation depends on, beside the seed."""

    epoch: int
    position: int


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def by_length(examples: Tensor, lengths: Tensor, section: int, descending: bool = False) -> Tensor:
    """Examples (n,) sorted by their length, or, where each has two, by the first and within sections by the second.

    Args:
        examples: positions in ``lengths``.
        lengths: (size,) or (size, 2).
        section: how many examples, neighbours in the first length, are sorted by the second.
        descending: the longest first.
    """
    if lengths.dim() == 1:
        return examples[lengths[examples].argsort(stable=True, descending=descending)]
    first = examples[lengths[examples, 0].argsort(stable=True, descending=descending)]
    parts = [part[lengths[part, 1].argsort(stable=True, descending=descending)] for part in first.split(section)]
    return torch.cat(parts)


class TrainBatches(Sampler[list[Draw]]):
    """Shuffled batches of training, without the last incomplete one.

    The order of an epoch comes from a generator of its own, seeded by (seed, epoch). Step k takes the k-th block of
    ``batch_size * world`` examples, of which rank r gets every world-th from its own first: so two ranks with batch b
    see what one process with batch 2b sees. ``consumed`` examples of the epoch (counted over all ranks, so that the
    number of ranks may change) are skipped once, which is how a run resumes in mid-epoch.

    With ``lengths`` a step has examples of about the same length, so that little is padded: the shuffled examples are
    cut into pools of :data:`POOL` steps, sorted by length within a pool and cut into steps, and the steps are shuffled.
    That order depends on the number of examples in a step too, its ``block``: the rest of an epoch that was begun with
    another one is read with that one, so that nothing comes twice or is left out.

    Args:
        size: examples in the set.
        batch_size: per rank.
        seed: of the order.
        rank: of this process; asked of torch.distributed if omitted.
        world: number of ranks; likewise.
        replays: each batch comes so many times in a row; :attr:`replayed` of the first one's are skipped once.
        lengths: (size,) of each example, or (size, 2) of its two parts, padded apart; omitted: they are all alike.

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
        lengths: Tensor | None = None,
    ) -> None:
        here = ranks()
        self.rank = here[0] if rank is None else rank
        self.world = here[1] if world is None else world
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.step = batch_size * self.world
        if size < self.step:
            raise ValueError(
                f"{size} training examples don't fill one step of {self.world} x {batch_size}: lower --data.batch_size"
            )
        self.epoch = 0
        self.consumed = 0
        self.replays, self.replayed = replays, 0
        self.lengths = lengths
        #: Examples in a step of the run that began the epoch, where ``consumed`` are skipped; used once, too.
        self.block = self.step

    @property
    def sampler(self) -> TrainBatches:
        """Lightning calls ``set_epoch`` on the batch sampler's sampler: that is this object too."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.step * self.replays

    def _order(self, block: int) -> list[int]:
        """All examples in the order of this epoch, (size,)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        if self.lengths is None:
            return order.tolist()
        full = self.size // block * block
        taken, left = order[:full], order[full:]  # what is left is drawn before it is sorted: not always the longest
        pool = block * (POOL if self.lengths.dim() == 1 else PAIRS_POOL)
        pools = [by_length(part, self.lengths, block * SECTION) for part in taken.split(pool)]
        steps = torch.cat(pools).view(-1, block)
        return torch.cat([steps[torch.randperm(len(steps), generator=generator)].flatten(), left]).tolist()

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self._order(self.block)
        first, self.consumed, self.block = self.consumed, 0, self.step
        skipped, self.replayed = self.replayed, 0
        epoch = self.epoch
        for start in range(first, self.size - self.step + 1, self.step):
            batch = [Draw(epoch, i) for i in order[start : start + self.step][self.rank :: self.world]]
            for _ in range(skipped, self.replays):
                yield batch
            skipped = 0


class EvalBatches(Sampler[list[Draw]]):
    """Every example once, in the same number of batches on all ranks, none of them filled up.

    Batches differ in size by at most one, so no example is counted twice and no rank waits for another. Examples come
    in order; with ``lengths`` the longest first, so that little is padded, and what doesn't fit into memory shows soon.

    Args:
        size: examples in the set; at least one per rank.
        batch_size: the largest batch per rank (of 1, two where the ranks' shares differ).
        rank: of this process; asked of torch.distributed if omitted.
        world: number of ranks; likewise.
        lengths: (size,) of each example, or (size, 2) of its two parts, padded apart; omitted: they are all alike.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int | None = None,
        world: int | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        here = ranks()
        rank = here[0] if rank is None else rank
        world = here[1] if world is None else world
        if size < world:
            raise ValueError(f"{size} examples can't be shared by {world} ranks: evaluate on fewer")
        batches = math.ceil(math.ceil(size / world) / batch_size)
        order = np.arange(size)
        if lengths is not None:
            section = batch_size * world * max(1, round(math.sqrt(batches)))
            order = by_length(torch.arange(size), lengths, section, descending=True).numpy()
        own = order[rank::world]
        self.batches = [part.tolist() for part in np.array_split(own, min(batches, size // world))]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            yield [Draw(0, i) for i in batch]


class ReplacementSampler(TrainBatches):
    """Batches of training that are drawn anew at each step: no example twice in a batch, whatever the steps before had.

    That is stochastic gradient descent as theory has it. Beside it a shuffled epoch is quieter: its last batches have
    what the first ones left over. An epoch is a number of steps here. A step's examples depend on (seed, epoch, how
    many were drawn in the epoch before), so a run resumes exactly, and rank r of n gets every n-th of them.

    Args:
        size: examples in the set.
        batch_size: per rank.
        seed: of the draws.
        steps: of an epoch; about as many as it takes to see ``size`` examples if omitted.
        rank: of this process; asked of torch.distributed if omitted.
        world: number of ranks; likewise.
        replays: each batch comes so many times in a row.

    Raises:
        ValueError: if the set is smaller than one step of all ranks, or an epoch has no steps.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        steps: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        replays: int = 1,
    ) -> None:
        super().__init__(size, batch_size, seed, rank, world, replays)
        if steps is not None and steps < 1:
            raise ValueError(f"an epoch needs at least one step, not {steps}")
        #: Examples to draw from; ``size`` is now how many an epoch draws.
        self.examples = size
        self.size = (size // self.step if steps is None else steps) * self.step

    def __iter__(self) -> Iterator[list[Draw]]:
        first, self.consumed, self.block = self.consumed, 0, self.step
        skipped, self.replayed = self.replayed, 0
        epoch = self.epoch
        for start in range(first, self.size - self.step + 1, self.step):
            generator = np.random.default_rng((self.seed, epoch, start))
            drawn = generator.choice(self.examples, self.step, replace=False).tolist()
            batch = [Draw(epoch, i) for i in drawn[self.rank :: self.world]]
            for _ in range(skipped, self.replays):
                yield batch
            skipped = 0
