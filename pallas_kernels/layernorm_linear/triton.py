"""LayerNorm and the product as Pallas kernels on the Triton backend (NVIDIA, AMD).

The kernels know standardised rows x^ and one matrix only: scale and offset are folded into the weights and a constant
beforehand, arrays of [k, n] and [n], and their gradients follow from x^T d_out (see `xla`). Three kernels: `product`
standardises a tile of rows as it is loaded and multiplies it; `rows_gradient` takes d_out times the weights back
through the norm; `weights_sums` adds x^T d_out over a share of the rows, so that few shares make a deterministic sum.

A row of up to `Tiles.depth` (or `columns`, where rows are the result) is held whole. A longer one is read in parts:
for the statistics, merged part by part (Chan, Golub and LeVeque, 1979), then again for the products, from the cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_tiles import dot, flat, load, store, upright
from pallas_kernels.grouped_matmul.triton import Tiles
from pallas_kernels.layernorm_linear.xla import folded, weight_gradients

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_PROGRAMS = 264  # that share a sum: two for each core of an H100, on every GPU, so that the order is the same


def forward(
    x: Float[Array, "m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    b: Float[Array, " n"] | None,
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """LN(x) w + b."""
    check(interpret, x)
    weights, constant = folded(scale, offset, w, b, x)
    return product(x, weights.astype(x.dtype), constant, eps=eps, interpret=interpret)


def backward(
    x: Float[Array, "m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    d_out: Float[Array, "m n"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, " k"], Float[Array, "k n"], Float[Array, " n"]]:
    """Gradients of x, scale, offset, w and b, the last four in float32."""
    check(interpret, x)
    weights, _ = folded(scale, offset, w, None, x)
    d_x, mean, rstd = rows_gradient(x, weights.astype(x.dtype), d_out, eps=eps, interpret=interpret)
    sums, total = weights_sums(x, mean, rstd, d_out, interpret=interpret)
    return d_x, *weight_gradients(scale, offset, w, sums, total), total


def product(
    x: Float[Array, "m k"],
    weights: Float[Array, "k n"],
    constant: Float[Array, " n"],
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """x^ weights + constant."""
    (m, k), n = x.shape, weights.shape[1]
    tiles = tiles or _FORWARD_TILES[x.dtype.itemsize]
    # Rows of several parts, the last with a mask, take more registers.
    depth = fit(k, tiles.depth if k <= tiles.depth or k % tiles.depth == 0 else tiles.depth // 2)
    tiles = dataclasses.replace(tiles, rows=fit(m, tiles.rows), columns=fit(n, tiles.columns), depth=depth)
    return pl.pallas_call(
        functools.partial(_product_kernel, eps=eps, tiles=tiles),
        out_shape=output_like((m, n), x.dtype, x),
        grid=(pl.cdiv(m, tiles.rows) * pl.cdiv(n, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="layernorm_linear",
    )(x, weights, constant)


def _product_kernel(x_ref: Any, w_ref: Any, constant_ref: Any, out_ref: Any, *, eps: float, tiles: Tiles) -> None:
    (m, k), n = x_ref.shape, w_ref.shape[1]
    column_tiles = pl.cdiv(n, tiles.columns)  # neighbouring programs share their rows
    row, safe, real = rows_of(pl.program_id(0) // column_tiles, tiles.rows, m)
    column, wanted = span(pl.program_id(0) % column_tiles, tiles.columns, n)
    part, _, _ = standardised(x_ref, safe, tiles.depth, eps)

    def step(i, total):
        depth, inside = span(i, tiles.depth, k)
        w = load(w_ref, (depth[:, None], column[None, :]), upright(inside), flat(wanted))
        return total + dot(part(i).astype(w.dtype), w, 0)

    total = fold(pl.cdiv(k, tiles.depth), step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    total += load(constant_ref, (column,), wanted)[None, :]
    store(out_ref, (row[:, None], column[None, :]), total, upright(real), flat(wanted))


def rows_gradient(
    x: Float[Array, "m k"],
    weights: Float[Array, "k n"],
    d_out: Float[Array, "m n"],
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "m k"], Float[Array, " m"], Float[Array, " m"]]:
    """The gradient of x, and the mean and reciprocal deviation of its rows in float32."""
    (m, k), n = x.shape, weights.shape[1]
    tiles = tiles or _ROWS_TILES[x.dtype.itemsize, k > 256]
    sides = {"rows": fit(m, tiles.rows), "columns": fit(k, tiles.columns), "depth": fit(n, tiles.depth)}
    tiles = dataclasses.replace(tiles, **sides)
    moment = output_like((m,), jnp.float32, x)
    d_x, mean, rstd = pl.pallas_call(
        functools.partial(_rows_kernel, eps=eps, tiles=tiles),
        out_shape=(output_like((m, k), x.dtype, x), moment, moment),
        grid=(pl.cdiv(m, tiles.rows),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="layernorm_linear_rows_gradient",
    )(x, weights, d_out)
    return d_x, mean, rstd


def _rows_kernel(
    x_ref: Any, w_ref: Any, d_ref: Any, dx_ref: Any, mean_ref: Any, rstd_ref: Any, *, eps: float, tiles: Tiles
) -> None:
    (m, k), n = x_ref.shape, w_ref.shape[1]
    row, safe, real = rows_of(pl.program_id(0), tiles.rows, m)

    def back(i):
        column, wanted = span(i, tiles.columns, k)

        def step(j, total):
            depth, inside = span(j, tiles.depth, n)
            d = load(d_ref, (safe[:, None], depth[None, :]), flat(inside))
            w = load(w_ref, (column[:, None], depth[None, :]), upright(wanted), flat(inside))
            return total + dot(d, w, 1)

        return fold(pl.cdiv(n, tiles.depth), step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))

    part, mean, rstd = standardised(x_ref, safe, tiles.columns, eps)
    store_through_norm(dx_ref, row, real, tiles.columns, part, rstd, back)
    store(mean_ref, (row,), mean, real)
    store(rstd_ref, (row,), rstd, real)


def weights_sums(
    x: Float[Array, "m k"],
    mean: Float[Array, " m"],
    rstd: Float[Array, " m"],
    d_out: Float[Array, "m n"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "k n"], Float[Array, " n"]]:
    """x^T d_out, and the sum of d_out's rows, float32."""
    (m, k), n = x.shape, d_out.shape[1]
    tiles = tiles or _SUMS_TILES[x.dtype.itemsize]
    sides = {"rows": fit(k, tiles.rows), "columns": fit(n, tiles.columns), "depth": fit(m, tiles.depth)}
    tiles = dataclasses.replace(tiles, **sides)
    grid = pl.cdiv(k, tiles.rows) * pl.cdiv(n, tiles.columns)
    shares = shares_of(m, tiles.depth, pl.cdiv(_PROGRAMS, grid))
    sums, totals = pl.pallas_call(
        functools.partial(_sums_kernel, tiles=tiles),
        out_shape=(output_like((shares, k, n), jnp.float32, x), output_like((shares, n), jnp.float32, x)),
        grid=(shares * grid,),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="layernorm_linear_weights_sums",
    )(x, mean, rstd, d_out)
    return jnp.sum(sums, axis=0), jnp.sum(totals, axis=0)


