"""Law 4 for what the matrix of recipes and techniques doesn't have: the recipes' other losses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws import laws, right
from tests.laws.ranks import VARIANTS, variant


@pytest.mark.parametrize("recipe", sorted(VARIANTS))
def test_two_ranks_are_one_under_other_losses(recipe: str, two_ranks: Any) -> None:
    for settings in VARIANTS[recipe]:
        with variant(recipe, settings) as label:
            laws.two_ranks_are_one(two_ranks(recipe, label), recipe, right.Nothing)
