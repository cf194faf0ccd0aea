"""Long skip connections: where they are found, what is scaled by what, the theory at initialisation, the monitor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.long_skip import LongSkipScaling, SkipGate, SkipMonitor, cs_coefficients, find_skips, oscillation
from recipes.scalelong.uvit import UViT
from tests.laws import cells


class Holder(LightningModule):
    """A network with an example, as recipes have it."""

    def __init__(self, backbone: nn.Module, example: Any) -> None:
        super().__init__()
        self.backbone, self.example_input_array = backbone, example

    def forward(self, *args: Any, **named: Any) -> Any:
        output = self.backbone(*args, **named)
        return output if isinstance(output, Tensor) else output.sample


def uvit(depth: int = 6, **more: Any) -> Holder:
    torch.manual_seed(0)
    return Holder(UViT(8, 1, 2, 32, depth, 4, **more), (torch.zeros(2, 1, 8, 8), torch.zeros(2)))


def unet() -> Holder:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    downs, ups = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    channels = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "in_channels": 1, "out_channels": 1}
    network = UNet2DModel(16, **channels, layers_per_block=2, down_block_types=downs, up_block_types=ups)
    return Holder(network, (torch.zeros(2, 1, 16, 16), torch.zeros(2)))


def conditional() -> Holder:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    network = UNet2DConditionModel(8, cross_attention_dim=8, **sizes, **blocks)
    example = {"sample": torch.zeros(2, 4, 8, 8), "timestep": torch.zeros(2)}
    return Holder(network, {**example, "encoder_hidden_states": torch.zeros(2, 3, 8)})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor draws into the run's folder, which is where one stands."""
    monkeypatch.chdir(tmp_path)


NETWORKS: dict[str, Callable[[], Holder]] = {"uvit": uvit, "unet": unet, "conditional": conditional}
each = pytest.mark.parametrize("network", NETWORKS)


def noise(example: Any) -> Any:
    torch.manual_seed(1)
    return torch.utils._pytree.tree_map(lambda x: torch.randn_like(x) * (1 if x.dim() > 1 else 100), example)


def run(module: Holder, example: Any) -> Tensor:
    return module(**example) if isinstance(example, dict) else module(*example)


def gradients(module: Holder, example: Any) -> list[Tensor]:
    weights = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(run(module, example).square().mean(), weights))


# ---------------------------------------------------------------------- constants


@given(st.integers(1, 40), st.floats(0.01, 1.0))
def test_constants(n: int, kappa: float) -> None:
    found = cs_coefficients(n, kappa)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([kappa**i for i in range(n)])
    assert found[0] == 1  # the outermost


