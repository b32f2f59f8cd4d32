"""A pairformer block at AlphaFold3's widths, all fused operations against none: time, temporaries, the largest crop."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import MIB, temporary_bytes
from benchmarks.megafold_triangle import BUDGET, LENGTH_BAR, MEMORY_BAR, largest
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.modules import PairformerStack

SYSTEM = "megafold"
PEER = "the same without fused operations"
NONE = Kernels(*("reference",) * len(dataclasses.fields(Kernels)))


@functools.cache
def compiled(kernels: Kernels, n: int) -> Any:
    """(params, s, z, mask, cotangents) -> the new s and z, and gradients of s, z and all weights; float32, this CPU."""
    config = dataclasses.replace(AF3Config.af3(), pairformer_blocks=1, dtype="float32", kernels=kernels)
    stack = PairformerStack(config)

    def step(params, s, z, mask, d):
        out, pull = jax.vjp(lambda params, s, z: stack.apply(params, s, z, mask), params, s, z)
        return out, pull(d)

    return jax.jit(step).lower(*abstract(stack, n)).compile()


def abstract(stack: PairformerStack, n: int) -> tuple[Any, ...]:
    """The arguments, not there."""
    s = jax.ShapeDtypeStruct((1, n, stack.config.c_s), jnp.float32)
    z = jax.ShapeDtypeStruct((1, n, n, stack.config.c_z), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, n), jnp.bool_)
    return jax.eval_shape(stack.init, jax.random.key(0), s, z, mask), s, z, mask, (s, z)


def arrays(n: int) -> tuple[Any, ...]:
    """Random ones, a tenth of the tokens masked."""
    rng = np.random.default_rng(0)

    def draw(x: Any) -> jax.Array:
        made = rng.random(x.shape) < 0.9 if x.dtype == bool else rng.normal(size=x.shape) / 8
        return jnp.asarray(made, x.dtype)

    return jax.tree.map(draw, abstract(PairformerStack(dataclasses.replace(AF3Config.af3(), pairformer_blocks=1)), n))


def cases(quick: bool) -> Iterator[Case]:
    """Bar 5 of the specification; unless quick, at its size and with the largest crop."""
    n = 64 if quick else 256
    args, what = arrays(n), f"pairformer block, {n} tokens, float32, gradients, CPU"
    own, peer = compiled(Kernels(), n), compiled(NONE, n)
    run = (functools.partial(program, *args) for program in (own, peer))
    seconds = interleaved(*run, repeats=3)
    yield Case(SYSTEM, what, "ms", *(1e3 * each for each in seconds), PEER, None if quick else 1.0)
    mib = (temporary_bytes(program) / MIB for program in (own, peer))
    yield Case(SYSTEM, what, "temporary MiB", *mib, PEER, MEMORY_BAR)
    if not quick:
        what = f"pairformer block, largest crop in {BUDGET // 2**30} GiB, float32, gradients, CPU"
        lengths = (float(largest(functools.partial(compiled, kernels))) for kernels in (Kernels(), NONE))
        yield Case(SYSTEM, what, "tokens", *lengths, PEER, LENGTH_BAR, higher_is_better=True)
