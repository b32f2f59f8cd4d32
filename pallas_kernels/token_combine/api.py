"""The public weighted sum: checks, choice of implementation, gradients."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.token_combine import reference, triton, xla
from pallas_kernels.token_gather import checks
from pallas_kernels.token_gather import reference as gather_reference
from pallas_kernels.token_gather import triton as gather_triton
from pallas_kernels.token_gather import xla as gather_xla

_OP = "token_combine"
_FORWARD = implementations(gather_reference.sum_choices, gather_xla.sum_choices, gather_triton.sum_choices)
_ROWS_GRADIENT = implementations(gather_reference.gather, gather_xla.gather, gather_triton.gather)
_WEIGHTS_GRADIENT = implementations(reference.row_dots, xla.row_dots, triton.row_dots)


def token_combine(
    y: Float[Array, "b h"],
    weights: Float[Array, "s k"],
    inv: Integer[Array, "s k"],
    slots: Integer[Array, " b"],
    num_valid: Integer[Array, ""] | int,
    *,
    implementation: Implementation = None,
) -> Float[Array, "s h"]:
    """Row t is the sum over its k slots of `weights[t, j] * y[inv[t, j]]` (X-MoE, section 2.4 of its specification).

    Differentiable in `y` and `weights` (reverse mode), in gather form throughout: the gradient of a row is
    `weights[slot] * d_out[slot // k]`, that of a weight the dot product of its row with its token's gradient. Nothing
    is scattered, [s, k, h] is never stored, and sums are taken in float32 (float64 for float64 inputs). Usable under
    `jit`, `vmap` (one element after the other), `jax.checkpoint` and `shard_map`.

    Rows from `num_valid` on belong to nobody and may hold anything (NaN too): they are not read. What the gradient
    holds for them is unspecified (zeros from "xla" and "reference"; kernels do not write them).

    Args:
      y: rows, any floating dtype.
      weights: of each slot, any floating dtype.
      inv: the row of each slot; `num_valid` or more (or negative) where a slot was dropped, which counts as zero and
        gives its weight no gradient.
      slots: the slot t * k + j of each row, the inverse of `inv`. Read by the gradient of `y` only.
      num_valid: rows in use, in [0, b].
      implementation: "triton" (CUDA, ROCm), "xla" (anywhere), "interpret" (the Triton kernels, interpreted, for tests),
        "reference", or several of them to be tried in order; None takes the best for the platform for which the program
        is lowered.

    Returns:
      [s, h] in y's dtype.

    Raises:
      ValueError: ranks or shapes disagree, a concrete num_valid is outside [0, b]; unknown implementation.
      TypeError: y or weights are not floating, or indices are not integers.
      NotImplementedError: the implementation asked for cannot serve the dtype or the platform (the latter when the
        program is lowered).
    """
    names = check_names(_OP, _FORWARD, implementation)
    y, weights, inv, slots, num_valid = map(jnp.asarray, (y, weights, inv, slots, num_valid))
    checks.floating(y=(y, 2), weights=(weights, 2))
    checks.integers(inv=(inv, 2), slots=(slots, 1), num_valid=(num_valid, 0))
    if inv.shape != weights.shape:
        raise ValueError(f"inv must have the shape of weights, {weights.shape}, got {inv.shape}")
    if slots.shape[0] != y.shape[0]:
        raise ValueError(f"slots must have one entry for each of the {y.shape[0]} rows of y, got {slots.shape}")
    checks.count("num_valid", num_valid, y.shape[0])
    return _jitted(y, weights, inv, slots, num_valid, implementation=names)


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames="implementation")
def _jitted(y, weights, inv, slots, num_valid, *, implementation):
    if 0 in (*y.shape, *weights.shape):
        return jnp.zeros((weights.shape[0], y.shape[1]), y.dtype)
    y, weights, *indices = vary_alike(y, weights, *(i.astype(jnp.int32) for i in (inv, slots, num_valid)))
    return _combine(implementation, y, weights, *indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(implementation, y, weights, inv, slots, num_valid):
    del slots
    return _run(_FORWARD, implementation, y, inv, num_valid, weights)


def _combine_forward(implementation, *args):
    return _combine(implementation, *args), args


def _combine_backward(implementation, residuals, grads):
    y, weights, inv, slots, num_valid = residuals
    d_y = _run(_ROWS_GRADIENT, implementation, grads, slots, num_valid, weights)
    d_weights = _run(_WEIGHTS_GRADIENT, implementation, y, grads, inv, num_valid)
    return d_y, d_weights.astype(weights.dtype), None, None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _run(table, implementation, *args):
    # Under vmap one element after the other, so that kernels keep their grid.
    return jax.custom_batching.sequential_vmap(functools.partial(dispatch, _OP, table, implementation))(*args)