@pytest.mark.parametrize(("n", "kappa"), [(0, 0.5), (3, 0.0), (3, 1.01), (3, -0.5)])
def test_constants_out_of_range(n: int, kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa lie in"):
        cs_coefficients(n, kappa)


@pytest.mark.parametrize(
    ("arguments", "said"), [({"mode": "csl"}, "mode must be one of none"), ({"kappa": 0}, "kappa")]
)
def test_settings_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LongSkipScaling(**arguments)


# ---------------------------------------------------------------------- where they are


def test_a_unets_connections_are_numbered_across_the_whole_network() -> None:
    skips = find_skips(unet())
    assert [s.level for s in skips] == list(range(1, 10))
    assert [(s.name, s.item) for s in skips] == [(f"up_blocks.{b}", i) for b in (2, 1, 0) for i in (0, 1, 2)]
    sides = [s.shape[-1] for s in skips]
    assert sides == sorted(sides, reverse=True) and sides[0] == 16  # the outermost is the largest


def test_a_u_vits_connections() -> None:
    skips = find_skips(uvit())
    assert [(s.level, s.name, s.reader) for s in skips] == [
        (i, f"skips.{i - 1}", f"out_blocks.{3 - i}.skip_linear") for i in (1, 2, 3)
    ]


@each
@pytest.mark.parametrize("mode", ["cs", "sqrt2"])
def test_each_connection_is_scaled_by_its_constant(network: str, mode: Any) -> None:
    """Against the same network, whose encoder outputs are scaled by hand where the decoder takes them."""
    module, technique = NETWORKS[network](), LongSkipScaling(mode, 0.6)
    example = noise(module.example_input_array)
    technique.attach(module)
    found, found_gradients = run(module, example), gradients(module, example)
    technique.detach(module)
    count = len(find_skips(module))
    kappa = [0.6**i if mode == "cs" else 0.5**0.5 for i in range(count)]
    by_hand = copy.deepcopy(module)
    if network == "uvit":
        for level, block in enumerate(reversed(by_hand.backbone.out_blocks)):
            forward = block.forward
            block.forward = lambda x, u, forward=forward, k=kappa[level]: forward(x, k * u)
    else:
        first = count
        for block in by_hand.backbone.up_blocks:  # the deepest first
            first -= len(block.resnets)
            forward, own = block.forward, kappa[first : first + len(block.resnets)]

            def scaled(sample: Any = None, skips: Any = None, *a: Any, f: Any = forward, k: Any = own, **n: Any) -> Any:
                if skips is None:
                    skips = n.pop("res_hidden_states_tuple")
                    return f(res_hidden_states_tuple=tuple(c * u for c, u in zip(k, skips, strict=True)), **n)
                return f(sample, tuple(c * u for c, u in zip(k, skips, strict=True)), *a, **n)

            block.forward = scaled
    assert torch.equal(found, run(by_hand, example))
    for a, b in zip(found_gradients, gradients(by_hand, example), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(found, run(module, example), rtol=1e-4)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kappa_one_is_no_scaling_bit_by_bit(network: str, dtype: torch.dtype) -> None:
    module = NETWORKS[network]().to(dtype)
    example = torch.utils._pytree.tree_map(lambda x: x.to(dtype), noise(module.example_input_array))
    plain, wanted = run(module, example), gradients(module, example)
    technique = LongSkipScaling("cs", 1.0)
    technique.attach(module)
    assert plain.dtype == dtype and torch.equal(run(module, example), plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients(module, example), wanted, strict=True))


class Block(nn.Module):
    """As segmentation networks have it."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(first + second, out, 3, padding=1)

    def forward(self, feature_map: Tensor, scale: float, skip_connection: Tensor | None = None) -> Tensor:
        x = F.interpolate(feature_map, scale_factor=scale)
        x = x if skip_connection is None else torch.cat([x, skip_connection], 1)
        return self.conv(x).relu()


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)])
        self.up = nn.ModuleList([Block(8, 6, 6), Block(6, 4, 4), Block(4, 0, 2)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x).relu()
        b = self.down[1](a).relu()
        x = self.up[0](self.down[2](b).relu(), 2.0, b)
        return self.up[2](self.up[1](x, 2.0, skip_connection=a), 2.0)


def segmentation() -> Holder:
    torch.manual_seed(0)
    return Holder(Segmentation(), torch.zeros(2, 3, 16, 16))


def test_blocks_of_segmentation_networks() -> None:
    module = segmentation()
    skips = find_skips(module)
    assert [(s.level, s.name, s.shape[1], s.reader) for s in skips] == [
        (1, "up.1", 4, "up.1.conv"),
        (2, "up.0", 6, "up.0.conv"),
    ]
    technique, x = LongSkipScaling("cs", 0.5), torch.randn(2, 3, 16, 16)
    technique.attach(module)
    before = module(x)
    technique.fold(module)
    assert torch.allclose(module(x), before, atol=1e-6) and not technique.skips
    plain = segmentation()
    assert not torch.allclose(plain(x), before, atol=1e-5)
    assert torch.equal(module.backbone.up[0].conv.weight[:, 8:], 0.5 * plain.backbone.up[0].conv.weight[:, 8:])
    assert torch.equal(module.backbone.up[1].conv.weight, plain.backbone.up[1].conv.weight)  # the outermost's is 1


class Named(nn.Module):
    """A user's own: additive, the connections pass through layers that have names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mid, self.c, self.d = (nn.Linear(5, 5) for _ in range(5))
        self.near, self.far = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        w = self.b(u)
        v = self.c(self.far(w) + self.mid(w))
        return self.d(self.near(u) + v)


def test_a_users_own_module_names_them() -> None:
    module, x = Holder(Named(), torch.zeros(2, 3, 5)), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="no long skip connections found in Named: name the layers"):
        find_skips(module)
    with pytest.raises(ValueError, match="from the outermost to the deepest; a forward pass uses near, far"):
        find_skips(module, ["far", "near"])
    with pytest.raises(ValueError, match="no layer 'nearer' in the backbone Named. Layers: a, b"):
        find_skips(module, ["nearer"])
    technique = LongSkipScaling("cs", 0.25, layers=["near", "far"])
    technique.attach(module)
    n = module.backbone
    u = n.a(x)
    w = n.b(u)
    wanted = n.d(u + n.c(0.25 * w + n.mid(w)))
    assert torch.allclose(module(x), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="leave the technique on"):
        technique.fold(module)
    assert torch.allclose(module(x), wanted, atol=1e-6)  # it is still on


