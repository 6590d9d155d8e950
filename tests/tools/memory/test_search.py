"""The largest size within a limit is found in a few tries."""

import pytest

from paca_lightning.tools.memory.search import largest_fitting


@pytest.mark.parametrize(
    ("fixed", "each", "limit", "most"), [(500, 10, 1000, 50), (0, 1, 1000, 1000), (990, 3, 1000, 3), (1000, 1, 1000, 0)]
)
@pytest.mark.parametrize("known", [1, 40, 900])
def test_the_largest_that_fits_is_found_to_a_percent_in_a_few_tries(
    fixed: int, each: int, limit: int, most: int, known: int
) -> None:
    tried = []

    def peak(units: int) -> int:
        tried.append(units)
        return fixed + each * units

    found = largest_fitting(peak, limit, (known, fixed + each * known), resident=fixed // 2)
    assert found <= most <= found + max(1, found // 100)
    assert len(tried) <= 8
