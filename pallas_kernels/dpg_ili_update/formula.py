"""The update rearranged, so that every term is a difference that is exactly zero where the branches are equal.

Step(z, g) - Step(z_src, g_src) = carry (z - z_src) + gain (g - g_src), as a Step is linear, and E0 is in both g:

    g - g_src = w_cfg (Et - Es) + w_dpg (d_tgt - p d_src)
    d_tgt - p d_src = r - q d_src        r = Et - Ec        q = p - 1 = sum(d_src r) / sum(d_src^2)

With equal branches r, and so q, are zero: no cancellation of rounded products, which a compiler may contract (or sums,
which it may order) differently on both sides. A d_src without a direction counts as zero: q d_src is left out, and r is
d_tgt (up to a d_src whose norm over all places is 1e-6 at most), so that equal branches are exact here, too.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALLEST = 1e-12  # square of d_src that still has a direction


class Scales(NamedTuple):
    """f32 scalars: of z - z_src and of g - g_src in z_new, and the two of guidance."""

    carry: Array
    gain: Array
    w_cfg: Array
    w_dpg: Array


def scales(scalars: Float[Array, "7"]) -> Scales:
    """From gamma, t_start, t_end, t, t_next, w_cfg and w_dpg."""
    gamma, t_start, t_end, t, t_next, w_cfg, w_dpg = scalars
    pace = (t_next - t) / (t - t_start + gamma * (t_end - t))
    return Scales(1 + (1 - gamma) * pace, -jnp.sqrt((1 - gamma) * (1 + gamma)) * pace, w_cfg, w_dpg)


def products(
    eps_null: Float[Array, "*n"], eps_tgt: Float[Array, "*n"], eps_cross: Float[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """d_src r and d_src^2, to be summed over places."""
    d_src = eps_cross - eps_null
    return d_src * (eps_tgt - eps_cross), d_src * d_src


def injected(
    z: Float[Array, "*n"],
    z_src: Float[Array, "*n"],
    z_inv: Float[Array, "*n"],
    eps_null: Float[Array, "*n"],
    eps_src: Float[Array, "*n"],
    eps_tgt: Float[Array, "*n"],
    eps_cross: Float[Array, "*n"],
    *,
    sums: tuple[Float[Array, "*#n"], Float[Array, "*#n"]],
    by: Scales,
) -> Float[Array, "*n"]:
    """z_new, from the sums of `products`."""
    product, square = sums
    d_src, r, directed = eps_cross - eps_null, eps_tgt - eps_cross, square > _SMALLEST
    share = jnp.where(directed, product / jnp.where(directed, square, 1.0), 0.0)
    guided = by.w_cfg * (eps_tgt - eps_src) + by.w_dpg * (r - share * d_src)
    return z_inv + (by.carry * (z - z_src) + by.gain * guided)
