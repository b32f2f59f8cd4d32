"""K-means by Lloyd's iterations, a part of the points at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_PART = 1 << 12


def palette(
    points: Float[Array | np.ndarray, "n d"], count: int, *, iterations: int = 10, seed: int = 0
) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " n"]]:
    """Few vectors that stand for many.

    Args:
      points: N of them.
      count: how many are wanted; at most N.
      iterations: moves of all of them to the middle of the points they are nearest to; one that is nearest to none
        stays.
      seed: of the points where they start.

    Returns:
      The vectors [K, D], and the nearest for each point, [N] int32.

    Raises:
      ValueError: no points, no vectors, or no iterations.
    """
    points = np.asarray(points, np.float32)
    if len(points) == 0 or count < 1 or iterations < 1:
        raise ValueError(f"palette: expected points, vectors and iterations, got {len(points)}, {count}, {iterations}")
    chosen = np.random.default_rng(seed).permutation(len(points))[:count]
    centers = jnp.asarray(points[np.sort(chosen)])
    rows = jnp.asarray(np.pad(points, ((0, -len(points) % _PART), (0, 0))).reshape(-1, _PART, points.shape[1]))
    for _ in range(iterations):
        centers = _moved(rows, centers, len(points))
    return np.asarray(centers), np.asarray(_nearest(rows, centers)).reshape(-1)[: len(points)]


@functools.partial(jax.jit, static_argnames="count")
def _moved(rows: Float[Array, "p r d"], centers: Float[Array, "k d"], count: int) -> Float[Array, "k d"]:
    nearest = _nearest(rows, centers).reshape(-1)[:count]
    points = rows.reshape(-1, rows.shape[-1])[:count]
    sums = jnp.zeros_like(centers).at[nearest].add(points)
    members = jnp.zeros(len(centers)).at[nearest].add(1.0)[:, None]
    return jnp.where(members > 0, sums / jnp.maximum(members, 1), centers)


@jax.jit
def _nearest(rows: Float[Array, "p r d"], centers: Float[Array, "k d"]) -> Int[Array, "p r"]:
    half = 0.5 * jnp.sum(jnp.square(centers), axis=1)
    return jax.lax.map(lambda part: jnp.argmin(half - part @ centers.T, axis=1).astype(jnp.int32), rows)
