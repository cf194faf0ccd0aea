"""Adversarial training of image classifiers, with the objectives of eight papers.

The claim: a network trained on the inputs that projected gradient descent finds within a ball classifies attacked
images better than one trained on clean images, at a price in clean accuracy.

* ``standard``: cross-entropy on PGD's inputs (Madry et al., arXiv 1706.06083).
* ``trades``: clean cross-entropy and beta times the divergence from clean to adversarial (arXiv 1901.08573).
* ``mart``: boosted cross-entropy and a divergence weighted by what is misclassified (Wang et al., ICLR 2020).
* ``alp``: both cross-entropies and lam times the distance of the logits (arXiv 1803.06373).
* ``vat``: clean cross-entropy and lam times the divergence in the direction to which the output is most sensitive; it
  needs no labels, so examples with label -1 take part in it (arXiv 1704.03976).
* ``fast``: cross-entropy on the inputs of FGSM from a random start (Wong et al., arXiv 2001.03994); a watch says when
  robustness is lost within an epoch.
* ``free``: each batch ``replays`` times, with a perturbation that is carried along (:mod:`callbacks.free`, 1904.12843).
* ``freelb``, ``smart``: of token embeddings, for ViTs (:mod:`callbacks.embeddings`, 1909.11764 and 1911.03437).

What a step does: the technique :class:`Craft` puts the crafted images into the batch as ``adversarial``, at untouched
weights and before any weight perturbation; then ``loss`` is a function of the batch alone.

What is sound here and not in the released codes:

* Crafting takes gradients of the input alone (TRADES' l2 branch, FGSM-RS and free training leak gradients into the
  parameters), moves no batch-norm statistics (FGSM-RS and AWP craft in training mode) and nothing calls ``zero_grad``
  inside the loss (TRADES, MART and VAT do, which breaks accumulation).
* TRADES forwards the clean images in training mode once, not twice, so their batch-norm statistics count once.
* Its random start is clipped to the box; radii are of pixels in [0, 1], normalisation sits inside the model.
* TRADES, VAT and SMART craft in float32 under mixed precision, too: their gradients there are small differences.
* VAT's clean distribution and its gradient step come from the same pass, and only the clean pass moves batch norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.adversary import Norm, classification, pgd
from callbacks.balls import Ball, length, on_ball
from callbacks.embeddings import FreeLB, embedding_layer, smart_loss, smart_step
from callbacks.free import FreeAdversary
from callbacks.layers import Added, Behind, find_layers
from callbacks.overfitting import CatastrophicOverfitting
from callbacks.perturbation import Batch, Mode, Perturbation, crafting
from callbacks.robustness import RobustAccuracy
from recipes.adversarial_training.objectives import alp_loss, kl_divergence, mart_loss, trades_loss, vat_loss
from recipes.classifier import Classifier

Objective = Literal["standard", "trades", "mart", "alp", "vat", "fast", "free", "freelb", "smart"]
#: alpha / eps, steps and the weight of the second term, as published; used where a setting is omitted.
PUBLISHED: dict[str, tuple[float, int, float]] = {
    "standard": (0.25, 10, 0.0),
    "trades": (0.007 / 0.031, 10, 6.0),
    "mart": (0.007 / 0.031, 10, 5.0),
    "alp": (0.25, 10, 0.5),
    "vat": (1.0, 1, 1.0),
    "fast": (1.25, 1, 0.0),
    "free": (1.0, 1, 0.0),
    "freelb": (1 / 6, 2, 0.0),
    "smart": (1.0, 1, 1.0),
}
#: Whose radius is one of embeddings, not of pixels.
EMBEDDED = ("freelb", "smart")


def _float32(x: Tensor) -> torch.autocast:
    """Out of mixed precision: near the clean image a divergence's gradient is a difference that bf16 rounds away."""
    return torch.autocast(x.device.type, enabled=False)


