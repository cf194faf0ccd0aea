"""The style techniques hang on every family of timm backbones, and run compiled, in bfloat16 and in both layouts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.style import DSU, AdvStyle, EFDMix, MixStyle
from recipes.classifier import Classifier
from tests.callbacks.styled import (
    ALWAYS,
    TECHNIQUES,
    B,
    C,
    Net,
    batch_of,
    begin,
    begun,
    flow,
    shift_of,
    spread,
    statistics,
    theta_of,
)

every = pytest.mark.parametrize("kind", TECHNIQUES)
#: Smallest variants, image size, and how many layers are moved there by default: those with more than one position.
FAMILIES = [
    ("resnet10t", 32, 5),
    ("convnext_atto", 32, 3),
    ("efficientnet_b0", 32, 4),
    ("regnetx_002", 32, 4),
    ("mobilenetv3_small_050", 32, 4),
    ("vit_tiny_patch16_224", 64, 4),
    ("swin_tiny_patch4_window7_224", 64, 4),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=[f[0] for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> tuple[Classifier, int, int]:
    name, size, layers = request.param
    torch.manual_seed(0)
    return Classifier(name, num_classes=3, image_size=size, backbone_args={"drop_path_rate": 0.0}), size, layers


def around(module: Classifier, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The output of the layers that have hooks, before and after the hooks."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            seen.setdefault(name, []).append(output)

        return hook

    for name, layer in module.named_modules():
        if layer._forward_hooks:
            layer.register_forward_hook(note(name), prepend=True)
            layer.register_forward_hook(note(name))
    module(image)
    return {name: (before, after) for name, (before, after) in seen.items()}


@every
def test_every_family(family: tuple[Classifier, int, int], kind: type) -> None:
    """The style of every layer moves, and nothing else does; class tokens have none."""
    module, size, layers = copy.deepcopy(family[0]), *family[1:]
    technique = kind(seed=0, **ALWAYS[kind])
    batch = {"image": torch.rand(4, 3, size, size), "label": torch.tensor([0, 1, 2, 0])}
    wanted = module.eval()(batch["image"])
    begin(technique, module, 0, batch)
    assert torch.equal(module(batch["image"]), wanted)
    module.train().loss(batch).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert parameter.grad is not None or not name.startswith("perturbations"), name
    prefix = int(getattr(module.backbone, "num_prefix_tokens", 0))
    moved = around(module, batch["image"])
    assert len(moved) == (2 if kind in (MixStyle, EFDMix) else layers)
    for before, after in moved.values():
        assert not torch.equal(before, after) and before.dtype == after.dtype and before.shape == after.shape
        if before.dim() == 3:
            assert torch.equal(before[:, :prefix], after[:, :prefix])
            before, after = (v[:, prefix:, :, None].transpose(1, 2) for v in (before, after))
        elif "swin" in module.hparams["backbone"]:
            before, after = (v.permute(0, 3, 1, 2) for v in (before, after))
        if kind is EFDMix:
            values, order = before.flatten(2).sort(-1)
            rises = after.flatten(2).gather(-1, order).diff(dim=-1)
            assert (rises[values.diff(dim=-1) > 0] >= -1e-4).all(), "the order of values isn't as before"
        else:
            shift_of(before, after)  # fails if the content isn't as before


def test_a_map_of_one_position_is_left_out() -> None:
    module = Classifier("test_resnet", num_classes=2, image_size=32)
    technique = DSU()
    technique.attach(module)
    assert list(technique.hung(module)) == ["conv1", "maxpool", "layer1", "layer2", "layer3"]
    with pytest.raises(ValueError, match="layer 'layer4' gives .*one position per channel has no style"):
        DSU(layers=["layer4"], name="other").attach(module)
    tiny = Classifier("test_vit", num_classes=2, image_size=16)
    with pytest.raises(ValueError, match="no layer of the backbone has a feature map larger than 1x1"):
        DSU().attach(tiny)


def test_tokens_are_moved_over_their_axis() -> None:
    """Style of (B, N, C) tokens by the formula, written for one technique whose numbers are known."""
    module = Classifier("test_vit", num_classes=2, image_size=64)
    technique = AdvStyle(layers=["blocks.0"], seed=0, **ALWAYS[AdvStyle])
    batch = {"image": torch.rand(B, 3, 64, 64), "label": torch.arange(B) % 2}
    begin(technique, module.train(), 0, batch)
    ((before, after),) = around(module, batch["image"]).values()
    x, y = (v[:, 1:].transpose(1, 2)[..., None] for v in (before, after))
    theta = module.get_parameter("perturbations.adv_style.blocks_0.theta").detach()
    torch.testing.assert_close(theta, torch.from_numpy(spread(x)).float(), rtol=1e-4, atol=1e-6)
    noise = shift_of(x, y) / theta.double().numpy()[:, None]
    assert abs(noise.mean()) < 4 / noise.size**0.5 and abs((noise**2).mean() - 1) < 4 * (2 / noise.size) ** 0.5


# ---------------------------------------------------------------------- precision, layout, compilation


@every
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays_and_does_not_matter(kind: type, layout: torch.memory_format) -> None:
    image = batch_of()["image"]
    wanted = flow(begun(kind(layers=["first"], seed=0, **ALWAYS[kind])), image)["first"][1]
    module = begun(kind(layers=["first"], seed=0, **ALWAYS[kind])).to(memory_format=layout)
    found = flow(module, image.contiguous(memory_format=layout))["first"][1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if kind is not EFDMix:  # whose sorting is along the rows
        assert found.is_contiguous(memory_format=layout)


@every
def test_bfloat16_is_what_comes_out_and_statistics_are_float32(kind: type) -> None:
    image = batch_of()["image"]
    module = begun(kind(layers=["first"], seed=0, **ALWAYS[kind]))
    exact = flow(module, image)["first"][1]
    with torch.autocast("cpu", torch.bfloat16):
        half = flow(module, image)["first"][1]
        loss = module.loss(batch_of())
    assert half.dtype == torch.bfloat16
    # a few roundings of 2^-9; where values tie, EFDMix may take them in another order
    assert (half.float() - exact).abs().mean() < 2**-7 * exact.abs().mean()
    assert abs(statistics(half.float()) - statistics(exact)).max() < 2**-7 * abs(statistics(exact)).max()
    loss.backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@every
@pytest.mark.parametrize("per_sample", [False, True])
def test_compiled_it_is_one_graph_that_stays(kind: type, per_sample: bool) -> None:
    """Whatever branches a step draws; the numbers are those of the network that isn't compiled."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    networks, techniques = [], []
    for _ in range(2):
        networks.append(Net().train())
        techniques.append(kind(layers=["first", "second"], per_sample=per_sample, seed=0))
        begin(techniques[-1], networks[-1])
        techniques[-1].restore(networks[-1])
    networks[0].backbone.compile(backend=count, fullgraph=True)
    for step in range(1, 8):
        losses = []
        for module, technique in zip(networks, techniques, strict=True):
            technique._step = (0, step)
            technique.perturb(module, batch_of())
            losses.append(module.loss(batch_of()))
            module.zero_grad()
            losses[-1].backward()
            technique.restore(module)
        torch.testing.assert_close(losses[0], losses[1])
        for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert graphs == 1
    assert networks[0].backbone(batch_of()["image"]).shape == (B, 2)
    assert graphs == 2, "a step that isn't perturbed has a graph of its own"
    if kind is AdvStyle:
        assert theta_of(networks[0]).shape == (2, C)