def test_what_can_not_be_found_is_one_line() -> None:
    with pytest.raises(ValueError, match="Holder needs example_input_array"):
        find_skips(Holder(segmentation().backbone, None))
    module = Holder(nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no long skip connections found in Sequential"):
        LongSkipScaling().attach(module)
    LongSkipScaling("none").attach(module)  # nothing to do, nothing to find


# ---------------------------------------------------------------------- folding


@pytest.mark.parametrize("mode", ["cs", "sqrt2"])
def test_a_folded_u_vit_gives_the_same(mode: Any) -> None:
    module, technique = uvit(), LongSkipScaling(mode, 0.7)
    example = noise(module.example_input_array)
    technique.attach(module)
    before = run(module, example)
    technique.fold(module)
    assert torch.allclose(run(module, example), before, atol=1e-5)
    assert not any(m._forward_hooks for m in module.modules())


def test_what_normalises_first_is_not_folded() -> None:
    module, technique = unet(), LongSkipScaling("cs", 0.7)
    example = noise(module.example_input_array)
    technique.attach(module)
    before, weights = run(module, example), {n: p.clone() for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"connection 2 is read by up_blocks.2.resnets.1 \(ResnetBlock2D\)"):
        technique.fold(module)
    assert torch.equal(run(module, example), before)
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    with pytest.raises(ValueError, match="depends on the features"):
        LongSkipScaling("ls").fold(module)


# ---------------------------------------------------------------------- gates


@given(st.integers(1, 70), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_gate_is_the_papers(size: int, tokens: bool) -> None:
    gate = SkipGate(size)
    u = torch.randn(3, size, 7) if tokens else torch.randn(3, size, 4, 5)
    assert gate.down.weight.shape == (max(size // 16, 1), size)
    mean = u.mean(2) if tokens else u.mean((2, 3))
    s = torch.sigmoid(
        gate.up.weight @ torch.relu(gate.down.weight @ mean.T + gate.down.bias[:, None]) + gate.up.bias[:, None]
    )
    wanted = torch.stack([torch.stack([s[c, b] * u[b, c] for c in range(size)]) for b in range(3)])
    assert torch.allclose(gate(u), wanted, atol=1e-6)


def test_a_gate_of_another_size_says_so() -> None:
    with pytest.raises(ValueError, match="made for 20 tokens, but the connection has 30"):
        SkipGate(20)(torch.zeros(1, 30, 4))


@pytest.mark.parametrize(
    ("network", "mode", "keys"),
    [
        ("uvit", "ls", ["size_17"]),
        ("uvit", "ls_unshared", ["level_1", "level_2", "level_3"]),
        ("unet", "ls", ["size_16", "size_8"]),
        ("unet", "ls_unshared", [f"level_{i}" for i in range(1, 10)]),
    ],
)
def test_gates_are_shared_among_connections_of_one_size(network: str, mode: Any, keys: list[str]) -> None:
    module, technique = NETWORKS[network](), LongSkipScaling(mode)
    technique.attach(module)
    gates: Any = module.perturbations["long_skip_scaling"]
    assert sorted(gates) == keys
    example = noise(module.example_input_array)
    gradients(module, example)  # raises where a weight is unused: so plain DDP works
    first = [float(p.detach().sum()) for p in gates.parameters()]
    technique.attach(module)  # again, as for validate after fit: the gates stay
    assert [float(p.detach().sum()) for p in module.perturbations["long_skip_scaling"].parameters()] == first
    middle = gates[keys[0]].coefficient(torch.randn(64, gates[keys[0]].size, 9)).detach()
    assert 0.4 < float(middle.mean()) < 0.6  # near a half, as the paper's begin


def test_gates_have_no_weight_decay_and_are_averaged_and_kept() -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    module, trainer = cells.recipe("scalelong"), cells.trainer(LongSkipScaling("ls"), average, max_epochs=1)
    trainer.fit(module, datamodule=cells.data("scalelong"))
    groups = {g["name"]: g for g in trainer.optimizers[0].param_groups}
    assert groups["model"]["weight_decay"] == 0.03 and groups["perturbations.long_skip_scaling"]["weight_decay"] == 0
    names = groups["perturbations.long_skip_scaling"]["parameters"]
    assert len(names) == 4 and set(names) <= module.state_dict().keys()
    assert set(names) <= {n for n, _ in average._average_model.module.named_parameters()}  # type: ignore[union-attr]


# ---------------------------------------------------------------------- checkpointing, compiling


@pytest.mark.parametrize("mode", ["cs", "ls"])
def test_gradient_checkpointing_gives_the_same_gradients(mode: Any) -> None:
    found = []
    for kept in (True, False):
        module, technique = uvit(grad_checkpointing=not kept), LongSkipScaling(mode)
        torch.manual_seed(2)
        technique.attach(module)
        found.append(gradients(module, noise(module.example_input_array)))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


@each
@pytest.mark.parametrize("mode", ["cs", "ls"])
def test_it_compiles_as_one_graph(network: str, mode: Any) -> None:
    module, technique = NETWORKS[network](), LongSkipScaling(mode)
    technique.attach(module)
    example = noise(module.example_input_array)
    wanted = run(module, example)
    torch._dynamo.reset()
    module.backbone.compile(backend="eager", fullgraph=True)
    assert torch.allclose(run(module, example), wanted, atol=1e-5)


# ---------------------------------------------------------------------- the theory, at initialisation


class Additive(nn.Module):
    """The paper's network: blocks of ReLU and linear layers with He's weights, connections that are added."""

    def __init__(self, width: int, depth: int, layers: int = 1) -> None:
        super().__init__()

        def block() -> nn.Sequential:
            return nn.Sequential(*[m for _ in range(layers) for m in (nn.ReLU(), nn.Linear(width, width, bias=False))])

        self.encoder = nn.ModuleList(block() for _ in range(depth))
        self.mid = block()
        self.decoder = nn.ModuleList(block() for _ in range(depth))
        self.skips = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.long_skips = [f"skips.{i}" for i in range(depth)]
        self.h: list[Tensor] = []
        for weight in self.parameters():
            nn.init.normal_(weight, std=math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        kept, self.h = [], []
        for block in self.encoder:
            kept.append(x := block(x))
        x = self.mid(x)
        for level in reversed(range(len(kept))):
            h = self.skips[level](kept[level]) + x
            self.h.insert(0, h.detach())
            x = self.decoder[level](h)
        return x


def at_start(mode: Any, kappa: float, seed: int, width: int = 512, depth: int = 8) -> tuple[list[float], float, float]:
    """|h_i|^2 / |x|^2 for each i, the gain of a small disturbance, the norm of the first layer's gradient."""
    torch.manual_seed(seed)
    module = Holder(Additive(width, depth), torch.zeros(1, 1, width))
    LongSkipScaling(mode, kappa).attach(module)
    x = torch.randn(1, 1, width)
    output = module(x)
    grown = [float(h.norm() ** 2 / x.norm() ** 2) for h in module.backbone.h]
    (gradient,) = torch.autograd.grad(output.square().sum() / 2, module.backbone.encoder[0][1].weight)
    shift = 1e-3 * torch.randn(1, 1, width)
    with torch.no_grad():
        gain = float((module(x + shift) - output).norm() / shift.norm())
    return grown, gain, float(gradient.norm())


ARMS: list[tuple[Any, float]] = [("none", 1.0), ("cs", 0.9), ("cs", 0.7), ("cs", 0.5), ("sqrt2", 1.0)]


@pytest.fixture(scope="module")
def starts() -> dict[tuple[Any, float], list[tuple[list[float], float, float]]]:
    return {arm: [at_start(*arm, seed) for seed in range(20)] for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_features_grow_with_the_sum_of_squared_constants(arm: tuple[Any, float], starts: Any) -> None:
    """E |h_i|^2 / |x|^2 = 1 + sum over j >= i of kappa_j^2."""
    mode, kappa = arm
    constants = [{"none": 1.0, "sqrt2": 0.5**0.5}.get(mode, kappa**j) for j in range(8)]
    for i in range(8):
        mean = sum(grown[i] for grown, _, _ in starts[arm]) / 20
        assert mean == pytest.approx(1 + sum(c**2 for c in constants[i:]), rel=0.15), f"h_{i + 1}"


def test_gain_and_gradient_fall_with_kappa(starts: Any) -> None:
    order = [("none", 1.0), ("cs", 0.9), ("cs", 0.7), ("cs", 0.5)]
    for which in (1, 2):
        means = [sum(found[which] for found in starts[arm]) / 20 for arm in order]
        assert means == sorted(means, reverse=True) and means[0] > 1.2 * means[-1], means


# ---------------------------------------------------------------------- the monitor


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=30))
def test_oscillation(values: list[float]) -> None:
    moves = [abs(values[i + 1] - values[i]) for i in range(len(values) - 1)]
    wanted = (sum(moves) / len(moves)) / (sum(values) / len(values))
    assert oscillation(values) == pytest.approx(wanted) and oscillation(values[:1]) == 0
    assert oscillation([3.0] * len(values)) == 0


class Steps(cells.ExactResume):
    """What the loss and its gradients are at each step, by hand."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))


class Lines:
    """A logger's part that the monitor needs."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))


@pytest.mark.parametrize("mode", ["none", "cs", "ls"])
def test_the_monitor_sees_what_the_decoder_sees(mode: Any) -> None:
    module, steps, monitor = cells.recipe("scalelong"), Steps(), SkipMonitor(every_n_steps=2)
    seen: list[tuple[Tensor, Tensor]] = []  # of the outermost reader: what it is given, and the gradient of that

    def keep(layer: nn.Module, args: Any) -> None:
        h = args[0]
        if h.requires_grad:
            seen.append((h.detach(), h))
            h.retain_grad()

    module.backbone.out_blocks[-1].skip_linear.register_forward_pre_hook(keep)
    trainer = cells.trainer(monitor, LongSkipScaling(mode, 0.5), steps, max_epochs=2)
    trainer.fit(module, datamodule=cells.data("scalelong"))
    assert monitor.steps == [0, 2, 4]
    for look, step in enumerate(monitor.steps):
        h, held = seen[step]
        assert monitor.history["feature_1"][look] == pytest.approx(float(h.flatten(1).norm(dim=1).mean()), rel=1e-5)
        assert monitor.history["gradient_1"][look] == pytest.approx(float(held.grad.norm()), rel=1e-5)
        assert monitor.history["gradient"][look] == pytest.approx(steps.norms[step], rel=1e-4)
    kappa = [monitor.history[f"kappa_{i}"][0] for i in (1, 2)]
    if mode == "ls":
        assert all(0.3 < k < 0.7 for k in kappa) and kappa[0] != kappa[1]
    else:
        assert kappa == ([1.0, 1.0] if mode == "none" else [1.0, 0.5])
    assert not any(
        m._forward_pre_hooks for m in module.modules() if m is not module.backbone.out_blocks[-1].skip_linear
    )


def test_the_monitor_changes_nothing() -> None:
    runs = []
    for callbacks in ([], [SkipMonitor(every_n_steps=1)]):
        module = cells.recipe("scalelong")
        cells.trainer(*callbacks, LongSkipScaling("ls"), max_epochs=2, accumulate_grad_batches=2).fit(
            module, datamodule=cells.data("scalelong")
        )
        runs.append(module.state_dict())
    assert not cells.differing(*runs)


def test_the_monitor_goes_on_where_a_run_stopped(tmp_path: Path) -> None:
    whole, part, rest = (SkipMonitor(every_n_steps=2) for _ in range(3))
    for monitor, epochs, start in ((whole, 3, None), (part, 1, None), (rest, 3, tmp_path / "one.ckpt")):
        module = cells.recipe("scalelong")
        trainer = cells.trainer(monitor, max_epochs=epochs)
        trainer.fit(module, datamodule=cells.data("scalelong"), ckpt_path=start, weights_only=True)
        if monitor is part:
            trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert rest.steps == whole.steps == [0, 2, 4, 6, 8] and rest.history == whole.history


def test_the_monitor_looks_at_a_compiled_network() -> None:
    module, monitor = cells.recipe("scalelong"), SkipMonitor(every_n_steps=2)
    torch._dynamo.reset()
    module.backbone.compile(backend="eager")
    cells.trainer(monitor, max_epochs=1).fit(module, datamodule=cells.data("scalelong"))
    assert len(monitor.history["feature_1"]) == 2


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"window": 1}])
def test_the_monitors_settings(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 and window 2"):
        SkipMonitor(**arguments)
