"""Images of 3D Gaussians that a camera has projected: tiles, alpha blending front to back, and the gradient.

>>> import jax.numpy as jnp
>>> from pallas_kernels.splat_rasterize import splat_rasterize
>>> means2d, conics, depths = jnp.array([[10.0, 6.0]]), jnp.array([[0.1, 0.0, 0.1]]), jnp.ones(1)
>>> radii = jnp.array([10])
>>> seen = splat_rasterize(
...     means2d, conics, jnp.array([0.5]), jnp.ones((1, 3)), depths, radii, width=20, height=12, max_pairs=64
... )
>>> seen.image.shape, int(seen.num_pairs)
((12, 20, 3), 2)
"""

from pallas_kernels.splat_rasterize.api import Rasterized, splat_rasterize

__all__ = ["Rasterized", "splat_rasterize"]
