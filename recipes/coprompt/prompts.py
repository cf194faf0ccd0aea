"""What is learned on a frozen CLIP: prompts of both towers, adapters behind them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Prompted(NamedTuple):
    """Prompts as the towers take them; None and nothing where a tower has none.

    Attributes:
        text: (M, W_text) in place of the first words of each class's text.
        deep_text: J - 1 of the same shape, in place of those before block 1, 2, ...
        image: (M, W_image) behind the patches.
        deep_image: as ``deep_text``.
    """

    text: Tensor | None = None
    deep_text: tuple[Tensor, ...] = ()
    image: Tensor | None = None
    deep_image: tuple[Tensor, ...] = ()


def _random(n_ctx: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(n_ctx, width).normal_(std=0.02))


class TextPrompts(nn.Module):
    """One context for all classes, in the text tower alone (CoOp).

    Args:
        ctx: (M, W) it starts as.
    """

    def __init__(self, ctx: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx.clone())

    def forward(self) -> Prompted:
        return Prompted(text=self.ctx)


class ConditionalPrompts(TextPrompts):
    """CoOp's context with a shift that a small network makes of the image (CoCoOp, section 3.2).

    Args:
        ctx: (M, W) it starts as.
        dim: D of the image features.
    """

    def __init__(self, ctx: Tensor, dim: int) -> None:
        super().__init__(ctx)
        hidden = max(dim // 16, 1)
        self.meta_net = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, ctx.shape[1]))

    def of(self, feature: Tensor) -> Tensor:
        """(B, M, W) for image features (B, D) of length 1."""
        return self.ctx + self.meta_net(feature)[:, None]


class CoupledPrompts(nn.Module):
    """Prompts of the text tower, and projections that make the image tower's of them (MaPLe, section 3.2).

    Args:
        ctx: (M, W_text) it starts as.
        width: W_image.
        depth: J, blocks that are given prompts of their own.
        layers: blocks of the text and of the image tower.
    """

    def __init__(self, ctx: Tensor, width: int, depth: int, layers: tuple[int, int]) -> None:
        super().__init__()
        n_ctx, text_width = ctx.shape
        self.in_text, self.in_image = (min(depth, count) - 1 for count in layers)
        self.ctx = nn.Parameter(ctx.clone())
        self.proj = nn.Linear(text_width, width)
        self.deep = nn.ParameterList([_random(n_ctx, text_width) for _ in range(max(self.in_text, self.in_image))])
        first = nn.Linear(text_width, width)  # the projections of the deep ones begin alike, as released
        self.deep_proj = nn.ModuleList([copy.deepcopy(first) for _ in range(self.in_image)])

    def forward(self) -> Prompted:
        deep = tuple(self.deep)
        image = tuple(proj(prompt) for proj, prompt in zip(self.deep_proj, deep, strict=False))
        return Prompted(self.ctx, deep[: self.in_text], self.proj(self.ctx), image)


class IndependentPrompts(nn.Module):
    """Prompts of each tower by itself (PromptSRC's). Arguments: see :class:`CoupledPrompts`."""

    def __init__(self, ctx: Tensor, width: int, depth: int, layers: tuple[int, int]) -> None:
        super().__init__()
        n_ctx, text_width = ctx.shape
        in_text, in_image = (min(depth, count) - 1 for count in layers)
        self.ctx, self.image_ctx = nn.Parameter(ctx.clone()), _random(n_ctx, width)
        self.deep = nn.ParameterList([_random(n_ctx, text_width) for _ in range(in_text)])
        self.image_deep = nn.ParameterList([_random(n_ctx, width) for _ in range(in_image)])

    def forward(self) -> Prompted:
        return Prompted(self.ctx, tuple(self.deep), self.image_ctx, tuple(self.image_deep))


class Adapter(nn.Module):
    """``(1 - ratio) z + ratio ReLU(W2 ReLU(W1 z))`` of features z (..., D), as released (the last ReLU, too).

    Args:
        dim: D; a quarter of it is hidden.
        ratio: share of the adapted features, in (0, 1].
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.down, self.up = nn.Linear(dim, dim // 4, bias=False), nn.Linear(dim // 4, dim, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return (1 - self.ratio) * z + self.ratio * self.up(self.down(z).relu()).relu()