class Craft(Perturbation):
    """Puts ``adversarial`` into the batch: what the recipe's own attack makes of ``image`` (SMART: of the tokens)."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        assert isinstance(module, AdversarialTrainer)
        batch["adversarial"] = module.craft(batch, self)


class AdversarialTrainer(Classifier):
    """A classifier trained on adversarial images.

    Args:
        objective: see the head of this file.
        eps: radius in pixels of [0, 1]; of ``vat`` the l2 length of the step; of ``freelb`` the length of the start and
            the largest one; of ``smart`` the largest entry of a token's perturbation.
        alpha: length of the attack's step; the paper's share of ``eps`` if omitted.
        steps: of the attack (of ``vat``: power iterations; of ``freelb``: K); the paper's if omitted.
        norm: of the ball, ``linf`` or ``l2``.
        beta: weight of the second term (lam of ``alp``, ``vat`` and ``smart``); the paper's if omitted.
        xi: length of the step with which ``vat`` looks for its direction, and deviation of the noise from which
            ``smart`` starts (published 1e-6 and 1e-5, which rounding swallows).
        replays: of ``free``: how often each batch is trained on; an epoch is as many passes over the data.
        layer: of ``freelb`` and ``smart``: whose output is perturbed; the token embedding if omitted.
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
        replays: int = 8,
        layer: str | None = None,
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
        self.objective, self.radius, self.xi, self.attack_mode = objective, eps, xi, attack_mode
        #: Radius and norm as evaluators take them; None where the radius isn't one of pixels.
        self.eps: float | None = None if objective in EMBEDDED else eps
        self.norm: Norm = "l2" if objective == "vat" else norm
        self.replays, self.layer, self.unlabelled = replays, layer, objective == "vat"
        self.alpha = share * eps if alpha is None else alpha
        self.steps = published_steps if steps is None else steps
        self.beta = weight if beta is None else beta
        self._craft = Craft(name="craft")
        self._plugs = self._made()
        self._added: Added | None = None

    def _made(self) -> list[Callback]:
        """The techniques and watches that make up the objective."""
        eps, norm = self.radius, self.norm
        if self.objective == "free":
            return [FreeAdversary(eps, self.replays, norm)]
        if self.objective == "freelb":
            return [FreeLB(self.layer, self.steps, self.alpha, mag=eps, eps=eps, norm=norm)]
        return [self._craft, *([CatastrophicOverfitting()] if self.objective == "fast" else [])]

    def configure_callbacks(self) -> list[Callback]:
        there: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
        watched = any(isinstance(c, CatastrophicOverfitting) for c in there)
        own = [c for c in self._plugs if not (watched and isinstance(c, CatastrophicOverfitting))]
        return [] if own[0] in there else own

    def setup(self, stage: str) -> None:
        there: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # as above
        watched = [c.monitor for c in there if isinstance(c, ModelCheckpoint)]
        if stage == "fit" and self.monitor[0] in watched and not any(isinstance(c, RobustAccuracy) for c in there):
            raise ValueError(
                f"the best checkpoint is chosen by {self.monitor[0]}, which RobustAccuracy logs: add "
                "--trainer.callbacks+=RobustAccuracy, or choose by --checkpoint.monitor val/acc"
            )
        super().setup(stage)

    # ------------------------------------------------------------------ crafting

    def craft(self, batch: Batch, draws: Perturbation | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) of a batch, or, of ``smart``, a perturbation of its tokens (B, T, D).

        ``draws`` gives the random numbers (the recipe's own technique if omitted).
        """
        draws, x, label = draws or self._craft, batch["image"].detach(), batch["label"]
        if self.objective == "vat":
            return self._most_sensitive(x, draws)
        if self.objective == "smart":
            return self._most_sensitive_tokens(x, draws)
        if self.objective in ("trades", "mart"):
            begin = 0.001 * draws.rows("start", x, "normal")
        elif self.norm == "linf":
            begin = draws.rows("start", x) * (2 * self.radius) - self.radius
        else:
            radius = draws.uniform("radius", len(x), device=x.device)
            begin = on_ball(draws.rows("start", x, "normal"), radius, self.radius)
        settings: dict[str, Any] = {"eps": self.radius, "alpha": self.alpha, "steps": self.steps, "norm": self.norm}
        with crafting(self, self.attack_mode):
            if self.objective == "trades":
                with _float32(x):
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
        with crafting(self, "train"), _float32(x):
            with torch.no_grad():
                clean = self(x)
            d = draws.rows("direction", x, "normal")
            for _ in range(self.steps):
                d = (d / length(d).clamp_min(1e-12)).requires_grad_()
                divergence = kl_divergence(clean, self(x + self.xi * d)).sum()
                d = torch.autograd.grad(divergence, d)[0]
        return Ball(x, self.radius, "l2").exact(x + self.radius * d / length(d).clamp_min(1e-12))

    def _tokens(self) -> Added:
        """What adds to the token embedding; hung there the first time, and idle but for SMART's second pass."""
        if self._added is None:
            self.layer = self.layer or embedding_layer(self)
            self._added = Added(find_layers(self, [self.layer])[self.layer])
        return self._added

    def _most_sensitive_tokens(self, x: Tensor, draws: Perturbation) -> Tensor:
        """SMART's steps: from small noise along the gradient of the divergence, within ``eps`` of each entry."""
        added = self._tokens()
        with crafting(self, self.attack_mode), _float32(x):
            behind = Behind(self, added.layer)
            h = behind.reach(lambda: self(x)).float()
            with torch.no_grad():
                clean = self(x)
            noise = self.xi * draws.rows("noise", h, "normal")
            with behind.replaying():
                for _ in range(self.steps):
                    noise.requires_grad_()
                    behind.again(h + noise)
                    gradient = torch.autograd.grad(kl_divergence(clean, self(x)).sum(), noise)[0]
                    noise = smart_step(noise.detach(), gradient, self.alpha, self.radius)
        return noise

    # ------------------------------------------------------------------ the step

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        image, label, adversarial = batch["image"], batch["label"], batch.get("adversarial")
        if self.objective in ("free", "freelb"):  # the technique perturbs what this sees
            return super().loss(batch)
        if adversarial is None and self.objective == "smart":
            adversarial = self.craft(batch)
        if adversarial is None:  # outside of a training step; the perturbation is constant, the image is not
            adversarial = image + (self.craft(batch) - image).detach()
        if self.objective in ("standard", "fast"):
            return super().loss({**batch, "image": adversarial})
        logits = self(image)
        if self.objective == "smart":
            added = self._tokens()
            try:
                added.delta = adversarial
                with crafting(self, "train", parameters=True):
                    adv_logits = self(image)
            finally:
                added.delta = None
            return F.cross_entropy(logits.float(), label) + self.beta * smart_loss(logits, adv_logits)
        if self.objective == "vat":
            with crafting(self, "train", parameters=True):
                adv_logits = self(adversarial)
            labelled = label >= 0
            known = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum")
            return known / labelled.sum().clamp_min(1) + self.beta * vat_loss(logits, adv_logits)
        objective = {"trades": trades_loss, "mart": mart_loss, "alp": alp_loss}[self.objective]
        return objective(logits, self(adversarial), label, self.beta)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As the classifier's, and ``holds``: whether PGD-20 with 2 starts fails to change the answer at ``eps``.

        Without ``holds`` where the radius isn't one of pixels.
        """
        found = super().predict_step(batch, batch_idx)
        if self.eps is None:
            return found
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
