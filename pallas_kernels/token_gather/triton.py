"""The two gathers between tokens and the buffer of their slots as Pallas kernels on the Triton backend (NVIDIA, AMD).

Each has one program for a tile of the result's rows and columns, reads every row it needs once and stores once: no
atomics, and nothing between. Rows from `num_valid` on are neither read nor written.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one program computes: `rows` x `columns` of the result, in `warps` warps."""

    rows: int
    columns: int
    warps: int = 4

    def __post_init__(self):
        for name in ("rows", "columns", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tiles.{name} must be a power of two, got {value}")


# A row's part is 256 columns: 512 bytes of bfloat16, 16 bytes a thread of a warp.
_GATHER_TILES = Tiles(16, 256)
_SUM_TILES = Tiles(8, 256)


def gather(
    x: Float[Array, "s h"],
    ids: Int[Array, " b"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
    *,
    tiles: Tiles = _GATHER_TILES,
    interpret: bool = False,
) -> Float[Array, "b h"]:
    """Row i is `x[ids[i]]`; with weights ids are slots: `weights[slot] * x[slot // k]`. Nothing from num_valid on."""
    check(interpret, x, *(() if weights is None else (weights,)))
    tiles, (rows, width) = fit(tiles, x), (ids.shape[0], x.shape[1])
    scale = () if weights is None else (weights.reshape(-1),)
    return pl.pallas_call(
        functools.partial(_gather_kernel, tiles=tiles, choices=None if weights is None else weights.shape[1]),
        out_shape=output_like((rows, width), x.dtype, x),
        grid=(pl.cdiv(rows, tiles.rows), pl.cdiv(width, tiles.columns)),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps),
        interpret=interpret,
        name="token_gather" if weights is None else "token_combine_rows_gradient",
    )(x, ids, num_valid.reshape(1), *scale)


def _gather_kernel(x_ref: Any, ids_ref: Any, num_ref: Any, *refs: Any, tiles: Tiles, choices: int | None) -> None:
    *scale_ref, out_ref = refs
    first, num_valid = pl.program_id(0) * tiles.rows, num_ref[0]
    column = pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)

    @pl.when(first < num_valid)
    def _():
        row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
        valid = (row < num_valid) & (row < out_ref.shape[0])
        token, scale = plt.load(ids_ref.at[row], mask=valid, other=0), None
        if choices is not None:
            slot = jnp.clip(token, 0, scale_ref[0].shape[0] - 1)
            token, scale = slot // choices, plt.load(scale_ref[0].at[slot]).astype(jnp.float32)
        token = jnp.clip(token, 0, x_ref.shape[0] - 1)
        mask = valid[:, None] & inside(column, x_ref.shape[1])
        value = plt.load(x_ref.at[token[:, None], column[None, :]], mask=mask, other=0)
        if scale is not None:
            value = (value.astype(jnp.float32) * scale[:, None]).astype(out_ref.dtype)
        plt.store(out_ref.at[row[:, None], column[None, :]], value, mask=mask)


def sum_choices(
    y: Float[Array, "b h"],
    inv: Int[Array, "s k"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
    *,
    tiles: Tiles = _SUM_TILES,
    interpret: bool = False,
) -> Float[Array, "s h"]:
    """Row t is the sum over j of `y[inv[t, j]]`, times `weights[t, j]` if given; slots without a row count as zero."""
    check(interpret, y, *(() if weights is None else (weights,)))
    tiles, (tokens, width) = fit(tiles, y), (inv.shape[0], y.shape[1])
    return pl.pallas_call(
        functools.partial(_sum_kernel, tiles=tiles),
        out_shape=output_like((tokens, width), y.dtype, y),
        grid=(pl.cdiv(tokens, tiles.rows), pl.cdiv(width, tiles.columns)),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps),
        interpret=interpret,
        name="token_gather_gradient" if weights is None else "token_combine",
    )(y, inv, num_valid.reshape(1), *(() if weights is None else (weights,)))


def _sum_kernel(y_ref: Any, inv_ref: Any, num_ref: Any, *refs: Any, tiles: Tiles) -> None:
    *weights_ref, out_ref = refs
    tokens, choices = inv_ref.shape
    token = pl.program_id(0) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
    column = pl.program_id(1) * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
    num_valid, safe = num_ref[0], jnp.minimum(token, tokens - 1)

    def add(j, total):
        row = plt.load(inv_ref.at[safe, j])
        kept = (row >= 0) & (row < num_valid)
        mask = kept[:, None] & inside(column, y_ref.shape[1])
        part = plt.load(y_ref.at[jnp.where(kept, row, 0)[:, None], column[None, :]], mask=mask, other=0)
        part = part.astype(jnp.float32)
        for ref in weights_ref:
            part *= plt.load(ref.at[safe, j], mask=kept, other=0).astype(jnp.float32)[:, None]
        return total + part

    total = lax.fori_loop(0, choices, add, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    mask = inside(token, tokens).reshape(-1, 1) & inside(column, y_ref.shape[1])
    plt.store(out_ref.at[token[:, None], column[None, :]], total.astype(out_ref.dtype), mask=mask)


def inside(index: Array, limit: int) -> Array:
    """[1, n] mask of the indices below limit."""
    return (index < limit)[None, :]


def fit(tiles: Tiles, x: Float[Array, "n h"]) -> Tiles:
    """No more columns than the array has."""
    return dataclasses.replace(tiles, columns=min(tiles.columns, 1 << max(x.shape[1] - 1, 0).bit_length()))


def check(interpret: bool, *arrays: Array) -> None:
    """Refuses what the kernels cannot do."""
    for array in arrays:
        if array.dtype not in _DTYPES:
            raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {array.dtype}")
    if interpret and jax.typeof(arrays[0]).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
