"""The gradient of the weights as a Pallas kernel; the sum and the gradient of its rows are `token_gather`'s kernels."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.token_gather.triton import Tiles, check, fit, inside

_TILES = Tiles(4, 128)


def row_dots(
    y: Float[Array, "b h"],
    tokens: Float[Array, "s h"],
    inv: Int[Array, "s k"],
    num_valid: Int[Array, ""],
    *,
    tiles: Tiles = _TILES,
    interpret: bool = False,
) -> Float[Array, "s k"]:
    """Entry (t, j) is the dot product of `y[inv[t, j]]` and `tokens[t]`, float32; zero where the slot has no row."""
    check(interpret, y, tokens)
    tiles = fit(tiles, y)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        out_shape=output_like(inv.shape, jnp.float32, y),
        grid=(pl.cdiv(inv.shape[0], tiles.rows),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps),
        interpret=interpret,
        name="token_combine_weights_gradient",
    )(y, tokens, inv, num_valid.reshape(1))


def _kernel(y_ref: Any, tokens_ref: Any, inv_ref: Any, num_ref: Any, out_ref: Any, *, tiles: Tiles) -> None:
    (tokens, choices), width = inv_ref.shape, y_ref.shape[1]
    token = pl.program_id(0) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
    choice = jnp.arange(1 << (choices - 1).bit_length(), dtype=jnp.int32)
    real = (token[:, None] < tokens) & (choice[None, :] < choices)
    row = plt.load(inv_ref.at[token[:, None], choice[None, :]], mask=real, other=-1)
    kept = (row >= 0) & (row < num_ref[0])
    row = jnp.where(kept, row, 0)

    def add(i, total):  # a token's part is loaded once for all its rows
        column = i * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
        within = inside(column, width)
        mask = (token[:, None] < tokens) & within
        right = plt.load(tokens_ref.at[token[:, None], column[None, :]], mask=mask, other=0)
        mask = kept[:, :, None] & within[None]
        left = plt.load(y_ref.at[row[:, :, None], column[None, None, :]], mask=mask, other=0)
        return total + jnp.sum(left.astype(jnp.float32) * right.astype(jnp.float32)[:, None, :], axis=2)

    start = jnp.zeros((tiles.rows, choice.size), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(width, tiles.columns), add, start)
    plt.store(out_ref.at[token[:, None], choice[None, :]], total, mask=real)
