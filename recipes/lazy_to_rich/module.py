"""Lazy and rich training under SGD's noise (Sclocchi, Geiger, Wyart; arXiv 2301.13703).

The predictor is ``F(w, x) = alpha (f(w, x) - f(w_0, x))``, labels are y = +-1, and the loss of an example is
``relu(1 - y F) / alpha``: for large alpha the weights hardly move (lazy), for small alpha features are learned (rich).
Plain SGD with a constant step; its temperature is ``T = lr / (h B)`` with the width h (1 for the perceptron) and the
batch size B. Training ends when all margins are fitted, ``y F >= 1``: then the loss is zero and nothing moves any more.

The claim: beside alpha it is the temperature that decides what SGD does. Above a temperature T_c, which falls with the
number of examples, the weights at the end of training are proportional to T; below it they don't depend on it.

As in the released code (JAX), in PyTorch's terms:

* A margin of 1 of F is one of 1 / alpha of ``f - f_0``; the code writes the hinge in the one, its stop in the other.
* The initial function f_0 is a frozen copy that is in every checkpoint, so resuming and testing see the same F.
* Batches are drawn anew at each step (``Depleted``, ``DigitsParity``), without replacement within a batch.
* The networks have no biases and N(0, 1) weights; pre-activations are divided by the root of the fan-in, activations
  scaled to E[rho(z)^2] = 1 for z ~ N(0, 1), the last layer is divided by its fan-in (mean field).

Where we differ:

* The perceptron begins at w = 0. Only w - w_0 is in F, so this changes nothing but rounding.
* F is computed in float32 at least, also under mixed precision: for large alpha it is a small difference, magnified.
* Images are centred and scaled to a mean square of 1 each; vectors are taken as they are.
* A run whose weights grow beyond all bounds ends, and says ``diverged`` 1 and no accuracy, in place of an error rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from callbacks.diagnostic import Batch, dataset_of, effective_batch, fetch
from callbacks.perturbation import accept_other_techniques, clip_groups, match_optimizer_groups, parameter_groups

#: Weights that have moved so many times their initial length are past hope.
DIVERGED = 100.0
#: Margin of F at which an example is fitted.
MARGIN = 1.0
#: Examples whose margins are computed together.
CHUNK = 1000

# ---------------------------------------------------------------------- functions


def hinge(predictor: Tensor, label: Tensor, alpha: float) -> Tensor:
    """relu(1 - y F) / alpha of each example, (B,); ``label`` is 0 or 1 for y = -1 or 1."""
    return F.relu(MARGIN - signs(label) * predictor) / alpha


def signs(label: Tensor) -> Tensor:
    """y = +-1 of labels 0 and 1, in float32."""
    return 2.0 * label - 1.0


def activation_scale(name: str) -> float:
    """c such that E[(c rho(z))^2] = 1 for z ~ N(0, 1): root 2 for relu, 1.5335 for gelu."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(getattr(F, name)(z).square() * density, z).rsqrt())


# ---------------------------------------------------------------------- networks


