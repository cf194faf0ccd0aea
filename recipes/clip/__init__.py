"""Contrastive training of a small CLIP, the ground on which prompts are learned.

Paper: Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020)
Perturbs: nothing
Plugs in: every technique of callbacks/ that perturbs inputs, features of the image tower or weights
Claim: none of its own
Data: 1,644 emoji in five drawing styles, with their Unicode names and keywords
Run time: three quarters of an hour on two cores
Command: python -m recipes.clip fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.clip.module import Contrastive

__all__ = ["Contrastive"]
__getattr__ = lazily(__name__, "Contrastive")
