"""MegaFold's triangle multiplication against the formula differentiated by JAX: time, temporaries, the largest problem.

The program is that of training: a value, and the gradients of z and of every weight, from a cotangent that depends on
the value. The widths are AlphaFold 3's. (Its other peers in JAX, tokamax and cuEquivariance, are the formula to XLA.)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import MIB, temporary_bytes
from jaxlab.core.errors import MissingExtra
from pallas_kernels.triangle_multiplication import triangle_multiplication

SYSTEM = "megafold"
PEER = "the formula, differentiated by JAX"
CHANNELS = HIDDEN = 128
DIRECTIONS = ("outgoing", "incoming")
# Of a whole block the specification asks for 0.8 times the temporaries and a length of 1.35 times (section 8, 5).
TIME_BAR, MEMORY_BAR, LENGTH_BAR = 1.0, 1 / 0.8, 1.35
BUDGET = 8 * 2**30


def abstract(n: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """z, mask and weights by name, not there."""
    array, c, f = jax.ShapeDtypeStruct, CHANNELS, HIDDEN
    shapes = {"w_proj": (c, 2 * f), "w_gate": (c, 2 * f), "w_out": (f, c), "w_out_gate": (c, c)}
    weights: dict[str, Any] = {name: array(shape, jnp.float32) for name, shape in shapes.items()}
    weights |= {name: (array((size,), jnp.float32),) * 2 for name, size in (("ln_in", c), ("ln_out", f))}
    return array((1, n, n, c), dtype), array((1, n, n), jnp.bool_), weights


def arrays(n: int) -> tuple[Any, ...]:
    """Random ones, a tenth of the pairs masked."""
    rng = np.random.default_rng(0)
    z, mask, weights = abstract(n)
    made = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 8, x.dtype), (z, weights))
    return made[0], jnp.asarray(rng.random(mask.shape) < 0.9), made[1]


def with_gradients(implementation: str | None, direction: str, z: Any, mask: Any, weights: Any) -> tuple[Any, ...]:
    """The value, and the gradients of half the sum of its squares."""

    def multiply(z, weights):
        return triangle_multiplication(z, mask, **weights, direction=direction, implementation=implementation)

    out, pull = jax.vjp(multiply, z, weights)
    return out, *pull(out)


def compiled(implementation: str | None, direction: str, n: int) -> Any:
    """The program for this CPU, float32."""
    return jax.jit(functools.partial(with_gradients, implementation, direction)).lower(*abstract(n)).compile()


def gpu_bytes(implementation: str | None, direction: str, n: int) -> int:
    """Temporaries of the program compiled for an H100, bfloat16.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    program = functools.partial(with_gradients, implementation, direction)
    labels = ["input", "input", "parameters"]
    args = abstract(n, jnp.bfloat16)
    return plan.compile(program, *args, target=plan.target("h100"), labels=labels, read_kernels=False).bytes[
        "temporaries"
    ]


def held_bytes(program: Any) -> int:
    """Arguments, results and temporaries of a compiled program."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def largest(compiled_at: Callable[[int], Any]) -> int:
    """The most tokens, in steps of 64, with which a program stays within the budget."""
    low, high = 1, 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held_bytes(compiled_at(64 * middle)) <= BUDGET else (low, middle)
    return 64 * low


def cases(quick: bool) -> Iterator[Case]:
    """Time and temporaries on this CPU, temporaries on an H100; unless quick, larger ones and the largest there is."""
    for n in (128,) if quick else (128, 256):
        args = arrays(n)
        for direction in DIRECTIONS:
            own, peer = (compiled(name, direction, n) for name in (None, "reference"))
            what = f"triangle_multiplication {direction}, [1,{n},{n},{CHANNELS}] float32, gradients, CPU"
            run = (functools.partial(program, *args) for program in (own, peer))
            seconds = interleaved(*run, repeats=5 if quick else 7)
            yield Case(SYSTEM, what, "ms", *(1e3 * each for each in seconds), PEER, TIME_BAR)
            mib = (temporary_bytes(program) / MIB for program in (own, peer))
            yield Case(SYSTEM, what, "temporary MiB", *mib, PEER, MEMORY_BAR)
    if not quick:
        what = f"triangle_multiplication, largest N in {BUDGET // 2**30} GiB, float32, gradients, CPU"
        lengths = (float(largest(functools.partial(compiled, name, "outgoing"))) for name in (None, "reference"))
        yield Case(SYSTEM, what, "tokens", *lengths, PEER, LENGTH_BAR, higher_is_better=True)
    for n in (384,) if quick else (384, 768, 1024):
        for direction in DIRECTIONS:
            try:
                mib = [gpu_bytes(name, direction, n) / MIB for name in (None, "reference")]
            except MissingExtra:
                return
            what = f"triangle_multiplication {direction}, [1,{n},{n},{CHANNELS}] bfloat16, gradients, H100"
            yield Case(SYSTEM, what, "temporary MiB", *mib, PEER, MEMORY_BAR)
