"""What every op is made of: normalisation, projections, softmax over what is valid."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.megafold.config import Kernels
from pallas_kernels.layernorm_linear import layernorm_linear

Affine = tuple[Float[Array, " _"], Float[Array, " _"]]
"""Scale and offset of a normalisation."""

Implementation = Kernels | str | None
"""One name for every kernel, or one for each."""

Whole = Callable[[Array, int], Array]
"""Where tokens lie over devices: an array and the axis of its tokens here -> the array with all tokens."""


def whole_already(x: Array, axis: int) -> Array:
    """`Whole` on one device."""
    del axis
    return x


def kernels_of(implementation: Implementation) -> Kernels:
    """`implementation` spelled out for each kernel.

    Raises:
      ValueError: unknown name.
    """
    if isinstance(implementation, Kernels):
        return implementation
    return Kernels(implementation, implementation, implementation, implementation)


def normalise(x: Float[Array, "*batch c"], eps: float = 1e-5) -> Float[Array, "*batch c"]:
    """Mean 0 and variance 1 along the last axis, in float32 (float64 for float64 inputs)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


def layer_norm(x: Float[Array, "*batch c"], affine: Affine | None) -> Float[Array, "*batch c"]:
    """`normalise`, scale and offset, in x's dtype; x itself where `affine` is None."""
    return x if affine is None else (normalise(x) * affine[0] + affine[1]).astype(x.dtype)


def project(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], b: Float[Array, " n"] | None = None
) -> Float[Array, "*batch n"]:
    """`x w + b` in x's dtype."""
    y = x @ w.astype(x.dtype)
    return y if b is None else y + b.astype(x.dtype)


def norm_project(
    x: Float[Array, "*batch k"],
    affine: Affine | None,
    w: Float[Array, "k n"],
    b: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-5,
    implementation: Sequence[str] | str | None = None,
) -> Float[Array, "*batch n"]:
    """`project(layer_norm(x, affine), w, b)` by the fused kernel, where there is something to normalise."""
    if affine is None:
        return project(x, w, b)
    return layernorm_linear(x, *affine, w, b, eps=eps, implementation=implementation)


def swiglu(x: Float[Array, "*batch c"], w_in: Float[Array, "c f2"], w_out: Float[Array, "f n"]) -> Array:
    """`(silu(gate) * value) w_out`, the value in the first half of `x w_in`, the gate in the second."""
    value, gate = jnp.split(project(x, w_in), 2, axis=-1)
    return project(jax.nn.silu(gate) * value, w_out)


def masked_softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."] | None) -> Float[Array, "..."]:
    """Float32 softmax along the last axis over what the mask (which broadcasts) lets pass; zeros if that is nothing."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30))
    # Masked before the exponential, where the largest logit may be a masked one.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - peak, 0)), 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)


def split_heads(x: Float[Array, "*batch hd"], heads: int) -> Float[Array, "*batch h d"]:
    """Head-major channels as two axes."""
    return x.reshape(*x.shape[:-1], heads, -1)


def check_shape(name: str, x: Array, axes: str, shape: tuple[int, ...]) -> None:
    """Raises a ValueError that names argument, axes and shapes, unless x has the shape."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {axes} = {shape}, got {x.shape}")


def check_mask(mask: Array | None, axes: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError or TypeError unless the mask is None, or boolean and of the shape."""
    if mask is None:
        return
    check_shape("mask", mask, axes, shape)
    if mask.dtype != jnp.bool:
        raise TypeError(f"mask: expected booleans (True is valid), got {mask.dtype}")


def check_matrices(outputs: int | None = None, **matrices: tuple[Array, int | None]) -> None:
    """Raises a ValueError unless each matrix is `[in, out]` with the rows it is given with."""
    for name, (w, rows) in matrices.items():
        if w.ndim != 2 or (rows is not None and w.shape[0] != rows) or (outputs is not None and w.shape[1] != outputs):
            expected = ["any" if size is None else str(size) for size in (rows, outputs)]
            raise ValueError(f"{name}: expected a matrix [{', '.join(expected)}], got shape {w.shape}")