class Perceptron(nn.Module):
    """f(x) = w x / sqrt(d), from w = 0; (B, d) to (B,)."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features))
        self.width = 1

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight / math.sqrt(len(self.weight))


class Layer(nn.Module):
    """c rho(W x / sqrt(fan-in)) with W ~ N(0, 1) and no bias."""

    def __init__(self, in_features: int, width: int, activation: Literal["relu", "gelu"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, in_features))
        self.activation, self.scale = nn.ReLU() if activation == "relu" else nn.GELU(), activation_scale(activation)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight) / math.sqrt(self.weight.shape[1])
        return self.scale * self.activation(h)


class MeanFieldMLP(nn.Module):
    """Fully connected ``layer1`` to ``layer<depth>`` of one width, then ``v h / width``; (B, d) to (B,)."""

    def __init__(self, in_features: int, width: int, depth: int, activation: Literal["relu", "gelu"]) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        for i in range(1, depth + 1):
            self.add_module(f"layer{i}", Layer(in_features if i == 1 else width, width, activation))
        self.fc = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{i}")(x)
        return x @ self.fc / self.width


# ---------------------------------------------------------------------- the recipe


class LazyToRich(LightningModule):
    """The scaled predictor with its hinge loss, trained by plain SGD until all margins are fitted.

    Args:
        network: ``mlp``, or ``linear``, the perceptron.
        num_classes: from the data; two.
        in_chans: channels of the image, or length of the vector; from the data.
        image_size: height of the image in pixels; from the data.
        class_names: from the data.
        alpha: scale of the predictor: lazy where it is large.
        width: of the ``mlp``'s layers; the h of the temperature.
        depth: hidden layers of the ``mlp``.
        activation: ``relu`` or ``gelu``.
        temperature: T; the learning rate is T h B, with the batch B of all ranks and accumulated batches.
        lr: the learning rate itself, in place of a temperature.
        check_every_n_steps: how often the margins of all training examples are looked at, in optimizer steps. What is
            fitted doesn't move, so the weights at the end don't depend on it.

    A batch has ``image`` (B, C, H, W) in [0, 1], or ``input`` (B, d), and ``label`` (B,), 0 or 1.

    Logged in the test, beside loss and accuracy: ``norm``, the length of w - w_0, and ``log2_norm``, its logarithm;
    ``weight_change``, over that of w_0; ``norm_over_T``; for the perceptron ``w_par`` and ``w_perp``, along the first
    coordinate and across it; ``unfitted``, the share of training examples with y F < 1 when training ended;
    ``fit_steps``, after how many steps none was left (from the check that found it; absent if some were left);
    ``diverged``. How they come about is what :class:`callbacks.sgd_noise.SGDTemperature` shows.

    Raises:
        ValueError: for a setting out of range.
    """

    monitor = ("val/acc", "max")
    #: Settings without which a checkpoint's weights are another function.
    shaping = ("network", "alpha", "width", "depth", "activation")
    unfitted: Tensor
    fit_steps: Tensor
    diverged: Tensor

    def __init__(
        self,
        network: Literal["mlp", "linear"] = "mlp",
        num_classes: int = 2,
        in_chans: int = 3,
        image_size: int = 32,
        class_names: Sequence[str] = (),
        alpha: float = 1.0,
        width: int = 64,
        depth: int = 3,
        activation: Literal["relu", "gelu"] = "relu",
        temperature: float | None = None,
        lr: float | None = None,
        check_every_n_steps: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        accept_other_techniques(self)
        if num_classes != 2:
            raise ValueError(f"labels must be of two classes, not {num_classes}: take --data Depleted or DigitsParity")
        if (temperature is None) == (lr is None):
            raise ValueError("give either --model.temperature or --model.lr, and the other one null")
        if not alpha > 0 or not (temperature if lr is None else lr) or (temperature or lr or 0) < 0:
            raise ValueError(f"alpha, temperature and lr must be positive: {alpha}, {temperature} and {lr}")
        if min(width, depth, check_every_n_steps) < 1:
            raise ValueError(
                f"width, depth and check_every_n_steps must be at least 1: {width}, {depth} and {check_every_n_steps}"
            )
        self.class_names = list(class_names) or ["0", "1"]
        self.alpha = alpha
        features = in_chans * image_size * image_size
        self.backbone: Perceptron | MeanFieldMLP
        if network == "linear":
            self.backbone = Perceptron(features)
        else:
            self.backbone = MeanFieldMLP(features, width, depth, activation)
        #: f_0, frozen; in every checkpoint.
        self.initial = copy.deepcopy(self.backbone).requires_grad_(False)
        #: Of the last check: the share of margins that aren't fitted, after how many steps all were (-1: they aren't),
        #: and whether the weights grew beyond all bounds.
        self.register_buffer("unfitted", torch.tensor(1.0))
        self.register_buffer("fit_steps", torch.tensor(-1))
        self.register_buffer("diverged", torch.tensor(False))
        self.example_input_array = torch.zeros(2, in_chans, image_size, image_size)
        self.val_accuracy = MulticlassAccuracy(2, average="micro")
        self.test_accuracy = MulticlassAccuracy(2, average="micro")

    # ------------------------------------------------------------------ the function

    def predictor(self, batch: Batch | Tensor) -> Tensor:
        """F (B,) of images (B, C, H, W), of vectors (B, d), or of a batch that has the one or the other."""
        x = batch
        if isinstance(batch, Mapping):
            x = batch["image"] if "image" in batch else batch["input"]
        assert isinstance(x, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(next(self.backbone.parameters()).dtype)
            if x.dim() == 4:
                x = x.flatten(1) - 0.5
                x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
            return self.alpha * (self.backbone(x) - self.initial(x))

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Two logits (B, 2), -F / 2 and F / 2: the margin of the right one over the other is y F."""
        half = self.predictor(batch) / 2
        return torch.stack([-half, half], 1)

    def example_losses(self, batch: Batch) -> Tensor:
        """(B,)."""
        return hinge(self.predictor(batch), batch["label"], self.alpha)

    def loss(self, batch: Batch) -> Tensor:
        """The mean over the batch; no logging, no side effects."""
        return self.example_losses(batch).mean()

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        # A run that diverges has something to say, so it goes on until the next check finds it.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step % self.hparams["check_every_n_steps"] == 0 and not self.trainer.should_stop:
            self._check()

    def on_train_end(self) -> None:
        self._check()

    def _check(self) -> None:
        """Whether to stop, decided alike on all ranks."""
        lowest, unfitted = self.margins()
        self.unfitted.fill_(unfitted)
        self.diverged.fill_(not math.isfinite(lowest) or self.weights()["weight_change"] > DIVERGED)
        if not unfitted and int(self.fit_steps) < 0:
            self.fit_steps.fill_(self.trainer.global_step)
        if self.diverged or not unfitted:
            self.trainer.should_stop = True

    @torch.no_grad()
    def margins(self) -> tuple[float, float]:
        """The smallest y F of all training examples, over all ranks, and the share of them that is below 1."""
        dataset, _ = dataset_of(self.trainer, "train")
        rank, world = self.trainer.global_rank, self.trainer.world_size
        own = list(range(rank, len(dataset), world))
        lowest, unfitted = torch.tensor(math.inf), torch.tensor(0.0)
        for first in range(0, len(own), CHUNK):
            batch = fetch(self.trainer, "train", own[first : first + CHUNK])
            margin = (signs(batch["label"]) * self.predictor(batch)).nan_to_num(nan=-math.inf).cpu()
            lowest, unfitted = torch.minimum(lowest, margin.min()), unfitted + (margin < MARGIN).sum()
        found = torch.stack([-lowest, unfitted]).to(self.device)
        if world > 1:
            dist.all_reduce(found[:1], dist.ReduceOp.MAX)
            dist.all_reduce(found[1:])
        return -float(found[0]), float(found[1]) / len(dataset)

    @torch.no_grad()
    def weights(self) -> dict[str, float]:
        """Lengths of weights: see the class. Of the perceptron, which begins at zero, there is no relative change."""
        pairs = list(zip(self.backbone.parameters(), self.initial.parameters(), strict=True))
        norm = float(torch.stack([(w - w0).double().norm() for w, w0 in pairs]).norm())
        start = float(torch.stack([w0.double().norm() for _, w0 in pairs]).norm())
        found = {"norm": norm, "weight_change": norm / start if start else 0.0}
        if not math.isfinite(norm):
            found["weight_change"] = math.inf
        if isinstance(self.backbone, Perceptron):
            w = (self.backbone.weight - self.initial.weight).double()  # type: ignore[operator]
            found |= {"w_par": float(w[0]), "w_perp": float(w[1:].norm())}
        return found

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, batch: Batch, part: str, accuracy: MulticlassAccuracy) -> None:
        logits, size = self(batch), len(batch["label"])
        accuracy.update(logits, batch["label"])
        self.log(f"{part}/loss", self.example_losses(batch).mean(), on_epoch=True, batch_size=size, sync_dist=True)

    def _accuracy(self, part: str, accuracy: MulticlassAccuracy) -> None:
        right = accuracy.compute()
        accuracy.reset()
        self.log(f"{part}/acc", torch.full_like(right, math.nan) if self.diverged else right, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        self._accuracy("val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        self._accuracy("test", self.test_accuracy)
        found = self.weights()
        if isinstance(self.backbone, Perceptron):
            del found["weight_change"]
        found["log2_norm"] = math.log2(max(found["norm"], torch.finfo(torch.float32).tiny))
        if self.hparams["temperature"]:
            found["norm_over_T"] = found["norm"] / self.hparams["temperature"]
        found |= {"diverged": float(self.diverged), "unfitted": float(self.unfitted)}
        if int(self.fit_steps) >= 0:
            found["fit_steps"] = float(self.fit_steps)
        for name, value in found.items():
            self.log(name, value, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """F and the class whose side it is on; a hinge gives no probabilities."""
        predictor = self.predictor(batch)
        return {"index": batch.get("index"), "predictor": predictor, "prediction": (predictor > 0).long()}

    # ------------------------------------------------------------------ the optimizer

    def configure_optimizers(self) -> Any:
        lr = self.hparams["lr"]
        if lr is None:
            lr = self.hparams["temperature"] * self.backbone.width * effective_batch(self.trainer)
        return torch.optim.SGD(parameter_groups(self, lr=lr, weight_decay=0.0), lr=lr)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(self, checkpoint)  # also where no technique is there to do it
