"""Names of a recipe that are imported when they are asked for, so that a card and ``--help`` need no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, *names: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a recipe's package, whose public names are in its ``module.py``."""

    def get(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(f"{package}.module"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
