"""Targets that tests of plans share."""

import pytest

from jaxlab.core import plan


@pytest.fixture(scope="module")
def h100():
    return plan.target("h100")


@pytest.fixture(scope="module")
def nodes():
    return plan.target("h100", "1x2x8", {"node": 2, "expert": 4, "tensor": 2})
