"""Plans that are refused, and one of each phase for a CPU; those of GPUs are evidence."""

import pytest

from jaxlab.core import plan
from jaxlab.flexgaussian.compiled import PlanConfig, compile_rasteriser

SMALL = {"gaussians": 40, "degree": 1, "width": 16, "height": 16}


def test_plans_that_are_refused(unchecked):
    for changes, message in (
        ({"phase": "fit"}, "phase: expected one of"),
        ({"weights": "best"}, "weights: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            PlanConfig(**changes)


def test_scores_over_views():
    """Each device gets a view, whole scores come back, and higher harmonics are left out."""
    target = plan.target("cpu", "1x1x8", {"view": 8})
    made = compile_rasteriser(PlanConfig(phase="scores", **SMALL), target, read_kernels=False)
    assert made.bytes["parameters"] == 40 * 14 * 4
    assert {each.axes for each in made.collectives} == {("view",)}
    assert max(each.bytes for each in made.collectives) == 40 * 4


def test_images_on_one_device():
    target = plan.target("cpu", "1x1x8", {"view": 8})
    made = compile_rasteriser(PlanConfig(**SMALL), target, read_kernels=False)
    assert made.bytes["parameters"] == 40 * (14 + 9) * 4
    assert not made.collectives
