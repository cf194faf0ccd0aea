"""Adversarial training: on inputs that an attack has moved.

Paper: Towards Deep Learning Models Resistant to Adversarial Attacks (arXiv 1706.06083), and eight more
Perturbs: the input, or token embeddings, within a ball
Plugs in: the objectives standard, trades, mart, alp, vat, fast, free, freelb, smart
Claim: trained on PGD's inputs, it classifies attacked images better than plain training does
Data: handwritten digits
Run time: about a minute on two cores
Command: python -m recipes.adversarial_training fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.adversarial_training.module import AdversarialTrainer
    from recipes.adversarial_training.objectives import alp_loss, mart_loss, trades_loss, vat_loss

__all__ = ["AdversarialTrainer", "alp_loss", "mart_loss", "trades_loss", "vat_loss"]
__getattr__ = lazily(__name__, "AdversarialTrainer", "alp_loss", "mart_loss", "trades_loss", "vat_loss")
