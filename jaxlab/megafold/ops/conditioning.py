"""Normalisation steered by another representation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.megafold.ops.basic import Implementation, check_matrices, kernels_of, norm_project, normalise


def adaptive_layer_norm(
    x: Float[Array, "*batch c"],
    s: Float[Array, "*#batch c_s"],
    *,
    scale_s: Float[Array, " c_s"],
    w_gamma: Float[Array, "c_s c"],
    b_gamma: Float[Array, " c"],
    w_beta: Float[Array, "c_s c"],
    implementation: Implementation = None,
) -> Float[Array, "*batch c"]:
    """sigmoid(ŝ w_gamma + b_gamma) * LN(x) + ŝ w_beta, with ŝ = scale_s * LN(s) (AlphaFold3, algorithm 26).

    Args:
      x: what is normalised.
      s: what conditions; axes of size 1 are shared.
      scale_s: of the normalised s, which has no offset; nor has x any parameter.
      w_gamma: scale.
      b_gamma: its bias.
      w_beta: offset.
      implementation: of layernorm_linear.

    Raises:
      ValueError: shapes that do not fit; unknown implementation.
    """
    check_matrices(x.shape[-1], w_gamma=(w_gamma, s.shape[-1]), w_beta=(w_beta, s.shape[-1]))
    kernels = kernels_of(implementation)
    both = jnp.concatenate([w_gamma, w_beta], axis=1)
    affine = scale_s, jnp.zeros_like(scale_s)
    b = jnp.concatenate([b_gamma, jnp.zeros_like(b_gamma)])
    gamma, beta = jnp.split(norm_project(s, affine, both, b, implementation=kernels.layernorm_linear), 2, axis=-1)
    return (jax.nn.sigmoid(gamma) * normalise(x) + beta).astype(x.dtype)
