"""The CIFAR networks: their published sizes, the stem, and that techniques and the recipe find their way in them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.layers import stages
from callbacks.style import MixStyle
from recipes.adversarial_training import AdversarialTrainer
from recipes.classifier import Classifier, networks


@pytest.mark.parametrize(
    ("name", "size"),
    [("preact_resnet18", 11_172_170), ("wide_resnet28_10", 36_479_194), ("wide_resnet34_10", 46_160_474)],
)
def test_parameters_are_as_published(name: str, size: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in network.parameters()) == size


def small(**options: Any) -> networks.PreActResNet:
    torch.manual_seed(0)
    network = networks.PreActResNet((2, 1), 4, (4, 6), (1, 2), num_classes=3, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.eval()


def test_forward_is_the_papers_equation() -> None:
    """Written out from the paper: pre-activation blocks, the shortcut convolved behind the ReLU where shapes differ."""
    network, x = small(), torch.rand(2, 3, 7, 9)
    state = network.state_dict()

    def norm(h: Tensor, at: str) -> Tensor:
        mean, var, weight, bias = (state[f"{at}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        scale = weight / (var + 1e-5).sqrt()
        return (h * scale[:, None, None] + (bias - mean * scale)[:, None, None]).clamp_min(0)

    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for at, stride, same in (("layer1.0", 1, True), ("layer1.1", 1, True), ("layer2.0", 2, False)):
        inner = norm(h, f"{at}.bn1")
        way = h if same else F.conv2d(inner, state[f"{at}.shortcut.weight"], stride=stride)
        inner = norm(F.conv2d(inner, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn2")
        h = way + F.conv2d(inner, state[f"{at}.conv2.weight"], padding=1)
    wanted = norm(h, "bn").mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_sits_where_wide_resnets_have_it() -> None:
    network, x = small(block_dropout=0.5), torch.rand(2, 3, 8, 8)
    assert torch.equal(network(x), network(x))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", ["preact_resnet18", "cnn4"])
@pytest.mark.parametrize("size", [28, 32])
def test_recipe_and_techniques_take_them(name: str, size: int) -> None:
    module = Classifier(name, num_classes=5, in_chans=1, image_size=size)
    assert module(torch.rand(2, 1, size, size)).shape == (2, 5)
    assert stages(module.backbone) == [f"layer{i}" for i in range(1, 5)]
    MixStyle().attach(module)
    features = module.backbone.forward_features(torch.rand(2, 1, size, size))
    reduction = module.backbone.feature_info[-1]["reduction"]
    assert features.shape == (2, module.backbone.num_features, -(-size // reduction), -(-size // reduction))
    module.backbone.reset_classifier(0)
    assert module.backbone(torch.rand(2, 1, size, size)).shape == (2, module.backbone.num_features)
    assert isinstance(module.backbone.get_classifier(), nn.Identity)


def test_there_are_no_weights_to_fetch() -> None:
    with pytest.raises(ValueError, match="no pretrained weights of 'preact_resnet18'"):
        AdversarialTrainer("preact_resnet18", pretrained=True)
