"""Finds the layers of a network on which a technique hangs modules, and the shapes of what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.perturbation import crafting


def backbone_of(module: nn.Module) -> nn.Module:
    """The network whose layers techniques name: ``module.backbone``, else the first child that timm made, else all."""
    own = getattr(module, "backbone", None)
    for child in module.children():
        if child is own or (own is None and hasattr(child, "feature_info")):
            return getattr(child, "_orig_mod", child)  # below torch.compile's wrapper
    return module


def stages(backbone: nn.Module) -> list[str]:
    """Names of a network's stages, shallow to deep, as timm names them in ``feature_info``; of a ViT every third block.

    Raises:
        ValueError: if there are none.
    """
    names = dict(backbone.named_modules())
    info = getattr(backbone, "feature_info", None) or []
    found = [entry["module"] for entry in info if isinstance(entry, dict) and entry.get("module") in names]
    if {"conv1", "layer1", "layer2"} <= names.keys():  # a ResNet's first feature is its stem
        found = [name for name in found if name.startswith("layer")]
    elif len(found) > 6:
        found = found[2::3]
    if not found:
        raise ValueError(f"no stages found in {type(backbone).__name__}; name the layers. {layers_there(backbone)}")
    return found


def stem(backbone: nn.Module) -> list[str]:
    """Names of the layers before the first stage after which the AdvStyle paper moves styles: of ResNets only."""
    names = dict(backbone.named_modules())
    return ["conv1", "maxpool"] if {"conv1", "maxpool", "layer1"} <= names.keys() else []


def layers_there(backbone: nn.Module) -> str:
    """The names of a network's layers, two levels deep, for error messages."""
    return "Layers: " + ", ".join(n for n, _ in backbone.named_modules() if n and n.count(".") < 2)


def find_layers(module: LightningModule, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of the module's backbone that have these names.

    Raises:
        ValueError: for a name that isn't there; lists those that are.
    """
    backbone = backbone_of(module)
    names = dict(backbone.named_modules())
    for name in layers:
        if name not in names or not name:
            raise ValueError(f"no layer '{name}' in the backbone {type(backbone).__name__}. {layers_there(backbone)}")
    return {name: names[name] for name in layers}


def layer_shapes(module: LightningModule, layers: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """The shapes that come out of the layers for the module's ``example_input_array``.

    Raises:
        ValueError: if there is no such tensor, or a layer gives no (B, C, H, W) or (B, N, C), or is never called.
    """
    example = module.example_input_array
    if not isinstance(example, Tensor):
        raise ValueError(f"{type(module).__name__} needs example_input_array (a tensor), to learn its layers' shapes")
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                raise ValueError(f"layer '{name}' gives no feature map and no tokens, so it has no style")
            shapes[name] = output.shape

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with crafting(module, "eval"), torch.no_grad():
            module(example.to(module.device))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in shapes:
            raise ValueError(f"layer '{name}' is never called in the forward pass of {type(module).__name__}")
    return shapes
