"""U-ViT: a transformer on patches, time, labels and words, with long skip connections (Bao et al., arXiv 2209.12152).

Where paper and released code differ we follow the released code of its CIFAR-10 model: ``depth`` counts the blocks that
are joined in pairs (12: six in, one in the middle, six out), no bias at queries, keys and values, one 3x3 convolution
at the end, weights drawn from a normal distribution of deviation 0.02 (its cut at two cuts nothing). What is
done otherwise: attention is torch's own in whatever precision it is given (the release casts to float32 and back), and
gradient checkpointing is the non-reentrant one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def time_embedding(time: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines (B, dim) of times (B,), of periods from 2 pi to ``max_period`` times that; at least float32."""
    exact = time.dtype if time.dtype == torch.float64 else torch.float32
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=time.device, dtype=exact) * (-math.log(max_period) / max(half, 1)))
    angle = time.to(exact)[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, dim % 2))


class Attention(nn.Module):
    """Self-attention of tokens (B, L, dim)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The tokens attended to; ``attn_mask``: (B, heads, L, L) or the like, added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block; with ``skip`` a connection (B, L, dim) is joined in by a linear layer first."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False, skip: bool = False
    ) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qkv_bias)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, u], -1))  # type: ignore[list-item]  # such a block is given one
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Images (B, in_chans, S, S), times (B,) and conditions to images of the same shape.

    Args:
        image_size: S, a multiple of ``patch_size``.
        in_chans: channels of the image.
        patch_size: side of a token's patch.
        dim: width, a multiple of ``heads``.
        depth: blocks that are joined in pairs, even; there is one more in the middle.
        heads: of attention.
        mlp_ratio: hidden width of the blocks' perceptrons, over ``dim``.
        qkv_bias: biases at queries, keys and values.
        mlp_time: a perceptron on the time's embedding.
        num_classes: labels, which become a token; 0: none. (Room for "no label" is the caller's to count in.)
        context_dim: width of further tokens (B, context_tokens, context_dim), a text's features; 0: none.
        context_tokens: their number.
        init_std: deviation of the weights at the start: the release's 0.02 is of width 512. Narrow networks learn
            slowly with it; ``0.02 * sqrt(512 / dim)`` keeps the same scale of features.
        final_conv: a 3x3 convolution at the end.
        grad_checkpointing: keep less for the backward pass and compute it twice.

    Raises:
        ValueError: for sizes that don't divide.
    """

    #: For techniques on features: tokens before those of patches.
    num_prefix_tokens: int

    def __init__(
        self,
        image_size: int = 32,
        in_chans: int = 3,
        patch_size: int = 2,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time: bool = False,
        num_classes: int = 0,
        context_dim: int = 0,
        context_tokens: int = 77,
        init_std: float = 0.02,
        final_conv: bool = True,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size or dim % heads or depth % 2 or depth < 2:
            raise ValueError(
                f"U-ViT needs an image_size that patch_size divides, a dim that heads divides and an even depth: "
                f"{image_size}/{patch_size}, {dim}/{heads}, {depth}"
            )
        self.dim, self.patch_size, self.side = dim, patch_size, image_size // patch_size
        self.in_chans, self.grad_checkpointing = in_chans, grad_checkpointing
        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.time_mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim)) if mlp_time else None
        self.label_embed = nn.Embedding(num_classes, dim) if num_classes else None
        self.context_embed = nn.Linear(context_dim, dim) if context_dim else None
        self.num_prefix_tokens = 1 + (num_classes > 0) + (context_tokens if context_dim else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + self.side**2, dim))
        blocks: dict[str, Any] = {"dim": dim, "heads": heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        self.in_blocks = nn.ModuleList(Block(**blocks) for _ in range(depth // 2))
        self.mid_block = Block(**blocks)
        self.out_blocks = nn.ModuleList(Block(**blocks, skip=True) for _ in range(depth // 2))
        #: What the connections pass through, the outermost first: here they can be scaled.
        self.skips = nn.ModuleList(nn.Identity() for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_size**2 * in_chans)
        self.final_conv = nn.Conv2d(in_chans, in_chans, 3, padding=1) if final_conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=init_std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        names = [f"in_blocks.{i}" for i in range(depth // 2)] + ["mid_block"]
        self.feature_info = [{"module": n} for n in [*names, *(f"out_blocks.{i}" for i in range(depth // 2))]]

    @property
    def long_skips(self) -> list[str]:
        """Names of the layers through which the connections pass, the outermost first."""
        return [f"skips.{i}" for i in range(len(self.skips))]

    @property
    def blocks(self) -> list[nn.Module]:
        """All of them, in the order of the forward pass."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def _block(self, block: nn.Module, *tokens: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False)
        return block(*tokens)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_chans, S, S).
            time: (B,), in thousandths or what else the embedding's periods suit.
            label: (B,) int64, where there are labels.
            context: (B, context_tokens, context_dim), where there is one.
        """
        image = self.patch_embed(x).flatten(2).transpose(1, 2)
        clock = time_embedding(time, self.dim).to(x.dtype)
        prefix = [(clock if self.time_mlp is None else self.time_mlp(clock))[:, None]]
        if self.label_embed is not None:
            prefix.append(self.label_embed(label)[:, None])
        if self.context_embed is not None:
            prefix.append(self.context_embed(context))
        tokens = torch.cat([*prefix, image], 1) + self.pos_embed
        kept = []
        for block in self.in_blocks:
            tokens = self._block(block, tokens)
            kept.append(tokens)
        tokens = self._block(self.mid_block, tokens)
        for block in self.out_blocks:
            level = len(kept)  # the deepest first
            tokens = self._block(block, tokens, self.skips[level - 1](kept.pop()))
        patches = self.head(self.norm(tokens)[:, self.num_prefix_tokens :])
        p, s = self.patch_size, self.side
        image = patches.unflatten(1, (s, s)).unflatten(-1, (p, p, self.in_chans))
        image = image.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.in_chans, s * p, s * p)
        return self.final_conv(image)
