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
* One fused pass forward and one backward (``_Shift``) in place of six: the same numbers, a good deal faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.perturbation import PREFIX, Batch, Perturbation, batch_size, crafting

EPS = 1e-6

# ---------------------------------------------------------------------- pure functions


def feature_statistics(x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each example's channels.

    Args:
        x: (B, C, H, W) feature map, or (B, N, C) tokens.
        eps: added to the (unbiased) variance under the root.

    Returns:
        ``mean`` and ``std``, (B, C) each, at least float32.

    Raises:
        ValueError: for another number of dimensions, or fewer than two positions.
    """
    dims = _positions(x)
    if x.shape.numel() // (x.shape[0] * x.shape[dims[0] - 1 if x.dim() == 4 else 2]) < 2:
        raise ValueError(f"a feature map of shape {tuple(x.shape)} has one position per channel, so no spread")
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims)
    return mean, (variance + eps).sqrt()


def batch_spread(statistic: Tensor, eps: float = EPS) -> Tensor:
    """How far a statistic (B, C) spreads over the batch: (C,), unbiased, with ``eps`` under the root (DSU, eq. 3-4)."""
    return (statistic.var(0) + eps).sqrt()


def gradient_reversal(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """``x`` forward; the gradient is multiplied by ``-weight`` backward."""
    return (1 + weight) * x.detach() - weight * x


def mixstyle(x: Tensor, permutation: Tensor, lam: Tensor, eps: float = EPS) -> Tensor:
    """MixStyle: ``x`` in the style ``lam * own + (1 - lam) * other``; no gradient through statistics, as published.

    Args:
        x: (B, C, H, W) or (B, N, C).
        permutation: (B,) int64, the example whose style is mixed in.
        lam: (B,) in [0, 1], weight of the own style; published Beta(0.1, 0.1).
    """
    with torch.no_grad():
        mean, std = feature_statistics(x, eps)
        other = (1 - lam).unsqueeze(1).to(std.dtype)
        # (x - mean) / std * mixed_std + mixed_mean, as one affine map; at lam = 1 exactly x
        ratio = other * (std[permutation] - std) / std
        offset = other * (mean[permutation] - mean) - mean * ratio
    return torch.addcmul(_over(offset, x), x.to(ratio.dtype), _over(1 + ratio, x)).to(x.dtype)


def efdmix(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """EFDMix: the sorted values of each channel are mixed with those of another example, rank by rank.

    ``y = x + (1 - lam) * (other's value of the same rank - stopgrad(x))``, as published.

    Args:
        x: (B, C, H, W) or (B, N, C).
        permutation: (B,) int64.
        lam: (B,) in [0, 1], weight of the own values.
    """
    flat = (x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)).to(torch.promote_types(x.dtype, torch.float32))
    ordered, order = flat.sort(dim=-1)
    matched = ordered[permutation].gather(-1, order.argsort(-1))
    other = (1 - lam).view(-1, 1, 1).to(flat.dtype)
    mixed = flat + other * (matched - flat.detach())
    return (mixed.view_as(x) if x.dim() == 4 else mixed.transpose(1, 2)).to(x.dtype)


def dsu(x: Tensor, noise_mean: Tensor, noise_std: Tensor, strength: float = 1.0, eps: float = EPS) -> Tensor:
    """DSU: style + noise times the batch's spread of that style; gradient flows through all of it, as published.

    Args:
        x: (B, C, H, W) or (B, N, C), B > 1.
        noise_mean: (B, C) standard normal.
        noise_std: (B, C) standard normal.
        strength: multiplies the noise; 0 is the identity.
    """
    channels = noise_mean.shape[1]
    theta = noise_mean.new_zeros(2, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    weight = torch.tensor([[0.0], [strength]], device=x.device).expand(2, x.shape[0])
    return _Shift.apply(x, theta, torch.stack((noise_mean, noise_std)), weight, True, eps)


def adversarial_style(
    x: Tensor,
    theta_mean: Tensor,
    theta_std: Tensor,
    noise_mean: Tensor,
    noise_std: Tensor,
    adv_weight: float = 1.0,
    eps: float = EPS,
) -> Tensor:
    """AdvStyle: ``y = x_hat * (std + e_std R(theta_std)) + (mean + e_mean R(theta_mean))``, R the gradient reversal.

    Args:
        x: (B, C, H, W) or (B, N, C).
        theta_mean: (C,) learned intensity of the mean.
        theta_std: (C,) learned intensity of the standard deviation.
        noise_mean: (B, C) standard normal.
        noise_std: (B, C) standard normal.
        adv_weight: lam of the reversal: theta ascends the loss with this weight.
    """
    theta = gradient_reversal(torch.stack((theta_mean, theta_std)), adv_weight)
    weight = torch.tensor([[1.0], [0.0]], device=x.device).expand(2, x.shape[0])
    return _Shift.apply(x, theta, torch.stack((noise_mean, noise_std)), weight, False, eps)


def _positions(x: Tensor) -> tuple[int, ...]:
    if x.dim() == 4:
        return (2, 3)
    if x.dim() == 3:
        return (1,)
    raise ValueError(f"style needs a feature map (B, C, H, W) or tokens (B, N, C), not a tensor of {tuple(x.shape)}")


def _over(statistic: Tensor, x: Tensor) -> Tensor:
    """A (B, C) statistic in the shape that broadcasts over the positions of ``x``."""
    return statistic[:, :, None, None] if x.dim() == 4 else statistic[:, None, :]


def _sums(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over positions of ``gradient`` and of ``gradient * x``: (B, C) each."""
    dims = _positions(x)
    return gradient.sum(dims), (gradient * x).sum(dims)


class _Shift(torch.autograd.Function):
    """``y = x * (1 + d_std / std) + (d_mean - mean * d_std / std)`` with
    ``d = noise * (weight[0] * theta + weight[1] * batch_spread)``; its gradient in closed form.

    What autograd would do in six passes over the feature map takes two here. Twice differentiable: asked for a graph,
    the backward pass recomputes the statistics with one.
    """

    @staticmethod
    def forward(ctx, x, theta, noise, weight, spread, eps):  # type: ignore[no-untyped-def]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, std = feature_statistics(wide, eps)
        ratio, d_mean, _, _ = _shift(mean, std, theta, noise, weight, spread, eps)
        ctx.save_for_backward(x, theta, noise, weight, mean, std)
        ctx.spread, ctx.eps = spread, eps
        return torch.addcmul(_over(d_mean - mean * ratio, x), wide, _over(1 + ratio, x)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, theta, noise, weight, mean, std = ctx.saved_tensors
        wide, g = x.to(mean.dtype), gradient.to(mean.dtype)
        if torch.is_grad_enabled():
            mean, std = feature_statistics(wide, ctx.eps)
        ratio, _, spread_mean, spread_std = _shift(mean, std, theta, noise, weight, ctx.spread, ctx.eps)
        g_sum, gx_sum = _sums(g, wide)
        centred = gx_sum - mean * g_sum
        g_d = torch.stack((g_sum, centred / std))  # gradient of d_mean and d_std, (2, B, C)
        g_mean = -ratio * g_sum
        g_std = -ratio * centred / std
        if ctx.spread:  # through the spread of the batch, back to every example's statistics
            g_spread = (g_d * noise * weight[1][:, None]).sum(1) / (len(x) - 1)
            g_mean = g_mean + g_spread[0] * (mean - mean.mean(0)) / spread_mean
            g_std = g_std + g_spread[1] * (std - std.mean(0)) / spread_std
        g_theta = (g_d * noise * weight[0][:, None]).sum(1) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, g_theta, None, None, None, None
        count = wide.numel() // mean.numel()
        slope = g_std / (std * (count - 1))
        g_x = torch.addcmul(_over(g_mean / count - slope * mean, x), wide, _over(slope, x))
        g_x = torch.addcmul(g_x, g, _over(1 + ratio, x)) if g_x.requires_grad else g_x.addcmul_(g, _over(1 + ratio, x))
        return g_x.to(x.dtype), g_theta, None, None, None, None


def _shift(
    mean: Tensor, std: Tensor, theta: Tensor, noise: Tensor, weight: Tensor, spread: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``d_std / std``, ``d_mean`` (B, C) and the batch's two spreads (C,)."""
    width = weight[0][:, None] * theta[:, None]
    spread_mean = spread_std = theta[0]
    if spread:
        spread_mean, spread_std = batch_spread(mean, eps), batch_spread(std, eps)
        width = width + weight[1][:, None] * torch.stack((spread_mean, spread_std))[:, None]
    d_mean, d_std = noise * width
    return d_std / std, d_mean, spread_mean, spread_std


class _Unused(torch.autograd.Function):
    """``x``, with a zero gradient for ``theta``, so that no parameter is unused under DDP; costs nothing."""

    @staticmethod
    def forward(ctx, x, theta):  # type: ignore[no-untyped-def]
        ctx.like = (theta.shape, theta.dtype, theta.device)
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


# ---------------------------------------------------------------------- where styles are


def backbone_of(module: nn.Module) -> nn.Module:
    """The network whose layers techniques name: ``module.backbone``, else the first child that timm made, else itself."""
    for child in (getattr(module, "backbone", None), *module.children()):
        if child is not None and (child is getattr(module, "backbone", None) or hasattr(child, "feature_info")):
            return getattr(child, "_orig_mod", child)  # below torch.compile's wrapper
    return module


def default_layers(backbone: nn.Module) -> list[str]:
    """Names of the layers after which styles are moved, shallow to deep.

    ResNets: after ``conv1`` and ``maxpool`` and the four stages, the six points of the AdvStyle paper ("lc01234");
    other networks: the stages that timm names in ``feature_info``, of a ViT every third block.
    """
    names = dict(backbone.named_modules())
    info = getattr(backbone, "feature_info", None) or []
    stages = [entry["module"] for entry in info if isinstance(entry, dict) and entry.get("module") in names]
    if {"conv1", "maxpool", "layer1"} <= names.keys():
        return ["conv1", "maxpool", *(s for s in stages if s.startswith("layer"))]
    if len(stages) > 6:
        stages = stages[2::3]
    if not stages:
        raise ValueError(f"no stages found in {type(backbone).__name__}; name the layers. {_layers_there(backbone)}")
    return stages


def _layers_there(backbone: nn.Module) -> str:
    return "Layers: " + ", ".join(n for n, _ in backbone.named_modules() if n and n.count(".") < 2)


def _find(module: LightningModule, layers: Sequence[str]) -> dict[str, nn.Module]:
    backbone = backbone_of(module)
    names = dict(backbone.named_modules())
    for name in layers:
        if name not in names or not name:
            raise ValueError(f"no layer '{name}' in the backbone {type(backbone).__name__}. {_layers_there(backbone)}")
    return {name: names[name] for name in layers}


def _shapes(module: LightningModule, layers: dict[str, nn.Module]) -> dict[str, torch.Size]:
    """What the layers give for the module's example input."""
    example = module.example_input_array
    if not isinstance(example, Tensor):
        raise ValueError(f"{type(module).__name__} needs example_input_array (a tensor), to learn its layers' shapes")
    shapes: dict[str, torch.Size] = {}

    def note(name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                raise ValueError(f"layer '{name}' gives no feature map and no tokens, so it has no style")
            shapes[name] = output.shape

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with crafting(module, "eval"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(example.to(module.device))
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in shapes:
            raise ValueError(f"layer '{name}' is never called in the forward pass of {type(module).__name__}")
    return shapes


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

    def restyle(self, x: Tensor) -> Tensor:
        if len(x) != len(self.lam):  # a permutation holds for the batch that it was drawn for
            return x
        return self.mix(x, self.permutation, self.lam)


class ShiftLayer(StyleLayer):
    """DSU or AdvStyle at one layer: a shift by noise times the batch's spread and times a learned intensity."""

    def __init__(self, learned: bool, adv_weight: float, direction: bool, *shape: Any) -> None:
        super().__init__(*shape)
        self.adv_weight, self.direction = adv_weight, direction
        self.theta = nn.Parameter(torch.full((2, self.channels), 0.1)) if learned else None
        if learned:
            #: Whether theta was set from the first batch; in the checkpoint, so that a resumed run keeps what it learned.
            self.register_buffer("initialised", torch.tensor(False))
        self.noise = self.weight = torch.empty(0)
        self.branches: frozenset[str] = frozenset()

    def restyle(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            return x if self.theta is None else _Unused.apply(x, self.theta)
        branches = frozenset(("adv", "dsu")) if torch.compiler.is_compiling() else self.branches
        if not branches:
            return x if self.theta is None else _Unused.apply(x, self.theta)
        noise, weight = self.rows(self.noise, x, 1), self.rows(self.weight, x, 1)
        if self.theta is None:
            theta = noise.new_zeros(2, self.channels)
        elif self.direction:
            unit = self.theta / self.theta.norm(dim=1, keepdim=True)
            theta = gradient_reversal(unit, self.adv_weight) * self._spread_norm(x)
        else:
            theta = gradient_reversal(self.theta, self.adv_weight)
        return _Shift.apply(x, theta, noise, weight, "dsu" in branches, EPS)

    @staticmethod
    def _spread_norm(x: Tensor) -> Tensor:
        """The strength of the direction variant: the norm over channels of the live batch's spread, (2, 1)."""
        with torch.no_grad():
            return torch.stack([batch_spread(s).norm() for s in feature_statistics(x)]).unsqueeze(1)


# ---------------------------------------------------------------------- callbacks


class _Style(Perturbation):
    """What the four have in common: the layers, and when they are armed.

    Args:
        layers: names of layers of the backbone after which styles are moved; found if omitted (:func:`default_layers`).
        per_sample: choose per example of the batch, not once per layer and step.
        strength: scales how far a style is moved; 1 as published, 0 not at all.
    """

    site: ClassVar[str] = "features"
    zero: ClassVar = {"strength": 0.0}
    first: ClassVar[int | None] = None  # how many of the default layers; None: all

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
        found = default_layers(backbone)[: self.first] if self.layers is None else self.layers
        layers = _find(module, found)
        prefix = int(getattr(backbone, "num_prefix_tokens", 0) or 0)
        last = getattr(backbone, "output_fmt", "") == "NHWC"
        own = self.own(module)
        hung: dict[str, StyleLayer] = {}
        for name, shape in _shapes(module, layers).items():
            tokens = len(shape) == 3
            channels = shape[-1] if tokens or last else shape[1]
            if shape.numel() // (shape[0] * channels) - (prefix if tokens else 0) < 2:
                if self.layers is None:
                    continue  # found, not asked for: a 1x1 map has no style
                raise ValueError(f"layer '{name}' gives {tuple(shape)}: one position per channel has no style")
            hung[name.replace(".", "_")] = self.layer(channels, prefix if tokens else 0, last and not tokens)
            layers[name.replace(".", "_")] = layers[name]
        if not hung:
            raise ValueError(f"no layer of the backbone has a feature map larger than 1x1. {_layers_there(backbone)}")
        if self.name not in own or own[self.name].keys() != hung.keys():
            own[self.name] = nn.ModuleDict(hung)
            own[self.name].train(module.training)
        for name, layer in own[self.name].items():
            self._hooks.append(layers[name].register_forward_hook(layer.hook))

    def detach(self, module: LightningModule) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def layer(self, *shape: Any) -> StyleLayer:
        """The module for one layer, from (channels, prefix tokens, channels last)."""
        raise NotImplementedError

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        size = batch_size(batch)
        layers = list(getattr(module, PREFIX)[self.name].values())
        # a number in [0, 1) for each layer and example decides its branch
        chosen = self.generator("branch", shared=not self.per_sample)
        u = torch.rand(len(layers), size if self.per_sample else 1, generator=chosen).expand(-1, size)
        self.arm(module, layers, u, size)
        for layer in layers:
            layer.armed = True

    def arm(self, module: LightningModule, layers: list[Any], u: Tensor, size: int) -> None:
        """Draw what the layers need in this step; ``u`` is (layers, examples)."""
        raise NotImplementedError

    def restore(self, module: LightningModule) -> None:
        for layer in getattr(module, PREFIX)[self.name].values():
            layer.armed = False

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        """Standard normal noise of this step, another on each rank."""
        return torch.randn(*shape, generator=self.generator("noise", device=device), device=device)


class MixStyle(_Style):
    """MixStyle (arXiv 2104.02008) at the first two of the default layers that are stages, unless ``layers`` says others.

    Args:
        p: chance that a layer mixes in a step.
        alpha: of Beta(alpha, alpha), from which each example's ``lam`` is drawn.
    """

    mix = staticmethod(mixstyle)

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

    def layer(self, *shape: Any) -> StyleLayer:
        return MixLayer(self.mix, *shape)

    def arm(self, module: LightningModule, layers: list[Any], u: Tensor, size: int) -> None:
        generator = self.generator("mix")
        # torch draws no Beta from a generator; NumPy does
        lam = np.random.default_rng(generator.initial_seed()).beta(self.alpha, self.alpha, (len(layers), size))
        other = self.strength * (1 - torch.from_numpy(lam).float()) * (u < self.p)
        for layer, o in zip(layers, other, strict=True):
            layer.lam = (1 - o).to(module.device)
            layer.permutation = torch.randperm(size, generator=generator).to(module.device)


class EFDMix(MixStyle):
    """Exact feature distribution mixing (arXiv 2203.07740), where MixStyle would mix; the same settings."""

    mix = staticmethod(efdmix)


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
        noise = self.normal(2, size, sum(widths), device=module.device).split(widths, 2)
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

    per_example: ClassVar[bool] = False

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
        super().__init__(layers, p_dsu, per_sample, strength, **schedule)
        if min(p_identity, p_dsu) < 0 or p_identity + p_dsu > 1 + 1e-9:
            raise ValueError(f"p_identity and p_dsu must be chances that add to at most 1, not {p_identity} and {p_dsu}")
        if variant not in ("full", "direction"):
            raise ValueError(f"variant must be full or direction, not '{variant}'")
        self.adv_weight, self.variant = adv_weight, variant
        self.p_identity, self.p_dsu = p_identity, p_dsu
        self._initialised = False

    def layer(self, *shape: Any) -> StyleLayer:
        return ShiftLayer(True, self.adv_weight, self.variant == "direction", *shape)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = getattr(pl_module, PREFIX)[self.name].values()
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
        layers = list(getattr(module, PREFIX)[self.name].values())
        devices = [module.device] if module.device.type == "cuda" else []
        for layer in layers:
            layer.measured = []
        try:
            with crafting(module, "train"), torch.no_grad(), torch.random.fork_rng(devices=devices):
                module.loss(batch)
            for layer in layers:
                theta = torch.stack([_spread_over_ranks(s) for s in layer.measured[-1]])
                if not theta.isfinite().all():
                    return  # a single example: wait for a larger batch
                with torch.no_grad():
                    layer.theta.copy_(theta)
                    layer.initialised.fill_(True)
        finally:
            for layer in layers:
                layer.measured = None
        self._initialised = True


def _spread_over_ranks(statistic: Tensor, eps: float = EPS) -> Tensor:
    """:func:`batch_spread` of the examples of all ranks: (C,), the same on every rank."""
    s = statistic.double()
    sums = torch.cat((s.new_tensor([len(s)]), s.sum(0), s.square().sum(0)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    count, total, squares = sums[0], *sums[1:].chunk(2)
    variance = (squares - total.square() / count).clamp_min(0) / (count - 1)
    return (variance + eps).sqrt().to(statistic.dtype)
