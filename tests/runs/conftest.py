"""What the tests of runs share."""

import pytest
from remembered_plans import remember_predictions


@pytest.fixture(scope="module", autouse=True)
def simulations():
    """Simulate equal steps of all runs of a file once; what is known may be forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        yield remember_predictions(patch.setattr)
