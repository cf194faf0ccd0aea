"""Adversarial training of image classifiers, with the objectives of five papers.

The claim: a network trained on the inputs that projected gradient descent finds within a ball classifies attacked
images better than one trained on clean images, at a price in clean accuracy.

* ``standard``: cross-entropy on PGD's inputs (Madry et al., arXiv 1706.06083).
* ``trades``: clean cross-entropy and beta times the divergence from clean to adversarial (arXiv 1901.08573).
* ``mart``: boosted cross-entropy and a divergence weighted by what is misclassified (Wang et al., ICLR 2020).
* ``alp``: both cross-entropies and lam times the distance of the logits (arXiv 1803.06373).
* ``vat``: clean cross-entropy and lam times the divergence in the direction to which the output is most sensitive; it
  needs no labels, so examples with label -1 take part in it (arXiv 1704.03976).
* ``fast``: cross-entropy on the inputs of FGSM from a random start (Wong et al., arXiv 2001.03994).

What a step does: the technique :class:`Craft` puts the crafted images into the batch as ``adversarial``, at untouched
weights and before any weight perturbation; then ``loss`` is a function of the batch alone.

What is sound here and not in the released codes:

* Crafting takes gradients of the input alone (TRADES' l2 branch, FGSM-RS and free training leak gradients into the
  parameters), moves no batch-norm statistics (FGSM-RS and AWP craft in training mode) and nothing calls ``zero_grad``
  inside the loss (TRADES, MART and VAT do, which breaks accumulation).
* TRADES forwards the clean images in training mode once, not twice, so their batch-norm statistics count once.
* Its random start is clipped to the box; radii are of pixels in [0, 1], normalisation sits inside the model.
* VAT's clean distribution and its gradient step come from the same pass, and only the clean pass moves batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from callbacks.adversary import Norm, classification, pgd
from callbacks.balls import Ball, length, on_ball
from callbacks.perturbation import Batch, Mode, Perturbation, crafting
from recipes.adversarial_training.objectives import alp_loss, kl_divergence, mart_loss, trades_loss, vat_loss
from recipes.classifier import Classifier

Objective = Literal["standard", "trades", "mart", "alp", "vat", "fast"]
#: alpha / eps, steps and the weight of the second term, as published; used where a setting is omitted.
PUBLISHED: dict[str, tuple[float, int, float]] = {
    "standard": (0.25, 10, 0.0),
    "trades": (0.007 / 0.031, 10, 6.0),
    "mart": (0.007 / 0.031, 10, 5.0),
    "alp": (0.25, 10, 0.5),
    "vat": (1.0, 1, 1.0),
    "fast": (1.25, 1, 0.0),
}


class Craft(Perturbation):
    """Puts ``adversarial`` into the batch: what the recipe's own attack makes of ``image``."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        assert isinstance(module, AdversarialTrainer)
        batch["adversarial"] = module.craft(batch, self)


