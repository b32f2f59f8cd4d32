"""VoltanaLLM: serving with less GPU energy within latency objectives, by clocks and routing (arXiv 2509.04827).

Example:
    from jaxlab.voltanallm import EcoFreq, LatencyTable
    from jaxlab.voltanallm.predictor import Plane

    planes = [Plane(1005, tokens=1e-4, intercept=14.0, batch=0.2, start=1, end=128)]
    planes += [Plane(1410, tokens=1e-4, intercept=11.0, batch=0.15, start=1, end=128)]
    controller = EcoFreq(LatencyTable("decode", planes), freqs=(1005, 1410), slo_ms=50.0)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.voltanallm.config import ControllerConfig
    from jaxlab.voltanallm.controller import EcoFreq
    from jaxlab.voltanallm.fitting import fit_decode, fit_prefill
    from jaxlab.voltanallm.gpu import GPUBackend, GPUUnavailableError, SimulatedGPU
    from jaxlab.voltanallm.power import PowerModel, sweet_spot, wasteful_clocks
    from jaxlab.voltanallm.predictor import EnergyTable, LatencyTable
    from jaxlab.voltanallm.router import RequestInfo, Router, WorkerState

__all__ = [
    "ControllerConfig",
    "EcoFreq",
    "EnergyTable",
    "GPUBackend",
    "GPUUnavailableError",
    "LatencyTable",
    "PowerModel",
    "RequestInfo",
    "Router",
    "SimulatedGPU",
    "WorkerState",
    "fit_decode",
    "fit_prefill",
    "sweet_spot",
    "wasteful_clocks",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "config": ("ControllerConfig",),
        "controller": ("EcoFreq",),
        "fitting": ("fit_decode", "fit_prefill"),
        "gpu": ("GPUBackend", "GPUUnavailableError", "SimulatedGPU"),
        "power": ("PowerModel", "sweet_spot", "wasteful_clocks"),
        "predictor": ("EnergyTable", "LatencyTable"),
        "router": ("RequestInfo", "Router", "WorkerState"),
    },
)
