"""CoPrompt: prompts of a frozen CLIP, learned from a few images and tied to the untouched model.

Paper: Consistency-guided Prompt Learning for Vision-Language Models (arXiv 2306.01195)
Perturbs: prompts of both towers; the teacher sees another view of the image and another sentence about the class
Plugs in: the techniques zero_shot, zero_shot_ensemble, coop, cocoop, maple, promptsrc, coprompt on any ViT CLIP
Claim: with the consistency term, base and novel classes together are told apart better than without it
Data: emoji in five drawing styles, on a small CLIP that comes with the project
Run time: about a minute on two cores
Command: python -m recipes.coprompt fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.coprompt.module import CoPrompt, consistency_loss

__all__ = ["CoPrompt", "consistency_loss"]
__getattr__ = lazily(__name__, "CoPrompt", "consistency_loss")
