"""What the tests of runs share."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _simulations(simulations):
    """Remember plans in every file."""
