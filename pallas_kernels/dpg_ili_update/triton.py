"""The update as a Pallas kernel on the Triton backend (NVIDIA, AMD).

One program takes a channel of a sample over all places twice: for the two sums, and for the result. The second time
what it reads is in the cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.dpg_ili_update import formula

_BLOCK, _WARPS = 1024, 4  # places at a time


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
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """z_new, and where(mask, z_new, z_inv)."""
    if interpret and jax.typeof(z).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    if jnp.float64 in (z.dtype, eps_null.dtype):
        raise NotImplementedError("the Triton kernel takes floats of 16 and 32 bits, got float64")
    batch, *_, channels = z.shape
    flat = [x.reshape(batch, -1, channels) for x in (z, z_src, z_inv, eps_null, eps_src, eps_tgt, eps_cross)]
    places = flat[0].shape[1]
    made = pl.pallas_call(
        functools.partial(_kernel, places=places, block=min(_BLOCK, pl.next_power_of_2(places))),
        out_shape=(output_like(flat[0].shape, z.dtype, z),) * 2,
        grid=(batch * channels,),
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="dpg_ili_update",
    )(*flat, mask.reshape(batch, places), jnp.stack(formula.scales(scalars)))
    z_new, masked = (x.reshape(z.shape) for x in made)
    return z_new, masked


def _kernel(*refs: Any, places: int, block: int) -> None:
    latents, predictions, (mask_ref, scales_ref), targets = refs[:3], refs[3:7], refs[7:9], refs[9:]
    channels = jnp.int32(targets[0].shape[2])
    batch, channel = lax.div(pl.program_id(0), channels), lax.rem(pl.program_id(0), channels)
    blocks, zeros = jnp.int32(pl.cdiv(places, block)), jnp.zeros(block, jnp.float32)

    def load(ref: Any, place: Array, *where: Array) -> Array:
        return plt.load(ref.at[batch, place, *where], mask=place < places, other=ref.dtype.type(0))

    def floats(refs: Any, place: Array) -> list[Array]:
        return [load(ref, place, channel).astype(jnp.float32) for ref in refs]

    def add(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        null, _, tgt, cross = predictions
        parts = formula.products(*floats((null, tgt, cross), index * block + jnp.arange(block, dtype=jnp.int32)))
        return sums[0] + parts[0], sums[1] + parts[1]

    product, square = lax.fori_loop(jnp.int32(0), blocks, add, (zeros, zeros))
    sums = jnp.sum(product), jnp.sum(square)
    by = formula.Scales(*(scales_ref[i] for i in range(4)))

    def write(index: Array, _: None) -> None:
        place = index * block + jnp.arange(block, dtype=jnp.int32)
        given = floats((*latents, *predictions), place)
        z_new = formula.injected(*given, sums=sums, by=by)
        for ref, value in zip(targets, (z_new, jnp.where(load(mask_ref, place), z_new, given[2]))):
            plt.store(ref.at[batch, place, channel], value.astype(ref.dtype), mask=place < places)

    lax.fori_loop(jnp.int32(0), blocks, write, None)
