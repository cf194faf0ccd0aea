"""Neural collapse held back by what comes in: features that have to stay near features of an earlier layer.

Paper: Perturbation Analysis of Neural Collapse (arXiv 2210.16658)
Perturbs: the features in front of the head, pulled towards those of an earlier layer
Plugs in: NeuralCollapse (NC1 to NC4 of any network's layers), into any classifier
Claim: within-class variability falls with depth, and along the central path of the paper's model
Data: handwritten digits
Run time: under a minute on two cores
Command: python -m recipes.near_features fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.near_features.module import NearFeatures, central_weights, flow, minimise, nearest_features

__all__ = ["NearFeatures", "central_weights", "flow", "minimise", "nearest_features"]
__getattr__ = lazily(__name__, "NearFeatures", "central_weights", "flow", "minimise", "nearest_features")
