"""What InstantEdit is compared with: other rules of editing on the same network, at equal network samples.

Each is a pure function `edit(network, problem, *, num_steps, ...)` from an `EditProblem` to the edited latents
`[B, h, w, C]`, meant to be jitted by its caller; `METHODS` has them by name.

Example:
    from jaxlab.instantedit import PeRFlowSchedule
    from jaxlab.instantedit.baselines import METHODS, count_samples, steps_within

    schedule = PeRFlowSchedule()
    steps = {name: steps_within(edit, schedule, 24) for name, edit in METHODS.items()}
    samples = {name: count_samples(METHODS[name], schedule, num_steps=n) for name, n in steps.items()}
"""

from jaxlab.instantedit.baselines.counting import count_samples, steps_within
from jaxlab.instantedit.baselines.flow import EditProblem
from jaxlab.instantedit.baselines.inversion_based import ddim_inversion, direct_inversion, plain_inversion, renoise
from jaxlab.instantedit.baselines.inversion_free import flow_edit, sdedit, virtual_inversion
from jaxlab.instantedit.baselines.methods import METHODS, Edit
from jaxlab.instantedit.baselines.second_order import fire_flow, rf_solver

__all__ = [
    "METHODS",
    "Edit",
    "EditProblem",
    "count_samples",
    "ddim_inversion",
    "direct_inversion",
    "fire_flow",
    "flow_edit",
    "plain_inversion",
    "renoise",
    "rf_solver",
    "sdedit",
    "steps_within",
    "virtual_inversion",
]
