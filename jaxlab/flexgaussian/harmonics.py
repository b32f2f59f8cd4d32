"""Real spherical harmonics up to degree 3, as 3D Gaussian Splatting orders and signs them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
_C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)

FLIP_YZ = np.array([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1], np.float32)
"""What half a turn about x multiplies the higher coefficients by: the change between the frames of .ply and .spz."""


def degree_of(num_coefficients: int) -> int:
    """The degree whose number of higher coefficients, (degree + 1)^2 - 1, this is.

    Raises:
      ValueError: none of 0 to 3 has that number.
    """
    for degree in range(4):
        if (degree + 1) ** 2 - 1 == num_coefficients:
            return degree
    raise ValueError(f"shN: expected 0, 3, 8 or 15 coefficients a colour (degrees 0 to 3), got {num_coefficients}")


def higher_basis(directions: Float[Array | np.ndarray, "*n 3"], degree: int) -> Float[Array, "*n k"]:
    """The basis functions of degrees 1 to `degree` at unit vectors."""
    x, y, z = jnp.moveaxis(jnp.asarray(directions), -1, 0)
    xx, yy, zz = x * x, y * y, z * z
    terms = []
    if degree > 0:
        terms += [-_C1 * y, _C1 * z, -_C1 * x]
    if degree > 1:
        terms += [_C2[0] * x * y, _C2[1] * y * z, _C2[2] * (2 * zz - xx - yy), _C2[3] * x * z, _C2[4] * (xx - yy)]
    if degree > 2:
        terms += [
            _C3[0] * y * (3 * xx - yy),
            _C3[1] * x * y * z,
            _C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            _C3[4] * x * (4 * zz - xx - yy),
            _C3[5] * z * (xx - yy),
            _C3[6] * x * (xx - 3 * yy),
        ]
    return jnp.stack(terms, axis=-1) if terms else jnp.zeros((*directions.shape[:-1], 0), directions.dtype)


def colors(
    directions: Float[Array, "*n 3"], sh0: Float[Array, "*n 3"], shN: Float[Array, "*n k 3"]
) -> Float[Array, "*n 3"]:
    """Red, green and blue seen along unit vectors, not below 0; 1 is full, larger is possible."""
    basis = higher_basis(directions, degree_of(shN.shape[-2]))
    # Term by term, which XLA makes one loop; a product of matrices would need the basis of all Gaussians in memory.
    higher = sum(basis[..., k, None] * shN[..., k, :] for k in range(shN.shape[-2]))
    return jnp.maximum(0.5 + C0 * sh0 + higher, 0.0)
