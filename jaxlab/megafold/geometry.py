"""Distances, rigid alignment and local frames: what losses and metrics measure structures with. Å, float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ArrayLike = Array | np.ndarray

_EXACT = jax.lax.Precision.HIGHEST


def weighted_rigid_align(
    x: Float[ArrayLike, "... a 3"], target: Float[ArrayLike, "... a 3"], weight: Float[ArrayLike, "... a"]
) -> Float[Array, "... a 3"]:
    """Moves x onto the target: the rotation and translation of least weighted squared error, never a reflection.

    AlphaFold3's algorithm 28. Batch axes broadcast. No gradient passes: that of a singular value decomposition explodes
    for symmetric structures. Fewer than three atoms of positive weight leave the rotation open: only the centroids
    are matched then. Weights that sum to 0 leave x where it is. What atoms of weight 0 hold has no influence.

    Raises:
        ValueError: Shapes that do not fit.
    """
    x, target, weight = (jnp.asarray(value, jnp.float32) for value in (x, target, weight))
    if x.shape[-1:] != (3,) or x.shape[-2:] != target.shape[-2:] or weight.shape[-1:] != x.shape[-2:-1]:
        raise ValueError(
            f"x, target: expected [..., A, 3], and weight: [..., A]; got {x.shape}, {target.shape} and {weight.shape}"
        )
    total = jnp.sum(weight, axis=-1, keepdims=True)
    share = (weight / jnp.where(total > 0, total, 1.0))[..., None]
    used, target = jnp.where(share > 0, x, 0.0), jnp.where(share > 0, target, 0.0)
    x_centre = jnp.sum(share * used, axis=-2, keepdims=True)
    target_centre = jnp.sum(share * target, axis=-2, keepdims=True)
    covariance = jnp.einsum("...ai,...aj->...ij", share * (used - x_centre), target - target_centre, precision=_EXACT)
    u, _, vt = jnp.linalg.svd(covariance)
    handed = jnp.where(jnp.linalg.det(u) * jnp.linalg.det(vt) < 0, -1.0, 1.0)
    signs = jnp.stack([jnp.ones_like(handed), jnp.ones_like(handed), handed], axis=-1)
    rotation = jnp.einsum("...ki,...k,...jk->...ij", vt, signs, u, precision=_EXACT)
    open_ = (jnp.sum(weight > 0, axis=-1) < 3)[..., None, None]
    rotation = jnp.where(open_, jnp.eye(3), rotation)
    moved = jnp.einsum("...ij,...aj->...ai", rotation, x - x_centre, precision=_EXACT) + target_centre
    return jax.lax.stop_gradient(jnp.where(total[..., None] > 0, moved, x))


def distances(x: Float[Array, "*batch a 3"], y: Float[Array, "*batch b 3"]) -> Float[Array, "*batch a b"]:
    """Between every point of x and every point of y; the gradient is 0 where two coincide."""
    squared = sum((x[..., :, None, i] - y[..., None, :, i]) ** 2 for i in range(3))
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def in_frames(
    coords: Float[Array, "a 3"], frames: Int[Array, "n 3"], points: Float[Array, "p 3"]
) -> Float[Array, "n p 3"]:
    """Points as seen from frames of three atoms each, the second being the origin (AlphaFold3, algorithm 29).

    Three atoms in line make a frame that means nothing, but finite numbers.
    """

    def unit(vector):
        return vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-6)

    a, origin, c = jnp.moveaxis(coords[frames], 1, 0)
    to_a, to_c = unit(a - origin), unit(c - origin)
    first, second = unit(to_a + to_c), unit(to_c - to_a)
    axes = jnp.stack([first, second, jnp.cross(first, second)], axis=1)
    return jnp.einsum("nij,npj->npi", axes, points - origin[:, None], precision=_EXACT)


def sum_over_rows(block: Callable[..., Any], rows: int, *arrays: Array) -> Any:
    """The sum of `block(*pieces)` over pieces of `arrays` along their first axis, at most `rows` long.

    The last piece is padded with 0 or False. Intermediates of one piece live at once, in the backward pass too, which
    computes them again. With all rows in one piece this is `block(*arrays)`.
    """
    count = arrays[0].shape[0]
    blocks = -(-count // max(rows, 1))
    if blocks <= 1:
        return block(*arrays)
    rows = -(-count // blocks)

    def split(array):
        padding = ((0, blocks * rows - count), *((0, 0) for _ in array.shape[1:]))
        return jnp.pad(array, padding).reshape(blocks, rows, *array.shape[1:])

    pieces = [split(array) for array in arrays]
    again = jax.checkpoint(block, prevent_cse=False)
    shapes = jax.eval_shape(block, *(piece[0] for piece in pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(sums, piece):
        return jax.tree.map(jnp.add, sums, again(*piece)), None

    return jax.lax.scan(add, zeros, pieces)[0]


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The mean where the mask is True; 0 where it nowhere is."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
