"""The plain image classifier: the baseline that every technique is compared with.

Paper: none; empirical risk minimisation
Perturbs: nothing
Plugs in: every technique of callbacks/
Claim: none of its own
Data: emoji in five drawing styles
Run time: about a minute on two cores
Command: python -m recipes.classifier fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes._lazy import lazily

if TYPE_CHECKING:
    from recipes.classifier.module import Classifier

__all__ = ["Classifier"]
__getattr__ = lazily(__name__, "Classifier")
