"""What the attention with a pair bias would take on an H100, over lengths and head sizes: temporaries and kernels."""

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "megafold"

LENGTHS = (128, 256, 384, 768, 1024, 2048)
DIMS = (16, 24, 32, 64)


def items() -> Iterator[Item]:
    """A row for each length and head size."""
    title = (
        "Triangle attention [1,N,N,4,D] with output and four gradients, bfloat16, compiled for an H100: MiB of "
        "temporaries by XLA's buffer assignment, beside those of the formula; registers and spilled bytes of the "
        "kernels by ptxas"
    )
    for dim in DIMS:
        for length in LENGTHS:
            yield Item(
                name=f"N={length}, D={dim}",
                table=title,
                settings={"length": length, "dim": dim, "heads": 4, "gpu": "h100"},
                run=functools.partial(_row, length, dim),
            )


def _row(length: int, dim: int) -> dict[str, Any]:
    from benchmarks.megafold_kernels import MIB, formula, gpu_plan, ours, triangle

    own, peer = (gpu_plan(attend, triangle(length, dim)) for attend in (ours, formula))
    wgmma = [any(name.startswith("wgmma") for name in kernel.ptx_instructions) for kernel in own.kernels]
    registers = {kernel.name.removeprefix("evo_attention_"): kernel.registers for kernel in own.kernels}
    return {
        "N": length,
        "D": dim,
        "temporaries": round(own.bytes["temporaries"] / MIB, 2),
        "of the formula": round(peer.bytes["temporaries"] / MIB, 1),
        "registers forward": registers["evo_attention"],
        "dq": registers["dq"],
        "dk, dv": registers["dkv"],
        "bias": registers["dbias"],
        "spilled": sum(kernel.spill_bytes or 0 for kernel in own.kernels),
        "wgmma in all": all(wgmma),
    }
