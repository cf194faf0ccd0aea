"""Generalization measures at the end of a training, and the error that each of them must make somewhere.

Gastpar, Nachum, Shafer, Weinberger, "Fantastic Generalization Measures are Nowhere to be Found", arXiv 2309.13658. A
measure is a number b(S, h) computed from the training set S and the trained network h that is meant to tell the
generalization gap. The claim: where the network is overparametrised none can be uniformly tight. If h fits S and two
distributions D1 and D2 could both have given S, but h does well on one and badly on the other, then b(S, h) is the same
number for both and misses the gap on one of them by at least half the difference, ``|L_D1(h) - L_D2(h)| / 2``.
:func:`floor_of` builds such a pair.

The measures are those that Jiang et al., "Fantastic Generalization Measures and Where to Find Them", arXiv 1912.02178,
compared, in their plainest form. The paper is theory and has no code; what is ours to choose:

* The matrices are all trained tensors of two or more dimensions, flattened from the second on: a convolution's is
  (out, in * k * k), whose spectral norm is not that of the convolution as an operator.
* The margin is a quantile over the training set (10 %), at least 1e-3; a network below that has not fitted its training
  set (``unfit``), so that measures by margin say nothing of it.
* Noise on the weights has one sigma for all of them; ``1 / sigma`` of the largest sigma at which the expected training
  accuracy falls by no more than 0.1.
* ``pac_bayes`` is McAllester's bound of the gap in Maurer's form, for the Gaussian posterior of that sigma around the
  weights and the prior of the same sigma around the initial ones, at 95 %: ``sqrt((KL + ln(2 sqrt(n) / 0.05)) / 2n)``
  with ``KL = |W - W0|^2 / (2 sigma^2)``. sigma is chosen by the data, so it is like a bound and none.
* ``log_path_norm`` is the logarithm of the sum over all paths of the product of squared weights; at a bias a path
  begins. One pass of ones through squared weights computes it, exactly for linear layers, convolutions, ReLU and batch
  norm (which is squared as the affine map that it is in evaluation). Elsewhere it is what that pass gives, as in Jiang
  et al., and left out if that is no positive number.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks.diagnostic import Batch, Diagnostic, dataset_of, gathered, label_of, logits_of, summed
from callbacks.layers import backbone_of
from callbacks.perturbation import PREFIX, device_of, trained_weights
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

#: Names of all measures, in the order in which they are shown; each is meant to grow with the gap.
MEASURES = (
    "params",
    "inverse_margin2",
    "log_prod_spec",
    "log_prod_fro",
    "sum_fro_over_spec",
    "sum_log_fro",
    "log_path_norm",
    "distance",
    "spec_distance",
    "norm",
    "inverse_sigma",
    "pac_bayes",
)
#: A smaller margin counts as this.
LEAST_MARGIN = 1e-3
#: Between which sigmas it is searched, and in how many halvings (of the logarithm).
SIGMAS, HALVINGS = (1e-4, 1.0), 10
#: How often a draw of noise, and the norms, go through vectors as long as the weights.
SWEEPS = (4, 8)

# ---------------------------------------------------------------------- of weights


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix (m, n), in float64, by the Gram matrix of its shorter side."""
    matrix = matrix.detach().double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


def norm_measures(weights: Mapping[str, Tensor], start: Mapping[str, Tensor], margin: float) -> dict[str, float]:
    """The measures that follow from weights, initial weights and margin.

    A matrix that is zero gives ``-inf`` in logarithms, which has no place in a ranking; trained ones aren't.

    Args:
        weights: the trained tensors by name.
        start: the same before training.
        margin: positive.
    """
    spec, fro, moved = [], [], []
    for name, value in weights.items():
        if value.dim() > 1:
            matrix, first = (each.detach().double().flatten(1) for each in (value, start[name].to(value.device)))
            spec.append(spectral_norm(matrix))
            fro.append(float(matrix.square().sum()))
            moved.append(spectral_norm(matrix - first) ** 2)
    away = {name: value.detach().double() - start[name].to(value.device).double() for name, value in weights.items()}
    return {
        "params": float(sum(value.numel() for value in weights.values())),
        "inverse_margin2": margin**-2,
        "log_prod_spec": 2 * sum(map(_log, spec)) - 2 * math.log(margin),
        "log_prod_fro": sum(map(_log, fro)) - 2 * math.log(margin),
        "sum_fro_over_spec": sum(f / s**2 for f, s in zip(fro, spec, strict=True) if s > 0),
        "sum_log_fro": sum(map(_log, fro)),
        "distance": _length(away),
        "spec_distance": math.sqrt(sum(moved)),
        "norm": _length(weights),
    }


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _length(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.detach().double().square().sum()) for value in tensors.values()))


