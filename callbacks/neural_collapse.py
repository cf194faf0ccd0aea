"""Neural collapse, layer by layer, while a network trains.

Late in training the features of a class draw together, and the class means, the rows of the linear head and a simplex
become one and the same figure (Papyan, Han, Donoho, arXiv 2008.08186: NC1 to NC4). How far that goes, and that it goes
further the deeper the layer, is what Tirer, Huang and Niles-Weed study (arXiv 2210.16658, ``recipes/near_features``).

With class means mu_k, their own mean mu_G (also where classes differ in size; the released codes take the mean of the
samples there, which is the same for classes of one size), centred means M (K, d) and head W (K, d), b:

* NC1 = tr(S_W S_B^+) / K and NC1r = tr S_W / tr S_B, of S_W = mean (h - mu_y)(h - mu_y)^T and S_B = M^T M / K. The
  ratio of traces is the one to judge by: S_B^+ divides by directions in which the classes hardly differ, so NC1 may
  rise while everything collapses.
* NC2: classes are alike far from mu_G (the norms' coefficient of variation), at alike angles (mean of
  ``|cos + 1/(K - 1)|``), together a simplex (``|MM^T/|MM^T| - (I - J/K)/sqrt(K - 1)|``); the same of the rows of W.
* NC3: W is M but for scale: ``|WM^T/|WM^T| - (I - J/K)/sqrt(K - 1)|`` and ``|W/|W| - M/|M||^2``.
* NC4: share of examples whose class by the head is not the one with the nearest mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.diagnostic import (
    Diagnostic,
    dataset_of,
    label_of,
    logits_of,
    steps_per_epoch,
    summed,
    total_steps,
)
from callbacks.layers import backbone_of, layers_there, stages
from callbacks.perturbation import PREFIX, device_of
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Wider features than this have only traces measured: a scatter matrix would take more than 128 MiB.
WIDEST = 4096
#: Eigenvalues of S_B below this part of the largest one are zero to its pseudo-inverse.
CUTOFF = 1e-10
#: The name under which the features in front of the head are measured.
LAST = "features"

# ---------------------------------------------------------------------- sums


@dataclass
class Moments:
    """Sums over examples from which class means and scatter follow; sums of parts of the data can be added up.

    Args:
        counts: examples of each class, (K,).
        sums: of their features, (K, d).
        second: sum of hh^T, (d, d), or only its trace, (), where features are wider than ``WIDEST``.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def of(cls, features: Tensor, label: Tensor, classes: int, widest: int = WIDEST) -> Moments:
        """Of features (n, d) and labels (n,), in float64; rows with a negative label count for nothing."""
        known = label >= 0
        h, label = features[known].double(), label[known]
        counts = torch.bincount(label, minlength=classes).double()
        sums = torch.zeros(classes, h.shape[1], dtype=torch.double, device=h.device).index_add_(0, label, h)
        return cls(counts, sums, h.T @ h if h.shape[1] <= widest else h.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.counts + other.counts, self.sums + other.sums, self.second + other.second)

    @property
    def present(self) -> Tensor:
        """Which classes have examples, bool (K,)."""
        return self.counts > 0

    @property
    def means(self) -> Tensor:
        """Means of the classes that have examples, (K', d)."""
        return self.sums[self.present] / self.counts[self.present, None]

    @property
    def centred(self) -> Tensor:
        """The same less their mean, (K', d)."""
        return self.means - self.means.mean(0)

    @property
    def within(self) -> Tensor:
        """S_W (d, d), or its trace ()."""
        means, counts = self.means, self.counts[self.present, None]
        explained = means.T @ (counts * means) if self.second.dim() else (counts * means.square()).sum()
        return (self.second - explained) / self.counts.sum()


# ---------------------------------------------------------------------- the measures


def nc1(moments: Moments) -> float:
    """tr(S_W S_B^+) / K, K being the classes that have examples; nan where S_W isn't known or the means are all equal.

    S_B^+ is taken by the singular values of the centred means, with the cut-off ``CUTOFF`` on their squares.
    """
    within, centred = moments.within, moments.centred
    if not within.dim() or len(centred) < 2:
        return math.nan
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = values.square() > CUTOFF * values[0].square()
    directions = directions[kept]
    spread = ((directions @ within) * directions).sum(1)
    return float((spread / values[kept].square()).sum()) if bool(kept.any()) else math.nan


def nc1_ratio(moments: Moments) -> float:
    """tr S_W / tr S_B, 0 or more; nan for fewer than two classes, infinite for equal means."""
    centred, within = moments.centred, moments.within
    trace = (within.trace() if within.dim() else within).clamp_min(0)
    return float(trace / (centred.square().sum() / len(centred))) if len(centred) > 1 else math.nan


