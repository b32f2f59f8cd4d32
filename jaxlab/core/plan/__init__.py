"""Plans: what a program takes on GPUs that are not here, compiled ahead of time and never run.

    from jaxlab.core import plan
    over = plan.target("h100", topology="1x8x8", mesh={"fsdp": 8, "tensor": -1})
    place = lambda *spec: jax.sharding.NamedSharding(over.mesh, jax.sharding.PartitionSpec(*spec))
    w = jax.ShapeDtypeStruct((8192, 8192), jax.numpy.bfloat16, sharding=place("fsdp", "tensor"))
    print(plan.compile(lambda w: w @ w, w, target=over, labels=("parameters",)).table())

Bytes are XLA's own buffer assignment for one device, collectives are read from the compiled HLO, kernels' instructions
from their PTX and their registers from `ptxas`. GPUs need the extra `aot`; `target("cpu")` needs nothing.
"""

from jaxlab.core.plan.hlo import Collective
from jaxlab.core.plan.hlo import collectives as collectives_of
from jaxlab.core.plan.planning import KINDS, Plan, compile, kernels_of
from jaxlab.core.plan.ptx import Kernel
from jaxlab.core.plan.searching import search
from jaxlab.core.plan.targets import GPUS, PRESETS, Target, target

__all__ = [
    "GPUS",
    "KINDS",
    "PRESETS",
    "Collective",
    "Kernel",
    "Plan",
    "Target",
    "collectives_of",
    "compile",
    "kernels_of",
    "search",
    "target",
]
