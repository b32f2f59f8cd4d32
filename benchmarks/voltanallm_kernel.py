"""Decoding over pages: time and temporaries on this CPU, temporaries of an H100 beside JAX's own kernel.

The peer on the CPU is the formula: all pages of a row gathered, one softmax over them. JAX's kernel is
`jax.experimental.pallas.ops.gpu.paged_attention`, for which the layer of a cache of many must be copied out.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import temporary_bytes
from jaxlab.core.errors import MissingExtra
from pallas_kernels.paged_attention import paged_attention

SYSTEM = "voltanallm"
MIB = 2**20
LAYERS = 4

# Rows, heads, heads of keys and values, head size, tokens of a page, pages of a row, tokens of a row at most.
Sizes = tuple[int, int, int, int, int, int, int]
_CPU: dict[str, Sizes] = {
    "32 rows of 8-192 tokens": (32, 4, 2, 64, 16, 16, 192),
    "64 rows of 8-2048 tokens": (64, 8, 2, 64, 16, 128, 2048),
    "8 rows of 8-128 tokens in a table of 2048": (8, 4, 4, 64, 16, 128, 128),
}
_GPU: Sizes = (16, 32, 8, 128, 16, 128, 2048)


def ours(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lengths: jax.Array, layer: Any) -> jax.Array:
    """The op, of one layer of a cache."""
    return paged_attention(q, k, v, table, lengths, layer=layer)


def formula(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lengths: jax.Array, layer: Any) -> jax.Array:
    """The peer: pages gathered at once, float32."""
    rows, _, dim = q.shape
    keys, values = (
        x.at[layer, :, table].get().swapaxes(1, 2).reshape(rows, x.shape[1], -1, dim).astype(jnp.float32)
        for x in (k, v)
    )
    grouped = q.reshape(rows, keys.shape[1], -1, dim).astype(jnp.float32)
    logits = jnp.einsum("bkgd,bksd->bkgs", grouped, keys) * dim**-0.5
    seen = jnp.arange(keys.shape[2]) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30))
    return jnp.einsum("bkgs,bksd->bkgd", weights, values).astype(q.dtype).reshape(q.shape)


def jax_kernel(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lengths: jax.Array, layer: Any) -> jax.Array:
    """JAX's own, with its defaults; a GPU's only."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    return paged_attention(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k[layer], v[layer], table, lengths)


def abstract(sizes: Sizes = _GPU, dtype: Any = jnp.bfloat16, layers: int = LAYERS) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, pages of keys and of values, table, lengths and layer, not there."""
    rows, heads, kv_heads, dim, page, count, _ = sizes
    array, numbers = (functools.partial(jax.ShapeDtypeStruct, dtype=x) for x in (dtype, jnp.int32))
    pages = array((layers, kv_heads, rows * count + 1, page, dim))
    return array((rows, heads, dim)), pages, pages, numbers((rows, count)), numbers((rows,)), numbers(())


def arrays(sizes: Sizes, dtype: Any = jnp.float32, layers: int = LAYERS) -> tuple[jax.Array, ...]:
    """Those, with shuffled tables and rows of different lengths."""
    rng = np.random.default_rng(0)
    q, k, v, table, lengths, _ = abstract(sizes, dtype, layers)
    q, k, v = (jnp.asarray(rng.normal(size=x.shape), dtype) for x in (q, k, v))
    places = jnp.asarray(1 + rng.permutation(table.size).reshape(table.shape), jnp.int32)
    return q, k, v, places, jnp.asarray(rng.integers(8, sizes[-1] + 1, lengths.shape), jnp.int32), jnp.int32(1)


def cases(quick: bool) -> Iterator[Case]:
    """Against the formula in float32 and bfloat16; and what is allocated on an H100."""
    repeats = 5 if quick else 15
    for what, sizes in _CPU.items():
        for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.bfloat16):
            given = arrays(sizes, dtype)
            mine, theirs = (jax.jit(program).lower(*given).compile() for program in (ours, formula))
            title = f"paged_attention, {what}, {jnp.dtype(dtype).name}, CPU"
            bars = (1.0, 2.0) if dtype == jnp.float32 else (None, None)
            times = interleaved(
                functools.partial(mine, *given), functools.partial(theirs, *given), repeats=repeats, warmup=2
            )
            yield Case(SYSTEM, title, "ms", *(1e3 * time for time in times), "the formula", bars[0])
            mib = (temporary_bytes(program) / MIB for program in (mine, theirs))
            yield Case(SYSTEM, title, "temporary MiB", *mib, "the formula", bars[1])
    for layers in (1, LAYERS):
        try:
            mine, theirs = (gpu_temporaries(program, abstract(layers=layers)) / MIB for program in (ours, jax_kernel))
        except MissingExtra:
            return
        title = f"paged_attention, 16 rows of up to 2048 tokens, one of {layers} layers, bfloat16, H100"
        yield Case(SYSTEM, title, "temporary MiB", mine, theirs, "JAX's Pallas kernel", 2.0)


def gpu_temporaries(function: Callable[..., jax.Array], args: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Temporary bytes, compiled for an H100 that need not be there.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    made = plan.compile(function, *args, target=plan.target("h100"), labels=["input"] * len(args))
    return made.bytes["temporaries"]
