"""Layers are found on every family of timm backbones, with the shapes that come out of them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.layers import backbone_of, find_layers, layer_shapes, layers_there, stages, stem


class Holder(LightningModule):
    """A backbone under the name that recipes give it."""

    def __init__(self, backbone: nn.Module, *example: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.example_input_array = torch.zeros(2, *example) if example else None

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone(image)


class Twofold(nn.Module):
    """A layer that gives a pair, one that gives vectors, one that is never called, and one with dropout and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.GRU(4, 4, batch_first=True)
        self.flat, self.idle, self.drop = nn.Flatten(), nn.Linear(1, 1), nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.pair(self.drop(self.norm(x))[:, 0])[0])


#: Backbone, image size, and where AdvStyle's layers are expected with the shapes there, written down from the papers:
#: channels and the image size divided by 2, 4, 8, ...; tokens with their class token; swin has its channels last.
FAMILIES: list[tuple[str, int, dict[str, tuple[int, ...]]]] = [
    (
        "resnet18",
        32,
        {
            "conv1": (64, 16, 16),
            "maxpool": (64, 8, 8),
            "layer1": (64, 8, 8),
            "layer2": (128, 4, 4),
            "layer3": (256, 2, 2),
            "layer4": (512, 1, 1),
        },
    ),
    (
        "convnext_atto",
        32,
        {"stages.0": (40, 8, 8), "stages.1": (80, 4, 4), "stages.2": (160, 2, 2), "stages.3": (320, 1, 1)},
    ),
    (
        "efficientnet_b0",
        32,
        {
            "blocks.0": (16, 16, 16),
            "blocks.1": (24, 8, 8),
            "blocks.2": (40, 4, 4),
            "blocks.4": (112, 2, 2),
            "blocks.6": (320, 1, 1),
        },
    ),
    (
        "regnetx_002",
        32,
        {"stem": (32, 16, 16), "s1": (24, 8, 8), "s2": (56, 4, 4), "s3": (152, 2, 2), "s4": (368, 1, 1)},
    ),
    (
        "mobilenetv3_small_050",
        32,
        {
            "bn1": (16, 16, 16),
            "blocks.0": (8, 8, 8),
            "blocks.1": (16, 4, 4),
            "blocks.3": (24, 2, 2),
            "blocks.5": (288, 1, 1),
        },
    ),
    ("vit_tiny_patch16_224", 64, {f"blocks.{i}": (17, 192) for i in (2, 5, 8, 11)}),
    ("swin_tiny_patch4_window7_224", 64, {f"layers.{i}": (16 >> i, 16 >> i, 96 << i) for i in range(4)}),
]


def made(name: str, size: int) -> Holder:
    options: dict[str, Any] = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    return Holder(timm.create_model(name, num_classes=2, **options), 3, size, size)


@pytest.mark.parametrize(("name", "size", "expected"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_stages_of_every_family(name: str, size: int, expected: dict[str, tuple[int, ...]]) -> None:
    module = made(name, size)
    names = [*stem(module.backbone), *stages(module.backbone)]
    assert names == list(expected)
    shapes = layer_shapes(module, find_layers(module, names))
    assert {n: tuple(s[1:]) for n, s in shapes.items()} == expected


def test_a_backbone_is_found_under_its_name_or_because_timm_made_it() -> None:
    net, other = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    assert backbone_of(Holder(net)) is net

    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.net, self.teacher = nn.Linear(1, 1), net, other

    assert backbone_of(Unnamed()) is net
    plain = nn.Sequential(nn.Linear(1, 1))
    assert backbone_of(plain) is plain
    assert backbone_of(Holder(torch.compile(net))) is net  # type: ignore[arg-type]  # a wrapped module is a module


def test_a_wrong_name_lists_the_layers() -> None:
    module = made("resnet10t", 32)
    for name in ("layer9", "", "backbone.layer1"):
        with pytest.raises(ValueError, match=f"no layer '{name}' in the backbone ResNet.*layer1, .*layer2"):
            find_layers(module, ["layer1", name])
    assert "layer1.0" in layers_there(module.backbone) and "layer1.0.conv1" not in layers_there(module.backbone)


def test_a_network_without_stages_lists_the_layers() -> None:
    net = nn.Sequential(OrderedDict(first=nn.Linear(1, 1), second=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="no stages found in Sequential; name the layers. Layers: first, second"):
        stages(net)
    assert stem(net) == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pair", "layer 'pair' gives no feature map and no tokens"),
        ("flat", "layer 'flat' gives no feature map and no tokens"),
        ("idle", "layer 'idle' is never called"),
    ],
)
def test_layers_that_have_no_style(layer: str, message: str) -> None:
    module = Holder(Twofold(), 1, 3, 4)
    with pytest.raises(ValueError, match=message):
        layer_shapes(module, find_layers(module, [layer]))
    assert not any(m._forward_hooks for m in module.modules())


def test_without_an_example_the_error_says_what_is_missing() -> None:
    module = Holder(Twofold())
    with pytest.raises(ValueError, match="Holder needs example_input_array"):
        layer_shapes(module, find_layers(module, ["drop"]))


def test_looking_leaves_no_trace() -> None:
    module = Holder(Twofold(), 1, 3, 4).train()
    module.backbone.drop.eval()  # type: ignore[union-attr]
    before = {n: v.clone() for n, v in module.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    shapes = layer_shapes(module, find_layers(module, ["drop"]))
    assert torch.equal(torch.rand(3), wanted)
    assert shapes == {"drop": torch.Size((2, 1, 3, 4))}
    assert {n: m.training for n, m in module.backbone.named_children()} == {
        "pair": True,
        "flat": True,
        "idle": True,
        "drop": False,
        "norm": True,
    }
    after: dict[str, Any] = module.state_dict()
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert not any(m._forward_hooks for m in module.modules())
