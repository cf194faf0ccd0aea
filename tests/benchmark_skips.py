"""What scaled long skip connections cost: a part of ``python -m tests.benchmarks``, which says how it is measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.long_skip import LongSkipScaling
from recipes.scalelong import Diffusion
from recipes.scalelong.uvit import Block

#: U-ViT-S/2, as published for CIFAR-10 (44 M weights), and a U-Net of DDPM's CIFAR-10 size (36 M); small ones.
NETWORKS: dict[str, tuple[Literal["uvit", "unet"], dict[str, Any], int]] = {
    "U-ViT-S/2": ("uvit", {}, 32),
    "U-Net": (
        "unet",
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 256,
        },
        32,
    ),
    "small U-ViT": ("uvit", {"dim": 32, "depth": 4, "heads": 4, "patch_size": 4}, 16),
    "small U-Net": (
        "unet",
        {
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
        },
        16,
    ),
}


class PublishedAttention(nn.Module):
    """U-ViT's attention as released: to float32 before torch's attention, and back by what comes behind."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).contiguous().float()
        found = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(found.permute(0, 2, 1, 3).reshape(b, n, c))


def as_published(module: Diffusion) -> Diffusion:
    """The same network with the released attention."""
    for block in module.backbone.modules():
        if isinstance(block, Block):
            dim, own = block.attn.proj.in_features, block.attn
            block.attn = PublishedAttention(dim, own.heads)  # type: ignore[assignment]
            block.attn.load_state_dict(own.state_dict())
    return module


def diffusion(name: str, device: str, published: bool = False) -> Diffusion:
    network, options, side = NETWORKS[name]
    torch.manual_seed(0)
    module = Diffusion(network, dict(options), image_size=side, test_samples=0)
    return (as_published(module) if published else module).to(device)


def ratios(
    name: str, steps: int, batch: int, device: str, bf16: bool, compiled: bool, others: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Times of a training step over the plain network's, of the same step right beside it; ``others``: see ``rows``."""
    side = NETWORKS[name][2]
    modules = {"plain": diffusion(name, device)}
    for label, arguments in others.items():
        modules[label] = diffusion(name, device, published=not arguments)
        if arguments:
            LongSkipScaling(**arguments).attach(modules[label])
    torch.manual_seed(0)
    image, noise, level = torch.rand(batch, 3, side, side), torch.randn(batch, 3, side, side), torch.rand(batch)
    data = {"image": image.to(device), "noise": noise.to(device), "time": level.to(device)}
    runs: dict[str, Callable[[], None]] = {}
    for label, module in modules.items():
        if compiled:
            module.backbone.compile()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

        def step(module: Diffusion = module, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = module.loss(data)
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        runs[label] = step
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(steps + 2):
        for label, run in runs.items():
            begun = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - begun)
    return {label: [a / b for a, b in zip(own[2:], times["plain"][2:], strict=True)] for label, own in times.items()}


def skip_table(
    names: list[str], steps: int, batch: int, shown: Callable[[list[float]], str], device: str = "cpu", **how: Any
) -> None:
    """Prints a row for each network."""
    rows: dict[str, dict[str, Any]] = {
        "CS": {"mode": "cs", "kappa": 0.7},
        "1/sqrt2": {"mode": "sqrt2"},
        "LS": {"mode": "ls"},
        "LS, unshared": {"mode": "ls_unshared"},
    }
    print(f"\n| step over the unscaled step | {' | '.join(rows)} | published attention |")
    print("| -- " * (len(rows) + 2) + "|")
    for name in names:
        uvit = NETWORKS[name][0] == "uvit"
        others: dict[str, dict[str, Any]] = {**rows, **({"published": {}} if uvit else {})}
        found = ratios(name, steps, batch, device, how.get("bf16", False), how.get("compiled", False), others)
        cells = [shown(found[label]) if label in found else "" for label in [*rows, "published"]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
