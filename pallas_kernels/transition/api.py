"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.layernorm_linear.api import check_norm, check_weight
from pallas_kernels.transition import reference, triton, xla

_OP = "transition"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


def transition(
    x: Float[Array, "*m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    *,
    eps: float = 1e-5,
    row_chunk: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*m c"]:
    """(silu(gate) * value) w_out with [value, gate] = LN(x) w_in, [..., 2F] never stored (MegaFold, arXiv:2506.20686).

    The value is the first half of w_in's columns, the gate the second, as in MegaFold; there are no biases (section 2.3
    of the specification). Mean, deviation, scale, offset and the gate are float32 whatever x's dtype; w_in and w_out
    are rounded to x's dtype for their products, whose sums are float32. The backward pass keeps the arguments alone
    and makes the hidden layer again. Usable under `jit`, `vmap`, `jax.checkpoint` and `shard_map`; arrays that lie over
    a mesh need a `shard_map`.

    Args:
        x: `[...,C]`, any floating dtype.
        scale: `[C]`; weights may have another dtype than x (float32 beside bfloat16).
        offset: `[C]`.
        w_in: `[C,2F]`.
        w_out: `[F,C]`.
        eps: added to the variance.
        row_chunk: rows whose hidden layer exists at one time; None lets the implementation choose. A bound, not an
            order: the fused kernels hold far less, and "reference" holds all.
        implementation: None, "reference" (plain JAX, differentiated by JAX), "xla", "triton" or "interpret", or several
            in order.

    Returns:
        `[...,C]` in x's dtype; gradients have each argument's dtype.

    Raises:
        ValueError: shapes that do not fit, C = 0, an odd width of w_in, a negative eps, a row_chunk below 1, an unknown
            implementation.
        TypeError: an argument that is not floating.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names(_OP, _FORWARD, implementation)
    check_norm(x, scale, offset, eps)
    check_weight("w_in", w_in, (x.shape[-1], None), x)
    if w_in.shape[1] % 2:
        raise ValueError(f"w_in: expected an even width, half value and half gate, got shape {w_in.shape}")
    check_weight("w_out", w_out, (w_in.shape[1] // 2, x.shape[-1]), x)
    if row_chunk is not None and row_chunk < 1:
        raise ValueError(f"row_chunk: expected at least 1, or None, got {row_chunk}")
    if implementation == "reference":
        return reference.forward(x, scale, offset, w_in, w_out, eps=eps, row_chunk=row_chunk)
    if x.size == 0 or w_in.size == 0:
        return jnp.zeros_like(x)
    implementation = implementation if isinstance(implementation, str | None) else tuple(implementation)
    x, *weights = vary_alike(x, scale, offset, w_in, w_out)
    return _rows((implementation, float(eps), row_chunk), x.reshape(-1, x.shape[-1]), *weights).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static, x, scale, offset, w_in, w_out):
    return _fwd(static, x, scale, offset, w_in, w_out)[0]


def _fwd(static, *args):
    implementation, eps, row_chunk = static
    return dispatch(_OP, _FORWARD, implementation, *args, eps=eps, row_chunk=row_chunk), args


def _bwd(static, args, d_out):
    implementation, eps, row_chunk = static
    gradients = dispatch(_OP, _BACKWARD, implementation, *args, d_out, eps=eps, row_chunk=row_chunk)
    return tuple(d.astype(a.dtype) for d, a in zip(gradients, args, strict=True))


_rows.defvjp(_fwd, _bwd)
