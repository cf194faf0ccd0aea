"""From lazy to rich: a scaled predictor and plain SGD at a given temperature, until all margins are fitted.

Paper: Dissecting the effects of SGD noise in distinct regimes of deep learning (arXiv 2301.13703)
Perturbs: the gradient, by SGD's own noise, whose size is the temperature; the scale alpha decides lazy or rich
Plugs in: SGDTemperature (a diagnostic), SGDNoiseInjection (noise of a smaller batch)
Claim: above a temperature the perceptron's weights at the end of training are proportional to it, below they aren't
Data: points on two sides of a plane; odd and even handwritten digits
Run time: half a minute on two cores
Command: python -m recipes.lazy_to_rich fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.lazy_to_rich.module import LazyToRich, MeanFieldMLP, Perceptron, hinge

__all__ = ["LazyToRich", "MeanFieldMLP", "Perceptron", "hinge"]
__getattr__ = lazily(__name__, "LazyToRich", "MeanFieldMLP", "Perceptron", "hinge")