def pac_bayes(distance: float, sigma: float, count: int, delta: float = 0.05) -> float:
    """See the module: ``sqrt((distance^2 / (2 sigma^2) + ln(2 sqrt(n) / delta)) / (2 n))``."""
    divergence = distance**2 / (2 * sigma**2)
    return math.sqrt((divergence + math.log(2 * math.sqrt(count) / delta)) / (2 * count))


def log_path_norm(network: nn.Module, example: Tensor) -> float | None:
    """Logarithm of the sum over all paths of the product of squared weights; None where it isn't to be had.

    Args:
        network: in evaluation mode; gives (1, outputs).
        example: (1, ...), an input of the network of any values.
    """
    squared = {name: value.detach().double().square() for name, value in network.named_parameters()}
    squared |= {name: b.detach().double() for name, b in network.named_buffers() if b.is_floating_point()}
    for name, norm in network.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            at = f"{name}." if name else ""
            scale = norm.weight.detach().double() if norm.weight is not None else 1.0
            shift = norm.bias.detach().double() if norm.bias is not None else 0.0
            mean, variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
            squared[f"{at}running_mean"] = torch.zeros_like(mean)
            if norm.bias is not None:
                squared[f"{at}bias"] = (shift - scale * mean / variance.sqrt()).square()
            squared[f"{at}running_var"] = variance.square() - norm.eps  # whose root, eps added, is the variance
    ones = torch.ones_like(example, dtype=torch.float64)
    with torch.no_grad(), torch.autocast(example.device.type, enabled=False):
        try:
            found = torch.func.functional_call(network, squared, (ones,))
        except (RuntimeError, TypeError):  # of a network that can't be run like that
            return None
    total = float(found.sum()) if isinstance(found, Tensor) else math.nan
    return math.log(total) if 0 < total < math.inf else None


# ---------------------------------------------------------------------- noise on weights


@contextmanager
def noisy(parameters: Sequence[Tensor]) -> Iterator[Callable[[float, torch.Generator], None]]:
    """Inside, ``move(sigma, generator)`` sets the parameters to what they were, plus noise; then they are put back.

    It is from copies, to the last bit: subtracting what was added would leave rounding.
    """
    kept = [parameter.detach().clone() for parameter in parameters]

    def move(sigma: float, generator: torch.Generator) -> None:
        for parameter, value in zip(parameters, kept, strict=True):
            noise = torch.randn(value.shape, generator=generator)  # on the CPU: the same on every device
            parameter.copy_(value + sigma * noise.to(value.device, value.dtype))

    with torch.no_grad():
        try:
            yield move
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def largest_sigma(
    accuracy: Callable[[float], float], clean: float, drop: float, tried: list[tuple[float, float]] | None = None
) -> float:
    """The largest sigma at which the accuracy is no more than ``drop`` below ``clean``, by halving in the logarithm.

    It is found to within 1 %; what falls outside of :data:`SIGMAS` comes out as the nearer end (also to within 1 %).

    Args:
        accuracy: of a sigma; should fall as sigma grows.
        clean: without noise.
        drop: in accuracy.
        tried: gets what was tried, (sigma, accuracy).
    """
    low, high = map(math.log, SIGMAS)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = accuracy(math.exp(middle))
        if tried is not None:
            tried.append((math.exp(middle), found))
        if clean - found <= drop:
            low = middle
        else:
            high = middle
    return math.exp(low)


# ---------------------------------------------------------------------- the pair of distributions


