"""What evaluators of texts share: forward passes of a bounded size, and what all ranks found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

#: Words in one forward pass, padding included.
TOKENS = 16_384

T = TypeVar("T")


def chunks(lengths: Mapping[int, int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """The keys in groups of similar length, none of more than so many tokens, padding included, unless it is one."""
    group: list[int] = []
    for key in sorted(lengths, key=lambda k: (lengths[k], k)):
        if group and (len(group) + 1) * lengths[key] > tokens:
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def gathered(value: T) -> list[T]:
    """What each rank has, in the order of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
