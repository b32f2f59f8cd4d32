"""The packed model behind a port, and the agent that asks it: energy is a model's, everything else is measured."""

import contextlib
import dataclasses
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlab.eaglet import Planner, ServedExecutor, evaluate
from jaxlab.inference import Engine, EngineConfig
from jaxlab.pipeline.config import PipelineConfig, ServerConfig
from jaxlab.pipeline.quest import WORDS, Quest, prompt
from jaxlab.voltanallm import Clocks, LatencyTable, ServeConfig, launch, profile, served

NAME = "agent"
_LOOK_S = 0.25  # between two looks at the energy counters


def _engine(config: ServerConfig) -> EngineConfig:
    # The buckets between one and all would be compiled as well; a small model gains nothing by them.
    return EngineConfig(
        config.num_pages,
        max_running=config.max_running,
        prefill_chunk=config.prefill_chunk,
        batch_buckets=tuple(sorted({1, config.max_running})),
        kv_dtype="float32",
    )


def profiled(config: ServerConfig, model: Path, place: Path) -> dict[str, Any]:
    """Measures the packed model in one engine, and leaves the tables that a controller predicts by."""
    engine = Engine.from_pretrained(model, _engine(config))
    engine.warmup()
    return {
        phase: {"samples": len(each.samples), "error": each.error}
        for phase, each in profile(engine, place, freqs=config.freqs, steps=8).items()
    }


def objectives(config: ServerConfig, tables: Path) -> dict[str, float]:
    """Milliseconds that a controller keeps an iteration within, by phase."""
    low = min(config.freqs)
    prefill, decode = (LatencyTable.from_csv(tables / f"{phase}.csv", phase) for phase in ("prefill", "decode"))
    full = config.max_running * config.prefill_chunk
    return {
        "prefill": float(config.prefill_slo_ms or 4 * prefill.predict(low, 1, config.prefill_chunk)),
        "decode": float(config.decode_slo_ms or 2 * decode.predict(low, config.max_running, full)),
    }


def worked(config: PipelineConfig, quest: Quest, model: Path, tables: Path) -> dict[str, Any]:
    """Lets the agent do its tasks under each controller, without plans and with the package's planner's."""
    slo, tasks = objectives(config.server, tables), quest.held_out(config.agent.tasks)
    # Before anything is measured: the server would idle meanwhile.
    written = Planner.load().plan_all([task.instruction for task in tasks], temperature=0.0)
    plans = {task.id: plan for task, (plan,) in zip(tasks, written)}
    runs = []
    for controller in config.server.controllers:
        with _serving(config.server, controller, model, tables, slo) as (url, gpus):
            agent = ServedExecutor(
                f"{url}/v1",
                NAME,
                prompt=prompt,
                max_tokens=WORDS,
                temperature=config.agent.temperature,
                concurrency=2 * config.server.max_running,
            )
            with agent.client:
                evaluate(quest.make, agent, tasks[:1])  # connections and first programs
                for planner in (None, lambda task: plans[task.id]):
                    runs.append(
                        {"controller": controller, "planned": planner is not None}
                        | _work(config, quest, agent, tasks, planner, url, gpus)
                    )
    return {"objectives_ms": slo, "runs": runs}


def _work(
    config: PipelineConfig, quest: Quest, agent: Any, tasks: Any, planner: Any, url: str, gpus: dict[str, Any]
) -> dict[str, Any]:
    before, joules, started = _counters(url), _joules(gpus), time.perf_counter()
    with _watched(gpus) as trace:
        report = evaluate(quest.make, agent, tasks, planner=planner, seeds=config.agent.seeds)
    seconds, after = time.perf_counter() - started, _counters(url)
    used = {worker: energy - joules[worker] for worker, energy in _joules(gpus).items()}
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    actions = sum(row["steps"] for row in report.table)
    return {
        **{name: dataclasses.astuple(getattr(report, name)) for name in ("success", "reward", "steps")},
        "episodes": len(report.table),
        "solved": sum(row["success"] for row in report.table),
        "actions": actions,
        "seconds": seconds,
        "prompt_tokens": gained['jaxlab_tokens_total{kind="prompt"}'],
        "written_tokens": gained['jaxlab_tokens_total{kind="generated"}'],
        "joules": sum(used.values()),
        "ttft_ms": 1000
        * gained["jaxlab_time_to_first_token_seconds_sum"]
        / max(gained["jaxlab_time_to_first_token_seconds_count"], 1),
        "switches": sum(value for name, value in gained.items() if name.startswith("jaxlab_clock_switches_total")),
        "trace": trace,
        "lengths": [[row["task_id"], row["seed"], row["steps"], row["success"]] for row in report.table],
    }


@contextlib.contextmanager
def _serving(
    config: ServerConfig, controller: str, model: Path, tables: Path, slo: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server, and the simulated GPU of each worker."""
    settings = ServeConfig(
        str(model),
        _engine(config),
        num_prefill=config.num_prefill,
        num_decode=config.num_decode,
        processes=config.processes,
        clocks=Clocks(
            "simulated",
            config.freqs,
            "none" if controller == "static" else controller,
            tables,
            slo["prefill"],
            slo["decode"],
            margin=0.0,
        ),
    )
    with launch(settings) as launched, served(launched.app(NAME, warm=False)) as url:
        yield url, launched.gpus


def _joules(gpus: dict[str, Any]) -> dict[str, float]:
    return {worker: gpu.energy_j() for worker, gpu in gpus.items()}


def _counters(url: str) -> dict[str, float]:
    """What the server counts, as Prometheus would read it."""
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with here.open(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    rows = re.findall(r"^(jaxlab_\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in rows}


@contextlib.contextmanager
def _watched(gpus: dict[str, Any]) -> Iterator[dict[str, list[float]]]:
    """Power of every worker while the block runs: seconds, and mean watts since the look before, by worker."""
    trace: dict[str, list[float]] = {"seconds": [], **{worker: [] for worker in gpus}}
    over, started = threading.Event(), time.perf_counter()

    def look() -> None:
        then, before = started, _joules(gpus)
        while not over.wait(_LOOK_S):
            now, after = time.perf_counter(), _joules(gpus)
            trace["seconds"].append(round(now - started, 3))
            for worker, joules in after.items():
                trace[worker].append(round((joules - before[worker]) / (now - then), 1))
            then, before = now, after

    thread = threading.Thread(target=look, daemon=True, name="jaxlab-watch")
    thread.start()
    try:
        yield trace
    finally:
        over.set()
        thread.join()
