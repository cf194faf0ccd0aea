"""Attention AT and iAT: adversarial training of text classifiers on their attention, with labels or without.

Paper: Attention Meets Perturbations (arXiv 2009.12064); Attention VAT and iVAT (arXiv 2104.08763)
Perturbs: the scores of attention, before the softmax
Plugs in: word_at, word_iat, attention_rp, attention_at, attention_iat, attention_vat, attention_ivat
Claim: trained on adversarial attention, it classifies mail of other collections better than plain training does
Data: mails, spam or not, tested on collections that weren't trained on
Run time: about a minute on two cores
Command: python -m recipes.attention_at fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.attention_at.module import AttentionClassifier, attention_at, attention_iat

__all__ = ["AttentionClassifier", "attention_at", "attention_iat"]
__getattr__ = lazily(__name__, "AttentionClassifier", "attention_at", "attention_iat")
