"""An engine measured, served under clocks that are simulated, and clusters of A100s in simulation."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.voltanallm import study
from jaxlab.voltanallm.compiled import PlanConfig, compile_phase
from jaxlab.voltanallm.config import ControllerConfig, Phase
from jaxlab.voltanallm.load import LoadResult
from jaxlab.voltanallm.predictor import LatencyTable
from jaxlab.voltanallm.sim import Trace
from jaxlab.voltanallm.study import SimulationConfig, Way

__all__ = ["PlanConfig", "ServingConfig", "SimulationConfig", "plan", "run"]

_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """The whole story.

    Attributes:
      model: random weights of this shape.
      num_pages: of each worker.
      max_running: requests decoded together, at most.
      prefill_chunk: tokens read in one step.
      num_prefill: workers that read prompts.
      num_decode: workers that draw tokens.
      processes: each worker in a process of its own.
      freqs: MHz of the simulated GPUs.
      ways: how their clocks are chosen, see `Way.read`; the first one is what savings are told against.
      prefill_slo_ms: what controllers keep an iteration within that reads prompts; None: four times what a full chunk
        takes at the lowest clock.
      decode_slo_ms: the same for decoding; None: halfway between those of half a batch and of a full one at the lowest
        clock, which will do for small batches only.
      requests: replayed from Azure's conversation trace.
      seconds: in which they come.
      shrink: their lengths are divided by this.
      simulation: of clusters.
      folder: gets tables, samples and answers; None: a temporary one.
      seed: of weights, prompts and noise.
    """

    model: DecoderConfig
    num_pages: int = 129
    max_running: int = 8
    prefill_chunk: int = 64
    num_prefill: int = 1
    num_decode: int = 1
    processes: bool = False
    freqs: tuple[int, ...] = (1005, 1410)
    ways: tuple[str, ...] = ("1410", "1005", "ecofreq")
    prefill_slo_ms: float | None = None
    decode_slo_ms: float | None = None
    requests: int = 40
    seconds: float = 4.0
    shrink: int = 16
    simulation: SimulationConfig = dataclasses.field(default_factory=SimulationConfig)
    folder: str | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.ways:
            raise ValueError("ways: expected at least one, got none")
        for way in map(Way.read, self.ways):
            self.controller(way, 1.0, 1.0)
        for name in ("requests", "seconds", "shrink"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    def controller(self, way: Way, prefill_slo_ms: float, decode_slo_ms: float) -> ControllerConfig:
        """The clocks' controller of a way."""
        return ControllerConfig(
            way.kind,  # pyrefly: ignore[bad-argument-type]
            freqs=self.freqs,
            static_freq=way.freq,
            prefill_slo_ms=prefill_slo_ms,
            decode_slo_ms=decode_slo_ms,
            margin=0.0,
            idle_s=0.2,
        )


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles a step of the engine for a target, which need not be there."""
    return compile_phase(config, target)


def run(config: ServingConfig) -> core.Report:
    """Measures, serves and simulates. Needs nothing but a CPU and the extra `serving`.

    Raises:
      MissingExtra: the extra `serving` is not installed.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: ServingConfig, folder: Path) -> core.Report:
    from jaxlab.inference import Engine, EngineConfig, SamplingParams, generate
    from jaxlab.models import save_pretrained
    from jaxlab.voltanallm import pictures
    from jaxlab.voltanallm.profiling import profile_decode, profile_prefill

    model = Decoder(config.model)
    params = init_params(model, jax.random.key(config.seed))
    save_pretrained(folder / "model", model, params)
    settings = EngineConfig(
        config.num_pages, max_running=config.max_running, prefill_chunk=config.prefill_chunk, kv_dtype="float32"
    )
    engine = Engine(model, params, settings)
    engine.warmup()

    prompts = [list(range(1, 4 + 7 * row)) for row in range(min(6, config.max_running))]
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    plain = generate(model, params, prompts, greedy)
    served = engine.generate(prompts, greedy)
    same = float(np.mean([np.array_equal(a.token_ids, b) for a, b in zip(served, np.asarray(plain.tokens))]))

    samples = {
        "prefill": profile_prefill(engine, freqs=config.freqs, repeats=8),
        "decode": profile_decode(engine, freqs=config.freqs, steps=16),
    }
    errors, tables = {}, {}
    for phase, measured in samples.items():
        fitted, held = measured.split(seed=config.seed)
        ends = settings.batch_buckets if phase == "decode" else None
        errors[phase], tables[phase] = held.error(fitted.fit(boundaries=ends)), measured.fit(boundaries=ends)
        measured.to_csv(folder / f"{phase}_samples.csv")
        tables[phase].to_csv(folder / f"{phase}.csv")

    objectives = _objectives(config, tables)
    trace, synthetic = _trace(config)
    live = {}
    for text in config.ways:
        way = Way.read(text)
        live[str(way)] = serve_once(config, folder, way, tables, objectives, trace)
        live[str(way)].result.save(folder / f"answers_{len(live)}.jsonl")
    outcomes, made_up = study.study(config.simulation)
    base = {each.rate: each for each in reversed(outcomes)}
    *_, busy = sorted(base)[:-1] or sorted(base)  # beyond it nothing keeps its objectives
    savings = {
        f"saved at {busy:g}/s, {each.way}": each.saving(base[busy])
        for each in outcomes
        if each.rate == busy and each is not base[busy]
    }
    return core.Report(
        system="voltanallm",
        title=f"{config.requests} requests over HTTP under simulated clocks, and clusters of A100s in simulation",
        metrics={
            "requests with generate's tokens": same,
            "decode table, held-out error": errors["decode"],
            "prefill table, held-out error": errors["prefill"],
            "failed requests": sum(each.result.failed for each in live.values()),
            "KV bytes moved": sum(each.kv_bytes for each in live.values()),
            **savings,
        },
        tables=(
            (
                f"Served here, {config.num_prefill} + {config.num_decode} workers (times measured, joules simulated)",
                _LIVE,
                _live_rows(live),
            ),
            (
                f"Simulated: {config.simulation.num_prefill} + {config.simulation.num_decode} A100s",
                study.COLUMNS,
                list(study.rows(outcomes)),
            ),
        ),
        plots=(
            ("An iteration's staircase (measured)", pictures.staircase(samples["decode"], tables["decode"])),
            ("Energy saved by load (simulated)", pictures.savings(outcomes)),
            ("Objectives kept by load (simulated)", pictures.attainment(outcomes)),
        ),
        notes=(
            "Iteration times were measured, and stretched by a model for the lower clocks. Controllers here keep those "
            f"that read prompts within {objectives[0]:.1f} ms, and those that decode within {objectives[1]:.1f} ms.",
            "Joules are a power model's, calibrated to the paper's figure; none was measured.",
        ),
        synthetic=synthetic or made_up,
    )


