"""Label noise: a fixed share of the training examples has labels that were redrawn, the same in every epoch.

Zhang et al., "Understanding deep learning requires rethinking generalization", arXiv 1611.03530: networks fit labels
that say nothing, so fitting the training set doesn't tell whether they generalize. That makes label noise the dial of
studies of generalization (:mod:`callbacks.generalization_measures`).

A redrawn label is uniform over all classes, the true one among them: of the share ``p`` that is redrawn ``p (1 - 1/K)``
are wrong, and at ``p = 1`` labels are independent of the images. (Drawn among the other classes only, they would still
say at ``p = 1`` which class it is not.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.perturbation import Batch, Perturbation, fold_seed, run_seed

# ---------------------------------------------------------------------- draws by index


def _signed(number: int) -> int:
    """The int64 with these 64 bits."""
    return (number & (2**64 - 1)) - ((number & 2**63) << 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed(index: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 2**31) that look random, one for each index (B,), int64; on any device the same.

    The mixing function of SplitMix64 (Steele et al., 2014): a draw by index needs no table as long as the dataset.
    """
    x = (index.long() + 1) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 33)


def noisy_labels(label: Tensor, index: Tensor, p: float, classes: int, seed: int) -> Tensor:
    """Labels (B,) of which each is redrawn with chance ``p``, uniformly over all classes, by index and seed alone.

    Labels below 0 (unknown) stay.

    Args:
        label: (B,), int64.
        index: (B,), the examples' places in the dataset.
        p: in [0, 1].
        classes: how many.
        seed: of the draws.
    """
    chosen = hashed(index, fold_seed(seed, "which")) < round(p * 2**31)
    drawn = hashed(index, fold_seed(seed, "label")) % classes
    return torch.where(chosen & (label >= 0), drawn.to(label.dtype), label)


# ---------------------------------------------------------------------- the technique


class LabelNoise(Perturbation):
    """Trains on labels of which a share ``p`` was redrawn once and for all.

    Which examples, and what they get, depends on their ``index`` in the dataset and on the seed alone: the same in
    every epoch, on every rank and after resuming. Each is redrawn with chance ``p``, so of N examples it is ``p`` up to
    ``sqrt(p (1 - p) / N)``. There is no schedule: it is another training set. Validation and test keep the true
    labels; diagnostics that look at training examples see the noisy ones (:meth:`as_trained`).

    Args:
        p: chance that an example's label is redrawn, in [0, 1].
        num_classes: labels are drawn among the first so many; null: the data's, else the module's. CoPrompt trains on
            the base classes alone: there, give their number.
        seed: of the draws; null: the run's.
        name: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, an unknown number of classes, or batches without ``index`` and integer
            ``label`` (B,).
    """

    site = "data"
    zero: ClassVar = {"p": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self, p: float = 0.5, num_classes: int | None = None, *, seed: int | None = None, name: str | None = None
    ) -> None:
        super().__init__(seed=seed, name=name)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must lie in [0, 1], not {p}")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        self.p, self.num_classes = p, num_classes
        self._classes = num_classes or 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        known: Any = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        known = known or pl_module.hparams.get("num_classes")
        self._classes = self.num_classes or (known if isinstance(known, int) else 0)
        if not self._classes and stage == "fit":
            raise ValueError("LabelNoise doesn't know how many classes there are: give num_classes")

    def labels(self, label: Tensor, index: Tensor) -> Tensor:
        """What training sees in place of these labels (B,) of the examples at ``index`` (B,) of the dataset."""
        seed = fold_seed(run_seed() if self.seed is None else self.seed, self.name)
        return noisy_labels(label, index, self.p, self._classes, seed)

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.as_trained(module, batch)

    def as_trained(self, module: LightningModule, batch: Batch) -> None:
        label, index = batch.get("label"), batch.get("index")
        integers = all(isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point() for v in (label, index))
        if not integers:
            raise ValueError("LabelNoise needs batches with integer 'label' and 'index', both (B,)")
        assert isinstance(label, Tensor) and isinstance(index, Tensor)
        batch["label"] = self.labels(label, index)
