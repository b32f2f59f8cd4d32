"""The table of methods."""

from collections.abc import Callable
from types import MappingProxyType

from jaxtyping import Array

from jaxlab.instantedit.baselines.inversion_based import ddim_inversion, direct_inversion, plain_inversion, renoise
from jaxlab.instantedit.baselines.inversion_free import flow_edit, sdedit, virtual_inversion
from jaxlab.instantedit.baselines.second_order import fire_flow, rf_solver

Edit = Callable[..., Array]
"""`edit(network, problem, *, num_steps, ...)` -> latents `[B, h, w, C]`."""

METHODS: MappingProxyType[str, Edit] = MappingProxyType(
    {
        "plain_inversion": plain_inversion,
        "ddim_inversion": ddim_inversion,
        "direct_inversion": direct_inversion,
        "virtual_inversion": virtual_inversion,
        "sdedit": sdedit,
        "flow_edit": flow_edit,
        "rf_solver": rf_solver,
        "fire_flow": fire_flow,
        "renoise": renoise,
    }
)
"""Name -> method."""
