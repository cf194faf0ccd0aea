"""Noise-mask policy: pre-training under masks that a second network draws, then fine-tuning on clean images.

Paper: Policy Gradient-Driven Noise Mask (arXiv 2406.14568)
Perturbs: the input, multiplied by a mask of Beta variables
Plugs in: NoiseMask (a policy, or fixed Beta, Gaussian and cutout masks), into any image recipe
Claim: a network heated under learned masks and then fine-tuned classifies better than one trained plainly as long
Data: clothing, digits, emoji and brain slices under one label space
Run time: two to three minutes on two cores, plain training for comparison included
Command: python -m recipes.noise_mask fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.noise_mask.module import NoiseMaskPolicy, policy_loss, sample_mask

__all__ = ["NoiseMaskPolicy", "policy_loss", "sample_mask"]
__getattr__ = lazily(__name__, "NoiseMaskPolicy", "policy_loss", "sample_mask")