class AdversarialTrainer(Classifier):
    """A classifier trained on adversarial images.

    Args:
        objective: see the head of this file.
        eps: radius in pixels of [0, 1]; of ``vat`` the l2 length of the step.
        alpha: length of the attack's step; the paper's share of ``eps`` if omitted.
        steps: of the attack (of ``vat``: power iterations); the paper's if omitted.
        norm: of the ball, ``linf`` or ``l2``.
        beta: weight of the second term (lam of ``alp`` and ``vat``); the paper's if omitted.
        xi: length of the step with which ``vat`` looks for its direction.
        attack_mode: mode of the network while the attack runs; see :func:`callbacks.perturbation.crafting`.
        schedule: of the learning rate: ``cosine`` (per epoch), ``cyclic`` (per step: from 0 up to ``lr`` at ``peak`` of
            the run and down to 0), or ``step`` (a tenth at each of the ``milestones``).
        milestones: epochs, for ``step``.
        peak: for ``cyclic``, in (0, 1).

    Other arguments: see :class:`recipes.classifier.Classifier`.

    Raises:
        ValueError: for a setting out of range.
    """

    #: Robust accuracy falls again long before training ends, so the best checkpoint is chosen by it.
    monitor = ("val/robust_acc", "max")

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 32,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        objective: Objective = "standard",
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int | None = None,
        norm: Norm = "linf",
        beta: float | None = None,
        xi: float = 0.01,
        attack_mode: Mode = "eval",
        schedule: Literal["cosine", "cyclic", "step"] = "cosine",
        milestones: Sequence[int] = (),
        peak: float = 0.5,
        **classifier: Any,
    ) -> None:
        if objective not in PUBLISHED:
            raise ValueError(f"objective must be one of {', '.join(PUBLISHED)}, not '{objective}'")
        if not eps >= 0 or not xi > 0:
            raise ValueError(f"eps must not be negative and xi must be positive, not {eps} and {xi}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        if not 0 < peak < 1:
            raise ValueError(f"peak must lie between 0 and 1, not {peak}")
        if schedule == "step" and not milestones:
            raise ValueError("schedule step needs milestones: the epochs at which the learning rate falls")
        super().__init__(backbone, num_classes, in_chans, image_size, class_names, domain_names, **classifier)
        self.save_hyperparameters()
        share, published_steps, weight = PUBLISHED[objective]
        self.objective, self.eps, self.norm, self.xi, self.attack_mode = objective, eps, norm, xi, attack_mode
        self.alpha = share * eps if alpha is None else alpha
        self.steps = published_steps if steps is None else steps
        self.beta = weight if beta is None else beta
        self._craft = Craft(name="craft")

    def configure_callbacks(self) -> list[Callback]:
        return [] if self._craft in self.trainer.callbacks else [self._craft]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ crafting

    def craft(self, batch: Batch, draws: Perturbation | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) of a batch; ``draws`` gives the random numbers (its own if omitted)."""
        draws, x, label = draws or self._craft, batch["image"].detach(), batch["label"]
        if self.objective == "vat":
            return self._most_sensitive(x, draws)
        if self.objective in ("trades", "mart"):
            begin = 0.001 * draws.rows("start", x, "normal")
        elif self.norm == "linf":
            begin = draws.rows("start", x) * (2 * self.eps) - self.eps
        else:
            radius = draws.uniform("radius", len(x), device=x.device)
            begin = on_ball(draws.rows("start", x, "normal"), radius, self.eps)
        settings: dict[str, Any] = {"eps": self.eps, "alpha": self.alpha, "steps": self.steps, "norm": self.norm}
        with crafting(self, self.attack_mode):
            if self.objective == "trades":
                with torch.no_grad():
                    clean = self(x)
                return pgd(lambda z: kl_divergence(clean, self(z)), x, start=begin, **settings)
            smoothing = self.hparams["label_smoothing"]
            return pgd(
                lambda z: F.cross_entropy(self(z).float(), label, reduction="none", label_smoothing=smoothing),
                x,
                start=begin,
                **settings,
            )

    def _most_sensitive(self, x: Tensor, draws: Perturbation) -> Tensor:
        """VAT's step: along the dominant direction of the divergence's curvature, by power iteration."""
        with crafting(self, "train"):
            with torch.no_grad():
                clean = self(x)
            d = draws.rows("direction", x, "normal")
            for _ in range(self.steps):
                d = (d / length(d).clamp_min(1e-12)).requires_grad_()
                divergence = kl_divergence(clean, self(x + self.xi * d)).sum()
                d = torch.autograd.grad(divergence, d)[0]
        return Ball(x, self.eps, "l2").exact(x + self.eps * d / length(d).clamp_min(1e-12))

    # ------------------------------------------------------------------ the step

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        image, label, adversarial = batch["image"], batch["label"], batch.get("adversarial")
        if adversarial is None:  # outside of a training step; the perturbation is constant, the image is not
            adversarial = image + (self.craft(batch) - image).detach()
        if self.objective in ("standard", "fast"):
            return super().loss({**batch, "image": adversarial})
        logits = self(image)
        if self.objective == "vat":
            with crafting(self, "train", parameters=True):
                adv_logits = self(adversarial)
            labelled = label >= 0
            known = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum")
            return known / labelled.sum().clamp_min(1) + self.beta * vat_loss(logits, adv_logits)
        objective = {"trades": trades_loss, "mart": mart_loss, "alp": alp_loss}[self.objective]
        return objective(logits, self(adversarial), label, self.beta)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As the classifier's, and ``holds``: whether PGD-20 with 2 starts fails to change the answer at ``eps``."""
        found = super().predict_step(batch, batch_idx)
        x, answer = batch["image"].clone(), found["prediction"].clone()
        with crafting(self, "eval"):
            settings: dict[str, Any] = {"eps": self.eps, "steps": 20, "norm": self.norm, "restarts": 2}
            moved = pgd(classification(self), x, answer, **settings)
            with torch.no_grad():
                holds = self(moved).argmax(-1) == answer
        return {**found, "holds": holds}

    def configure_optimizers(self) -> Any:
        optimizers, schedulers = super().configure_optimizers()
        h = self.hparams
        if h["schedule"] == "cyclic":
            total, peak = max(int(self.trainer.estimated_stepping_batches), 1), h["peak"]

            def factor(step: int) -> float:
                return min(step / (peak * total), max(total - step, 0) / ((1 - peak) * total))

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[0], factor)
            return optimizers, [{"scheduler": schedule, "interval": "step"}]
        if h["schedule"] == "step":
            return optimizers, [torch.optim.lr_scheduler.MultiStepLR(optimizers[0], list(h["milestones"]), 0.1)]
        return optimizers, schedulers
