"""The 512 x 512 edit of Stable Diffusion 1.5 compiled for H100s and A100s, one and over (data, view). Nothing ran."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "instantedit"

PHASES = {"h100": ("edit", "invert", "source", "decode"), "a100": ("edit",)}
MESHES = {"1": None, "1 x 4": {"data": 1, "view": 4}, "2 x 4": {"data": 2, "view": 4}}
"""Devices along (data, view)."""
_OPTIONS = {"xla_backend_optimization_level": 0}  # where only buffers are read


def items() -> Iterator[Item]:
    """Phases on one device with their kernels, the edit over meshes, and what two images take of activations."""
    for gpu, phases in PHASES.items():
        for phase in phases:
            yield _item("phase", f"{phase}, {gpu}", functools.partial(_phase_row, gpu, phase), gpu=gpu, phase=phase)
        for mesh in list(MESHES)[1:]:
            run = functools.partial(_sharded_row, gpu, mesh)
            yield _item("sharded", f"edit over {mesh}, {gpu}", run, gpu=gpu, mesh=MESHES[mesh])
    for mesh in ("1", "2 x 4"):
        run = functools.partial(_activations_row, mesh)
        yield _item("activations", f"activations, {mesh}", run, gpu="h100", mesh=MESHES[mesh])


def _item(kind: str, name: str, run: Any, **settings: Any) -> Item:
    from jaxlab.core import to_dict
    from jaxlab.instantedit.compiled import PlanConfig

    settings = {**settings, "options": _OPTIONS, "sizes": to_dict(PlanConfig())}
    return Item(name=name, table=_TITLES[kind], settings=settings, run=run)


_SIZE = "Stable Diffusion 1.5 with a ControlNet in bfloat16, 512 x 512, N = 4, by XLA's buffer assignment (nothing ran)"
_TITLES = {
    "phase": (
        f"{_SIZE}: GB of one image on one GPU, all weights included; our kernels with registers and spilled bytes a "
        "thread by ptxas, for each head size"
    ),
    "sharded": f"{_SIZE}: GB a GPU, one image for each device along data, and what a whole edit exchanges",
    "activations": (
        f"{_SIZE}: MB of temporaries of two images on one device of an H100 node; XLA keeps a second copy of 3 x 3 "
        "convolutions' weights in the order that they want (their size by shapes), what is left are activations"
    ),
}


def _target(gpu: str, mesh: str) -> Any:
    from jaxlab.core.plan import target

    shape = MESHES[mesh]
    return target(gpu) if shape is None else target(gpu, f"1x1x{shape['data'] * shape['view']}", shape)


def _compiled(gpu: str, mesh: str, *, kernels: bool = False, **changes: Any) -> Any:
    from jaxlab.instantedit.compiled import PlanConfig, compile_phase

    config = dataclasses.replace(PlanConfig(), **changes)
    options = None if kernels else _OPTIONS
    return compile_phase(config, _target(gpu, mesh), options=options, read_kernels=kernels)


def _sizes(made: Any) -> dict[str, Any]:
    parts = {name: made.bytes[name] / 1e9 for name in ("parameters", "temporaries", "total")}
    return {**parts, "fits": made.fits}


def _phase_row(gpu: str, phase: str) -> dict[str, Any]:
    made = _compiled(gpu, "1", phase=phase, kernels=True)
    sizes: dict[str, list[str]] = {}
    for kernel in made.kernels:
        sizes.setdefault(kernel.name, []).append(f"{kernel.registers}, {kernel.spill_bytes}")
    told = "; ".join(f"{name} ({' / '.join(sorted(set(each)))})" for name, each in sizes.items())
    return {"GPU": gpu, "phase": phase, **_sizes(made), "kernels": told}


def _sharded_row(gpu: str, mesh: str) -> dict[str, Any]:
    made = _compiled(gpu, mesh, images=MESHES[mesh]["data"])
    exchanged = sum(each.bytes * each.count for each in made.collectives) / 1e6
    return {"GPU": gpu, "data x view": mesh, **_sizes(made), "exchanged, MB": exchanged}


def _activations_row(mesh: str) -> dict[str, Any]:
    temporaries = _compiled("h100", mesh, images=2).bytes["temporaries"]
    copied = _convolutions()
    return {
        "data x view": mesh,
        "temporaries": temporaries / 1e6,
        "weights, again": copied / 1e6,
        "activations": (temporaries - copied) / 1e6,
    }


def _convolutions() -> int:
    """Bytes of the 3 x 3 kernels of UNet and ControlNet, without the hint encoder, which an edit does not run."""
    import jax

    from jaxlab.instantedit.compiled import abstract_network

    params = dict(abstract_network().params)
    own = {name: value for name, value in params["controlnet"].items() if name != "controlnet_cond_embedding"}
    kernels = [leaf for leaf in jax.tree.leaves([params["unet"], own]) if leaf.shape[:2] == (3, 3)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kernels)
