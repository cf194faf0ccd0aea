"""Trained long after the training set is fitted: the setting of the grokking papers.

Humayun, Balestriero, Baraniuk: Deep Networks Always Grok and Here is Why (ICML 2024, arXiv 2402.15555). The claim:
local complexity near training points falls, rises while the network fits them and falls a second time long after, and
with that second fall accuracy under attack arrives, late. What is measured is in :mod:`callbacks.local_complexity` and
:mod:`callbacks.grokking`, and plugs into any recipe; here is only what is trained.

* The squared error to one-hot labels, the mean over classes (``mse``), as in the paper's MNIST runs; or cross-entropy.
* AdamW at a constant learning rate. ``--model.backbone_args.init_scale`` makes the initial weights larger, which delays
  generalization (Liu et al., Omnigrok, arXiv 2210.01117).
* The network sees pixels of [0, 1] as they are. With ``normalise`` the mean and deviation of the other recipes are
  taken, inside the network, so that radii are of pixels either way.

Where the released code and the paper differ: its MLP has GELU by default; here it is ReLU, as the theory wants it. It
draws the training set with replacement and computes in float64; here it is without, in float32 unless
``--trainer.precision 64-true``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from recipes.classifier import Classifier
from recipes.grok import networks as networks  # importing it makes preact_resnet18_plain known to timm


def squared_error(logits: Tensor, label: Tensor) -> Tensor:
    """Squared distance of logits (B, K) to the one-hot label, over K: (B,)."""
    return (logits - F.one_hot(label, logits.shape[1])).square().mean(1)


class Grok(Classifier):
    """A classifier trained on squared errors.

    Args:
        objective: ``mse``: to one-hot labels, or ``ce``: cross-entropy.
        normalise: images by mean and deviation, inside the network; off: it sees [0, 1].

    Other arguments: see :class:`recipes.classifier.Classifier`.

    Raises:
        ValueError: for an unknown objective, or label smoothing with ``mse``.
    """

    def __init__(
        self,
        backbone: str = "mlp",
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 32,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        objective: Literal["mse", "ce"] = "mse",
        normalise: bool = False,
        **classifier: Any,
    ) -> None:
        if objective not in ("mse", "ce"):
            raise ValueError(f"objective must be mse or ce, not '{objective}'")
        if objective == "mse" and classifier.get("label_smoothing"):
            raise ValueError("the squared error has no label_smoothing: leave it out, or take objective ce")
        super().__init__(backbone, num_classes, in_chans, image_size, class_names, domain_names, **classifier)
        self.save_hyperparameters()
        self.objective = objective
        if not normalise:
            self.normalisation = ((0.0,) * in_chans, (1.0,) * in_chans)
            self.mean.zero_()
            self.std.fill_(1.0)

    def example_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each example, (B,): what diagnostics look at."""
        logits = self(batch["image"]).float()
        if self.objective == "mse":
            return squared_error(logits, batch["label"])
        smoothing = float(self.hparams["label_smoothing"])
        return F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smoothing)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.example_losses(batch).mean()
