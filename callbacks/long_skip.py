"""Long skip connections, scaled: constants, learned gates, and a monitor of what they do to features and gradients.

ScaleLong (Huang, Zhou, Yan, Lin; NeurIPS 2023, arXiv 2310.13545). A U-Net hands the features u_i of its encoder to its
decoder, i = 1 the outermost connection and N the deepest; the decoder sees ``kappa_i u_i`` beside its own features v_i:

* ``cs``: ``kappa_i = kappa ** (i - 1)``, so 1 at the outermost connection;
* ``sqrt2``: ``kappa_i = 2 ** -0.5`` for all;
* ``ls``: learned, ``kappa_i = sigmoid(W1 relu(W2 mean(u_i)))`` with one gate for all connections of one size;
  ``ls_unshared``: a gate for each connection.

The hidden features ``h_i = kappa_i u_i + v_i`` and the gradients grow with the sum of ``kappa_j ** 2`` over j >= i
(theorems 3.1 and 3.4), and so does what a disturbed input does to the output (3.5).

Where paper and released code (a U-ViT alone) differ, or something is easily got wrong:

* The released loop counts from the deepest connection; here everything is numbered from the outermost, and the numbers
  come from the order in which a forward pass of the network uses the connections.
* The gates see a connection's tokens (B, L, D) as the L means over D, and give a number for each token, as released; of
  a map (B, C, H, W) they see the C means over positions, and give a number for each channel. They are sized by what the
  network passes for ``example_input_array``, so with tokens they belong to one image size.
* The gates keep torch's initial values, so they begin near 1/2 for all connections. They have no weight decay (the
  released code decays them like all weights).
* Constants can be folded into the layer that reads the connection only where that layer is linear: U-ViT's
  ``skip_linear``, a convolution. Diffusers' blocks normalise what was joined first, so there :meth:`fold` refuses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from callbacks.layers import backbone_of
from callbacks.perturbation import Batch, Perturbation, device_of, techniques_of
from callbacks.report import new_figure, save_figure, wanted
from callbacks.sharded import is_sharded
from callbacks.skips import Skip, dtype_of, find_skips, run_example, value_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LongSkipScaling", "SkipMonitor", "cs_coefficients", "find_skips"]

Mode = Literal["none", "sqrt2", "cs", "ls", "ls_unshared"]
#: r of the gates: how much narrower their hidden layer is (the released code's).
REDUCTION = 16


def cs_coefficients(n: int, kappa: float) -> Tensor:
    """The constants of ``cs``, float64 (n,): ``kappa ** i``; index 0 is the outermost connection, whose constant is 1.

    Raises:
        ValueError: for fewer than one connection, or kappa outside (0, 1].
    """
    if n < 1 or not 0 < kappa <= 1:
        raise ValueError(f"there must be at least one connection, and kappa lie in (0, 1]: {n} and {kappa}")
    return torch.tensor([kappa**i for i in range(n)], dtype=torch.float64)


class SkipGate(nn.Module):
    """The learned coefficient (the paper's LS): a number in (0, 1) for each token or channel.

    Args:
        size: L of tokens (B, L, D), or C of maps (B, C, H, W).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        hidden = max(size // REDUCTION, 1)
        self.down, self.up = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def coefficient(self, u: Tensor) -> Tensor:
        """(B, L, 1) of tokens, (B, C, 1, 1) of maps; at least in float32.

        Raises:
            ValueError: for another number of tokens or channels.
        """
        over = -1 if u.dim() == 3 else tuple(range(2, u.dim()))
        if u.shape[1] != self.size:
            what = "tokens" if u.dim() == 3 else "channels"
            raise ValueError(f"the gate was made for {self.size} {what}, but the connection has {u.shape[1]}")
        with torch.autocast(u.device.type, enabled=False):
            exact = self.down.weight.dtype if self.down.weight.dtype == torch.float64 else torch.float32
            mean = u.to(exact).mean(over).to(self.down.weight.dtype)
            s = self.up(self.down(mean).relu()).sigmoid()
        return s.view(*s.shape, *[1] * (u.dim() - 2))

    def forward(self, u: Tensor) -> Tensor:
        return u * self.coefficient(u).to(u.dtype)


# ---------------------------------------------------------------------- the technique


class LongSkipScaling(Perturbation):
    """Scales the long skip connections of a U-Net; a part of the network, in training and evaluation alike.

    Args:
        mode: ``cs``, ``sqrt2``, ``ls``, ``ls_unshared``, or ``none``: nothing is scaled.
        kappa: of ``cs``, in (0, 1]; the paper's authors recommend 0.5 to 0.95.
        layers: names of layers in the backbone that receive the connections, the outermost first; found by themselves
            in U-Nets of diffusers, U-ViT and what else :func:`find_skips` knows.
        name: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for an unknown mode, or kappa out of range.
    """

    site: ClassVar[str] = "skips"
    zero: ClassVar[Mapping[str, Any]] = {"mode": "cs", "kappa": 1.0}
    per_example: ClassVar[Mapping[str, Any] | None] = {}
    part_of_network: ClassVar[bool] = True

    def __init__(
        self, mode: Mode = "cs", kappa: float = 0.7, layers: Sequence[str] | None = None, *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not '{mode}'")
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa must lie in (0, 1], not {kappa}")
        self.mode, self.kappa, self.layers = mode, kappa, layers
        #: The connections of the network it hangs on, the outermost first.
        self.skips: list[Skip] = []
        #: What scales each of them: a constant, or a gate.
        self.scales: list[float | SkipGate] = []
        self._handles: list[Any] = []

    def attach(self, module: LightningModule) -> None:
        self.detach(module)
        if self.mode == "none":
            return
        self.skips = find_skips(module, self.layers)
        if self.mode in ("ls", "ls_unshared"):
            self._make_gates(module)
        elif self.mode == "cs":
            self.scales = cs_coefficients(len(self.skips), self.kappa).tolist()
        else:
            self.scales = [2**-0.5] * len(self.skips)
        for members in _by_layer(self.skips).values():
            layer, argument = members[0].layer, members[0].argument
            scales = {skip.item: self.scales[skip.level - 1] for skip in members}
            if argument is None:
                hook = functools.partial(_scale_output, scales[None])
                self._handles.append(layer.register_forward_hook(hook))
            else:
                scale = functools.partial(_scale_argument, argument, scales)
                self._handles.append(layer.register_forward_pre_hook(scale, with_kwargs=True))

    def _make_gates(self, module: LightningModule) -> None:
        keys = [f"level_{skip.level}" if self.mode == "ls_unshared" else f"size_{skip.shape[1]}" for skip in self.skips]
        sizes = {key: skip.shape[1] for key, skip in zip(keys, self.skips, strict=True)}
        own = self.own(module)
        there: dict[str, Any] = dict(own[self.name].items()) if self.name in own else {}  # type: ignore[operator]
        if {key: gate.size for key, gate in there.items()} != sizes:
            made = nn.ModuleDict({key: SkipGate(size) for key, size in sizes.items()})
            own[self.name] = made.to(device_of(module), dtype_of(module)).train(module.training)
        gates: Any = own[self.name]
        self.scales = [gates[key] for key in keys]

    def detach(self, module: LightningModule) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.skips, self.scales = [], []

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass  # the hooks are there all the time

    def fold(self, module: LightningModule) -> None:
        """Write the constants into the weights that read the connections, and take the hooks off: same outputs.

        For inference and export; a folded network must not be given this technique again.

        Raises:
            ValueError: for learned gates, or where what reads a connection isn't linear in it.
        """
        if self.mode in ("ls", "ls_unshared"):
            raise ValueError(f"mode {self.mode} depends on the features, so it can't be folded into weights")
        attached = bool(self._handles)
        if not attached:
            self.attach(module)
        names = dict(backbone_of(module).named_modules())
        scaled: list[tuple[Tensor, int, float]] = []
        try:
            for skip, scale in zip(self.skips, self.scales, strict=True):
                if scale == 1.0:
                    continue
                reader, channels = names.get(skip.reader or ""), skip.shape[-1 if len(skip.shape) == 3 else 1]
                linear = isinstance(reader, (nn.Linear, nn.Conv2d)) and getattr(reader, "groups", 1) == 1
                if not linear or reader.weight.shape[1] < channels:  # type: ignore[union-attr]
                    kind = type(reader).__name__ if reader is not None else "nothing with weights"
                    raise ValueError(
                        f"connection {skip.level} is read by {skip.reader} ({kind}), which isn't linear in it: "
                        "the constants can't be folded; leave the technique on, it costs next to nothing"
                    )
                scaled.append((reader.weight, channels, float(scale)))  # type: ignore[union-attr, arg-type]
            before, kept = _outputs(module), [weight.detach().clone() for weight, _, _ in scaled]
            self.detach(module)
            with torch.no_grad():
                for weight, channels, constant in scaled:  # joined as (main, skip), as everybody does
                    weight[:, -channels:] *= constant
            for old, new in zip(before, _outputs(module), strict=True):
                if not torch.allclose(old, new, rtol=1e-3, atol=1e-4 * float(old.abs().max().clamp_min(1e-6))):
                    with torch.no_grad():
                        for (weight, _, _), saved in zip(scaled, kept, strict=True):
                            weight.copy_(saved)
                    raise ValueError(
                        "folding would change the outputs: what is behind a connection isn't linear in it; leave the "
                        "technique on, it costs next to nothing"
                    )
        except ValueError:
            self.detach(module)
            if attached:
                self.attach(module)
            raise


def _by_layer(skips: Sequence[Skip]) -> dict[str, list[Skip]]:
    found: dict[str, list[Skip]] = {}
    for skip in skips:
        found.setdefault(skip.name, []).append(skip)
    return found


def _scaled(u: Tensor, scale: float | SkipGate) -> Tensor:
    return u * scale if isinstance(scale, float) else scale(u)


def _scale_output(scale: float | SkipGate, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return _scaled(output, scale)


def _scale_argument(
    argument: tuple[str, int], scales: dict[Any, Any], layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    value = value_of(argument, args, named)
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = _scaled(value, scales[None])
    else:
        value = tuple(_scaled(u, scales[i]) for i, u in enumerate(value))
    name, place = argument
    if name in named:
        return args, {**named, name: value}
    return (*args[:place], value, *args[place + 1 :]), named


def _outputs(module: LightningModule) -> list[Tensor]:
    """What the module gives for noise of the shape of its example."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator) if x.is_floating_point() else x

    output = run_example(module, torch.utils._pytree.tree_map_only(Tensor, noise, module.example_input_array))
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]


# ---------------------------------------------------------------------- the monitor


def oscillation(values: Sequence[float]) -> float:
    """How much a number moves from one look to the next, as a part of its mean; 0 for fewer than two.

    ``mean |v_s - v_(s-1)| / mean |v_s|``.
    """
    if len(values) < 2:
        return 0.0
    moves = math.fsum(abs(b - a) for a, b in zip(values, values[1:], strict=False)) / (len(values) - 1)
    return moves / max(math.fsum(map(abs, values)) / len(values), 1e-30)


class SkipMonitor(Callback):
    """Watches the long skip connections of a network while it trains, whatever scales them.

    Logs, of the first rank's batch, as ``skips/...``: for each level (1 is the outermost) ``feature_<i>``, the mean
    norm of an example's h_i, which is what the decoder's block sees (its own features and the scaled connection,
    joined); ``gradient_<i>``, the norm of the loss' gradient with respect to h_i; ``kappa_<i>``, the constant, or the
    mean of the gate; and ``output``, the mean norm of the network's output, ``gradient``, the norm of the parameters'
    gradient before it is clipped, ``oscillation_feature`` (of level 1), ``oscillation_output`` and
    ``oscillation_gradient``: see :func:`oscillation`, over the last ``window`` looks. Draws ``skips.png``.

    Args:
        every_n_steps: look at optimizer steps whose number is a multiple of this.
        window: looks over which oscillation is measured.
        layers: see :class:`LongSkipScaling`.

    Raises:
        ValueError: for a setting out of range.
    """

    works_sharded = True

    def __init__(self, every_n_steps: int = 10, window: int = 50, layers: Sequence[str] | None = None) -> None:
        if every_n_steps < 1 or window < 2:
            raise ValueError(f"every_n_steps must be at least 1 and window 2: {every_n_steps} and {window}")
        self.every_n_steps, self.window, self.layers = every_n_steps, window, layers
        #: Name to the values seen, and the steps at which.
        self.history: dict[str, list[float]] = {}
        self.steps: list[int] = []
        self._skips: list[Skip] = []
        self._step = -1
        self._seen: dict[str, Tensor] = {}
        self._gates: list[Tensor] = []
        self._handles: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.steps = state_dict["history"], state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._skips, self._step = find_skips(pl_module, self.layers), -1

    # ------------------------------------------------------------------ one look

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps or trainer.global_step == self._step or not trainer.is_global_zero:
            return
        self._step = trainer.global_step
        self._seen, self._gates = {}, []
        backbone = backbone_of(pl_module)
        names = dict(backbone.named_modules())
        for skip in self._skips:
            if skip.reader is not None:
                hook = functools.partial(self._see, skip.level)
                self._handles.append(names[skip.reader].register_forward_pre_hook(hook))
        self._handles.append(backbone.register_forward_hook(self._see_output))
        for gate in {id(s): s for t in self._techniques(trainer) for s in t.scales if isinstance(s, SkipGate)}.values():
            self._handles.append(gate.register_forward_pre_hook(self._see_gate))
        torch.compiler.set_stance("force_eager")  # a compiled graph doesn't call hooks that come later

    def _techniques(self, trainer: Trainer) -> list[LongSkipScaling]:
        return [t for t in techniques_of(trainer) if isinstance(t, LongSkipScaling)]

    def _see(self, level: int, layer: nn.Module, args: Any) -> None:
        h = args[0]
        self._seen[f"feature_{level}"] = _norm(h)
        if h.requires_grad:
            h.register_hook(functools.partial(self._see_gradient, level))

    def _see_gradient(self, level: int, gradient: Tensor) -> None:
        self._seen[f"gradient_{level}"] = gradient.detach().float().norm()

    def _see_output(self, layer: nn.Module, args: Any, output: Any) -> None:
        first = next(x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor))
        self._seen["output"] = _norm(first)

    def _see_gate(self, gate: nn.Module, args: Any) -> None:
        assert isinstance(gate, SkipGate)
        with torch.no_grad():
            self._gates.append(gate.coefficient(args[0].detach()).float().mean())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_off()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_off()

    def _take_off(self) -> None:
        if self._handles:
            torch.compiler.set_stance("default")
        while self._handles:
            self._handles.pop().remove()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self._seen and trainer.global_step % self.every_n_steps:
            return
        found = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if self._seen or is_sharded(found):  # of sharded gradients every rank has a part
            norms = (g.detach().float().norm() for g in found)
            norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
            if self._seen:
                self._seen["gradient"] = norm

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._take_off()  # a step without a backward pass
        if not self._seen or trainer.global_step == self._step:  # in the middle of an accumulation window
            return
        values = dict(zip(self._seen, torch.stack(list(self._seen.values())).tolist(), strict=True))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # in fp16 the loss is scaled, and its gradients with it
            values |= {n: v / scaler.get_scale() for n, v in values.items() if n.startswith("gradient_")}
        self._seen = {}
        values |= self._coefficients(trainer)
        self.steps.append(self._step)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        for name, of in (("feature", "feature_1"), ("output", "output"), ("gradient", "gradient")):
            if of in values:
                values[f"oscillation_{name}"] = oscillation(self.history[of][-self.window :])
        for logger in trainer.loggers:
            logger.log_metrics({f"skips/{n}": v for n, v in values.items()}, step=self._step)

    def _coefficients(self, trainer: Trainer) -> dict[str, float]:
        """kappa_i of all scalings that are on, multiplied."""
        n = len(self._skips)
        found = {f"kappa_{i}": 1.0 for i in range(1, n + 1)}
        gates = [float(g) for g in self._gates]  # in the order of their use: the deepest first
        for technique in self._techniques(trainer):
            own = [s for s in technique.scales if not isinstance(s, SkipGate)]
            levels = own if own else gates[:n][::-1]
            for i, value in enumerate(levels if len(levels) == n else [], 1):
                found[f"kappa_{i}"] *= value
        return found

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if wanted(trainer) and self.steps:
            save_figure(trainer, "skips", draw_skips(self.history, self.steps, len(self._skips)))


def _norm(h: Tensor) -> Tensor:
    """Mean over the batch of the norm of an example's features (B, ...)."""
    return h.detach().float().flatten(1).norm(dim=1).mean()


def draw_skips(history: Mapping[str, Sequence[float]], steps: Sequence[int], levels: int) -> Figure:
    """Norms of features and gradients and the coefficients by level over the steps, and the output's norm."""
    from matplotlib import colormaps

    figure = new_figure(13.6, 3.4)
    axes = figure.subplots(1, 4)
    colors = colormaps["viridis"]
    shown = (("feature", "norm of $h_i$"), ("gradient", "norm of the gradient of $h_i$"), ("kappa", r"$\kappa_i$"))
    for axis, (what, title) in zip(axes, shown, strict=False):
        for level in range(1, levels + 1):
            values = history.get(f"{what}_{level}", [])
            label = f"i = {level}" if level in (1, levels) else None
            axis.plot(steps[: len(values)], values, color=colors((level - 1) / max(levels - 1, 1) * 0.9), label=label)
        axis.set_title(title, fontsize=10)
        if what != "kappa":
            axis.set_yscale("log")
    axes[2].set_ylim(0, 1.05)
    for name, label in (("output", "output"), ("gradient", "gradient of the parameters")):
        values = history.get(name, [])
        axes[3].plot(steps[: len(values)], values, label=label)
    axes[3].set_yscale("log")
    axes[3].set_title("norms of the network", fontsize=10)
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("long skip connections, i = 1 the outermost", fontsize=9)
    return figure
