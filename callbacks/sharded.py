"""Sharded weights: FSDP2 (``torch.distributed.fsdp.fully_shard``) under Lightning's ``ModelParallelStrategy``.

Each rank keeps a part of every weight, of its gradient and of the optimizer's state; a block's weights are gathered
when its forward or backward pass needs them and let go of behind it. A LightningModule calls :func:`shard` from its
``configure_model``. It is for a network that doesn't fit beside its optimizer into one device; else DDP is faster.

What a technique hangs on the network is small: it stays whole on every rank, and its gradient is averaged when it is
there. So is everything else that is trained outside of the blocks and networks given to :func:`shard`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

_NEEDS = "{} needs whole weights on each rank: leave it out, or use --trainer.strategy ddp"


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a part of a weight."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def needs_whole_weights(who: object, tensors: Iterable[Tensor]) -> None:
    """For what moves weights, or takes their gradients, by itself.

    A pass of :func:`torch.autograd.grad` ends at the gathered weights, of which the parts know nothing: it would find
    no gradient and go on without.

    Raises:
        ValueError: if one of the weights is sharded.
    """
    if is_sharded(tensors):
        raise ValueError(_NEEDS.format(type(who).__name__))


def _mesh(whole: DeviceMesh) -> DeviceMesh:
    """Over which ranks weights are sharded, and are copies of each other where there are two dimensions.

    Lightning's mesh has ``data_parallel`` (as it comes, one for each node) and ``tensor_parallel`` (one for each device
    of a node); all of these ranks see data of their own here. So weights are sharded within a node and copied between
    nodes, or, where one of both sizes is 1, sharded over all ranks.
    """
    sizes = dict(zip(whole.mesh_dim_names or (), whole.shape, strict=True))
    long = tuple(name for name, size in sizes.items() if size > 1) or ("data_parallel",)
    return whole[long] if len(long) > 1 else whole[long[0]]


def shards(module: LightningModule) -> bool:
    """Whether a module trains under ``ModelParallelStrategy``. ``load_from_checkpoint`` has no trainer."""
    return module._trainer is not None and isinstance(module.trainer.strategy, ModelParallelStrategy)


def shard(module: LightningModule, blocks: Iterable[nn.Module], networks: Iterable[nn.Module] = ()) -> None:
    """Shard a network if its trainer's strategy is ``ModelParallelStrategy``, once; else do nothing.

    Args:
        module: whose ``configure_model`` this is called from.
        blocks: modules whose weights are gathered together; they must be *called*, not looked into.
        networks: what holds the blocks, and is called as well: shards the weights that no block has.

    Raises:
        ValueError: for callbacks that need whole weights.
    """
    if not shards(module) or is_sharded(module.parameters()):
        return
    trainer = module.trainer
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it dynamically
        ours = type(callback).__module__.startswith("callbacks.")
        if isinstance(callback, WeightAveraging) or not getattr(callback, "works_sharded", not ours):
            raise ValueError(_NEEDS.format(type(callback).__name__))
    # No MixedPrecisionPolicy: under bf16-mixed autocast rounds what it would anyway, so that steps are DDP's.
    # Weights that stayed gathered behind a pass without gradients (a validation, crafting) would go into the next step
    # as they were there: without gradients.
    options: dict[str, Any] = {"mesh": _mesh(module.device_mesh), "reshard_after_forward": True}  # type: ignore[arg-type]
    for part in (*blocks, *networks):
        fully_shard(part, **options)
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            with torch.no_grad():  # as DDP begins
                first = parameter.to(trainer.strategy.root_device)  # the strategy moves it there only later
                dist.broadcast(first, 0)
                parameter.copy_(first)
            parameter.register_post_accumulate_grad_hook(functools.partial(_average, dist.get_world_size()))


def _average(world: int, parameter: Tensor) -> None:
    """What was averaged before, of accumulated batches, is alike on all ranks and stays what it is."""
    assert parameter.grad is not None  # it has just been accumulated
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(world)
