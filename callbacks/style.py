"""Perturbation of feature statistics ("style"): MixStyle, DSU, EFDMix and adversarial style augmentation.

A *style* is the mean and standard deviation of each channel of one example's feature map. All four techniques move it
in training and leave evaluation alone:

* MixStyle (Zhou et al., arXiv 2104.02008): mix the style with that of another example of the batch.
* DSU (Li et al., arXiv 2202.03958): draw the style from a Gaussian as wide as the styles of the batch.
* EFDMix (Zhang et al., arXiv 2203.07740): mix sorted values, so all moments and not only two.
* AdvStyle (Zhang et al., arXiv 2301.12643): the Gaussian's width is learned per channel, by gradient reversal, to
  make the loss large.

What we do differently from the released codes, and why:

* AdvStyle's first-batch initialisation is a buffer (theirs is a Python flag, so a resumed run forgot what it had
  learned), is measured on clean features in one pass, and is reduced over ranks (theirs differs for ever between them).
* The choice identity / DSU / AdvStyle is drawn alike on all ranks and every parameter takes part in every step's graph,
  so plain DDP works (theirs stops with "expected to have finished reduction").
* Statistics are float32 under any precision; a batch of one, or a 1x1 map, has no spread and is left out.
* One pass forward and one backward (``callbacks.statistics.Shift``) in place of six: the same numbers, much faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.layers import backbone_of, find_layers, layer_shapes, layers_there, stages, stem
from callbacks.perturbation import PREFIX, Batch, Perturbation, batch_size, crafting
from callbacks.statistics import (
    EPS,
    Shift,
    Unused,
    adversarial_style,
    batch_spread,
    dsu,
    efdmix,
    feature_statistics,
    gradient_reversal,
    mixstyle,
    spread_over_ranks,
)

__all__ = [
    "DSU",
    "AdvStyle",
    "EFDMix",
    "MixStyle",
    "adversarial_style",
    "batch_spread",
    "dsu",
    "efdmix",
    "feature_statistics",
    "gradient_reversal",
    "mixstyle",
]

# ---------------------------------------------------------------------- modules


class StyleLayer(nn.Module):
    """Hangs on one layer and moves the style of what comes out, in the steps for which it is armed.

    Everything random is drawn before the forward pass (:meth:`arm`), so every forward of a step sees the same styles.
    """

    armed = False

    def __init__(self, channels: int, prefix: int = 0, channels_last: bool = False) -> None:
        super().__init__()
        self.channels, self.prefix, self.channels_last = channels, prefix, channels_last
        self.measured: list[tuple[Tensor, Tensor]] | None = None

    def hook(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook; as a bound method it follows copies of the module (weight averaging)."""
        if self.measured is not None:
            self.measured.append(feature_statistics(self._map(output)))
        if not (self.armed and self.training):
            return output
        if self.prefix:  # class and register tokens hold no positions
            return torch.cat((output[:, : self.prefix], self.restyle(output[:, self.prefix :])), 1)
        return self._unmap(self.restyle(self._map(output)))

    def _map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.channels_last else x[:, self.prefix :] if self.prefix else x

    def _unmap(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self.channels_last else x

    def restyle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def rows(draws: Tensor, x: Tensor, dim: int = 0) -> Tensor:
        """Draws for the examples of ``x``, which may be several views, or a part, of the batch drawn for."""
        if draws.shape[dim] == x.shape[0]:
            return draws
        return draws.index_select(dim, torch.arange(x.shape[0], device=draws.device) % draws.shape[dim])


class MixLayer(StyleLayer):
    """MixStyle or EFDMix at one layer."""

    def __init__(self, mix: Any, *shape: Any) -> None:
        super().__init__(*shape)
        self.mix = mix
        self.lam = self.permutation = torch.empty(0)
        self.mixes = False

    def restyle(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() or self.mixes):  # compiled, one graph holds for all steps
            return x
        lam, permutation, views = self.lam, self.permutation, len(x) // len(self.lam)
        if len(x) != views * len(lam):  # a part of the batch: the partners aren't all there
            return x
        if views > 1:  # several views in one batch: a partner of the same view
            first = torch.arange(views, device=x.device) * len(lam)
            lam, permutation = lam.repeat(views), (first[:, None] + permutation).flatten()
        return self.mix(x, permutation, lam)


class ShiftLayer(StyleLayer):
    """DSU or AdvStyle at one layer: a shift by noise times the batch's spread and times a learned intensity."""

    def __init__(self, learned: bool, adv_weight: float, direction: bool, *shape: Any) -> None:
        super().__init__(*shape)
        self.adv_weight, self.direction = adv_weight, direction
        self.theta = nn.Parameter(torch.full((2, self.channels), 0.1)) if learned else None
        if learned:
            #: Whether theta was set from the first batch; in the checkpoint, so a resumed run keeps what it learned.
            self.register_buffer("initialised", torch.tensor(False))
        self.noise = self.weight = torch.empty(0)
        self.branches: frozenset[str] = frozenset()

    def restyle(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            return x if self.theta is None else Unused.apply(x, self.theta)
        branches = frozenset(("adv", "dsu")) if torch.compiler.is_compiling() else self.branches
        if not branches:
            return x if self.theta is None else Unused.apply(x, self.theta)
        noise, weight = self.rows(self.noise, x, 1), self.rows(self.weight, x, 1)
        if self.theta is None:
            theta = noise.new_zeros(2, self.channels)
        else:
            turned = self.theta / self.theta.norm(dim=1, keepdim=True) if self.direction else self.theta
            theta = gradient_reversal(turned, self.adv_weight)
        return Shift.apply(x, theta, noise, weight, "dsu" in branches, self.direction, EPS)


# ---------------------------------------------------------------------- callbacks


class _Style(Perturbation):
    """What the four have in common: the layers, and when they are armed.

    Args:
        layers: names of layers of the backbone after which styles are moved; found if omitted (:meth:`default_layers`).
        per_sample: choose per example of the batch, not once per layer and step.
        strength: scales how far a style is moved; 1 as published, 0 not at all.
    """

    site: ClassVar[str] = "features"
    zero: ClassVar = {"strength": 0.0}

    def __init__(
        self, layers: Sequence[str] | None = None, per_sample: bool = False, strength: float = 1.0, **schedule: Any
    ) -> None:
        super().__init__(**schedule)
        if strength < 0:
            raise ValueError(f"strength must not be negative, but is {strength}")
        self.layers = list(layers) if layers is not None else None
        self.per_sample = per_sample
        self.strength = strength
        self._hooks: list[Any] = []

    def attach(self, module: LightningModule) -> None:
        self.detach(module)
        backbone = backbone_of(module)
        found = self.default_layers(backbone) if self.layers is None else self.layers
        layers = find_layers(module, found)
        prefix = int(getattr(backbone, "num_prefix_tokens", 0) or 0)
        last = getattr(backbone, "output_fmt", "") == "NHWC"
        own = self.own(module)
        hung: dict[str, StyleLayer] = {}
        for name, shape in layer_shapes(module, layers).items():
            tokens = len(shape) == 3
            channels = shape[-1] if tokens or last else shape[1]
            if shape.numel() // (shape[0] * channels) - (prefix if tokens else 0) < 2:
                if self.layers is None:
                    continue  # found, not asked for: a 1x1 map has no style
                raise ValueError(f"layer '{name}' gives {tuple(shape)}: one position per channel has no style")
            hung[name.replace(".", "_")] = self.layer(channels, prefix if tokens else 0, last and not tokens)
            layers[name.replace(".", "_")] = layers[name]
        if not hung:
            raise ValueError(f"no layer of the backbone has a feature map larger than 1x1. {layers_there(backbone)}")
        if self.name not in own or self.hung(module).keys() != hung.keys():
            own[self.name] = nn.ModuleDict(hung)
            own[self.name].train(module.training)
        for name, layer in self.hung(module).items():
            self._hooks.append(layers[name].register_forward_hook(layer.hook))

    def detach(self, module: LightningModule) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def default_layers(self, backbone: nn.Module) -> list[str]:
        """Where styles are moved unless ``layers`` says it."""
        return [*stem(backbone), *stages(backbone)]

    def hung(self, module: LightningModule) -> Mapping[str, Any]:
        """This technique's modules, by layer."""
        return cast(Mapping[str, Any], getattr(module, PREFIX)[self.name])

    def layer(self, *shape: Any) -> StyleLayer:
        """The module for one layer, from (channels, prefix tokens, channels last)."""
        raise NotImplementedError

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        size = batch_size(batch)
        layers = list(self.hung(module).values())
        # a number in [0, 1) for each layer and example decides its branch
        if self.per_sample:
            u = self.uniform("branch", size, len(layers)).T
        else:
            u = torch.rand(len(layers), 1, generator=self.generator("branch", shared=True)).expand(-1, size)
        self.arm(module, layers, u, size)
        for layer in layers:
            layer.armed = True

    def arm(self, module: LightningModule, layers: list[Any], u: Tensor, size: int) -> None:
        """Draw what the layers need in this step; ``u`` is (layers, examples)."""
        raise NotImplementedError

    def restore(self, module: LightningModule) -> None:
        for layer in self.hung(module).values():
            layer.armed = False


class MixStyle(_Style):
    """MixStyle (arXiv 2104.02008), after the first two stages unless ``layers`` says otherwise (as published).

    Args:
        p: chance that a layer mixes in a step.
        alpha: of Beta(alpha, alpha), from which each example's ``lam`` is drawn.
    """

    @staticmethod
    def mix(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
        return mixstyle(x, permutation, lam)

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        p: float = 0.5,
        alpha: float = 0.1,
        per_sample: bool = False,
        strength: float = 1.0,
        **schedule: Any,
    ) -> None:
        super().__init__(layers, per_sample, strength, **schedule)
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], not {p}")
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, not {alpha}")
        self.p, self.alpha = p, alpha

    def default_layers(self, backbone: nn.Module) -> list[str]:
        return stages(backbone)[:2]  # deeper, mixing takes away what tells the classes apart (the paper's ablation)

    def layer(self, *shape: Any) -> StyleLayer:
        return MixLayer(self.mix, *shape)

    def arm(self, module: LightningModule, layers: list[Any], u: Tensor, size: int) -> None:
        generator = self.generator("mix")
        # torch draws no Beta from a generator; NumPy does
        lam = np.random.default_rng(generator.initial_seed()).beta(self.alpha, self.alpha, (len(layers), size))
        other = self.strength * (1 - torch.from_numpy(lam).float()) * (u < self.p)
        for layer, o in zip(layers, other, strict=True):
            layer.mixes = bool(o.any())
            layer.lam = (1 - o).to(module.device)
            layer.permutation = torch.randperm(size, generator=generator).to(module.device)


class EFDMix(MixStyle):
    """Exact feature distribution mixing (arXiv 2203.07740), where MixStyle would mix; the same settings."""

    @staticmethod
    def mix(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
        return efdmix(x, permutation, lam)


class DSU(_Style):
    """Domain shift with uncertainty (arXiv 2202.03958).

    Args:
        p: chance that a layer draws a style in a step.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        p: float = 0.5,
        per_sample: bool = False,
        strength: float = 1.0,
        **schedule: Any,
    ) -> None:
        super().__init__(layers, per_sample, strength, **schedule)
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], not {p}")
        self.p_identity, self.p_dsu = 1 - p, p

    def layer(self, *shape: Any) -> StyleLayer:
        return ShiftLayer(False, 0.0, False, *shape)

    def arm(self, module: LightningModule, layers: list[Any], u: Tensor, size: int) -> None:
        dsu = (u >= self.p_identity) & (u < self.p_identity + self.p_dsu)
        adv = u >= self.p_identity + self.p_dsu
        weight = (self.strength * torch.stack((adv, dsu), 1)).to(module.device)  # (layers, 2, examples)
        # one draw for all layers: one kernel, not one a layer
        widths = [layer.channels for layer in layers]
        noise = self.normal("noise", size, 2, sum(widths), device=module.device).transpose(0, 1).split(widths, 2)
        for i, layer in enumerate(layers):
            layer.weight, layer.noise = weight[i], noise[i]
            layer.branches = frozenset(n for n, b in (("adv", adv), ("dsu", dsu)) if self.strength and bool(b[i].any()))


class AdvStyle(DSU):
    """Adversarial style augmentation (arXiv 2301.12643): DSU whose widths are learned by gradient reversal.

    At each layer and step: identity with ``p_identity``, DSU with ``p_dsu``, else the learned intensities (the released
    classification code takes a third each). The intensities are set from the first batch's spread, then ascend the
    loss in the one backward pass, at the rate ``adv_weight * lr`` (published 10 * 0.001; far above it they run away:
    nothing bounds them). They sit in an optimizer group of their own, without weight decay.

    Args:
        adv_weight: of the gradient reversal; 0 leaves the intensities where the first batch put them.
        p_identity: chance of identity.
        p_dsu: chance of DSU.
        variant: ``full``: direction and size are learned; ``direction``: only the direction over channels is, the
            size is the live batch's spread (the released re-identification code, with p_identity 0.5 and p_dsu 0).
    """

    per_example: ClassVar = {"p_identity": 0.0, "p_dsu": 0.0}

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        adv_weight: float = 0.2,
        p_identity: float = 1 / 3,
        p_dsu: float = 1 / 3,
        variant: Literal["full", "direction"] = "full",
        per_sample: bool = False,
        strength: float = 1.0,
        **schedule: Any,
    ) -> None:
        if min(p_identity, p_dsu) < 0 or p_identity + p_dsu > 1 + 1e-9:
            raise ValueError(f"p_identity and p_dsu must be chances, together at most 1, not {p_identity} and {p_dsu}")
        super().__init__(layers, p_dsu, per_sample, strength, **schedule)
        if variant not in ("full", "direction"):
            raise ValueError(f"variant must be full or direction, not '{variant}'")
        self.adv_weight, self.variant = adv_weight, variant
        self.p_identity, self.p_dsu = p_identity, p_dsu
        self._initialised = False

    def layer(self, *shape: Any) -> StyleLayer:
        return ShiftLayer(True, self.adv_weight, self.variant == "direction", *shape)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = self.hung(pl_module).values()
        self._initialised = all(bool(layer.initialised) for layer in layers)  # once, not a device sync a step
        held = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        if any(id(layer.theta) not in held for layer in layers):
            raise ValueError(
                f"the intensities of {self.name} are in no optimizer: build it from "
                "callbacks.perturbation.parameter_groups(self, ...) in configure_optimizers"
            )

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        if not self._initialised:
            self._initialise(module, batch)
        super().perturb(module, batch)

    def _initialise(self, module: LightningModule, batch: Batch) -> None:
        """Set theta to the spread of clean styles over the first batch, the batches of all ranks taken as one."""
        # those of a checkpoint stay as they were learned
        layers = [layer for layer in self.hung(module).values() if not layer.initialised]
        for layer in layers:
            layer.measured = []
        try:
            with crafting(module, "train"), torch.no_grad():
                cast(Any, module).loss(batch)
            for layer in layers:
                theta = torch.stack([spread_over_ranks(s) for s in layer.measured[-1]])
                if not theta.isfinite().all():
                    return  # a single example: wait for a larger batch
                with torch.no_grad():
                    layer.theta.copy_(theta)
                    layer.initialised.fill_(True)
        finally:
            for layer in layers:
                layer.measured = None
        self._initialised = True
