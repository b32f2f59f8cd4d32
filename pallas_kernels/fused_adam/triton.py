"""The step as a Pallas kernel on the Triton backend (NVIDIA, AMD): every array read once and written once, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.fused_adam import reference

# Elements of a program and its warps: two 16-byte loads a thread and array.
_BLOCK, _WARPS = 1024, 4


def step(
    p: Float[Array, " n"],
    m: Float[Array, " n"],
    v: Float[Array, " n"],
    g: Float[Array, " n"],
    scalars: Float[Array, "9"],
    zero: Int[Array, ""],
    *,
    decoupled: bool,
    emit: jnp.dtype | None,
    interpret: bool = False,
) -> tuple[Float[Array, " n"], ...]:
    """New p, m, v (aliases of the old, where those are donated), and the copy if `emit`."""
    n = p.shape[0]
    if n == 0:
        return reference.step(p, m, v, g, scalars, zero, decoupled=decoupled, emit=emit)
    if interpret and jax.typeof(p).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    if g.dtype == jnp.float64:
        raise NotImplementedError("the Triton kernel takes gradients of 16 and 32 bits, got float64")
    dtypes = (jnp.float32,) * 3 if emit is None else (*(jnp.float32,) * 3, emit)
    return pl.pallas_call(
        functools.partial(_kernel, n=n, decoupled=decoupled),
        out_shape=tuple(output_like((n,), dtype, p) for dtype in dtypes),
        grid=(pl.cdiv(n, _BLOCK),),
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="fused_adam",
    )(p, m, v, g, scalars)


def _kernel(*refs: Any, n: int, decoupled: bool) -> None:
    sources, scalars, targets = refs[:4], refs[4], refs[5:]
    at = pl.program_id(0) * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
    mask = at < n if n % _BLOCK else None
    p, m, v, g = (plt.load(ref.at[at], mask=mask, other=None if mask is None else 0) for ref in sources)
    made = reference.formula(p, m, v, g, [scalars[i] for i in range(9)], decoupled=decoupled)
    for ref, value in zip(targets, (*made, made[0])):
        plt.store(ref.at[at], value.astype(ref.dtype), mask=mask)
