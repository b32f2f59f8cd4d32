"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.splat_rasterize import lists, reference, triton, xla

AnyArray = Array | np.ndarray
_OP = "splat_rasterize"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


class Rasterized(NamedTuple):
    """An image and what is known of it.

    Attributes:
        image: `[H,W,3]` float32, the Gaussians' colours before black; a background is added as transmittance times it.
        transmittance: `[H,W]` float32, what passes all Gaussians.
        pixel_counts: `[N]` int32, in how many pixels each Gaussian was composited.
        num_pairs: `[]` int32, pairs of a tile and a Gaussian that may be seen in it. Above `max_pairs` the rest is not
            valid. At most 2**31 - 1.
    """

    image: Float[Array, "h w 3"]
    transmittance: Float[Array, "h w"]
    pixel_counts: Int[Array, " n"]
    num_pairs: Int[Array, ""]


def splat_rasterize(
    means2d: Float[AnyArray, "n 2"],
    conics: Float[AnyArray, "n 3"],
    opacities: Float[AnyArray, " n"],
    colors: Float[AnyArray, "n 3"],
    depths: Float[AnyArray, " n"],
    radii: Integer[AnyArray, " n"],
    *,
    width: int,
    height: int,
    max_pairs: int,
    implementation: Implementation = None,
) -> Rasterized:
    """Blends N Gaussians front to back (Kerbl et al., 2023, arXiv:2308.04079; section 2.2 of FlexGaussian's
    specification).

    In each pixel, by rising depth (at equal depths by row), with d the offset of its centre from the Gaussian's:
    power = -(a dx^2 + c dy^2) / 2 - b dx dy and alpha = min(0.99, opacity exp(power)). A Gaussian with power > 0 or
    alpha < 1/255 is passed over. At the first that would bring the transmittance T below 1e-4 the pixel ends, without
    it; the others add alpha T color to the image and make T to (1 - alpha) T. Gaussians are listed by 16 x 16 tiles
    that have a pixel within their alpha of 1/255, so that no list changes the result.

    Differentiable in means2d, conics, opacities and colors (reverse mode) through image and transmittance; the choices
    above, depths and radii have no derivative. Sums have a fixed order: the same inputs give the same bits, images and
    gradients alike ("xla" on a GPU excepted). Usable under `jit`, `jax.checkpoint` and `shard_map`.

    Args:
        means2d: `[N,2]`, centres in pixels (x, y); the centre of the first pixel is at (0.5, 0.5).
        conics: `[N,3]`, inverse covariances (a, b, c) of [[a, b], [b, c]].
        opacities: `[N]`, in [0, 1].
        colors: `[N,3]`.
        depths: `[N]`.
        radii: `[N]` integers; a Gaussian with one below 1 is not there, whatever else it has (NaN too). Neither is one
            that has a number which is not finite.
        width: of the image in pixels.
        height: the same.
        max_pairs: room for pairs of a tile and a Gaussian: 4 bytes each, and 36 for a gradient on a GPU.
        implementation: None, "reference" (plain JAX, differentiated by JAX; N H W up to 2e8), "xla", "triton",
            "interpret", or several in order.

    Returns:
        `Rasterized`. Gradients have each argument's dtype, and are 0 where a Gaussian is not there.

    Raises:
        ValueError: shapes that do not fit; width, height or max_pairs below 1, or max_pairs above 2**30; an unknown
            implementation.
        TypeError: a float array not floating, radii not integer, a size not an int.
        NotImplementedError: the implementation asked for cannot run here, or takes no image of this size.
    """
    names = check_names(_OP, _FORWARD, implementation)
    arrays = [jnp.asarray(x) for x in (means2d, conics, opacities, colors, depths, radii)]
    _check(*arrays)
    sizes = {"width": width, "height": height, "max_pairs": max_pairs}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if not 1 <= size <= 2**30:
            raise ValueError(f"{name}: expected a number from 1 to 2**30, got {size}")
    return Rasterized(*_jitted(*arrays, **{name: int(size) for name, size in sizes.items()}, implementation=names))


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames=("width", "height", "max_pairs", "implementation"))
def _jitted(means2d, conics, opacities, colors, depths, radii, *, width, height, max_pairs, implementation):
    if radii.size == 0:
        image, transmittance = jnp.zeros((height, width, 3)), jnp.ones((height, width))
        return image, transmittance, jnp.zeros(0, jnp.int32), jnp.int32(0)
    rows = jnp.concatenate([x.astype(jnp.float32) for x in (means2d, conics, opacities[:, None], colors)], axis=1)
    depths = depths.astype(jnp.float32)
    seen = (radii > 0) & jnp.all(jnp.isfinite(rows), axis=1) & jnp.isfinite(depths)
    # Selected here, and not in the kernels, so that a row that is left out has a gradient of 0.
    args = vary_alike(jnp.where(seen[:, None], rows, 0.0), jnp.where(seen, depths, jnp.inf))
    return _rasterize((implementation, width, height, max_pairs), *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rasterize(static, rows, depths):
    return _fwd(static, rows, depths)[0]


def _fwd(static, rows, depths):
    implementation, width, height, max_pairs = static
    tiles, pairs = lists.build(rows, depths, width=width, height=height, max_pairs=max_pairs)
    size = {"width": width, "height": height}
    image, transmittance, stops, counts = dispatch(_OP, _FORWARD, implementation, rows, depths, tiles, **size)
    return (image, transmittance, counts, pairs), (rows, depths, tiles, transmittance, stops)


def _bwd(static, saved, cotangents: Any):
    return dispatch(_OP, _BACKWARD, static[0], *saved, *cotangents[:2]), None


_rasterize.defvjp(_fwd, _bwd)


def _check(means2d, conics, opacities, colors, depths, radii):
    count = radii.shape[0] if radii.ndim else 0
    expected = {
        "means2d": (means2d, (count, 2)),
        "conics": (conics, (count, 3)),
        "opacities": (opacities, (count,)),
        "colors": (colors, (count, 3)),
        "depths": (depths, (count,)),
    }
    if radii.ndim != 1:
        raise ValueError(f"radii: expected 1 axis [N], got shape {radii.shape}")
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} beside {count} radii, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if not jnp.issubdtype(radii.dtype, jnp.integer):
        raise TypeError(f"radii: expected integers, got {radii.dtype}")
