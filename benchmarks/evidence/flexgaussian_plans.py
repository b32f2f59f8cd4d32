"""Images of six million Gaussians compiled for H100s and A100s: one GPU, and scores over several views. Nothing ran."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "flexgaussian"

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "image": {"phase": "image"},
    "image, four times the pairs": {"phase": "image", "pairs_per_gaussian": 16.0},
    "gradients": {"phase": "gradients"},
    "gradients, four times the pairs": {"phase": "gradients", "pairs_per_gaussian": 16.0},
    "scores, opacity": {"phase": "scores"},
    "scores, alpha_T": {"phase": "scores", "weights": "alpha_T"},
}
"""What is compiled -> what differs from the paper's config."""
PLANS = {
    ("h100", 1): tuple(CHANGES),
    ("a100", 1): ("image", "gradients", "scores, alpha_T"),
    ("h100", 8): ("scores, opacity", "scores, alpha_T"),
}


def items() -> Iterator[Item]:
    """A row a program, GPU and number of devices."""
    from jaxlab import core

    for (gpu, devices), programs in PLANS.items():
        for program in programs:
            yield Item(
                name=f"{program}, {devices} {gpu}",
                table=_TITLE,
                settings={"gpu": gpu, "devices": devices, **core.to_dict(_config(program))},
                run=functools.partial(_row, program, gpu, devices),
            )


_TITLE = (
    "A scene of 6.1 million Gaussians of degree 3 (Mip-NeRF 360's bicycle) in 1920 x 1080 pixels, all of it on every "
    "GPU, but for scores without higher harmonics, room for 2^25 pairs of a tile and a Gaussian: GB a GPU by XLA's "
    "buffer assignment (nothing ran; without a GPU XLA compiles a sort of its own instead of CUB's); our kernels with "
    "registers and spilled bytes a thread by ptxas. Several devices take a view each along the mesh's axis `view`"
)


def _config(program: str) -> Any:
    from jaxlab import core
    from jaxlab.flexgaussian.recipe import PlanConfig

    config = core.load_config(PlanConfig, core.find_config("configs/flexgaussian/paper.yaml"))
    return dataclasses.replace(config, **CHANGES[program])


def _row(program: str, gpu: str, devices: int) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.flexgaussian.compiled import compile_rasteriser

    where = target(gpu, f"1x1x{devices}", {"view": devices})
    made = compile_rasteriser(_config(program), where)
    parts = {name: made.bytes[name] / 1e9 for name in ("parameters", "outputs", "temporaries", "total")}
    sizes = sorted({(kernel.name, kernel.registers, kernel.spill_bytes) for kernel in made.kernels})
    return {
        "GPU": gpu,
        "devices": devices,
        "program": program,
        **parts,
        "fits": made.fits,
        "exchanged, MB": sum(each.bytes * each.count for each in made.collectives) / 1e6,
        "kernels": "; ".join(f"{name} ({registers}, {spilled})" for name, registers, spilled in sizes),
    }