def _sums_kernel(
    x_ref: Any, mean_ref: Any, rstd_ref: Any, d_ref: Any, sums_ref: Any, totals_ref: Any, *, tiles: Tiles
) -> None:
    (m, k), (shares, _, n) = x_ref.shape, sums_ref.shape
    row_tiles, column_tiles = pl.cdiv(k, tiles.rows), pl.cdiv(n, tiles.columns)
    program = pl.program_id(0)
    share, row_tile = program // (row_tiles * column_tiles), program // column_tiles % row_tiles
    row, wanted = span(row_tile, tiles.rows, k)
    column, inside = span(program % column_tiles, tiles.columns, n)

    def step(i, carry):
        sums, total = carry
        _, safe, real = rows_of(i, tiles.depth, m)
        x = load(x_ref, (safe[:, None], row[None, :]), flat(wanted)).astype(jnp.float32)
        normal = (x - load(mean_ref, (safe,))[:, None]) * load(rstd_ref, (safe,))[:, None]
        d = load(d_ref, (safe[:, None], column[None, :]), upright(real), flat(inside))
        return sums + dot(normal.astype(d.dtype).T, d, 0), total + jnp.sum(d.astype(jnp.float32), axis=0)

    start = jnp.zeros((tiles.rows, tiles.columns), jnp.float32), jnp.zeros(tiles.columns, jnp.float32)
    sums, total = lax.fori_loop(*share_steps(share, shares, m, tiles.depth), step, start)
    store(sums_ref, (share, row[:, None], column[None, :]), sums, upright(wanted), flat(inside))
    first = jnp.broadcast_to(row_tile == 0, column.shape)
    store(totals_ref, (share, column), total, inside, first)