def simplex(classes: int, like: Tensor) -> Tensor:
    """(I - J/K) / sqrt(K - 1), (K, K): Gram matrix of a simplex, of Frobenius norm 1."""
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    return (eye - 1 / classes) / math.sqrt(classes - 1)


def nc2(vectors: Tensor) -> dict[str, float]:
    """How far rows (K, d), K at least 2, are from a simplex: ``norms``, ``angles`` and ``gram`` (see above)."""
    norms = vectors.norm(dim=1)
    unit = vectors / norms[:, None]
    gram, count = vectors @ vectors.T, len(vectors)
    apart = ~torch.eye(count, dtype=torch.bool, device=vectors.device)
    angles = (unit @ unit.T)[apart] + 1 / (count - 1)
    return {
        "norms": float(norms.std(correction=0) / norms.mean()),
        "angles": float(angles.abs().mean()),
        "gram": float((gram / gram.norm() - simplex(count, gram)).norm()),
    }


def nc3(weight: Tensor, centred: Tensor) -> tuple[float, float]:
    """How far the head's rows (K, d) are from the centred class means (K, d): by their products, and directly."""
    product = weight @ centred.T
    first = (product / product.norm() - simplex(len(product), product)).norm()
    return float(first), float((weight / weight.norm() - centred / centred.norm()).square().sum())


def nc4(features: Tensor, weight: Tensor, bias: Tensor | None, moments: Moments) -> float:
    """Share of features (n, d) whose class by the head isn't that of the nearest mean; of equals the first counts."""
    logits = features @ weight.T if bias is None else features @ weight.T + bias
    centre = moments.means.mean(0)  # near the features, so that little is lost to rounding
    means = moments.means - centre
    distance = means.square().sum(1) - 2 * (features - centre) @ means.T
    nearest = moments.present.nonzero().squeeze(1)[distance.argmin(1)]
    return float((logits.argmax(1) != nearest).double().mean())


# ---------------------------------------------------------------------- features


