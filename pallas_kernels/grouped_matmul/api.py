"""The public grouped matrix product: checks, choice of implementation, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Integer

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.grouped_matmul import gating, ragged_dot, reference, triton, xla

_OP = "grouped_matmul"
_FORWARD = implementations(
    reference.rows_times_weights,
    xla.rows_times_weights,
    triton.rows_times_weights,
    ragged_dot=ragged_dot.rows_times_weights,
)
_GRADIENT = implementations(
    reference.weights_gradient, xla.weights_gradient, triton.weights_gradient, ragged_dot=ragged_dot.weights_gradient
)
_COMPOSED = {name: gating.Composed(_FORWARD[name], _GRADIENT[name]) for name in ("reference", "ragged_dot")}
_GATED = {
    "reference": _COMPOSED["reference"].gated,
    "xla": xla.gated,
    "triton": triton.gated,
    "interpret": functools.partial(triton.gated, interpret=True),
    "ragged_dot": _COMPOSED["ragged_dot"].gated,
}
_PRODUCTS = {
    "reference": _COMPOSED["reference"].products,
    "xla": xla.products,
    "triton": triton.products,
    "interpret": functools.partial(triton.products, interpret=True),
    "ragged_dot": _COMPOSED["ragged_dot"].products,
}
_GATED_GRADIENTS = {
    "reference": _COMPOSED["reference"].gradients,
    "xla": xla.gated_gradients,
    "triton": triton.gated_gradients,
    "interpret": functools.partial(triton.gated_gradients, interpret=True),
    "ragged_dot": _COMPOSED["ragged_dot"].gradients,
}

PRODUCTS_NAME = "grouped_matmul_products"
"""What `jax.checkpoint` policies know the two products by that the gradient of the gated form keeps."""


def grouped_matmul(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "g k n"],
    group_sizes: Integer[Array, " g"],
    *,
    rhs_up: Float[Array, "g k n"] | None = None,
    act: str | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation = None,
) -> Float[Array, "m n"]:
    """Multiplies every row with the matrix of its group: the expert layers of a mixture of experts.

    The rows of `lhs` lie group after group: the first `group_sizes[0]` rows meet `rhs[0]`, the next `group_sizes[1]`
    rows `rhs[1]`, and so on. No group is padded, and a group may be empty. Rows past `sum(group_sizes)` belong to
    nobody: they give zero rows, take zero gradient and give none, whatever they hold (NaN too).

    With `rhs_up` every row gives `act(row @ rhs[g]) * (row @ rhs_up[g])`, the first half of a gated expert. The two
    products are stored only for a gradient, in the common dtype, under the `jax.checkpoint` name PRODUCTS_NAME.

    Differentiable in `lhs`, `rhs` and `rhs_up` (reverse mode), and usable under `jit`, `vmap` (one element after the
    other), `jax.checkpoint` and `shard_map`. Sums are taken in float32 (float64 for float64 inputs).

    Args:
      lhs: rows, any floating dtype.
      rhs: one matrix a group.
      group_sizes: rows of each group, any integer dtype; not negative, together at most m. Both are checked only where
        the sizes are concrete (outside `jit`).
      rhs_up: a second matrix for each group; `rhs` is then the gate.
      act: of the gate: "silu" (also called "swiglu") or "gelu" (the exact one); goes with `rhs_up`, and only with it.
      preferred_element_type: dtype of the result; by default the common dtype of `lhs` and the matrices.
      implementation: "triton" (CUDA, ROCm), "xla" (anywhere), "interpret" (the Triton kernels, interpreted, for tests),
        "reference", "ragged_dot" (JAX's own, for comparison), or several of them to be tried in order; None takes the
        best for the platform for which the program is lowered.

    Returns:
      The products, [m, n].

    Raises:
      ValueError: ranks, shapes or the number of groups disagree; `rhs_up` without `act` or the reverse, an unknown
        `act`; concrete sizes are negative or exceed m; unknown implementation.
      TypeError: a dtype is not floating (not integer, for `group_sizes`).
      NotImplementedError: the implementation asked for cannot serve the dtype or the platform (the latter when the
        program is lowered).
    """
    names = check_names(_OP, _FORWARD, implementation)
    lhs, rhs, group_sizes = map(jnp.asarray, (lhs, rhs, group_sizes))
    rhs_up = None if rhs_up is None else jnp.asarray(rhs_up)
    _check(lhs, rhs, group_sizes)
    _check_gate(rhs, rhs_up, act)
    dtype = (
        jnp.result_type(*_present(lhs, rhs, rhs_up))
        if preferred_element_type is None
        else jnp.dtype(preferred_element_type)
    )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"preferred_element_type must be floating, got {dtype}")
    act = None if act is None else gating.ACTIVATIONS[act]
    return _jitted(lhs, rhs, rhs_up, group_sizes, act=act, dtype=dtype, implementation=names)


def _present(*arrays: Array | None) -> list[Array]:
    return [array for array in arrays if array is not None]


def _check_gate(rhs: Array, rhs_up: Array | None, act: str | None) -> None:
    if (rhs_up is None) != (act is None):
        raise ValueError(
            f"rhs_up and act go together, got act={act!r} {'without' if rhs_up is None else 'with'} rhs_up"
        )
    if rhs_up is None:
        return
    if act not in gating.ACTIVATIONS:
        raise ValueError(f"unknown act {act!r}; expected one of: {', '.join(gating.ACTIVATIONS)}")
    if rhs_up.shape != rhs.shape:
        raise ValueError(f"rhs_up must have the shape of rhs, {rhs.shape}, got {rhs_up.shape}")
    if not jnp.issubdtype(rhs_up.dtype, jnp.floating):
        raise TypeError(f"rhs_up must be floating, got {rhs_up.dtype}")


def _check(lhs: Array, rhs: Array, group_sizes: Array) -> None:
    for name, array, rank in (("lhs", lhs, 2), ("rhs", rhs, 3), ("group_sizes", group_sizes, 1)):
        if array.ndim != rank:
            raise ValueError(f"{name} must have rank {rank}, got shape {array.shape}")
    for name, array in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"lhs [m, k] and rhs [g, k, n] must agree in k, got {lhs.shape} and {rhs.shape}")
    if group_sizes.shape[0] != rhs.shape[0]:
        raise ValueError(
            f"group_sizes must have one entry for each of the {rhs.shape[0]} groups, got {group_sizes.shape}"
        )
    if not isinstance(group_sizes, jax.core.Tracer) and group_sizes.is_fully_addressable:
        sizes = np.asarray(group_sizes).astype(np.int64)
        if (sizes < 0).any():
            raise ValueError(f"group_sizes must not be negative, got {sizes.min()} in group {sizes.argmin()}")
        if sizes.sum() > lhs.shape[0]:
            raise ValueError(f"group_sizes sum to {sizes.sum()}, but lhs has {lhs.shape[0]} rows")


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames=("act", "dtype", "implementation"))
def _jitted(lhs, rhs, rhs_up, group_sizes, *, act, dtype, implementation):
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    lhs, rhs, group_sizes, *up = vary_alike(*_present(lhs, rhs, group_sizes.astype(jnp.int32), rhs_up))
    if up:
        return _gated(act, dtype, implementation, lhs, rhs, *up, group_sizes)
    return _product(dtype, implementation, lhs, rhs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dtype, implementation, lhs, rhs, group_sizes):
    return _run(_FORWARD, implementation, lhs, rhs, group_sizes, transpose=False, dtype=dtype)


def _product_forward(dtype, implementation, lhs, rhs, group_sizes):
    return _product(dtype, implementation, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _product_backward(dtype, implementation, residuals, grads):
    del dtype
    lhs, rhs, group_sizes = residuals
    d_lhs = _run(_FORWARD, implementation, grads, rhs, group_sizes, transpose=True, dtype=lhs.dtype)
    d_rhs = _run(_GRADIENT, implementation, lhs, grads, group_sizes, dtype=rhs.dtype)
    return d_lhs, d_rhs, None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated(act, dtype, implementation, lhs, rhs, rhs_up, group_sizes):
    return _run(_GATED, implementation, lhs, rhs, rhs_up, group_sizes, act=act, dtype=dtype)


def _gated_forward(act, dtype, implementation, *args):
    # Keeping both products costs 2 m n elements and saves a fifth of the arithmetic of forward and backward. The result
    # is made of them outside the kernels, so that a checkpoint which keeps the products need not keep it, too.
    kept = jnp.result_type(*args[:3])
    z, u = (checkpoint_name(x, PRODUCTS_NAME) for x in _run(_PRODUCTS, implementation, *args, dtype=kept))
    precise = jnp.promote_types(kept, jnp.float32)
    out = (gating.activate(z.astype(precise), act) * u.astype(precise)).astype(dtype)
    return out, (*args, z, u)


def _gated_backward(act, dtype, implementation, residuals, grads):
    del dtype
    gradients = _run(_GATED_GRADIENTS, implementation, *residuals, grads, act=act)
    return *gradients, None


_gated.defvjp(_gated_forward, _gated_backward)


def _run(table, implementation, *args, **settings):
    # Under vmap one element after the other: kernels keep their grid, and the loops their in-place updates.
    call = functools.partial(dispatch, _OP, table, implementation, **settings)
    return jax.custom_batching.sequential_vmap(call)(*args)
