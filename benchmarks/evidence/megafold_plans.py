"""What lets longer crops train, by the compiler's word: AlphaFold3's whole training step compiled, none of it run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.evidence import Item

SYSTEM = "megafold"

CROPS = (384, 512, 640, 768)
GPUS = ("h100", "h200")
DEVICES = (1, 8, 32)
FUSED = ("evo_attention", "layernorm_linear", "transition", "triangle_multiplication")
_ATOMS = 18.25  # of a token: 7008 for a crop of 384, the official limit
_STEP = 64
_CHUNK = 8
_GIB = 2**30
_OPTIONS = {"xla_backend_optimization_level": 0}  # only buffers are read


def items() -> Iterator[Item]:
    """Crops with everything fused, with nothing, and without each operation; then longest crops."""
    for crop in CROPS:
        for way in ("all", "none", *(f"without {name}" for name in FUSED)):
            yield _crop_item(crop, way)
    for gpu in GPUS:
        yield from (_longest_item(gpu, way, 1) for way in ("none", "all"))
    yield from (_longest_item(GPUS[0], "all", count) for count in DEVICES[1:])


def _crop_item(crop: int, way: str) -> Item:
    return Item(
        name=f"crop {crop}, {way}",
        table=(
            "AlphaFold3's training step (48 pairformer blocks, 48 noise samples, 8 of them at a time, bfloat16, blocks "
            "recomputed), one structure on one GPU: GiB by XLA's buffer assignment, with all fused operations, without "
            "one of them, and with none (nothing ran)"
        ),
        settings={"crop": crop, "way": way, "atoms": _atoms(crop), "chunk": _CHUNK},
        run=functools.partial(_row, crop, way),
    )


def _longest_item(gpu: str, way: str, devices: int) -> Item:
    return Item(
        name=f"longest crop, {gpu}, {way}, {devices}",
        table=(
            f"Longest crop (a multiple of {_STEP} tokens) whose training step fits, and what it takes in GiB; over "
            "several GPUs with the pair representation spread over all of them (nothing ran)"
        ),
        settings={"gpu": gpu, "way": way, "devices": devices, "step": _STEP, "chunk": _CHUNK},
        run=functools.partial(_longest_row, gpu, way, devices),
    )


def _atoms(crop: int) -> int:
    return 32 * math.ceil(_ATOMS * crop / 32)


@functools.cache
def _bytes(crop: int, way: str, devices: int) -> dict[str, int]:
    """Of one device; H100 and H200 run the same program."""
    from jaxlab.core import plan
    from jaxlab.megafold.compiled import compile_step
    from jaxlab.megafold.config import AF3Config, Kernels

    off = FUSED if way == "none" else tuple(name for name in FUSED if way == f"without {name}")
    kernels = Kernels(**dict.fromkeys(off, "reference"))
    size = {"max_tokens": crop, "max_atoms": _atoms(crop), "sample_chunk": _CHUNK}
    config = dataclasses.replace(AF3Config.af3(), **size, kernels=kernels)
    mesh = {"pair": devices} if devices > 1 else None
    target = plan.target("h200", f"1x{math.ceil(devices / 8)}x{min(devices, 8)}", mesh)
    made = dict(compile_step(config, target, options=_OPTIONS, read_kernels=False).bytes)
    jax.clear_caches()  # a traced step takes a gigabyte
    return made


def _room(gpu: str) -> float:
    from jaxlab.core import plan

    target = plan.target(gpu)
    return target.memory_factor * target.memory_bytes


def _row(crop: int, way: str) -> dict[str, Any]:
    made = _bytes(crop, way, 1)
    return {
        "crop": crop,
        "fused": way,
        "temporaries": round(made["temporaries"] / _GIB, 2),
        "total": round(made["total"] / _GIB, 2),
        **{f"fits {gpu}": made["total"] <= _room(gpu) for gpu in GPUS},
    }


def _longest_row(gpu: str, way: str, devices: int) -> dict[str, Any]:
    crop = longest(lambda crop: _bytes(crop, way, devices)["total"], _room(gpu), max(_STEP, devices), CROPS[-1])
    made = _bytes(crop, way, devices)
    return {
        "GPUs": f"{devices} {gpu}",
        "fused": way,
        "longest crop": crop,
        "total": round(made["total"] / _GIB, 2),
        "room": round(_room(gpu) / _GIB, 2),
    }


def longest(size: Callable[[int], int], room: float, step: int, start: int) -> int:
    """The largest multiple of `step` whose size is within `room`; sought as if sizes were a + b crop^2."""
    known: dict[int, int] = {}
    crop = start
    while True:
        known[crop] = size(crop)
        below = max((n for n, held in known.items() if held <= room), default=0)
        above = min((n for n, held in known.items() if held > room), default=None)
        if above is not None and above - below <= step:
            return below
        (near, held), *rest = sorted(known.items(), key=lambda item: abs(item[1] - room))
        slope = held / near**2
        if rest and rest[0][1] != held:
            slope = (held - rest[0][1]) / (near**2 - rest[0][0] ** 2)
        guess = step * int(math.sqrt(max(near**2 + (room - held) / slope, 0)) / step)
        least, most = below + step, 2 * crop if above is None else above - step
        crop = min(max(guess, least), most)
