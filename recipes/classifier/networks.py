"""The networks of the literature's tables for 32x32 images, made known to timm under their usual names.

Importing this module registers ``preact_resnet18``, ``wide_resnet28_10``, ``wide_resnet34_10`` and ``cnn4``; then
``timm.create_model`` and ``--model.backbone`` take them. They begin with a 3x3 convolution of stride 1 and no pooling,
the CIFAR stem, and any image size will do. None has weights to fetch.

Sources: pre-activation ResNet, He et al., arXiv 1603.05027, with the final batch norm that adversarial training's
codes use (11,172,170 parameters for ten classes); Wide ResNet, Zagoruyko and Komodakis, arXiv 1605.07146, as TRADES
uses it (28-10: 36,479,194 parameters; 34-10: 46,160,474).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, added to the input or, where shapes differ, to a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out))))) + shortcut


class PreActResNet(nn.Module):
    """A stem, groups of blocks, batch norm and ReLU, mean over positions, a linear layer.

    Args:
        blocks: in each group.
        stem: channels of the first convolution.
        channels: of each group.
        strides: of each group's first block.
        num_classes: outputs; 0: features.
        in_chans: channels of the image.
        drop_rate: dropout before the linear layer.
        block_dropout: dropout between a block's convolutions (Wide ResNet's).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        stem: int,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        block_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, channels[-1]
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.feature_info: list[dict[str, Any]] = []
        width, reduction = stem, 1
        for i, (count, out, stride) in enumerate(zip(blocks, channels, strides, strict=True), 1):
            group = []
            for j in range(count):
                group.append(PreActBlock(width, out, stride if j == 0 else 1, block_dropout))
                width = out
            self.add_module(f"layer{i}", nn.Sequential(*group))
            reduction *= stride
            self.feature_info.append({"num_chs": out, "reduction": reduction, "module": f"layer{i}"})
        self.groups = len(blocks)
        self.bn = nn.BatchNorm2d(width)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = self._head(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.fc = num_classes, self._head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, num_features, H', W')."""
        x = self.conv1(x)
        for i in range(1, self.groups + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return F.relu(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CNN4(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, the second and the fourth of stride 2, and a linear layer."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 32, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 2 * width
        self.feature_info: list[dict[str, Any]] = []
        before, reduction = in_chans, 1
        for i, (out, stride) in enumerate(((width, 1), (width, 2), (2 * width, 1), (2 * width, 2)), 1):
            convolution = nn.Conv2d(before, out, 3, stride, 1, bias=False)
            self.add_module(f"layer{i}", nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU()))
            before, reduction = out, reduction * stride
            self.feature_info.append({"num_chs": out, "reduction": reduction, "module": f"layer{i}"})
        self.head_drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(before, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MLP(nn.Module):
    """Pixels in a row, ``depth`` layers of ``width`` units with ReLU, and a linear layer.

    Args:
        num_classes: outputs; 0: features.
        in_chans: channels of the image.
        img_size: its height and width in pixels.
        width: units of each hidden layer.
        depth: hidden layers, at least 1.
        init_scale: what all weights and biases are multiplied by at the start (torch's own initialisation is 1).
        drop_rate: dropout before the linear layer.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        width: int = 128,
        depth: int = 3,
        init_scale: float = 1.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1 or width < 1 or not init_scale > 0:
            raise ValueError(f"an MLP needs depth and width of at least 1 and init_scale > 0, not {(depth, width)}")
        self.num_classes, self.num_features, self.depth = num_classes, width, depth
        self.feature_info: list[dict[str, Any]] = []
        before = in_chans * img_size**2
        for i in range(1, depth + 1):
            self.add_module(f"layer{i}", nn.Sequential(nn.Linear(before, width), nn.ReLU()))
            self.feature_info.append({"num_chs": width, "reduction": img_size, "module": f"layer{i}"})
            before = width
        self.head_drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(before, num_classes) if num_classes else nn.Identity()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(init_scale)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, width)."""
        x = x.flatten(1)
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _settings(name: str, pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the network, without those that timm adds for its own."""
    if pretrained:
        raise ValueError(f"there are no pretrained weights of '{name}': leave --model.pretrained false")
    return {k: v for k, v in options.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}


@register_model
def preact_resnet18(pretrained: bool = False, **options: Any) -> PreActResNet:
    """Pre-activation ResNet-18 with the CIFAR stem."""
    settings = _settings("preact_resnet18", pretrained, options)
    return PreActResNet((2, 2, 2, 2), 64, (64, 128, 256, 512), (1, 2, 2, 2), **settings)


@register_model
def wide_resnet28_10(pretrained: bool = False, **options: Any) -> PreActResNet:
    """Wide ResNet of 28 layers, ten times as wide."""
    return PreActResNet((4, 4, 4), 16, (160, 320, 640), (1, 2, 2), **_settings("wide_resnet28_10", pretrained, options))


@register_model
def wide_resnet34_10(pretrained: bool = False, **options: Any) -> PreActResNet:
    """Wide ResNet of 34 layers, ten times as wide."""
    return PreActResNet((5, 5, 5), 16, (160, 320, 640), (1, 2, 2), **_settings("wide_resnet34_10", pretrained, options))


@register_model
def cnn4(pretrained: bool = False, **options: Any) -> CNN4:
    """Four convolutions: the small network of benchmarks and quick runs."""
    return CNN4(**_settings("cnn4", pretrained, options))


@register_model
def mlp(pretrained: bool = False, **options: Any) -> MLP:
    """Fully connected layers: the network of studies of training itself."""
    return MLP(**_settings("mlp", pretrained, options))
