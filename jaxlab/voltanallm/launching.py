"""Everything that `serve` starts: an engine or worker processes, their GPUs' clocks, and who sets these."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlab.voltanallm.config import A100_CLOCKS, ControllerConfig
from jaxlab.voltanallm.controllers import make_controller
from jaxlab.voltanallm.gpu import SimulatedGPU
from jaxlab.voltanallm.power import PowerModel
from jaxlab.voltanallm.predictor import LatencyTable
from jaxlab.voltanallm.router import RequestInfo, Router
from jaxlab.voltanallm.server import create_app


@dataclasses.dataclass(frozen=True)
class Clocks:
    """The GPUs' clocks.

    Attributes:
      backend: "none", "simulated", "nvml" or "zeus".
      freqs: MHz to choose from; empty: all that the GPU supports.
      controller: a kind of `ControllerConfig`, or "none".
      tables: folder with `decode.csv` and `prefill.csv`.
      prefill_slo_ms: objective.
      decode_slo_ms: objective.
      margin: of both.

    Raises:
      ValueError: a controller without a GPU or tables.
    """

    backend: str = "none"
    freqs: tuple[int, ...] = ()
    controller: str = "none"
    tables: Path | None = None
    prefill_slo_ms: float = 800.0
    decode_slo_ms: float = 50.0
    margin: float = 0.35

    def __post_init__(self):
        if self.controller == "none":
            return
        if self.backend == "none":
            raise ValueError("gpu: expected one whose clock the controller sets, got none")
        if self.tables is None and self.controller not in ("static", "aimd"):
            raise ValueError(f"tables: expected a folder of `profile`, by which {self.controller} predicts, got none")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What is served, by whom.

    Attributes:
      source: a model, see `load_pretrained`.
      engine: an `EngineConfig`, of every worker.
      dtype: of the weights.
      num_prefill: prefill workers; 0: one engine in this process.
      num_decode: decode workers.
      processes: each worker is a process of its own; False: all take turns in this one, on shared weights.
      policy: of the `Router` that chooses among them.
      warm: workers compile everything first.
      clocks: see there.
    """

    source: str
    engine: Any
    dtype: str = "float32"
    num_prefill: int = 0
    num_decode: int = 1
    processes: bool = True
    policy: str = "ln"
    warm: bool = True
    clocks: Clocks = dataclasses.field(default_factory=Clocks)

    def __post_init__(self):
        if self.num_prefill < 0 or self.num_decode < 1:
            raise ValueError(
                f"num_prefill, num_decode: expected at least 0 and 1, got {self.num_prefill} and {self.num_decode}"
            )


@dataclasses.dataclass(frozen=True)
class Launched:
    """What runs.

    Attributes:
      engine: an `Engine` or a `DisaggregatedEngine`.
      gpus: backends by worker; None: none.
      controllers: by worker; None: none.
    """

    engine: Any
    gpus: Any
    controllers: Any

    def app(self, model_name: str, **options: Any) -> Any:
        """A server of it all, to be given to `serve` or `served`.

        Args:
          model_name: what the model is called.
          **options: `api_key`, `limits` and `warm` of `create_app`.

        Raises:
          MissingExtra: fastapi or prometheus_client is not installed.
        """
        return create_app(
            self.engine,
            model_name=model_name,
            tokenizer=self.engine.tokenizer,
            gpu=self.gpus,
            controller=self.controllers,
            **options,
        )


def open_gpu(backend: str, freqs: tuple[int, ...] = (), index: int = 0) -> Any:
    """A backend by name; None for "none".

    Args:
      backend: see `Clocks`.
      freqs: of a simulated GPU; empty: the A100's of the paper.
      index: of a real one on this machine.

    Raises:
      GPUUnavailableError: there is none.
      PermissionError: its clocks may not be set.
      ValueError: an unknown backend.
    """
    if backend == "none":
        return None
    if backend == "simulated":
        return SimulatedGPU(freqs or A100_CLOCKS)
    if backend == "nvml":
        from jaxlab.voltanallm.nvml import NVMLBackend

        return NVMLBackend([index])
    if backend == "zeus":
        from jaxlab.voltanallm.zeus import ZeusBackend

        return ZeusBackend([index])
    raise ValueError(f"backend: expected none, simulated, nvml or zeus, got {backend!r}")


@contextlib.contextmanager
def launch(config: ServeConfig) -> Iterator[Launched]:
    """Starts it all, and ends it when the block is left: clocks are handed back, worker processes are gone.

    Worker number i, prefill workers first, has GPU i to itself.
    """
    from jaxlab.inference import DisaggregatedEngine, Engine

    with contextlib.ExitStack() as stack:
        if config.num_prefill == 0:
            engine: Any = Engine.from_pretrained(config.source, config.engine, dtype=config.dtype)
            phases = {"engine": "decode"}
        else:
            engine = stack.enter_context(
                DisaggregatedEngine.from_pretrained(
                    config.source,
                    config.engine,
                    num_prefill=config.num_prefill,
                    num_decode=config.num_decode,
                    transfer="tcp" if config.processes else "inproc",
                    processes=config.processes,
                    dtype=config.dtype,
                    warmup=config.warm,
                    route_decode=_route(config),
                    worker_env=lambda worker: {"CUDA_VISIBLE_DEVICES": str(_gpu_of(worker, config.num_prefill))},
                )
            )
            phases = {worker.id: worker.mode for worker in engine.workers()}
        clocks = config.clocks
        gpus: dict[str, Any] = {}
        for worker in phases:
            gpu = open_gpu(clocks.backend, clocks.freqs, _gpu_of(worker, config.num_prefill))
            if gpu is not None:
                stack.callback(gpu.reset)
                gpus[worker] = gpu
        controllers = {worker: _controller(clocks, phase, gpus[worker]) for worker, phase in phases.items() if gpus}
        whole = {worker: each for worker, each in controllers.items() if each is not None}
        yield Launched(engine, gpus or None, whole or None)


def _gpu_of(worker: str, num_prefill: int) -> int:
    """The GPU of a worker: decode workers come after the prefill workers."""
    phase, _, number = worker.partition("-")
    return int(number or 0) + (num_prefill if phase == "decode" else 0)


def _route(config: ServeConfig) -> Any:
    clocks = config.clocks
    table = None if clocks.tables is None else LatencyTable.from_csv(clocks.tables / "decode.csv", "decode")
    energy = None if table is None else _power(clocks, table.freqs).energy_table(table)
    router = Router(config.policy, table=table, energy_table=energy, slo_ms=clocks.decode_slo_ms, margin=clocks.margin)
    return lambda request, tokens, workers: router.route(RequestInfo(request, tokens), workers)


def _controller(clocks: Clocks, phase: Any, gpu: Any) -> Any:
    if clocks.controller == "none":
        return None
    freqs = clocks.freqs or tuple(gpu.supported_clocks())
    config = ControllerConfig(
        clocks.controller,  # pyrefly: ignore[bad-argument-type]
        freqs=freqs,
        prefill_slo_ms=clocks.prefill_slo_ms,
        decode_slo_ms=clocks.decode_slo_ms,
        margin=clocks.margin,
    )
    if clocks.tables is None:
        return make_controller(config, phase, None)  # pyrefly: ignore[bad-argument-type]
    table = LatencyTable.from_csv(clocks.tables / f"{phase}.csv", phase)
    power = _power(clocks, freqs)
    return make_controller(config, phase, table, energy=power.energy_table(table), idle_w=power.idle_w)


def _power(clocks: Clocks, freqs: tuple[int, ...]) -> PowerModel:
    return PowerModel(max_mhz=max(clocks.freqs or freqs))
