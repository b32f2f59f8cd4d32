"""Images of a scene: projection, then the op `splat_rasterize`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.projection import View, project_view, view_of
from jaxlab.flexgaussian.scene import GaussianScene, check_shapes
from pallas_kernels.splat_rasterize import Rasterized, splat_rasterize

BACKENDS = {"auto": None, "xla": "xla", "pallas": "triton", "dense": "reference"}
_LEAST_PAIRS = 1 << 12
_PAIRS_PER_GAUSSIAN = 4
_STREAM = 16


class RenderAux(NamedTuple):
    """What `render` tells beside the image.

    Attributes:
      transmittance: the share of light from behind that comes through, [H, W].
      pixel_counts: in how many pixels each Gaussian was composited, [N].
    """

    transmittance: Float[Array, "h w"]
    pixel_counts: Int[Array, " n"]


def render(
    scene: GaussianScene,
    camera: Camera,
    background: tuple[float, float, float] | Float[Array | np.ndarray, "3"] = (0.0, 0.0, 0.0),
    *,
    backend: str = "auto",
    return_aux: bool = False,
) -> Float[Array, "h w 3"] | tuple[Float[Array, "h w 3"], RenderAux]:
    """What a camera sees of a scene (Kerbl et al. 2023), differentiable in the scene.

    Args:
      scene: N Gaussians.
      camera: from where.
      background: red, green and blue behind everything.
      backend: "auto" (by platform), "xla", "pallas" (Triton; NVIDIA and AMD) or "dense" (every Gaussian in every pixel,
        for tests).
      return_aux: also return a `RenderAux`.

    Returns:
      The image [H, W, 3], float32, not clamped; or the image and a `RenderAux`.

    Raises:
      ValueError: another backend; shapes that do not fit; too much for the dense backend.
    """
    check_shapes(scene)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {backend!r}")
    size = {"width": camera.width, "height": camera.height}
    drawn = rasterize(scene, view_of(camera), **size, implementation=BACKENDS[backend])
    image = drawn.image + drawn.transmittance[..., None] * jnp.asarray(background, jnp.float32)
    return (image, RenderAux(drawn.transmittance, drawn.pixel_counts)) if return_aux else image


def rasterize(
    scene: GaussianScene, view: View, *, width: int, height: int, implementation: str | None = None
) -> Rasterized:
    """`render` without a background, from a camera as arrays.

    How many pairs of a tile and a Gaussian there are is known only when the program runs. Outside of a trace an
    overflow is answered by running again with room for all; inside of one, by a slower way that needs no list of pairs.
    """
    static = {"width": width, "height": height, "implementation": implementation}
    pairs = first_guess(scene.num_gaussians)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((scene, view))):
        return _draw_or_stream(scene, view, max_pairs=pairs, **static)
    while (drawn := _draw(scene, view, max_pairs=pairs, **static)).num_pairs > pairs:
        pairs = enough_for(int(drawn.num_pairs))
    return drawn


def first_guess(num_gaussians: int) -> int:
    """Room for pairs before their number is known."""
    return enough_for(max(_PAIRS_PER_GAUSSIAN * num_gaussians, _LEAST_PAIRS))


def enough_for(num_pairs: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return 1 << (num_pairs - 1).bit_length()


def draw(
    scene: GaussianScene,
    view: View,
    *,
    width: int,
    height: int,
    max_pairs: int,
    implementation: str | None = None,
) -> Rasterized:
    """`rasterize` with room for `max_pairs` pairs; the result is not valid where `num_pairs` is larger."""
    seen = project_view(scene, view, width, height)
    opacities = jax.nn.sigmoid(jnp.asarray(scene.opacity_logit))
    where = {"width": width, "height": height, "max_pairs": max_pairs, "implementation": implementation}
    return splat_rasterize(seen.means2d, seen.conics, opacities, seen.rgb, seen.depths, seen.radii, **where)


_draw = functools.partial(jax.jit, static_argnames=("width", "height", "max_pairs", "implementation"))(draw)


def _draw_or_stream(
    scene: GaussianScene, view: View, *, width: int, height: int, max_pairs: int, implementation: str | None
) -> Rasterized:
    size = {"width": width, "height": height}
    drawn = draw(scene, view, **size, max_pairs=max_pairs, implementation=implementation)
    if implementation == "reference":
        return drawn
    return jax.lax.cond(drawn.num_pairs <= max_pairs, lambda: drawn, lambda: _streamed(scene, view, **size))


def _streamed(scene: GaussianScene, view: View, *, width: int, height: int) -> Rasterized:
    """Every Gaussian in every pixel, a few at a time from front to back: slow, but needs no room for pairs."""
    seen = project_view(scene, view, width, height)
    count = scene.num_gaussians
    hidden = seen.radii == 0
    order = jnp.argsort(jnp.where(hidden, jnp.inf, seen.depths), stable=True)
    order = jnp.pad(order, (0, -count % _STREAM), constant_values=count).reshape(-1, _STREAM)
    opacities = jnp.where(hidden, 0.0, jax.nn.sigmoid(jnp.asarray(scene.opacity_logit)))
    columns = jnp.concatenate([seen.means2d, seen.conics, seen.rgb, opacities[:, None]], axis=1)
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)

    @jax.checkpoint
    def some(carry: tuple[Array, Array], rows: Array) -> tuple[tuple[Array, Array], Array]:
        image, before = carry
        u, v, a, b, c, red, green, blue, opacity = columns.at[rows].get(mode="fill", fill_value=0.0).T
        dx, dy = x[..., None] - u, y[..., None] - v
        power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
        alpha = jnp.minimum(0.99, opacity * jnp.exp(jnp.minimum(power, 0.0)))
        alpha = jnp.where((power <= 0) & (alpha >= 1 / 255), alpha, 0.0)
        after = before[..., None] * jnp.cumprod(1 - alpha, axis=-1)
        added = (after >= 1e-4) & (alpha > 0)
        weight = jnp.where(added, after / (1 - alpha) * alpha, 0.0)
        image += weight @ jnp.stack([red, green, blue], axis=1)
        return (image, before * jnp.prod(jnp.where(added, 1 - alpha, 1.0), axis=-1)), added.sum(axis=(0, 1))

    start = jnp.zeros((height, width, 3)), jnp.ones((height, width))
    (image, transmittance), counts = jax.lax.scan(some, start, order)
    counts = jnp.zeros(count, jnp.int32).at[order].add(counts.astype(jnp.int32), mode="drop")
    return Rasterized(image, transmittance, counts, jnp.int32(0))
