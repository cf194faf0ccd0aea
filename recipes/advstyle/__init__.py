"""Adversarial style augmentation: training on one domain, tested on others.

Paper: Adversarial Style Augmentation for Domain Generalization (arXiv 2301.12643)
Perturbs: channel means and deviations of features
Plugs in: AdvStyle, into any timm backbone
Claim: trained on one domain, it classifies other domains better than plain training does
Data: emoji in five drawing styles
Run time: about a minute on two cores
Command: python -m recipes.advstyle fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.advstyle.module import DomainGeneralizer

__all__ = ["DomainGeneralizer"]
__getattr__ = lazily(__name__, "DomainGeneralizer")
