"""An image of 1920 x 1080 of a paper-scale scene, and its gradients, compiled for an H100 and an A100. Nothing ran."""

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "flexgaussian"

GPUS = ("h100", "a100")
WHAT = {"image": False, "image and gradients": True}
_BYTES = ("parameters", "temporaries", "outputs", "total")
_TITLE = (
    "6.1 million Gaussians of degree 3, 1920 x 1080, room for 33.6 million pairs of a tile and a Gaussian, by XLA's "
    "buffer assignment (nothing ran): GB on one GPU, the scene as parameters; our kernels with registers and spilled "
    "bytes a thread by ptxas"
)


def items() -> Iterator[Item]:
    """An image, and an image with its gradients, on each GPU."""
    from jaxlab.core import to_dict

    for gpu in GPUS:
        for what, gradients in WHAT.items():
            config = _config(gradients)
            run = functools.partial(_row, gpu, what)
            yield Item(name=f"{what}, {gpu}", table=_TITLE, settings={"gpu": gpu, **to_dict(config)}, run=run)


def _config(gradients: bool) -> Any:
    from jaxlab.flexgaussian.compiled import PlanConfig

    return PlanConfig(gradients=gradients)


def _row(gpu: str, what: str) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.flexgaussian.compiled import compile_rasteriser

    made = compile_rasteriser(_config(WHAT[what]), target(gpu))
    kernels = sorted({f"{kernel.name} ({kernel.registers}, {kernel.spill_bytes})" for kernel in made.kernels})
    sizes = {name: made.bytes[name] / 1e9 for name in _BYTES}
    return {"GPU": gpu, "program": what, **sizes, "fits": made.fits, "kernels": "; ".join(kernels)}
