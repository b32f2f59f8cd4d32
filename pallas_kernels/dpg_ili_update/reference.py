"""The update as the paper writes it: guidance of both branches, two Steps, injection, mask."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
    gamma, t_start, t_end, t, t_next, w_cfg, w_dpg = scalars
    latents, predictions = (z, z_src, z_inv), (eps_null, eps_src, eps_tgt, eps_cross)
    z, z_src, z_inv, e0, es, et, ec = (x.astype(jnp.float32) for x in (*latents, *predictions))
    d_src, d_tgt = ec - e0, et - e0
    square = jnp.sum(d_src * d_src, axis=(1, 2), keepdims=True)
    p = jnp.sum(d_src * d_tgt, axis=(1, 2), keepdims=True)
    p = jnp.where(square > 1e-12, p / jnp.where(square > 1e-12, square, 1.0), 0.0)

    def step(x, eps):
        velocity = (1 - gamma) * x - jnp.sqrt(1 - gamma**2) * eps
        return x + (t_next - t) * velocity / (t - t_start + gamma * (t_end - t))

    guided, guided_src = e0 + w_cfg * d_tgt + w_dpg * (d_tgt - p * d_src), e0 + w_cfg * (es - e0)
    z_new = (z_inv + (step(z, guided) - step(z_src, guided_src))).astype(latents[0].dtype)
    return z_new, jnp.where(mask[..., None], z_new, latents[2])
