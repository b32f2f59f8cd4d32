"""Two fused reductions and one fused loop over all elements."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dpg_ili_update import formula


def update(
    z: Float[Array, "b h w c"],
    z_src: Float[Array, "b h w c"],
    z_inv: Float[Array, "b h w c"],
    eps_null: Float[Array, "b h w c"],
    eps_src: Float[Array, "b h w c"],
    eps_tgt: Float[Array, "b h w c"],
    eps_cross: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w"],
    scalars: Float[Array, "7"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """z_new, and where(mask, z_new, z_inv)."""
    arrays = (z, z_src, z_inv, eps_null, eps_src, eps_tgt, eps_cross)
    wide = [x.astype(jnp.float32) for x in arrays]
    product, square = formula.products(wide[3], wide[5], wide[6])
    sums = jnp.sum(product, axis=(1, 2), keepdims=True), jnp.sum(square, axis=(1, 2), keepdims=True)
    z_new = formula.injected(*wide, sums=sums, by=formula.scales(scalars)).astype(z.dtype)
    return z_new, jnp.where(mask[..., None], z_new, z_inv)
