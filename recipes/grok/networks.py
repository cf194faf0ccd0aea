"""The paper's network for CIFAR-10, made known to timm: ``preact_resnet18_plain``, without batch norm.

A pre-activation ResNet-18 (He et al., arXiv 1603.05027) of 16 channels and their multiples, with nothing but
convolutions, ReLU and sums: piecewise linear also in training. ReLUs are modules, so that local complexity finds them.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """ReLU, 3x3 convolution, twice, added to the input or, where shapes differ, to a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.act2(self.conv1(out))) + shortcut


class PlainPreActResNet18(nn.Module):
    """A 3x3 convolution, four groups of two blocks, ReLU, mean over positions, a linear layer.

    Args:
        num_classes: outputs.
        in_chans: channels of the image.
        width: channels of the first group; each later group has twice as many.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 16) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8 * width
        self.feature_info: list[dict[str, Any]] = []
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1)
        before = width
        for i in range(1, 5):
            out, stride = width * 2 ** (i - 1), 1 if i == 1 else 2
            self.add_module(f"layer{i}", nn.Sequential(PlainBlock(before, out, stride), PlainBlock(out, out, 1)))
            self.feature_info.append({"num_chs": out, "reduction": 2 ** (i - 1), "module": f"layer{i}"})
            before = out
        self.act = nn.ReLU()
        self.fc = nn.Linear(before, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, 8 width, H / 8, W / 8)."""
        x = self.conv1(x)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        out: Tensor = self.act(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def preact_resnet18_plain(pretrained: bool = False, **options: Any) -> PlainPreActResNet18:
    """Pre-activation ResNet-18 without normalisation, 16 channels wide."""
    if pretrained:
        raise ValueError("there are no pretrained weights of 'preact_resnet18_plain': leave --model.pretrained false")
    given = {k: v for k, v in options.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    return PlainPreActResNet18(**given)
