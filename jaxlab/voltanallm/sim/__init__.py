"""A simulator of serving clusters: what a trace, objectives, clocks and routing would cost in joules.

Example:
    from jaxlab.voltanallm import ControllerConfig
    from jaxlab.voltanallm.sim import ClusterConfig, SimModels, Simulator, Trace, sharegpt

    lengths = sharegpt()
    trace = Trace.from_lengths(lengths.prompt, lengths.output, rate=50, num_requests=1000)
    controller = ControllerConfig("ecofreq", freqs=(1005, 1410), prefill_slo_ms=800, decode_slo_ms=50)
    models = SimModels.preset("llama-3.1-8b-a100")
    print(Simulator(ClusterConfig(2, 2), trace, "tile_aware", controller, models).run().energy_j)

It needs neither JAX nor a GPU. Its joules are simulated, never measured.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.voltanallm.sim.cluster import ClusterConfig
    from jaxlab.voltanallm.sim.latency import Profile, ProfiledLatency
    from jaxlab.voltanallm.sim.metrics import Moment, SimResult
    from jaxlab.voltanallm.sim.models import SimModels
    from jaxlab.voltanallm.sim.simulator import Simulator
    from jaxlab.voltanallm.sim.traces import Lengths, Trace, read_lengths, sharegpt

__all__ = [
    "ClusterConfig",
    "Lengths",
    "Moment",
    "Profile",
    "ProfiledLatency",
    "SimModels",
    "SimResult",
    "Simulator",
    "Trace",
    "read_lengths",
    "sharegpt",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "cluster": ("ClusterConfig",),
        "latency": ("Profile", "ProfiledLatency"),
        "metrics": ("Moment", "SimResult"),
        "models": ("SimModels",),
        "simulator": ("Simulator",),
        "traces": ("Lengths", "Trace", "read_lengths", "sharegpt"),
    },
)