def floor_of(
    train_error: float,
    held_out_error: float,
    train_size: int,
    held_out_size: int,
    classes: int,
    redrawn: float | None = None,
) -> tuple[float, float, float]:
    """Errors of a network on two distributions that agree on its training set, and half of their difference.

    D1 is uniform over the training examples, with the labels that it was trained on, and the held-out ones, with
    theirs. D2 has the same examples and the same labels in training; the held-out ones have labels drawn uniformly.
    Whatever the network says, those are wrong with chance 1 - 1/K. The training set is as likely from D1 as from D2,
    and where the training error is 0 the network fits both alike; so a number computed from training set and network
    misses the error on one of the distributions by at least half of the difference.

    Args:
        train_error: share of errors on the training set as trained.
        held_out_error: share of errors on held-out examples.
        train_size: of the whole training set.
        held_out_size: of the whole held-out set.
        classes: K.
        redrawn: share of errors on held-out examples with labels that were drawn; None: as expected.

    Returns:
        ``L_D1(h)``, ``L_D2(h)`` and ``|L_D1 - L_D2| / 2``.
    """
    part = held_out_size / (train_size + held_out_size)
    wrong = 1 - 1 / classes if redrawn is None else redrawn
    first = (1 - part) * train_error + part * held_out_error
    second = (1 - part) * train_error + part * wrong
    return first, second, abs(first - second) / 2


# ---------------------------------------------------------------------- the callback


