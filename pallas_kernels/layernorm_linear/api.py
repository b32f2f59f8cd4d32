"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.layernorm_linear import reference, triton, xla

_OP = "layernorm_linear"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


def layernorm_linear(
    x: Float[Array, "*m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    b: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-5,
    implementation: Implementation = None,
) -> Float[Array, "*m n"]:
    """LN(x) w + b, the normalised rows never stored (MegaFold, arXiv:2506.20686; section 2.2 of its specification).

    Mean, deviation, scale and offset are float32 whatever x's dtype; w is rounded to x's dtype for the product, whose
    sums are float32, as a Dense layer of that dtype does. The backward pass keeps the arguments alone. Usable under
    `jit`, `vmap`, `jax.checkpoint` and `shard_map`; arrays that lie over a mesh need a `shard_map`.

    Args:
        x: `[...,K]`, any floating dtype.
        scale: `[K]`; weights may have another dtype than x (float32 beside bfloat16).
        offset: `[K]`.
        w: `[K,N]`.
        b: `[N]`, or None.
        eps: added to the variance.
        implementation: None, "reference" (plain JAX, differentiated by JAX), "xla", "triton" or "interpret", or several
            in order.

    Returns:
        `[...,N]` in x's dtype; gradients have each argument's dtype.

    Raises:
        ValueError: shapes that do not fit, K = 0, a negative eps, an unknown implementation.
        TypeError: an argument that is not floating.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names(_OP, _FORWARD, implementation)
    check_norm(x, scale, offset, eps)
    check_weight("w", w, (x.shape[-1], None), x)
    if b is not None:
        check_weight("b", b, (w.shape[1],), x)
    if implementation == "reference":
        return reference.forward(x, scale, offset, w, b, eps=eps)
    if x.size == 0 or w.size == 0:
        return jnp.zeros((*x.shape[:-1], w.shape[1]), x.dtype)
    implementation = implementation if isinstance(implementation, str | None) else tuple(implementation)
    given = vary_alike(*(a for a in (x, scale, offset, w, b) if a is not None))
    rows = given[0].reshape(-1, x.shape[-1])
    out = _product((implementation, float(eps)), rows, *given[1:4], None if b is None else given[4])
    return out.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static, x, scale, offset, w, b):
    return _fwd(static, x, scale, offset, w, b)[0]


def _fwd(static, *args):
    implementation, eps = static
    return dispatch(_OP, _FORWARD, implementation, *args, eps=eps), args


def _bwd(static, args, d_out):
    implementation, eps = static
    *given, b = args
    gradients = dispatch(_OP, _BACKWARD, implementation, *given, d_out, eps=eps)
    return tuple(None if a is None else d.astype(a.dtype) for d, a in zip(gradients, (*given, b), strict=True))


_product.defvjp(_fwd, _bwd)


def check_norm(x: Array, scale: Array, offset: Array, eps: float) -> None:
    """Checks x and what its LayerNorm takes.

    Raises:
        ValueError: x without axes or with an empty last one, scale or offset not as long as that, a negative eps.
        TypeError: one of them is not floating.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K] with K at least 1, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    check_weight("scale", scale, x.shape[-1:], x)
    check_weight("offset", offset, x.shape[-1:], x)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")


def check_weight(name: str, array: Array, shape: tuple[int | None, ...], x: Array) -> None:
    """Checks a weight's shape (None: any length) and that it is floating.

    Raises:
        ValueError: another shape.
        TypeError: not floating.
    """
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape)):
        expected = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{name}: expected shape [{expected}] beside x of shape {x.shape}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating dtype, got {array.dtype}")