@dataclasses.dataclass(frozen=True)
class Served:
    """A replay against our own server.

    Attributes:
      result: what clients saw.
      joules: of all simulated GPUs.
      kv_bytes: of keys and values that went from worker to worker.
    """

    result: LoadResult
    joules: float
    kv_bytes: int


def serve_once(
    config: ServingConfig,
    folder: Path,
    way: Way,
    tables: dict[str, LatencyTable],
    objectives: tuple[float, float],
    trace: Trace,
) -> Served:
    """Serves the model in `folder` on a free port, with clocks chosen one way, and replays a trace against it."""
    from jaxlab.inference import DisaggregatedEngine, EngineConfig, SamplingParams
    from jaxlab.voltanallm import PowerModel, SimulatedGPU, create_app, make_controller, served
    from jaxlab.voltanallm.load import replay

    settings = EngineConfig(
        config.num_pages, max_running=config.max_running, prefill_chunk=config.prefill_chunk, kv_dtype="float32"
    )
    power = PowerModel(max_mhz=max(config.freqs))
    controller = config.controller(way, *objectives)
    with contextlib.ExitStack() as stack:
        engine: Any = stack.enter_context(
            DisaggregatedEngine.from_pretrained(
                folder / "model",
                settings,
                num_prefill=config.num_prefill,
                num_decode=config.num_decode,
                processes=config.processes,
                transfer="tcp" if config.processes else "inproc",
            )
        )
        gpus = {worker.id: SimulatedGPU(config.freqs, power=power) for worker in engine.workers()}
        controllers = {
            worker.id: make_controller(
                controller,
                worker.mode,
                tables[worker.mode],
                energy=power.energy_table(tables[worker.mode]),
                idle_w=power.idle_w,
            )
            for worker in engine.workers()
        }
        engine.warmup()
        engine.generate([[1, 2, 3]] * config.max_running, SamplingParams(max_tokens=4, temperature=0.0))
        app = create_app(engine, model_name="small", gpu=gpus, controller=controllers, warm=False)
        url = stack.enter_context(served(app))
        before = sum(gpu.energy_j() for gpu in gpus.values())
        result = replay(f"{url}/v1", trace, model="small", vocab_size=config.model.vocab_size, seed=config.seed)
        return Served(result, sum(gpu.energy_j() for gpu in gpus.values()) - before, engine.kv_bytes_moved)


def _objectives(config: ServingConfig, tables: dict[str, LatencyTable]) -> tuple[float, float]:
    low, tokens = min(config.freqs), config.model.max_position_embeddings / 4
    sizes = np.array([max(1, config.max_running // 2), config.max_running])
    decode = tables["decode"].predict(low, sizes, sizes * tokens)
    prefill = 4 * tables["prefill"].predict(low, 1, config.prefill_chunk)
    return config.prefill_slo_ms or prefill, config.decode_slo_ms or float(np.mean(decode))


def _trace(config: ServingConfig) -> tuple[Trace, bool]:
    """The first requests of Azure's conversations, shorter and faster; and whether they are made up."""
    from jaxlab.voltanallm.sim.traces import AZURE_CONVERSATION

    try:
        whole, synthetic = Trace.azure(core.data_path(AZURE_CONVERSATION)), False
    except core.DataUnavailable:
        generator = np.random.default_rng(config.seed)
        gaps, lengths = generator.exponential(1.0, config.requests), generator.lognormal(6, 1, (2, config.requests))
        whole, synthetic = Trace(np.cumsum(gaps), *np.ceil(lengths)), True
    part = whole.part(0, config.requests)
    longest = config.model.max_position_embeddings // 2 - 1
    prompt, output = (
        np.clip(np.ceil(tokens / config.shrink), 1, longest) for tokens in (part.prompt_tokens, part.output_tokens)
    )
    return Trace(part.arrival_s / max(part.arrival_s[-1], 1e-9) * config.seconds, prompt, output), synthetic


_LIVE = (
    *("clocks", "J", "saved", "TTFT ms, median", "TTFT ms, p95", "ITL ms, median", "ITL ms, p95", "tokens/s", "failed"),
)


def _live_rows(live: dict[str, Served]) -> list[tuple[Any, ...]]:
    first = next(iter(live.values())).joules
    rows = []
    for name, each in live.items():
        ttft, gaps = each.result.ttft_ms(), each.result.gaps_ms()
        told = [
            float(np.percentile(values, share)) if values.size else None
            for values in (ttft[np.isfinite(ttft)], gaps)
            for share in (50, 95)
        ]
        rows.append((name, each.joules, 1 - each.joules / first, *told, each.result.tokens_per_s, each.result.failed))
    return rows
