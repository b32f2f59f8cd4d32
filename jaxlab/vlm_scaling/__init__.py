"""Inference-time scaling of vision-language models, and whether they can verify themselves (arXiv 2506.17417).

Example:
    from jaxlab.vlm_scaling import BestOfN, Majority, Oracle, RandomOf, Study, simulation

    model = simulation.Simulation(p=0.4, n_wrong=3, tpr=0.7, fpr=0.5)
    study = Study(
        model.questions(200), model, strategies=[Majority(8), BestOfN(8), Oracle(8), RandomOf(8)], n=8, verifier=model
    )
    print(study.run())

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.vlm_scaling.budget import Choice, choose
    from jaxlab.vlm_scaling.cost import Meter, Tokens
    from jaxlab.vlm_scaling.local import ModelReader, ModelSampler
    from jaxlab.vlm_scaling.report import Report, Row
    from jaxlab.vlm_scaling.samples import Question, Sample
    from jaxlab.vlm_scaling.sampling import Request, Samples, sample
    from jaxlab.vlm_scaling.strategies import (
        BestOfN,
        BudgetForce,
        FilteredVote,
        Greedy,
        Majority,
        Oracle,
        RandomOf,
        Refine,
        SelfSelect,
        WeightedVote,
    )
    from jaxlab.vlm_scaling.study import Study, split

_MODULES = (
    "adapters",
    "aha",
    "budget",
    "cost",
    "endpoint",
    "extract",
    "grade",
    "local",
    "select",
    "simulation",
    "stats",
    "tasks",
    "verify",
    "visual_math",
)

__all__ = [
    "BestOfN",
    "BudgetForce",
    "Choice",
    "FilteredVote",
    "Greedy",
    "Majority",
    "Meter",
    "ModelReader",
    "ModelSampler",
    "Oracle",
    "Question",
    "RandomOf",
    "Refine",
    "Report",
    "Request",
    "Row",
    "Sample",
    "Samples",
    "SelfSelect",
    "Study",
    "Tokens",
    "WeightedVote",
    "choose",
    "sample",
    "split",
    *_MODULES,
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "budget": ("Choice", "choose"),
        "cost": ("Meter", "Tokens"),
        "local": ("ModelReader", "ModelSampler"),
        "report": ("Report", "Row"),
        "samples": ("Question", "Sample"),
        "sampling": ("Request", "Samples", "sample"),
        "strategies": (
            "BestOfN",
            "BudgetForce",
            "FilteredVote",
            "Greedy",
            "Majority",
            "Oracle",
            "RandomOf",
            "Refine",
            "SelfSelect",
            "WeightedVote",
        ),
        "study": ("Study", "split"),
    },
    _MODULES,
)
