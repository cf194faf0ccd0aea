"""ScaleLong: diffusion training with scaled long skip connections.

Paper: ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection
  (arXiv 2310.13545)
Perturbs: the long skip connections of a U-Net or U-ViT
Plugs in: `LongSkipScaling` (modes cs, sqrt2, ls, ls_unshared), on any U-Net
Claim: with scaled connections training reaches the same loss in fewer steps
Data: 10,000 handwritten digits
Run time: about two minutes on two cores
Command: python -m recipes.scalelong fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.scalelong.module import Diffusion

__all__ = ["Diffusion"]
__getattr__ = lazily(__name__, "Diffusion")
