"""Local complexity: how many units of a piecewise linear network switch within a small distance of a point.

Humayun, Balestriero, Baraniuk: Deep Networks Always Grok and Here is Why (ICML 2024, arXiv 2402.15555). Around x stand
the corners x + r v_i and x - r v_i of a cross-polytope, for orthonormal directions v_1 .. v_k. A unit is *crossed* if
the sign of its pre-activation differs among them, and the local complexity of x is the number of crossed units: so many
borders between linear regions pass close by. The claim: near training points it falls, rises while the network fits
them, and falls again when the borders move away to where the decision is made, which is when robustness arrives late.

In the first layer a unit is crossed just when ``|w x + b| < r max_i |w v_i|``. Behind it only the corners' images are
looked at, not all that lies between them: an approximation, good where r is small. The number depends on r and on k, so
both stay the same over a training.

Where the released code and the paper differ, or something is easily got wrong:

* The released code hooks every linear layer of its MLP, the logits among them, which no unit gates. Here it is what
  goes into each ReLU, so the head is never counted.
* Its MLP has GELU, which has no regions: the sign of what goes in is a proxy there. Here such layers have to be named.
* Units are counted at each position of a feature map, as released; shares of a layer's units can be compared.
* Batch norm is in evaluation mode, so an affine map. The corners aren't clipped to the box of the images, as released.
* The released code draws training points with replacement.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.diagnostic import Diagnostic, dataset_of, log_steps, summed, take, total_steps
from callbacks.layers import backbone_of, find_layers, layers_there
from callbacks.perturbation import device_of
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Part = Literal["train", "val", "random"]
PARTS: tuple[Part, ...] = ("train", "val", "random")
#: Numbers in corners that pass through the network together, at most (those of one point always do).
ELEMENTS = 2**24
#: Directions where none are asked for: the released code's 40 corners.
DIRECTIONS = 20
#: Activations that are linear on both sides of zero.
KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
#: Those that are linear nowhere; what the refusal of a network speaks of.
SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Tanh, nn.Sigmoid)

# ---------------------------------------------------------------------- the polytope


def frame(k: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Orthonormal rows (k, dim), float64, drawn uniformly.

    Raises:
        ValueError: unless 1 <= k <= dim.
    """
    if not 1 <= k <= dim:
        raise ValueError(f"there are 1 to {dim} orthonormal directions in {dim} dimensions, not {k}")
    q, r = torch.linalg.qr(torch.randn(dim, k, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).T.contiguous()  # with that sign no direction is preferred


def vertices(x: Tensor, frame: Tensor, r: float) -> Tensor:
    """Corners (B, 2k, ...) of the cross-polytopes around points (B, ...): ``x + r v_i``, then ``x - r v_i``.

    Args:
        x: (B, ...) points of D numbers.
        frame: (k, D) directions.
        r: how far the corners are from the point, positive.

    Raises:
        ValueError: for another D, or r out of range.
    """
    if not 0 < r < math.inf:
        raise ValueError(f"r must be positive, not {r}")
    dim = math.prod(x.shape[1:])
    if frame.dim() != 2 or frame.shape[1] != dim:
        raise ValueError(f"the points have {dim} dimensions, but the frame is of shape {tuple(frame.shape)}")
    step = (r * frame).to(x).view(1, len(frame), *x.shape[1:])
    return torch.cat([x.unsqueeze(1) + step, x.unsqueeze(1) - step], 1)


def crossed(z: Tensor) -> Tensor:
    """Which units (B, ...), bool, have pre-activations (B, 2k, ...) of different signs; zero is a sign of its own."""
    sign = z.sign()
    return sign.amin(1) != sign.amax(1)


# ---------------------------------------------------------------------- in a network


def gated_layers(module: LightningModule, names: Sequence[str] | Literal["auto"] = "auto") -> dict[str, nn.Module]:
    """The layers whose pre-activations are looked at: every ReLU, leaky ReLU and PReLU of the backbone, or those named.

    Raises:
        ValueError: if there is none, or none of that name.
    """
    if names != "auto":
        if isinstance(names, str) or not names:
            raise ValueError(f"layers must be 'auto' or a list of names, not {names!r}")
        return find_layers(module, names)
    backbone = backbone_of(module)
    found: dict[str, nn.Module] = {n: layer for n, layer in backbone.named_modules() if isinstance(layer, KINKED)}
    if not found:
        smooth = sorted({type(layer).__name__ for layer in backbone.modules() if isinstance(layer, SMOOTH)})
        why = (
            f"has {' and '.join(smooth)} in place of ReLU, so it isn't piecewise linear and signs are a proxy"
            if smooth
            else "has no nn.ReLU (F.relu can't be hooked)"
        )
        raise ValueError(
            f"{type(backbone).__name__} {why}: name the layers whose outputs are pre-activations, layers=[...]. "
            + layers_there(backbone)
        )
    return found


def crossed_units(
    network: Callable[[Tensor], Any],
    layers: Mapping[str, nn.Module],
    x: Tensor,
    frame: Tensor,
    r: float,
    rows: int = 4096,
) -> dict[str, tuple[Tensor, int]]:
    """How many units of each layer are crossed at each point; without gradients. The network's mode is the caller's.

    Args:
        network: is called with (rows, ...).
        layers: by name; of ReLUs what goes in is looked at, of other layers what comes out. What is called several
            times in a pass is added up.
        x: (B, ...) points.
        frame: (k, D) directions.
        r: distance of the corners.
        rows: how many corners pass through the network at a time; those of one point always go together.

    Returns:
        Name to the crossed units (B,), float64 on the CPU (nan where a pre-activation isn't finite), and the number of
        units.

    Raises:
        ValueError: for a layer that isn't called, or that doesn't keep the rows apart.
    """
    corners = 2 * len(frame)
    counts: dict[str, list[Tensor]] = {name: [] for name in layers}
    units: dict[str, int] = dict.fromkeys(layers, 0)
    size, first = 0, True

    def look(name: str, z: Any) -> None:
        if not isinstance(z, Tensor) or z.dim() < 2 or len(z) != size * corners:
            raise ValueError(f"layer '{name}' gives no numbers (B, ...) of each example, so it has no units to count")
        z = z.detach().reshape(size, corners, -1)
        count = crossed(z).sum(1).float().masked_fill(~z.isfinite().flatten(1).all(1), math.nan)
        if called[name]:
            counts[name][-1] += count
        else:
            counts[name].append(count)
        called[name] = True
        units[name] += z.shape[2] if first else 0

    def hook(name: str, layer: nn.Module) -> Any:
        if isinstance(layer, KINKED):  # before it may be overwritten in place
            return layer.register_forward_pre_hook(lambda _, args: look(name, args[0]))
        return layer.register_forward_hook(lambda _, args, out: look(name, out))

    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for part in x.split(max(rows // corners, 1)):
                size, called = len(part), dict.fromkeys(layers, False)
                network(vertices(part, frame, r).flatten(0, 1))
                first = False
                for name, there in called.items():
                    if not there:
                        raise ValueError(f"layer '{name}' is never called in the forward pass: leave it out of layers")
    finally:
        for handle in handles:
            handle.remove()
    return {name: (torch.cat(values).cpu().double(), units[name]) for name, values in counts.items()}


def inputs_of(batch: Any) -> Tensor:
    """What the network sees, (B, ...): a batch's ``image``, or the first entry of a pair.

    Raises:
        ValueError: if that isn't there, or isn't made of floats.
    """
    x = batch.get("image") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, Sequence) else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise ValueError("a point needs neighbours: batches must have an entry 'image' of floats, or be pairs (x, y)")
    return x


# ---------------------------------------------------------------------- its course over a training


def phases(curve: Sequence[Sequence[float]]) -> dict[str, float]:
    """A curve of (step, value), cut in three at both ends of its largest rise.

    The largest rise goes from the ``valley`` to the ``peak``: the two points, the second one later, between which the
    value grows most. Where it never grows, both are the last point. So ``start >= valley``, and ``peak >= end``.

    Returns:
        ``start``, ``valley``, ``peak``, ``end``: the values; ``valley_step``, ``peak_step``; and the ratios
        ``first_descent`` = valley / start, ``ascent`` = peak / valley, ``second_descent`` = end / peak. A phase that
        doesn't take place has the ratio 1. nan where there is nothing to divide by.
    """
    values = [float(value) for _, value in curve]
    last = len(values) - 1
    lowest, best, ends = 0, 0.0, (last, last)
    for i, value in enumerate(values):
        if value - values[lowest] > best:
            best, ends = value - values[lowest], (lowest, i)
        if value < values[lowest]:
            lowest = i
    start, valley, peak, end = values[0], values[ends[0]], values[ends[1]], values[-1]

    def ratio(a: float, b: float) -> float:
        return a / b if b != 0 else math.nan

    return {
        **{"start": start, "valley": valley, "peak": peak, "end": end},
        **{"valley_step": float(curve[ends[0]][0]), "peak_step": float(curve[ends[1]][0])},
        "first_descent": ratio(valley, start),
        "ascent": ratio(peak, valley),
        "second_descent": ratio(end, peak),
    }


class LocalComplexity(Diagnostic):
    """Crossed units around training, held-out (``val``) and uniformly drawn points of [0, 1]^D, over a training.

    Logged, the mean over the points: ``<part>``, all layers together, ``<part>_share``, the same over the number of
    units, and both of each layer, ``<part>/<layer>`` and ``<part>_share/<layer>``. At the end the three phases of each
    part's curve, ``<part>_first_descent`` and so on; see :func:`phases`.

    Args:
        layers: ``auto``: what goes into every nn.ReLU, nn.LeakyReLU and nn.PReLU of the backbone; or names of layers,
            of such activations (what goes in) or of others (what comes out). The head has no gates and is left out.
        r: distance of the corners from the point, in units of the input (pixels of [0, 1]); one for the whole training.
        directions: k; the polytope has 2 k corners. null: 20, or as many as the input has dimensions.
        points: of each part, at most; fewer where they would cost more than ``share``.
        measurements: at so many steps, evenly spaced in their logarithm.
        parts: which of ``train``, ``val`` and ``random``.
        rows: corners that pass through the network at a time.

    Other arguments: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range, or a network or data with which it makes no sense.
    """

    def __init__(
        self,
        layers: Sequence[str] | Literal["auto"] = "auto",
        r: float = 0.05,
        directions: int | None = None,
        points: int = 256,
        measurements: int = 50,
        parts: Sequence[Part] = PARTS,
        rows: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < r < math.inf:
            raise ValueError(f"r must be positive, not {r}")
        for name, value in {"points": points, "rows": rows, "directions": directions or 1}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not parts or not set(parts) <= set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, not {list(parts)}")
        log_steps(measurements, 1)  # says what is wrong with it
        self.layers, self.r, self.directions, self.points = layers, r, directions, points
        self.measurements, self.parts, self.rows = measurements, tuple(dict.fromkeys(parts)), rows
        #: Points of each part; chosen once, and kept where a run goes on.
        self.count: int | None = None
        #: Directions, (k, D).
        self.frame: Tensor | None = None
        self._shape = torch.Size()
        self._found: dict[str, nn.Module] = {}

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        return log_steps(self.measurements, total_steps(trainer))

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._shape = inputs_of(take(*dataset_of(trainer, "train"), [0])).shape[1:]
        self._found = gated_layers(module, self.layers)
        dim = math.prod(self._shape)
        k = self.directions or min(DIRECTIONS, dim)
        self.frame = frame(k, dim, self.generator("frame"))
        self.count = self.affordable(trainer, self.points, 2 * k * len(self.parts))
        if trainer.is_global_zero:
            words = "%s: r %g, %d corners in %d dimensions, %d points of each of %s, %d layers"
            log.info(words, self.name, self.r, 2 * k, dim, self.count, ", ".join(self.parts), len(self._found))

    def _points(self, trainer: Trainer, part: Part) -> list[Tensor]:
        """This rank's points of a part, in batches (B, ...)."""
        assert self.count is not None
        if part != "random":
            chosen = self.positions(trainer, part, self.count)
            return [inputs_of(batch) for batch in self.examples(trainer, part, chosen)]
        drawn = torch.rand(self.count, *self._shape, generator=self.generator("random"))
        return [drawn[trainer.global_rank :: trainer.world_size]]

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert self.frame is not None
        device = device_of(module)
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        directions = self.frame.to(device, torch.float64 if device.type == "cpu" else torch.float32)
        values: dict[str, float] = {}
        for part in self.parts:
            # For each layer the crossed units of all points; then the number of units, and that of points.
            sums = torch.zeros(len(self._found), 3, dtype=torch.float64)
            for x in self._points(trainer, part):
                if not len(x):
                    continue
                rows = max(min(self.rows, ELEMENTS // x[0].numel()), 1)
                with torch.autocast(device.type, enabled=False):  # signs near zero are what this is about
                    found = crossed_units(module, self._found, x.to(device, dtype), directions, self.r, rows)
                for row, (counts, units) in zip(sums, found.values(), strict=True):
                    row += torch.tensor([float(counts.sum()), units * len(x), len(x)], dtype=torch.float64)
            sums = summed(sums, device)
            total = sums.sum(0)
            points = max(float(sums[0, 2]), 1.0)
            values |= {part: float(total[0]) / points, f"{part}_share": float(total[0] / total[1].clamp_min(1))}
            for name, (count, units, _) in zip(self._found, sums.tolist(), strict=True):
                values |= {f"{part}/{name}": count / points, f"{part}_share/{name}": count / max(units, 1.0)}
        return values

    def conclude(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        found: dict[str, float] = {}
        for part in self.parts:
            cut = phases(self.history[f"{self.name}/{part}"])
            found |= {f"{part}_{key}": value for key, value in cut.items()}
        return found

    def draw(self) -> Figure | None:
        """Crossed units of each part over the steps, and the share of each layer's near the first part's points."""
        curves = [(part, self.history.get(f"{self.name}/{part}", [])) for part in self.parts]
        if not all(points for _, points in curves):
            return None
        figure = new_figure(9.2, 3.6)
        left, right = figure.subplots(1, 2)
        for i, (part, points) in enumerate(curves):
            steps, values = zip(*points, strict=True)
            left.plot(steps, values, "o-", markersize=3, color=f"C{i}", label=part)
            cut = phases(points)
            marked = [(cut["valley_step"], cut["valley"]), (cut["peak_step"], cut["peak"])]
            left.plot(*zip(*marked, strict=True), "D", markersize=6, color=f"C{i}", markerfacecolor="white")
        left.set_ylabel("crossed units")
        left.set_title(f"local complexity, r = {self.r:g} (diamonds: valley and peak)", fontsize=10)
        first = self.parts[0]
        prefix = f"{self.name}/{first}_share/"
        layers = {key.removeprefix(prefix): points for key, points in self.history.items() if key.startswith(prefix)}
        shades = _shades(len(layers))
        for color, (name, points) in zip(shades, layers.items(), strict=True):
            steps, values = zip(*points, strict=True)
            shown = len(layers) <= 8 or name in (next(iter(layers)), list(layers)[-1])
            right.plot(steps, values, "-", color=color, label=name if shown else None)
        right.set_ylabel("share of a layer's units")
        right.set_title(f"near {first} points, from the first layer (dark) to the last", fontsize=10)
        for axis in (left, right):
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("optimizer step")
            axis.legend(frameon=False, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        return figure


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(count - 1, 1)) for i in range(count)]