class GeneralizationMeasures(Diagnostic):
    """Logs a dozen generalization measures when a training ends, the gap, and the floor that no measure gets below.

    Measures (see :data:`MEASURES`): ``params``, ``inverse_margin2``, ``log_prod_spec`` and ``log_prod_fro`` (sums of
    logarithms of squared norms over squared margin), ``sum_fro_over_spec``, ``sum_log_fro``, ``log_path_norm``,
    ``distance`` and ``norm`` (of all weights, |W - W0| and |W|), ``spec_distance`` (root of the sum of squared spectral
    norms of W - W0), ``inverse_sigma``, ``pac_bayes``. Also: ``margin``, ``unfit`` (1 if the margin is below 1e-3),
    ``sigma``; ``train_error``, ``train_loss`` (on the labels trained on), ``val_error``, ``val_loss``, ``gap`` (of
    errors), ``loss_gap``; and of :func:`floor_of` ``risk_1``, ``risk_2``, ``floor``, and ``risk_2_drawn`` (the mean of
    ``redraws`` drawn labellings, where ``risk_2`` is what they give on average).

    W0 is copied when the training starts, and kept in the checkpoint, which grows by the size of the weights. Trained
    tensors alone are measured; those of techniques aren't part of the network. It is measured once, after the last
    step.

    Args:
        quantile: of the margins over the training set.
        drop: in training accuracy, by which sigma is found.
        draws: of the weight noise, alike for each sigma tried.
        examples: at most so many of training and of validation, less where ``share`` allows fewer.
        redraws: of the held-out labels.
        **options: see :class:`callbacks.diagnostic.Diagnostic`.

    Raises:
        ValueError: for a setting out of range, data without labels or validation part, or a module without logits or
            without matrices that are trained.
    """

    def __init__(
        self,
        quantile: float = 0.1,
        drop: float = 0.1,
        draws: int = 3,
        examples: int = 1024,
        redraws: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, share in {"quantile": quantile, "drop": drop}.items():
            if not 0 < share < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {share}")
        for name, count in {"draws": draws, "examples": examples, "redraws": redraws}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        self.quantile, self.drop, self.draws, self.redraws = quantile, drop, draws, redraws
        self.wanted = examples
        #: The trained weights before the first step, on the CPU.
        self.start: dict[str, Tensor] = {}
        self._positions: dict[str, list[int]] = {}
        self._margins: dict[str, Tensor] = {}
        self._tried: list[tuple[float, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.start = state_dict["start"]

    # ------------------------------------------------------------------ what is measured

    def plan(self, trainer: Trainer, module: LightningModule) -> Sequence[int]:
        return ()  # the last step is always measured

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        trained = dict(trained_weights(module))
        if not any(p.dim() > 1 for p in trained.values()):
            raise ValueError("generalization measures need a weight matrix that is trained, and here is none")
        if trainer.global_step == 0 or not self.start:
            if trainer.global_step:
                log.info("%s: distances are from step %d, where it was added", self.name, trainer.global_step)
            self.start = {name: p.detach().cpu().clone() for name, p in trained.items()}
        passes = 2 + HALVINGS * self.draws  # of training and of validation once, and of training for sigma
        sweeps = SWEEPS[0] * HALVINGS * self.draws + SWEEPS[1]
        most = self.affordable(trainer, self.wanted, passes, sweeps)
        self._positions = {part: self.positions(trainer, part, most) for part in ("train", "val")}
        with self.measuring(module), torch.no_grad():  # what is missing is said now, not at the end
            for part, positions in self._positions.items():
                for batch in self.examples(trainer, part, positions[:2]):
                    logits_of(module, batch)

    @staticmethod
    def _network(module: LightningModule) -> dict[str, nn.Parameter]:
        return {n: p for n, p in module.named_parameters() if not n.startswith(f"{PREFIX}.")}

    def _outputs(
        self, trainer: Trainer, module: LightningModule, part: str, batches: Sequence[Batch]
    ) -> tuple[Tensor, ...]:
        """Margin, loss, prediction and label of all ranks' examples that have a label, (N,) each, on the CPU; and K."""
        rows, classes = [torch.empty(0, 4, dtype=torch.float64)], 0
        with torch.no_grad():
            for batch in batches:
                label = label_of(batch)
                logits = logits_of(module, batch).double()
                logits, label, classes = logits[label >= 0], label[label >= 0], logits.shape[1]
                own = logits.gather(1, label[:, None]).squeeze(1)
                other = logits.scatter(1, label[:, None], -math.inf).amax(1)
                loss = F.cross_entropy(logits, label, reduction="none")
                rows.append(torch.stack([own - other, loss, logits.argmax(1), label], 1).cpu())
        where = device_of(module)
        found = gathered(torch.cat(rows), where)
        classes = int(gathered(torch.tensor([classes]), where).max())
        if not len(found):
            raise ValueError(f"generalization measures need labelled examples in '{part}', and there are none")
        return (*found.unbind(1), torch.tensor(classes))

    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        where = device_of(module)
        weights = {name: p for name, p in self._network(module).items() if name in self.start}
        train = list(self.examples(trainer, "train", self._positions["train"]))
        margins, losses, predicted, label, classes = self._outputs(trainer, module, "train", train)
        held_out = self.examples(trainer, "val", self._positions["val"])
        val_margins, val_losses, val_predicted, val_label, _ = self._outputs(trainer, module, "val", list(held_out))
        self._margins = {"train": margins, "val": val_margins}
        errors = {"train_error": _share(predicted != label), "val_error": _share(val_predicted != val_label)}

        margin = float(margins.quantile(self.quantile))
        values = norm_measures(weights, self.start, max(margin, LEAST_MARGIN))
        sigma = self._sigma(train, module, list(weights.values()), 1 - errors["train_error"], len(label), where)
        size, held_size = (len(dataset_of(trainer, part)[0]) for part in ("train", "val"))
        values |= {"inverse_sigma": 1 / sigma, "pac_bayes": pac_bayes(values["distance"], sigma, size)}
        paths = self._path_norm(module, train[0]) if train else None
        paths = gathered(torch.tensor([math.nan if paths is None else paths], dtype=torch.float64), where)[0].item()
        if math.isfinite(paths):
            values["log_path_norm"] = paths

        k = int(classes)
        drawn = [torch.randint(k, val_label.shape, generator=self.generator("labels", i)) for i in range(self.redraws)]
        redrawn = sum(_share(val_predicted != labels) for labels in drawn) / self.redraws
        first, second, floor = floor_of(errors["train_error"], errors["val_error"], size, held_size, k)
        _, second_drawn, _ = floor_of(errors["train_error"], errors["val_error"], size, held_size, k, redrawn)
        losses_of_both = {"train_loss": float(losses.mean()), "val_loss": float(val_losses.mean())}
        return {
            **{name: values[name] for name in MEASURES if name in values},
            **{"margin": margin, "unfit": float(margin < LEAST_MARGIN), "sigma": sigma},
            **errors,
            **losses_of_both,
            "gap": errors["val_error"] - errors["train_error"],
            "loss_gap": losses_of_both["val_loss"] - losses_of_both["train_loss"],
            **{"risk_1": first, "risk_2": second, "floor": floor, "risk_2_drawn": second_drawn},
        }

    def _sigma(
        self,
        batches: Sequence[Batch],
        module: LightningModule,
        weights: Sequence[Tensor],
        clean: float,
        count: int,
        where: torch.device,
    ) -> float:
        self._tried = []
        with noisy(weights) as move:

            def accuracy(sigma: float) -> float:
                right = torch.zeros((), dtype=torch.float64)
                for draw in range(self.draws):
                    move(sigma, self.generator("sigma", draw))
                    for batch in batches:
                        label = label_of(batch)
                        hit = (logits_of(module, batch).argmax(1) == label) & (label >= 0)
                        right += hit.sum().cpu()
                return float(summed(right, where)) / (self.draws * count)

            return largest_sigma(accuracy, clean, self.drop, self._tried)

    def _path_norm(self, module: LightningModule, batch: Batch) -> float | None:
        network = backbone_of(module)
        example = batch["image"] if isinstance(batch, Mapping) and "image" in batch else None
        example = batch[0] if isinstance(batch, Sequence) else example
        if not isinstance(example, Tensor) or not example.is_floating_point():
            return None
        logits = logits_of(module, batch)
        try:
            with torch.no_grad():
                found = network(example)
        except (RuntimeError, TypeError):
            return None
        if not isinstance(found, Tensor) or found.shape != logits.shape:  # it doesn't give the module's logits
            return None
        return log_path_norm(network, example[:1])

    # ------------------------------------------------------------------ the picture

    def draw(self) -> Figure | None:
        if not self._margins:
            return None
        last = {key.removeprefix(f"{self.name}/"): points[-1][1] for key, points in self.history.items()}
        figure = new_figure(15, 4.2)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        for part, margins in self._margins.items():
            left.hist(margins.numpy(), 40, density=True, alpha=0.5, label=f"{part}, {len(margins)} examples")
        left.axvline(last["margin"], color="black", linewidth=1, label=f"margin {last['margin']:.3g}")
        left.set_xlabel("logit of the label - largest other")
        left.set_yticks([])
        left.legend(frameon=False, fontsize=8)
        left.set_title("margins" + (" (unfit: the training set isn't fitted)" if last["unfit"] else ""), fontsize=10)
        tried = sorted(self._tried)
        middle.plot([s for s, _ in tried], [a for _, a in tried], "o-", markersize=4)
        middle.axhline(1 - last["train_error"] - self.drop, color="black", linewidth=0.8, linestyle="--")
        middle.axvline(last["sigma"], color="black", linewidth=0.8, linestyle="--", label=f"sigma {last['sigma']:.3g}")
        middle.set_xscale("log")
        middle.set_ylim(0, 1.02)
        middle.set_xlabel("sigma of the noise on all weights")
        middle.set_ylabel("training accuracy")
        middle.legend(frameon=False, fontsize=8)
        middle.set_title("how much noise the weights bear", fontsize=10)
        names = [name for name in MEASURES if name in last]
        places = range(len(names), 0, -1)
        values = [abs(last[name]) for name in names]
        right.barh(list(places), values, height=0.6, color=["C0" if last[n] >= 0 else "C1" for n in names])
        for place, name, value in zip(places, names, values, strict=True):
            right.text(value * 1.15, place, f"{last[name]:.3g}", va="center", fontsize=8)
        gap = max(last["gap"], 1e-4)
        right.axvline(gap, color="C3", linewidth=1.2, label=f"gap {last['gap']:.3g}")
        right.axvspan(max(gap - last["floor"], 1e-4), gap + last["floor"], color="C3", alpha=0.15)
        right.plot([], [], color="C3", alpha=0.3, linewidth=6, label=f"± the floor {last['floor']:.3g}")
        right.set_xscale("log")
        right.set_xlim(min(1e-2, gap), 30 * max([*values, 1.0]))
        right.set_yticks(list(places), names, fontsize=8)
        right.legend(frameon=False, fontsize=8, loc="lower right")
        right.set_title("measures and the gap that they are meant to tell", fontsize=10)
        for axis in (left, middle, right):
            axis.spines[["top", "right"]].set_visible(False)
        return figure


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
