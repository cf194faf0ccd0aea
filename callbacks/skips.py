"""Where a network's long skip connections are: found by one forward pass, numbered from the outermost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.layers import backbone_of
from callbacks.perturbation import crafting, device_of

#: Names under which decoder blocks take their connections: diffusers' (a tuple, the deepest last), segmentation
#: networks' and diffusion transformers'.
ARGUMENTS = ("res_hidden_states_tuple", "skip_connection", "skip")


@dataclass(frozen=True)
class Skip:
    """One long skip connection, as the decoder receives it.

    Attributes:
        level: i, 1 is the outermost.
        name: of the layer that receives it.
        layer: that layer.
        argument: name and position of the argument of its ``forward``; None: the connection is what comes out of it.
        item: position in the argument, where that is a tuple.
        shape: of the connection, for the module's example.
        reader: name of the layer that reads it, joined with the decoder's features; None if there is none with weights.
    """

    level: int
    name: str
    layer: nn.Module = field(repr=False, compare=False)
    argument: tuple[str, int] | None
    item: int | None
    shape: torch.Size
    reader: str | None = None


def _argument(layer: nn.Module) -> tuple[str, int] | None:
    """Under which name, and where, a layer's ``forward`` takes connections."""
    taken = list(inspect.signature(layer.forward).parameters)
    return next(((name, taken.index(name)) for name in ARGUMENTS if name in taken), None)


def value_of(argument: tuple[str, int], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    name, place = argument
    return named[name] if name in named else args[place] if place < len(args) else None


def _receivers(module: nn.Module, layers: Sequence[str] | None) -> dict[str, tuple[nn.Module, tuple[str, int] | None]]:
    """Layers that receive connections, and as which argument, by name; in no order that matters."""
    backbone = backbone_of(module)
    names = dict(backbone.named_modules())
    named = layers if layers is not None else getattr(backbone, "long_skips", None)
    if named is not None:
        for name in named:
            if name not in names or not name:
                here = ", ".join(n for n in names if n and n.count(".") < 2)
                raise ValueError(f"no layer '{name}' in the backbone {type(backbone).__name__}. Layers: {here}")
        chosen = {name: names[name] for name in named}
    else:
        chosen = {n: m for n, m in names.items() if _argument(m) is not None}
        outer = {n for n in chosen if any(other.startswith(f"{n}.") for other in chosen)}
        chosen = {n: m for n, m in chosen.items() if n not in outer}  # a whole decoder only hands them on
    return {name: (layer, _argument(layer)) for name, layer in chosen.items()}


def dtype_of(module: LightningModule) -> torch.dtype:
    """Of the backbone's weights: Lightning's ``module.dtype`` stays float32 where only a part was cast."""
    return next((p.dtype for p in backbone_of(module).parameters() if p.is_floating_point()), torch.float32)


def run_example(module: LightningModule, example: Any = None) -> Any:
    """What the module gives for its ``example_input_array``, or another example of the same kind; leaves no trace.

    Raises:
        ValueError: if it has none.
    """
    example = module.example_input_array if example is None else example
    if example is None:
        raise ValueError(
            f"{type(module).__name__} needs example_input_array: its connections are found by a forward pass"
        )

    def moved(x: Tensor) -> Tensor:
        return x.to(device_of(module), dtype_of(module) if x.is_floating_point() else x.dtype)

    example = torch.utils._pytree.tree_map_only(Tensor, moved, example)
    with crafting(module, "eval"), torch.no_grad():
        if isinstance(example, Mapping):
            return module(**example)
        return module(*example) if isinstance(example, tuple) else module(example)


def find_skips(module: LightningModule, layers: Sequence[str] | None = None) -> list[Skip]:
    """The long skip connections of a module's backbone, the outermost (level 1) first.

    They are found by one forward pass of ``example_input_array``: a decoder uses the deepest connection first. Known
    are U-Nets of diffusers (every ``up_blocks`` block takes a tuple), blocks that take ``skip`` or ``skip_connection``
    (segmentation networks, diffusion transformers), networks with an attribute ``long_skips`` (names of the layers
    through which the connections pass, as :class:`recipes.scalelong.uvit.UViT` has it), and layers that are named.

    Args:
        module: its ``backbone``, or all of it.
        layers: names in the backbone, the outermost first: of blocks that take the connection as an argument, or of
            layers (``nn.Identity``) through which it passes.

    Raises:
        ValueError: if there are none, or the layers aren't used from the deepest to the outermost.
    """
    receivers = _receivers(module, layers)
    backbone = backbone_of(module)
    used: list[Skip] = []
    readers: dict[int, str] = {}
    waiting: list[int] = []  # of used: those whose reader is still to come

    def note(name: str, layer: nn.Module, argument: tuple[str, int] | None, value: Any) -> None:
        tensors = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        for item in reversed(range(len(tensors))):  # the last of a tuple is used first
            place = item if isinstance(value, (tuple, list)) else None
            if not isinstance(tensors[item], Tensor) or tensors[item].dim() < 3:
                raise ValueError(f"what '{name}' receives is no map (B, C, H, W) and no tokens (B, L, D)")
            if any(s.name == name and s.item == place for s in used):
                raise ValueError(f"'{name}' receives connections twice in one forward pass: name other layers")
            used.append(Skip(0, name, layer, argument, place, tensors[item].shape))
            resnets = getattr(layer, "resnets", None)
            if place is None:
                waiting.append(len(used) - 1)
            elif isinstance(resnets, nn.ModuleList) and len(resnets) == len(tensors):
                readers[len(used) - 1] = f"{name}.resnets.{len(tensors) - 1 - item}"

    def receive(name: str, argument: tuple[str, int]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, named: Any) -> None:
            note(name, layer, argument, value_of(argument, args, named))

        return hook

    def passed(name: str) -> Callable[..., None]:
        return lambda layer, args, output: note(name, layer, None, output)

    def read(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            while waiting:
                readers[waiting.pop()] = name

        return hook

    handles: list[Any] = []
    for name, (layer, argument) in receivers.items():
        if argument is None:
            handles.append(layer.register_forward_hook(passed(name)))
        else:
            handles.append(layer.register_forward_pre_hook(receive(name, argument), with_kwargs=True))
    for name, layer in backbone.named_modules():
        if next(layer.parameters(recurse=False), None) is not None and name not in receivers:
            handles.append(layer.register_forward_pre_hook(read(name)))
    try:
        if receivers:
            run_example(module)
    finally:
        for handle in handles:
            handle.remove()
    if not used:
        raise ValueError(
            f"no long skip connections found in {type(backbone).__name__}: name the layers that receive them, "
            "the outermost first (layers=[...])"
        )
    used = [replace(skip, level=len(used) - i, reader=readers.get(i)) for i, skip in enumerate(used)]
    if layers is not None or hasattr(backbone, "long_skips"):
        order = list(dict.fromkeys(skip.name for skip in reversed(used)))
        if order != list(receivers):
            raise ValueError(
                f"connections must be named from the outermost to the deepest; a forward pass uses {', '.join(order)}"
            )
    return used[::-1]
