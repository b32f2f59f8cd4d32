"""All Gaussians times all pixels, front to back, one after the other: the specification of the fast forms."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import vary_alike
from pallas_kernels.splat_rasterize.lists import Lists

MAX_ALPHA = 0.99
"""What an alpha is cut to."""
MIN_ALPHA = 1 / 255
"""Below it a Gaussian is not composited."""
STOP = 1e-4
"""A pixel ends before the Gaussian that would bring its transmittance below."""
MAX_PAIRS = int(2e8)


def alpha(dx: Any, dy: Any, a: Any, b: Any, c: Any, opacity: Any) -> Any:
    """Of a Gaussian at an offset from its centre; 0 where it is not composited."""
    power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
    value = opacity * jnp.exp(jnp.where(power <= 0, power, 0.0))
    value = jnp.where(value < MAX_ALPHA, value, MAX_ALPHA)
    return jnp.where((power <= 0) & (value >= MIN_ALPHA), value, 0.0)


def forward(
    rows: Float[Array, "n 9"], depths: Float[Array, " n"], lists: Lists, *, width: int, height: int
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"], Int[Array, "h w"], Int[Array, " n"]]:
    """See `splat_rasterize`; what stopped a pixel is not told.

    Raises:
      NotImplementedError: more than 2e8 pairs of a Gaussian and a pixel.
    """
    del lists
    if rows.shape[0] * width * height > MAX_PAIRS:
        raise NotImplementedError(
            f"'reference' takes {MAX_PAIRS:.0e} pairs of a Gaussian and a pixel, got {rows.shape[0]} x {width * height}"
        )
    y, x = jnp.mgrid[:height, :width] + 0.5
    image, transmittance, counts = composite(rows, depths, x.astype(rows.dtype), y.astype(rows.dtype))
    return image, transmittance, jnp.zeros((height, width), jnp.int32), counts


def composite(
    rows: Float[Array, "n 9"], depths: Float[Array, " n"], x: Float[Array, "*p"], y: Float[Array, "*p"]
) -> tuple[Float[Array, "*p 3"], Float[Array, "*p"], Int[Array, " n"]]:
    """The image, transmittance, and pixels of each Gaussian, at pixels of any arrangement."""
    order = vary_alike(jnp.argsort(depths, stable=True), depths)[0]

    def add(state, row):
        red, green, blue, transmittance, open_ = state
        u, v, a, b, c, opacity, *color = row
        value = alpha(x - u, y - v, a, b, c, opacity)
        after = transmittance * (1 - value)
        open_ &= after >= STOP
        value = jnp.where(open_, value, 0.0)
        weight = value * transmittance
        image = [channel + weight * c for channel, c in zip((red, green, blue), color)]
        state = (*image, jnp.where(open_, after, transmittance), open_)
        return state, jnp.sum(value > 0, dtype=jnp.int32)

    nothing = jnp.zeros_like(x)
    start = (nothing, nothing, nothing, jnp.ones_like(x), jnp.ones_like(x, bool))
    (*image, transmittance, _), counts = lax.scan(add, start, rows[order])
    return jnp.stack(image, axis=-1), transmittance, jnp.zeros_like(counts).at[order].set(counts)


def backward(
    rows: Float[Array, "n 9"],
    depths: Float[Array, " n"],
    lists: Lists,
    transmittance: Float[Array, "h w"],
    stops: Int[Array, "h w"],
    d_image: Float[Array, "h w 3"],
    d_transmittance: Float[Array, "h w"],
) -> Float[Array, "n 9"]:
    """By differentiating that."""
    del stops
    height, width = transmittance.shape
    pullback = jax.vjp(lambda rows: forward(rows, depths, lists, width=width, height=height)[:2], rows)[1]
    return pullback((d_image, d_transmittance))[0]