def pooled(output: Any, name: str, batch: int) -> Tensor:
    """Features (B, d) of what a layer gives: (B, d) as it is, of (B, C, H, W) the mean over positions, of (B, N, C)
    the mean over tokens. Means are taken in float64. Maps (B, H, W, C) are known by their square.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4) or len(output) != batch:
        raise ValueError(f"layer '{name}' gives no features (B, d), (B, C, H, W) or (B, N, C): name other layers")
    if output.dim() == 2:
        return output
    last = output.dim() == 4 and output.shape[1] == output.shape[2] != output.shape[3]  # channels, as in Swin
    return output.mean(1 if output.dim() == 3 else (1, 2) if last else (2, 3), dtype=torch.double)


def find(module: nn.Module, name: str) -> nn.Module:
    """The layer of this name in the module's backbone, or else in the module.

    Raises:
        ValueError: if there is none.
    """
    for place in (backbone_of(module), module):
        named = dict(place.named_modules())
        if name and name in named:
            return named[name]
    raise ValueError(f"no layer '{name}' in {type(module).__name__}. {layers_there(backbone_of(module))}")


def find_head(module: nn.Module, name: str | None = None) -> nn.Linear:
    """The linear layer that gives the logits: the named one, the backbone's ``get_classifier()``, or the last there is.

    Raises:
        ValueError: if there is none.
    """
    if name is not None:
        head: Any = find(module, name)
    else:
        own = getattr(backbone_of(module), "get_classifier", None)
        head = own() if callable(own) else None
        if not isinstance(head, nn.Linear):
            named = [(n, m) for n, m in module.named_modules() if not n.startswith(f"{PREFIX}.")]
            head = next((m for _, m in reversed(named) if isinstance(m, nn.Linear)), None)
    if not isinstance(head, nn.Linear):
        what = f"'{name}' is none" if name else "there is none"
        raise ValueError(f"NeuralCollapse needs a linear head, and {what}: name an nn.Linear by head=...")
    return head


@contextmanager
def watching(layers: Mapping[str, nn.Module], head: nn.Module) -> Iterator[dict[str, Any]]:
    """Inside, a forward pass puts what each layer gave into the dict, under its name.

    What the head took is put there as ``LAST``, what it gave as ``""``.
    """
    found: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda layer, args, output: found.__setitem__(name, output)

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    handles.append(head.register_forward_hook(lambda layer, args, output: found.update({LAST: args[0], "": output})))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _alike(one: Moments, other: Moments) -> bool:
    """Whether two layers give the same features but for rounding."""
    if one.sums.shape != other.sums.shape:
        return False
    return bool((one.sums - other.sums).norm() <= 0.01 * other.sums.norm())


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), equal_nan=True)


# ---------------------------------------------------------------------- the callback


class NeuralCollapse(Diagnostic):
    """Logs how far classes have collapsed, before the first step and at the end of epochs, on training examples.

    Of each layer and of the features in front of the head (``features/...``): ``nc1``, ``nc1r``, ``nc2_norms``,
    ``nc2_angles``, ``nc2_gram``; of the head ``head/nc2_...``; of the features in front of it also ``nc3``,
    ``nc3_dual``, ``nc4`` and ``global_mean_logits``, |W mu_G + b|. By depth: ``deep_over_shallow``, the NC1r of the
    last layer over that of the first, and ``rises``, how many layers have a larger one than the layer before. At the
    end: ``end_over_start`` and ``largest_rise`` (from one measurement to the next, 0 if there was none) of the NC1r of
    the features in front of the head. Numbers are 0 where collapse is complete.

    Args:
        layers: names in the backbone, shallow to deep; its stages if omitted (none where it doesn't say what they are).
        head: name of the linear layer that gives the logits; found by itself if omitted.
        every_n_epochs: measured at the end of every so many epochs, and of the last one.
        examples: of the training data, as far as ``share`` allows; take ten or more of each class.

    Other arguments: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range; in training, for a network without a linear head or such layers.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        head: str | None = None,
        every_n_epochs: int = 1,
        examples: int = 2000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if every_n_epochs < 1 or examples < 1:
            raise ValueError(f"every_n_epochs and examples must be at least 1, not {every_n_epochs} and {examples}")
        if layers is not None and (len(set(layers)) < len(layers) or {LAST, "head"} & set(layers)):
            raise ValueError(f"name each layer once, and neither '{LAST}' nor 'head' (they are there): {list(layers)}")
        self.layers, self.head, self.every_n_epochs, self.count = layers, head, every_n_epochs, examples
        self._layers: dict[str, nn.Module] = {}
        self._positions: list[int] = []
        self._total = 0
        #: Names of what is measured by depth.
        self._order: list[str] = []

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        every = self.every_n_epochs * steps_per_epoch(trainer)
        return range(0, total_steps(trainer) + 1, every)

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        if self.layers is not None:
            names = list(self.layers)
        else:
            try:
                names = stages(backbone_of(module))
            except ValueError:  # a user's own network: what is in front of its head will do
                names = []
        self._layers = {name: find(module, name) for name in names}
        wanted = self.affordable(trainer, self.count, 1)
        self._total = min(wanted, len(dataset_of(trainer, "train")[0]))
        self._positions = self.positions(trainer, "train", wanted)

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        head = find_head(module, self.head)
        classes = head.out_features
        if classes < 2:
            raise ValueError("NeuralCollapse needs a head with an output for each class, and this one has a single one")
        moments, features, labels = self._sums(trainer, module, head)
        moments, features, labels = self._over_ranks(trainer, moments, features, labels, device_of(module))
        weight = head.weight.detach().double().cpu()
        bias = None if head.bias is None else head.bias.detach().double().cpu()

        values: dict[str, float] = {}
        for name, found in moments.items():
            values |= {f"{name}/nc1": nc1(found)} if found.second.dim() else {}
            values[f"{name}/nc1r"] = nc1_ratio(found)
            if len(found.centred) > 1:
                values |= {f"{name}/nc2_{key}": value for key, value in nc2(found.centred).items()}
        last, known = moments[LAST], labels >= 0
        values |= {f"head/nc2_{key}": value for key, value in nc2(weight).items()}
        if len(last.centred) > 1:
            values[f"{LAST}/nc3"], values[f"{LAST}/nc3_dual"] = nc3(weight[last.present], last.centred)
        if bool(known.any()):
            values[f"{LAST}/nc4"] = nc4(features[known], weight, bias, last)
            middle = weight @ last.means.mean(0)
            values[f"{LAST}/global_mean_logits"] = float((middle if bias is None else middle + bias).norm())

        self._order = list(moments)
        if len(moments) > 1 and _alike(moments[self._order[-2]], last):  # the last stage is what the head takes
            self._order.remove(LAST)
        ratios = [values[f"{name}/nc1r"] for name in self._order]
        if len(ratios) > 1:
            values["deep_over_shallow"] = ratios[-1] / ratios[0] if ratios[0] else math.nan
            values["rises"] = float(sum(b > a * (1 + 1e-9) for a, b in zip(ratios, ratios[1:], strict=False)))
        return values

    def _sums(
        self, trainer: Trainer, module: LightningModule, head: nn.Linear
    ) -> tuple[dict[str, Moments], Tensor, Tensor]:
        """Of this rank's examples: moments of each layer, features in front of the head (n, d) and labels (n,)."""
        moments: dict[str, Moments] = {}
        rows, labels = [], []
        spare = not self._positions  # a rank without examples needs the shapes all the same
        for batch in self.examples(trainer, "train", self._positions or [0]):
            with watching(self._layers, head) as found:
                logits = logits_of(module, batch)
            label = torch.full_like(label_of(batch), -1) if spare else label_of(batch)
            given = found.get("")
            if not isinstance(given, Tensor) or given.shape != logits.shape or not _same(given, logits):
                raise ValueError(
                    f"NeuralCollapse needs a linear layer that gives the logits of {type(module).__name__}"
                    + (f", and '{self.head}' doesn't" if self.head else ": name it by head=..., if there is one")
                )
            if int(label.max()) >= logits.shape[1]:
                raise ValueError(f"there is a label {int(label.max())}, but the head has {logits.shape[1]} outputs")
            for name in [*self._layers, LAST]:
                if name not in found:
                    raise ValueError(f"layer '{name}' is never called in the forward pass of {type(module).__name__}")
                own = Moments.of(h := pooled(found[name], name, len(label)), label, logits.shape[1])
                moments[name] = moments[name] + own if name in moments else own
            rows.append(h.double())
            labels.append(label)
        return moments, torch.cat(rows), torch.cat(labels)

    def _over_ranks(
        self, trainer: Trainer, moments: dict[str, Moments], rows: Tensor, labels: Tensor, where: torch.device
    ) -> tuple[dict[str, Moments], Tensor, Tensor]:
        """The same of all ranks' examples, on the CPU, by a single all-reduce.

        NC4 needs the examples once the means are known, so the features in front of the head travel, too, each row at
        the place that it has in one process.
        """
        features = rows.new_zeros(self._total, rows.shape[1])
        numbers = rows.new_zeros(self._total)
        if self._positions:
            features[trainer.global_rank :: trainer.world_size] = rows
            numbers[trainer.global_rank :: trainer.world_size] = labels.double()
        parts = [part for m in moments.values() for part in (m.counts, m.sums, m.second)] + [features, numbers]
        flat = summed(torch.cat([part.reshape(-1) for part in parts]), where)
        own = iter(flat.split([part.numel() for part in parts]))
        added = [next(own).view(part.shape) for part in parts]
        found = {name: Moments(*added[3 * i : 3 * i + 3]) for i, name in enumerate(moments)}
        return found, added[-2], added[-1].long()

    def conclude(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        values = [value for _, value in self.history.get(f"{self.name}/{LAST}/nc1r", [])]
        if len(values) < 2 or not values[0]:
            return {}
        rise = max(b - a for a, b in zip(values, values[1:], strict=False))
        return {"end_over_start": values[-1] / values[0], "largest_rise": max(rise, 0.0)}

    def draw(self) -> Figure | None:
        """NC1r of all layers; NC2 of the features in front of the head and of the head; NC3; NC4."""
        if not self.history:
            return None
        order = [key.split("/", 1)[1].removesuffix("/nc1r") for key in self.history if key.endswith("/nc1r")]
        figure = new_figure(9.6, 6.4)
        axes = figure.subplots(2, 2).flat
        from matplotlib import colormaps

        shades = colormaps["viridis"]
        panels: list[tuple[str, dict[str, str]]] = [
            ("NC1r: within over between classes", {f"{name}/nc1r": name for name in order}),
            (
                "NC2: distance from a simplex",
                {
                    f"{what}/nc2_{key}": f"{words}, {key}"
                    for what, words in ((LAST, "class means"), ("head", "head"))
                    for key in ("norms", "angles", "gram")
                },
            ),
            (
                "NC3: distance of head and class means",
                {f"{LAST}/nc3": "products", f"{LAST}/nc3_dual": "squared, direct"},
            ),
            ("NC4: head disagrees with nearest mean", {f"{LAST}/nc4": "share of examples"}),
        ]
        for number, (axis, (title, lines)) in enumerate(zip(axes, panels, strict=True)):
            for i, (key, label) in enumerate(lines.items()):
                points = self.history.get(f"{self.name}/{key}", [])
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                style: dict[str, Any] = {"color": f"C{i % 3}", "linestyle": "-" if i < 3 else "--"}
                if number == 0:  # shallow is dark, deep is bright
                    style = {"color": shades(0.9 * i / max(len(lines) - 1, 1)), "linestyle": "-"}
                    if label == LAST:
                        style = {"color": "black", "linestyle": ":"}
                axis.plot(steps, values, marker="o" if len(points) < 4 else None, label=label, markersize=3, **style)
            if number == 0:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step")
            axis.legend(frameon=False, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        return figure
