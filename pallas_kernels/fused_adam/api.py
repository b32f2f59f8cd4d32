"""The public step: checks, scalars, choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.fused_adam import reference, triton, xla
from pallas_kernels.fused_adam.coefficients import check_hyper, coefficients, runtime_zero

AnyArray = Array | np.ndarray
_OP = "fused_adam"
_TABLE = implementations(reference.step, xla.step, triton.step)
_CASTS = (jnp.bfloat16, jnp.float16, jnp.float32)


def fused_adam(
    p: Float[AnyArray, " n"],
    m: Float[AnyArray, " n"],
    v: Float[AnyArray, " n"],
    g: Float[AnyArray, " n"],
    *,
    count: Any,
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    scale: Any = 1.0,
    mode: str = "adamw",
    bias_correction: bool = True,
    emit_dtype: DTypeLike | None = jnp.bfloat16,
    implementation: Implementation = None,
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"], Float[Array, " n"] | None]:
    """Step `count + 1` of Adam (Kingma & Ba, arXiv 1412.6980) or AdamW (arXiv 1711.05101) on one bucket.

    In the order of DeepSpeed's CPU Adam, with g first multiplied by `scale`, t = count + 1 and every operation rounded
    to float32:

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2          den = sqrt(v) / sqrt(1 - b2^t) + eps
        p = p - lr weight_decay p;     p = p - lr / (1 - b1^t) (m / den)

    Hyper-parameters are float32 scalars, numbers or arrays, so that a schedule compiles nothing anew. Jitted with p, m
    and v donated, the step works in place. It is one pass over memory on a GPU; "xla" gives the bits of the operations
    above whatever it is compiled into, a GPU's compiler contracts products and sums.

    Args:
      p: parameters, float32.
      m: first moments, float32.
      v: second moments, float32.
      g: gradients, any floating dtype; cast to float32.
      count: steps already made, int32.
      lr: learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      weight_decay: decoupled ("adamw"), or added to the gradient times p ("adam").
      scale: multiplies the gradient: the inverse of the loss scale, times a clipping coefficient.
      mode: "adamw" or "adam".
      bias_correction: False leaves out both corrections (1 - b^t).
      emit_dtype: dtype of the copy of the new parameters (bfloat16, float16, float32); None for no copy.
      implementation: None (by platform), "reference", "xla", "triton", or "interpret".

    Returns:
      p, m, v (float32) and the copy of p, or None.

    Raises:
      ValueError: shapes that differ, a rank other than 1, hyper-parameters out of range, an unknown mode or name.
      TypeError: p, m or v not float32, g not floating, another dtype to emit.
      NotImplementedError: mode "amsgrad"; an implementation that cannot run on this platform.
    """
    p, m, v, g = check_arrays(p, m, v, g)
    check_hyper(count=count, lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mode=mode)
    emit = check_emit(emit_dtype)
    check_names(_OP, _TABLE, implementation)
    p, m, v, g = vary_alike(p, m, v, g)
    made = coefficients(
        count=count,
        lr=lr,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        mode=mode,
        bias_correction=bias_correction,
    )
    settings = {"decoupled": mode == "adamw", "emit": emit}
    new = dispatch(_OP, _TABLE, implementation, p, m, v, g, jnp.stack(made), runtime_zero(count), **settings)
    return (*new, None) if emit is None else new


def check_arrays(*arrays: Any) -> tuple[jax.Array, ...]:
    """p, m, v and g as arrays of one shape [n]; errors as `fused_adam` has them."""
    named = [(name, jnp.asarray(array)) for name, array in zip(("p", "m", "v", "g"), arrays)]
    for name, array in named:
        if name != "g" and array.dtype != jnp.float32:
            raise TypeError(f"{name} must be float32 (master parameters and moments), got {array.dtype}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"{name} must have rank 1, got shape {array.shape}")
        if array.shape != named[0][1].shape:
            raise ValueError(f"{name} must have the shape of p, {named[0][1].shape}, got {array.shape}")
    return tuple(array for _, array in named)


def check_emit(dtype: DTypeLike | None) -> jnp.dtype | None:
    """The dtype of the copy, or None."""
    if dtype is None:
        return None
    if jnp.dtype(dtype) not in _CASTS:
        raise TypeError(f"emit_dtype must be bfloat16, float16, float32 or None, got {dtype!r}")
    return jnp.dtype(dtype)
