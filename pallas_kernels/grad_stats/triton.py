"""The statistics as a Pallas kernel on the Triton backend: partial sums of strips, then the same kernel over those."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.grad_stats import reference

# Elements of one step of a program, its warps, and how many programs there are at most.
_BLOCK, _WARPS, _PROGRAMS = 2048, 4, 1024


def stats(g: Float[Array, " n"], *, interpret: bool = False) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Sum of squares in float32, and whether all elements are finite; no atomics, so the order of the sum is fixed."""
    if interpret and jax.typeof(g).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    if g.dtype == jnp.float64:
        raise NotImplementedError("the Triton kernel takes gradients of 16 and 32 bits, got float64")
    if g.shape[0] == 0:
        return reference.stats(g)
    programs = min(_PROGRAMS, pl.cdiv(g.shape[0], _BLOCK))
    partial = functools.partial(_strips, programs=programs, interpret=interpret)
    total, odd = partial(g) if programs == 1 else _strips(*partial(g), programs=1, interpret=interpret)
    return total[0], odd[0] == 0


def _strips(
    g: Array, odd: Array | None = None, *, programs: int, interpret: bool
) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Partial sums of squares and counts of elements that are not finite; of such sums and counts, their sums."""
    n = g.shape[0]
    given = (g,) if odd is None else (g, odd)
    return pl.pallas_call(
        functools.partial(_kernel, n=n, programs=programs, first=odd is None),
        out_shape=(output_like((programs,), jnp.float32, g),) * 2,
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="grad_stats" if odd is None else "grad_stats_total",
    )(*given)


def _kernel(*refs: Any, n: int, programs: int, first: bool) -> None:
    sources, (total_ref, odd_ref) = refs[:-2], refs[-2:]
    program = pl.program_id(0)

    def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        at = (i * programs + program) * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        value, *odd = (plt.load(ref.at[at], mask=at < n, other=0).astype(jnp.float32) for ref in sources)
        if first:
            odd = [(jnp.abs(value) < jnp.inf).astype(jnp.float32)]
            return sums[0] + value * value, sums[1] + (1 - odd[0])
        return sums[0] + value, sums[1] + odd[0]

    zeros = jnp.zeros((_BLOCK,), jnp.float32)
    total, odd = lax.fori_loop(0, pl.cdiv(n, _BLOCK * programs), step, (zeros, zeros))
    plt.store(total_ref.at[program], jnp.sum(total))
    plt.store(odd_ref.at[program], jnp.sum(odd))