def standardised(
    x_ref: Any, row: Array, depth: int, eps: float
) -> tuple[Callable[[Any], Array], Float[Array, " r"], Float[Array, " r"]]:
    """Rows of x: a function that gives part i, [r, depth], of them standardised, zeros past the end; mean and rstd."""
    width = x_ref.shape[1]
    parts = pl.cdiv(width, depth)

    def read(i):
        column, inside = span(i, depth, width)
        return load(x_ref, (row[:, None], column[None, :]), flat(inside)).astype(jnp.float32), inside

    def deviations(x, inside, mean):
        return x - mean[:, None] if inside is None else jnp.where(inside[None, :], x - mean[:, None], 0.0)

    whole = read(0) if parts == 1 else None

    def moments(i, carry):
        mean, squares = carry
        x, inside = whole or read(i)
        before = jnp.float32(depth) * jnp.asarray(i, jnp.float32)
        count = jnp.minimum(width - before, depth)
        own = jnp.sum(x, axis=1) / count
        apart, share = own - mean, count / (before + count)
        own_squares = jnp.sum(jnp.square(deviations(x, inside, own)), axis=1)
        return mean + apart * share, squares + own_squares + apart * apart * before * share

    zeros = jnp.zeros(row.shape, jnp.float32)
    mean, squares = fold(parts, moments, (zeros, zeros))
    rstd = lax.rsqrt(squares / width + eps)

    def part(i):
        x, inside = whole or read(i)
        return deviations(x, inside, mean) * rstd[:, None]

    return part, mean, rstd


def store_through_norm(
    ref: Any,
    row: Array,
    real: Array | None,
    columns: int,
    part: Callable[[Any], Array],
    rstd: Array,
    back: Callable[[Any], Array],
) -> None:
    """Stores the gradient of rows, from parts of the standardised rows and of their gradient (`back`)."""
    width = ref.shape[1]
    parts = pl.cdiv(width, columns)
    held = (back(0), part(0)) if parts == 1 else None

    def both(i):
        return held or (back(i), part(i))

    def add(i, carry):
        d, normal = both(i)
        return carry[0] + jnp.sum(d * normal, axis=1), carry[1] + jnp.sum(d, axis=1)

    zeros = jnp.zeros(row.shape, jnp.float32)
    along, mean = (total[:, None] / width for total in fold(parts, add, (zeros, zeros)))

    def write(i, carry):
        d, normal = both(i)
        column, wanted = span(i, columns, width)
        value = rstd[:, None] * (d - normal * along - mean)
        store(ref, (row[:, None], column[None, :]), value, upright(real), flat(wanted))
        return carry

    fold(parts, write, jnp.int32(0))


def fold(steps: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` from 0, and no loop for one step."""
    return step(0, carry) if steps == 1 else lax.fori_loop(0, steps, step, carry)


def span(tile: Any, size: int, limit: int) -> tuple[Array, Array | None]:
    """Indices of a tile, and which of them are below a limit; None where all of every tile are."""
    index = tile * size + jnp.arange(size, dtype=jnp.int32)
    return index, None if limit % size == 0 else index < limit


def rows_of(tile: Any, size: int, rows: int) -> tuple[Array, Array, Array | None]:
    """Indices of a tile of rows, the same with the last row again past the end, and which are rows (None: all)."""
    row, real = span(tile, size, rows)
    return row, row if real is None else jnp.minimum(row, rows - 1), real


def shares_of(rows: int, depth: int, most: int) -> int:
    """Into how many shares of whole tiles the rows are divided, none empty."""
    tiles = pl.cdiv(rows, depth)
    return pl.cdiv(tiles, pl.cdiv(tiles, most))


def share_steps(share: Any, shares: int, rows: int, depth: int) -> tuple[Any, Any]:
    """First and last + 1 tile of rows of a share."""
    tiles = pl.cdiv(rows, depth)
    each = pl.cdiv(tiles, shares)
    return share * each, jnp.minimum((share + 1) * each, tiles)


def fit(length: int, most: int) -> int:
    """The side of a tile: a power of two, at least 16, not much beyond the length."""
    return min(most, max(16, pl.next_power_of_2(length)))


def check(interpret: bool, x: Array) -> None:
    """Refuses what the kernels cannot do."""
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {x.dtype}")
    if interpret and jax.typeof(x).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")


# By bytes of an element, and whether rows are longer than 256; what the compiler makes of them is in docs/kernels.md.
_FORWARD_TILES = {2: Tiles(128, 128, 128, warps=8, stages=3), 4: Tiles(64, 64, 128, warps=4, stages=2)}
_ROWS_TILES = {
    (2, False): Tiles(64, 256, 64, warps=8, stages=3),
    (2, True): Tiles(64, 128, 64, warps=8, stages=3),
    (4, False): Tiles(64, 256, 32, warps=8, stages=2),
    (4, True): Tiles(64, 128, 32, warps=8, stages=2),
}
_SUMS_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=4, stages=3)}
