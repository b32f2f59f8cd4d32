"""The logits as a Pallas kernel on the Triton backend (NVIDIA, AMD), and their gradients.

`logprob_entropy` gives a program some rows and a share of the vocabulary, over which it walks in tiles that never leave
the core; what the shares have found is merged afterwards. The backward pass stores what `logprob_entropy_slopes` makes
of a tile of logits, far larger than a core's but of a bounded size, and takes it into two plain products (see `xla`).
To keep it in the core, as forward, would make all logits again for every 128 or so of the d columns of either result.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_tiles import dot, flat, load, store, upright
from pallas_kernels.grouped_matmul.triton import Tiles
from pallas_kernels.layernorm_linear.triton import check, fit, fold, rows_of, share_steps, shares_of, span
from pallas_kernels.logprob_entropy.xla import LOW, Marks, Rows, Sums, gradients, merged, results

_PROGRAMS = 264  # two for each core of an H100, on every GPU, so that the order of sums is the same
_TILE, _ROWS = 2**24, 4096  # bytes of a tile of the backward pass, and its rows


def forward(
    hidden: Float[Array, "n d"],
    head: Float[Array, "d v"],
    targets: Int[Array, " n"],
    temperature: Float[Array, ""],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Rows, Rows, Rows]:
    """logp, entropy and lse; logp is -lse where the target is -1."""
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, head.dtype))
    check(interpret, hidden)
    (n, d), v = hidden.shape, head.shape[1]
    tiles = _fit(tiles or _FORWARD_TILES[hidden.dtype.itemsize], n, v, d)
    blocks = pl.cdiv(n, tiles.rows)
    shares = shares_of(v, tiles.columns, pl.cdiv(_PROGRAMS, blocks))
    sums = pl.pallas_call(
        functools.partial(_sums_kernel, tiles=tiles),
        out_shape=(output_like((shares, n), jnp.float32, hidden),) * 4,
        grid=(shares * blocks,),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="logprob_entropy",
    )(hidden, head, targets, temperature[None])
    return results(merged(Sums(*sums)))


def _sums_kernel(
    hidden_ref: Any, head_ref: Any, targets_ref: Any, temperature_ref: Any, *sums_refs: Any, tiles: Tiles
) -> None:
    (n, _), v, shares = hidden_ref.shape, head_ref.shape[1], sums_refs[0].shape[0]
    blocks = pl.cdiv(n, tiles.rows)
    share, block = pl.program_id(0) // blocks, pl.program_id(0) % blocks  # neighbouring programs share their columns
    row, safe, real = rows_of(block, tiles.rows, n)
    target, scale = load(targets_ref, (safe,)), 1 / temperature_ref[0]

    def step(i, sums):
        column, inside = span(i, tiles.columns, v)
        logits = _products(hidden_ref, head_ref, safe, column, inside, tiles) * scale
        if inside is not None:
            logits = jnp.where(inside[None, :], logits, LOW)
        maximum = jnp.maximum(sums.maximum, jnp.max(logits, axis=1))
        shift, away = sums.maximum - maximum, logits - maximum[:, None]
        factor, weight = jnp.exp(shift), jnp.exp(away)
        met = jnp.sum(jnp.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
        return Sums(
            maximum,
            factor * sums.total + jnp.sum(weight, axis=1),
            factor * (sums.moment + shift * sums.total) + jnp.sum(weight * away, axis=1),
            sums.target + met,
        )

    nothing = jnp.zeros(tiles.rows, jnp.float32)
    sums = Sums(nothing + LOW, nothing, nothing, nothing)
    for ref, value in zip(sums_refs, lax.fori_loop(*share_steps(share, shares, v, tiles.columns), step, sums)):
        store(ref, (share, row), value, real)


def backward(*args: Array, interpret: bool = False) -> tuple[Float[Array, "n d"], Float[Array, "d v"]]:
    """Gradients of hidden, in float32, and of head; arguments as those of `xla.gradients`."""
    hidden, head, *rest = args
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, head.dtype))
    check(interpret, hidden)
    made = functools.partial(slopes, interpret=interpret)
    most = _TILE // hidden.dtype.itemsize
    return gradients(hidden, head, *rest, slopes=made, dtype=hidden.dtype, most_rows=_ROWS, most=most)


def slopes(
    hidden: Float[Array, "r d"],
    head: Float[Array, "d c"],
    temperature: Float[Array, ""],
    marks: Marks,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "r c"]:
    """Gradients of the products of rows and columns, in hidden's dtype."""
    (n, d), v = hidden.shape, head.shape[1]
    tiles = _fit(tiles or _SLOPES_TILES[hidden.dtype.itemsize], n, v, d)
    return pl.pallas_call(
        functools.partial(_slopes_kernel, tiles=tiles),
        out_shape=output_like((n, v), hidden.dtype, hidden),
        grid=(pl.cdiv(n, tiles.rows) * pl.cdiv(v, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="logprob_entropy_slopes",
    )(hidden, head, temperature[None], *marks)


def _slopes_kernel(hidden_ref: Any, head_ref: Any, temperature_ref: Any, *refs: Any, tiles: Tiles) -> None:
    *marks_refs, out_ref = refs
    (n, _), v = hidden_ref.shape, head_ref.shape[1]
    blocks = pl.cdiv(n, tiles.rows)  # neighbouring programs share their columns
    row, safe, real = rows_of(pl.program_id(0) % blocks, tiles.rows, n)
    column, inside = span(pl.program_id(0) // blocks, tiles.columns, v)
    products = _products(hidden_ref, head_ref, safe, column, inside, tiles)
    marks = Marks(*(load(ref, (safe,))[:, None] for ref in marks_refs))
    logs = products * (1 / temperature_ref[0]) - marks.lse
    value = jnp.exp(logs) * (marks.level - marks.slope * logs)
    value += jnp.where(column[None, :] == marks.target, marks.peak, 0.0)
    store(out_ref, (row[:, None], column[None, :]), value, upright(real), flat(inside))


def _products(hidden_ref: Any, head_ref: Any, row: Array, column: Array, inside: Array | None, tiles: Tiles) -> Array:
    """Rows times columns, zero past the vocabulary's end."""
    d = hidden_ref.shape[1]

    def step(i, total):
        depth, real = span(i, tiles.depth, d)
        own = load(hidden_ref, (row[:, None], depth[None, :]), flat(real))
        part = load(head_ref, (depth[:, None], column[None, :]), upright(real), flat(inside))
        return total + dot(own, part.astype(own.dtype), 0)

    return fold(pl.cdiv(d, tiles.depth), step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))


def _fit(tiles: Tiles, rows: int, columns: int, depth: int) -> Tiles:
    sides = {"rows": fit(rows, tiles.rows), "columns": fit(columns, tiles.columns), "depth": fit(depth, tiles.depth)}
    return dataclasses.replace(tiles, **sides)


# By bytes of an element; what the compiler makes of them is in docs/kernels.md.
_FORWARD_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=4, stages=3)}
_SLOPES_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=4, stages=3)}
