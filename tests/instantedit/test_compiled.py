"""Plans that are refused; those that were compiled are evidence."""

import pytest

from jaxlab.core import plan
from jaxlab.instantedit import compiled


def test_plans_that_are_refused(unchecked):
    for changes, message in (
        ({"phase": "fold"}, "phase: expected one of"),
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"num_steps": 3}, "num_steps: expected at least 4, got 3"),
        ({"height": 520}, "height: expected a multiple of 64, got 520"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled.PlanConfig(**changes)
    target = plan.target("cpu", "1x1x8", {"data": 2, "view": 4})
    with pytest.raises(ValueError, match="phase: expected another than source on several devices"):
        compiled.compile_phase(compiled.PlanConfig(phase="source"), target)
