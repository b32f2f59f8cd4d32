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
    from jaxlab.voltanallm.controllers import (
        AIMD,
        DynamoLLM,
        GreenLLM,
        StaticClock,
        ThrottLLeM,
        best_static_clock,
        make_controller,
    )
    from jaxlab.voltanallm.fitting import fit_decode, fit_prefill
    from jaxlab.voltanallm.gpu import GPUBackend, GPUUnavailableError, SimulatedGPU
    from jaxlab.voltanallm.launching import Clocks, Launched, ServeConfig, launch
    from jaxlab.voltanallm.limits import Limits
    from jaxlab.voltanallm.nvml import NVMLBackend
    from jaxlab.voltanallm.planning import LeastEnergy, ModelPredictive
    from jaxlab.voltanallm.power import PowerModel, sweet_spot, wasteful_clocks
    from jaxlab.voltanallm.predictor import EnergyTable, LatencyTable
    from jaxlab.voltanallm.profiling import PhaseProfile, Samples, profile
    from jaxlab.voltanallm.router import RequestInfo, Router, WorkerState
    from jaxlab.voltanallm.server import create_app
    from jaxlab.voltanallm.serving import serve, served
    from jaxlab.voltanallm.sim import ClusterConfig, SimModels, SimResult, Simulator, Trace
    from jaxlab.voltanallm.zeus import ZeusBackend

__all__ = [
    "AIMD",
    "Clocks",
    "ClusterConfig",
    "ControllerConfig",
    "DynamoLLM",
    "EcoFreq",
    "EnergyTable",
    "GPUBackend",
    "GPUUnavailableError",
    "GreenLLM",
    "LatencyTable",
    "Launched",
    "LeastEnergy",
    "Limits",
    "ModelPredictive",
    "NVMLBackend",
    "PhaseProfile",
    "PowerModel",
    "RequestInfo",
    "Router",
    "Samples",
    "ServeConfig",
    "SimModels",
    "SimResult",
    "SimulatedGPU",
    "Simulator",
    "StaticClock",
    "ThrottLLeM",
    "Trace",
    "WorkerState",
    "ZeusBackend",
    "best_static_clock",
    "create_app",
    "fit_decode",
    "fit_prefill",
    "launch",
    "make_controller",
    "profile",
    "serve",
    "served",
    "sweet_spot",
    "wasteful_clocks",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "config": ("ControllerConfig",),
        "controller": ("EcoFreq",),
        "controllers": (
            "AIMD",
            "DynamoLLM",
            "GreenLLM",
            "StaticClock",
            "ThrottLLeM",
            "best_static_clock",
            "make_controller",
        ),
        "fitting": ("fit_decode", "fit_prefill"),
        "gpu": ("GPUBackend", "GPUUnavailableError", "SimulatedGPU"),
        "launching": ("Clocks", "Launched", "ServeConfig", "launch"),
        "limits": ("Limits",),
        "nvml": ("NVMLBackend",),
        "planning": ("LeastEnergy", "ModelPredictive"),
        "power": ("PowerModel", "sweet_spot", "wasteful_clocks"),
        "predictor": ("EnergyTable", "LatencyTable"),
        "profiling": ("PhaseProfile", "Samples", "profile"),
        "router": ("RequestInfo", "Router", "WorkerState"),
        "sim": ("ClusterConfig", "SimModels", "SimResult", "Simulator", "Trace"),
        "server": ("create_app",),
        "serving": ("serve", "served"),
        "zeus": ("ZeusBackend",),
    },
)
