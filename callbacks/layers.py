"""A network's layers: finding those on which a technique hangs, adding to what comes out, running what lies behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.perturbation import crafting, device_of


def backbone_of(module: nn.Module) -> nn.Module:
    """The network whose layers techniques name: ``module.backbone``, else the first child that timm made, else all."""
    own = getattr(module, "backbone", None)
    if not isinstance(own, nn.Module):
        own = next((child for child in module.children() if hasattr(child, "feature_info")), module)
    return getattr(own, "_orig_mod", own)  # below torch.compile's wrapper


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
            module(example.to(device_of(module)))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in shapes:
            raise ValueError(f"layer '{name}' is never called in the forward pass of {type(module).__name__}")
    return shapes


class _Reached(Exception):
    """The forward pass has come to the layer that is looked for."""


class Behind:
    """Runs only what comes behind a layer, over and over: what came before it is run once and replayed.

    In :meth:`reach` every submodule that ends before the layer's first output has its output noted; in
    :meth:`replaying` those submodules give what they gave, without running, and the layer gives ``output``. What a
    submodule's own ``forward`` computes between its children (a sum, say) is computed again. Hooks run in both.

    Args:
        network: the module whose submodules are replayed.
        layer: one of them.
    """

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        self.layer = layer
        self._modules = [m for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._kept: list[tuple[nn.Module, Tensor]] = []
        self._next = 0
        #: What the layer gives while it is replayed, (B, ...).
        self.output: Tensor | None = None

    @contextmanager
    def _wrapped(self, wrap: Callable[..., Any]) -> Iterator[None]:
        before = [(m, m.__dict__.get("forward")) for m in self._modules]
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled graph would run the old forward
                for m in self._modules:
                    m.__dict__["forward"] = functools.partial(wrap, m, m.forward)
                yield
        finally:
            for m, own in before:
                m.__dict__.pop("forward")
                if own is not None:
                    m.__dict__["forward"] = own

    def reach(self, run: Callable[[], Any]) -> Tensor:
        """Run until the layer's first output, (B, ...), without gradients; what comes behind it isn't run.

        Raises:
            ValueError: if the layer isn't called, or gives no tensor.
        """
        self._kept, self.output = [], None
        try:
            with self._wrapped(self._note), torch.no_grad():
                run()
        except _Reached as reached:
            output = reached.args[0]
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
                raise ValueError(f"the layer {type(self.layer).__name__} gives no tensor (B, ...) to perturb") from None
            return output.detach()
        raise ValueError(f"the layer {type(self.layer).__name__} is never called in the loss")

    def _note(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        first = len(self._kept)
        output = forward(*args, **named)
        if module is self.layer:
            del self._kept[first:]
            raise _Reached(output)
        if isinstance(output, Tensor):
            self._kept[first:] = [(module, output.detach().clone())]  # it may be changed in place behind this module
        return output

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, passes run only what comes behind the layer; set :attr:`output` and call :meth:`again` for each."""
        with self._wrapped(self._replay):
            yield

    def again(self, output: Tensor) -> None:
        """The next pass begins; its layer gives this, (B, ...)."""
        self.output, self._next = output, 0

    def _replay(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self._next < len(self._kept):
            noted, output = self._kept[self._next]
            if module is noted:
                self._next += 1
                return output.clone()
        elif module is self.layer and self.output is not None:
            output, self.output = self.output, None
            return output
        return forward(*args, **named)


class Added:
    """A tensor added to what comes out of a layer, while there is one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        #: (B, ...), of the output's shape; None: nothing is added.
        self.delta: Tensor | None = None
        self._handle = layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self.delta is None else output + self.delta.to(output.dtype)

    def remove(self) -> None:
        self._handle.remove()
