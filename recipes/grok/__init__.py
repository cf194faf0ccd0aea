"""Grokking: networks trained far beyond fitting, watched for late generalization, late robustness and their regions.

Paper: Deep Networks Always Grok and Here is Why (arXiv 2402.15555)
Perturbs: nothing; input corners and attacks probe the network at logarithmically spaced steps
Plugs in: LocalComplexity, Grokking
Claim: near training points local complexity falls, rises, and falls again; robustness arrives with the second fall
Data: handwritten digits of 8x8 pixels
Run time: about a minute on one core
Command: python -m recipes.grok fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.grok.module import Grok

__all__ = ["Grok"]
__getattr__ = lazily(__name__, "Grok")
