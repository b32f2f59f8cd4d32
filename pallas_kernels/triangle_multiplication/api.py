"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.triangle_multiplication import reference, triton, triton_backward, xla
from pallas_kernels.triangle_multiplication.reference import Affine, Weights

_OP = "triangle_multiplication"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton_backward.backward)
_DIRECTIONS = ("outgoing", "incoming")


def triangle_multiplication(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None = None,
    *,
    ln_in: Affine | None,
    w_proj: Float[Array, "c f2"],
    w_gate: Float[Array, "c f2"],
    ln_out: Affine | None,
    w_out: Float[Array, "f c"],
    w_out_gate: Float[Array, "c c"],
    direction: str = "outgoing",
    eps: float = 1e-5,
    implementation: Implementation = None,
) -> Float[Array, "b n n c"]:
    """Updates every pair (i, j) from the pairs that close a triangle with it (AlphaFold 3, algorithms 12 and 13).

    With x = LN(z; ln_in) and [a, b] = mask * sigmoid(x w_gate) * (x w_proj), halves of F channels each,

        t_ij = sum_k a_ik * b_jk ("outgoing")    or    sum_k a_ki * b_kj ("incoming"), channel by channel,
        out  = sigmoid(x w_out_gate) * (LN(t; ln_out) w_out).

    Products are taken in z's dtype, as `jax.default_matmul_precision` says (on a GPU TF32, unless it says otherwise),
    and accumulated in float32 (float64 for float64 inputs); normalisations and gates are float32. Nothing but the
    inputs is kept for the gradient, which recomputes a, b and t ("reference" keeps all that JAX keeps, and rounds to
    z's dtype in between). The Triton kernels take up to 128 channels, hidden and outer. Usable under `jit`, `vmap`,
    `jax.checkpoint` and `shard_map`; arrays that lie over a mesh need a `shard_map`, as XLA cannot divide a kernel.

    Args:
        z: pair representation `[B,N,N,C]`.
        mask: `[B,N,N]` boolean, True valid; None is all valid. A pair that is not contributes to no other.
        ln_in: scale and offset `[C]`, or None where z is normalised already.
        w_proj: `[C,2F]`, columns of a, then of b.
        w_gate: `[C,2F]`.
        ln_out: scale and offset `[F]`, or None for no normalisation of t.
        w_out: `[F,C]`.
        w_out_gate: `[C,C]`.
        direction: "outgoing" or "incoming".
        eps: of both normalisations.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[B,N,N,C]` in z's dtype.

    Raises:
        ValueError: shapes that do not fit, an odd width of w_proj, an empty axis, unknown direction or implementation.
        TypeError: a mask that is not boolean, z or a weight that is not floating.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names(_OP, _FORWARD, implementation)
    weights = Weights(ln_in, w_proj, w_gate, ln_out, w_out, w_out_gate)
    _check(z, mask, weights, direction)
    if implementation == "reference":
        return reference.forward(z, mask, weights, direction=direction, eps=eps)
    leaves, tree = jax.tree.flatten((z, mask, weights))
    z, mask, weights = tree.unflatten(vary_alike(*leaves))
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    return _multiply((implementation, direction, float(eps)), z, mask, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(static, z, mask, weights):
    implementation, direction, eps = static
    return dispatch(_OP, _FORWARD, implementation, z, mask, weights, direction=direction, eps=eps)


def _fwd(static, z, mask, weights):
    return _multiply(static, z, mask, weights), (z, mask, weights)


def _bwd(static, saved, d_out):
    implementation, direction, eps = static
    # What the forward pass made must be made again, after the cotangent is there: not found in it, and kept.
    saved, d_out = jax.lax.optimization_barrier((saved, d_out))
    dz, d_weights = dispatch(_OP, _BACKWARD, implementation, *saved, d_out, direction=direction, eps=eps)
    return dz, None, d_weights


_multiply.defvjp(_fwd, _bwd)


def _check(z: Array, mask: Array | None, weights: Weights, direction: str) -> None:
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: expected one of {_DIRECTIONS}, got {direction!r}")
    if z.ndim != 4 or z.shape[1] != z.shape[2]:
        raise ValueError(f"z: expected 4 axes [batch, n, n, channels], got shape {z.shape}")
    if 0 in z.shape:
        raise ValueError(f"z: expected no empty axis, got shape {z.shape}")
    channels, width = z.shape[3], weights.w_proj.shape[-1]
    if width == 0 or width % 2:
        raise ValueError(f"w_proj: expected an even number of columns, a's and b's, got shape {weights.w_proj.shape}")
    shapes: dict[str, tuple[int, ...]] = {
        "w_proj": (channels, width),
        "w_gate": (channels, width),
        "w_out": (width // 2, channels),
        "w_out_gate": (channels, channels),
    }
    named = {name: getattr(weights, name) for name in shapes}
    for name, size in (("ln_in", channels), ("ln_out", width // 2)):
        affine = getattr(weights, name)
        if affine is None:
            continue
        if len(affine) != 2:
            raise ValueError(f"{name}: expected a pair of scale and offset, or None, got {len(affine)} arrays")
        for part, array in zip(("scale", "offset"), affine):
            shapes[f"{name} {part}"], named[f"{name} {part}"] = (size,), array
    for name, shape in shapes.items():
        if named[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape} beside z of shape {z.shape}, got {named[name].shape}")
    for name, array in {"z": z, **named}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, got {array.dtype}")
    if mask is not None:
        if mask.shape != z.shape[:3]:
            raise ValueError(f"mask: expected shape {z.shape[:3]}, got {mask.shape}")
        if mask.dtype != jnp.bool:
            raise TypeError(f"mask: expected booleans, True valid, got {mask.dtype}")
