"""What offloading lets GH200s train, by the compiler's word: whole steps compiled, none of them run."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "superoffload"

# Layers and hidden size of the artifact's models.
SIZES = {
    "3.5B": (70, 2048),
    "5B": (44, 3072),
    "13B": (65, 4096),
    "15B": (18, 8192),
    "20B": (25, 8192),
    "25B": (30, 8192),
}
BATCH, LENGTH, DEVICES = 4, 1024, 8
LENGTHS = tuple(1 << n for n in range(17, 23))
_METHODS = ("gpu_only", "zero_offload", "superoffload")
_OPTIONS = {"xla_backend_optimization_level": 0}  # only buffers and the schedule are read
_IN_FLIGHT = "xla_gpu_experimental_parallel_async_compute_limit"


def items() -> Iterator[Item]:
    """One row a program."""
    yield from _sizes()
    yield from _fetches()
    yield from _lengths()


def _sizes() -> Iterator[Item]:
    title = (
        f"One GH200 (93.4 of 101.5 GB usable, host 470 of 480 GB), {BATCH} x {LENGTH} tokens, blocks recomputed: GB "
        "of the compiled step (nothing ran). gpu_only: float32 parameters and AdamW; zero_offload: 16-bit weights and "
        "all 16-bit gradients on the GPU; superoffload: layers flow, their gradients leave one by one. Optimizer state "
        "on the host (12 bytes a parameter) and superoffload's undo log (3) are counted, not compiled"
    )
    for name in SIZES:
        for method in _METHODS:
            yield Item(
                name=f"{name}, {method}",
                table=title,
                settings={"size": SIZES[name], "method": method, "batch": BATCH, "length": LENGTH},
                run=lambda name=name, method=method: _size_row(name, method),
            )


def _fetches() -> Iterator[Item]:
    title = (
        "Share of a layer's bytes whose fetch has a matrix product between its start and its end in the scheduled "
        f"program (SuperOffload, 25B), by XLA's flag {_IN_FLIGHT}"
    )
    for limit in (2, 16):
        yield Item(
            name=f"fetches of 25B, {limit}",
            table=title,
            settings={"size": SIZES["25B"], "batch": BATCH, "length": LENGTH, "in_flight": limit},
            run=lambda limit=limit: _fetch_row(limit),
        )


_LONG = {
    "ulysses": "Ulysses and ZeRO-3, AdamW on the GPUs",
    "weights": "SuperOffload, block inputs on the GPUs",
    "superoffload": "SuperOffload, block inputs on the host",
}


def _lengths() -> Iterator[Item]:
    title = (
        f"13B on {DEVICES} GH200, one sequence over all of them, blocks recomputed: GB of one device and of its host, "
        "of the compiled step (nothing ran; optimizer state and undo log on the host counted)"
    )
    for method in _LONG:
        for length in LENGTHS:
            yield Item(
                name=f"13B, {method}, {length}",
                table=title,
                settings={"size": SIZES["13B"], "method": method, "length": length, "devices": DEVICES},
                run=lambda method=method, length=length: _length_row(method, length),
            )


def _size_row(name: str, method: str) -> dict[str, Any]:
    from jaxlab.models.cost import parameter_count

    config = _config(name)
    if method == "gpu_only":
        from jaxlab.core.plan import target
        from jaxlab.training import TrainConfig, plan

        whole = dataclasses.replace(config, param_dtype="float32")
        made = plan(TrainConfig(model=whole, batch_size=BATCH, length=LENGTH), target("gh200"))
    else:
        made = _step(config, method, batch=BATCH, length=LENGTH)
    count = parameter_count(config).total
    return {
        "model": name,
        "parameters, B": count / 1e9,
        "method": method,
        **_places(made),
    }


def _length_row(method: str, length: int) -> dict[str, Any]:
    kind, offload_inputs = ("superoffload", method == "superoffload") if method != "ulysses" else (method, False)
    made = _step(_config("13B"), kind, batch=1, length=length, devices=DEVICES, offload_inputs=offload_inputs)
    return {"method": _LONG[method], "tokens, K": length >> 10, **_places(made)}


def _places(made: Any) -> dict[str, Any]:
    from jaxlab.superoffload.machine import get_machine
    from jaxlab.superoffload.memory import usable

    host = made.bytes.get("host", 0)
    return {
        "device": made.bytes["total"] / 1e9,
        "host": host / 1e9,
        "fits": made.fits and host <= usable(get_machine("gh200"))[1],
    }


def _config(name: str) -> Any:
    from jaxlab.models.decoder import DecoderConfig

    layers, hidden = SIZES[name]
    return DecoderConfig(
        vocab_size=50304,
        hidden_size=hidden,
        intermediate_size=math.ceil(8 * hidden / 3 / 128) * 128,  # a gated MLP of as many parameters as 4 * hidden
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="block",
    )


def _step(config: Any, method: str, *, batch: int, length: int, devices: int = 1, **settings: Any) -> Any:
    from jaxlab.core import plan
    from jaxlab.superoffload.compiled import compile_step

    over = plan.target("gh200", f"1x{devices}x1", {"sequence": devices})
    settings = {"options": _OPTIONS, **settings}
    return compile_step(config, over, method, batch=batch, length=length, **settings)


def _fetch_row(limit: int) -> dict[str, Any]:
    options = {**_OPTIONS, _IN_FLIGHT: limit}
    made = _step(_config("25B"), "superoffload", batch=BATCH, length=LENGTH, options=options)
    loops = [_hidden(computation) for computation in made.hlo.split("\n}\n") if "ENTRY" not in computation]
    forward, backward = (loop for loop in loops if loop is not None)
    return {"in flight": limit, "forward": forward, "backward": backward, "device": made.bytes["total"] / 1e9}


def _hidden(computation: str) -> float | None:
    """The share of the bytes fetched in a loop's body behind a product; None if it fetches nothing."""
    lines = computation.splitlines()
    total = hidden = 0
    for i, line in enumerate(lines):
        fetched = re.match(r" *%dynamic-slice-start\S* = .*S\(5\)\}.*?\), bf16\[([\d,]+)\]", line)
        if fetched is None:
            continue
        end = next(j for j, later in enumerate(lines) if f"fusion-done({line.split()[0]})" in later)
        size = math.prod(map(int, fetched[1].split(",")))
        total += size
        hidden += size * any(re.match(r" *%\S*(gemm|dot|custom-call)", between) for between in lines[i:end])
    return hidden / total if total else None
