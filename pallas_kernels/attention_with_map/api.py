"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention_with_map import reference, triton, triton_backward, xla
from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.flash_self_attention.api import check_arrays

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton_backward.backward)


def attention_with_map(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t s"]]:
    """softmax(scale * q k^T) v, and the mean over heads of softmax(scale * q k^T).

    What image editing by cross-attention keeps of a layer (Prompt-to-Prompt, arXiv:2208.01626; InstantEdit,
    arXiv:2508.06033), without probabilities of every head: `[B,H,T,S]` is never stored, in either direction. Softmax
    and accumulation are float32; on a GPU the weights meet v in v's dtype. The kernel holds all keys at once, up to 128
    (a prompt has 77), and sums the map over heads in registers. Both results take gradients, which are recomputed from
    q, k and v alone.

    Args:
        q: queries `[B,T,H,D]`.
        k: keys `[B,S,H,D]`.
        v: values, shaped as k.
        scale: of the logits; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        The output `[B,T,H,D]` in q's dtype, and the map `[B,T,S]` in float32 (float64 of float64), whose rows sum to
        one.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: q, k, v not floating or of different dtypes.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("attention_with_map", _FORWARD, implementation)
    check_arrays(q, k, v)
    q, k, v = vary_alike(q, k, v)
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    if q.size == 0 or k.size == 0:
        wide = jnp.promote_types(q.dtype, jnp.float32)
        return jnp.zeros_like(q), jnp.zeros((*q.shape[:2], k.shape[1]), wide)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention((implementation, scale), q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v):
    implementation, scale = static
    return dispatch("attention_with_map", _FORWARD, implementation, q, k, v, scale=scale)


def _fwd(static, q, k, v):
    return _attention(static, q, k, v), (q, k, v)


def _bwd(static, saved, cotangents):
    implementation, scale = static
    return dispatch("attention_with_map", _BACKWARD, implementation, *saved, *cotangents, scale=scale)


_attention.defvjp(_fwd, _bwd)
