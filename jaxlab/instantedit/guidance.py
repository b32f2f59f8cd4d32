"""InstantEdit's two rules: disentangled prompt guidance and inversion latent injection (arXiv 2508.06033)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def dpg(
    eps_null: Float[Array | np.ndarray, "B h w C"],
    eps_tgt: Float[Array | np.ndarray, "B h w C"],
    eps_src: Float[Array | np.ndarray, "B h w C"],
    *,
    w_cfg: ArrayLike = 1.1,
    w_dpg: ArrayLike = 3.0,
    axes: Sequence[int] = (1, 2),
    eps: float = 1e-12,
) -> Float[Array, "B h w C"]:
    """Guidance towards the target prompt; its strong term leaves out what lies along the source prompt's direction.

    `E0 + w_cfg d_tgt + w_dpg (d_tgt - p d_src)`, `d = E - E0`, `p = sum(d_src d_tgt) / sum(d_src^2)`.

    Args:
      eps_null: prediction for the empty prompt at z.
      eps_tgt: for the target prompt.
      eps_src: for the source prompt at the same z.
      w_cfg: weight of ordinary guidance.
      w_dpg: weight of what the source prompt does not explain.
      axes: the sums run over them; (1, 2), the official code's: a projection for each sample and channel.
      eps: where the denominator is not above it p is 0 (the official code gives NaN).

    Returns:
      The guided prediction, float32.

    Raises:
      ValueError: predictions of different shapes, or axes that they do not have.
    """
    for name, eps_of in (("eps_tgt", eps_tgt), ("eps_src", eps_src)):
        _check_shape(name, eps_of, "eps_null", eps_null)
    rank = jnp.ndim(eps_null)
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(f"axes: expected axes of {rank} dimensions, got {tuple(axes)}")
    eps_null, eps_tgt, eps_src = (jnp.asarray(x, jnp.float32) for x in (eps_null, eps_tgt, eps_src))
    d_src, d_tgt = eps_src - eps_null, eps_tgt - eps_null
    axes = tuple(axes)
    along = jnp.sum(d_src * d_tgt, axes, keepdims=True)
    norm = jnp.sum(d_src * d_src, axes, keepdims=True)
    known = norm > eps
    p = jnp.where(known, along / jnp.where(known, norm, 1), 0)
    return eps_null + w_cfg * d_tgt + w_dpg * (d_tgt - p * d_src)


def ili(
    z_inv: Float[Array | np.ndarray, "*shape"],
    z_step: Float[Array | np.ndarray, "*shape"],
    zs_step: Float[Array | np.ndarray, "*shape"],
) -> Float[Array, "*shape"]:
    """The inversion's latents moved by the difference of the two branches' steps.

    The difference is taken first, so that equal branches give z_inv bit for bit.

    Args:
      z_inv: latents of the inversion at the next time.
      z_step: the target branch after its step.
      zs_step: the source branch after its step.

    Raises:
      ValueError: other shapes than that of z_inv.
    """
    for name, z in (("z_step", z_step), ("zs_step", zs_step)):
        _check_shape(name, z, "z_inv", z_inv)
    return jnp.asarray(z_inv) + (jnp.asarray(z_step) - jnp.asarray(zs_step))


def _check_shape(name: str, x: ArrayLike, other_name: str, other: ArrayLike) -> None:
    if jnp.shape(x) != jnp.shape(other):
        raise ValueError(f"{name}: expected the shape of {other_name}, {jnp.shape(other)}, got {jnp.shape(x)}")
