"""The plain image classifier: the baseline that every technique is compared with.

Paper: none; empirical risk minimisation
Perturbs: nothing
Plugs in: every technique of callbacks/
Claim: none of its own
Data: emoji in five drawing styles
Run time: under a minute on two cores
Command: python -m recipes.classifier fit
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.classifier.module import Classifier

__all__ = ["Classifier"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from recipes.classifier import module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
