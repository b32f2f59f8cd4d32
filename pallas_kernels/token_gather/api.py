"""The public gather: checks, choice of implementation, gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.token_gather import checks, reference, triton, xla

_OP = "token_gather"
_FORWARD = implementations(reference.gather, xla.gather, triton.gather)
_GRADIENT = implementations(reference.sum_choices, xla.sum_choices, triton.sum_choices)


def token_gather(
    x: Float[Array, "s h"],
    token_ids: Integer[Array, " b"],
    inv: Integer[Array, "s k"],
    num_valid: Integer[Array, ""] | int,
    *,
    implementation: Implementation = None,
) -> Float[Array, "b h"]:
    """Row `token_ids[i]` of x at i: the padding-free buffer of X-MoE (section 2.3 of its specification).

    Each token has k slots, and `inv` says where each of them lies in the buffer; the gradient of a token is the sum of
    the gradients of its k rows, gathered through `inv` (nothing is scattered) and added in float32 (float64 for float64
    inputs). Usable under `jit`, `vmap` (one element after the other), `jax.checkpoint` and `shard_map`.

    Rows from `num_valid` on belong to nobody. What their ids are does not matter, their gradient is not read, and what
    is returned for them is unspecified (zeros from "xla" and "reference"; kernels do not write them): mask them
    before anything is summed over rows.

    Args:
      x: tokens, any floating dtype.
      token_ids: the token of each row; outside [0, s) it is clamped.
      inv: the row of each slot; `num_valid` or more where a slot was dropped. Read by the gradient only.
      num_valid: rows in use, in [0, b].
      implementation: "triton" (CUDA, ROCm), "xla" (anywhere), "interpret" (the Triton kernels, interpreted, for tests),
        "reference", or several of them to be tried in order; None takes the best for the platform for which the program
        is lowered.

    Returns:
      [b, h] in x's dtype.

    Raises:
      ValueError: ranks disagree, inv has not one row a token, a concrete num_valid is outside [0, b]; unknown
        implementation.
      TypeError: x is not floating, or ids are not integers.
      NotImplementedError: the implementation asked for cannot serve the dtype or the platform (the latter when the
        program is lowered).
    """
    names = check_names(_OP, _FORWARD, implementation)
    x, token_ids, inv, num_valid = map(jnp.asarray, (x, token_ids, inv, num_valid))
    checks.floating(x=(x, 2))
    checks.integers(token_ids=(token_ids, 1), inv=(inv, 2), num_valid=(num_valid, 0))
    if inv.shape[0] != x.shape[0]:
        raise ValueError(f"inv must have one row for each of the {x.shape[0]} tokens of x, got shape {inv.shape}")
    checks.count("num_valid", num_valid, token_ids.shape[0])
    return _jitted(x, token_ids, inv, num_valid, implementation=names)


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames="implementation")
def _jitted(x, token_ids, inv, num_valid, *, implementation):
    if 0 in (*x.shape, *inv.shape, *token_ids.shape):
        return jnp.zeros((token_ids.shape[0], x.shape[1]), x.dtype)
    x, *indices = vary_alike(x, *(i.astype(jnp.int32) for i in (token_ids, inv, num_valid)))
    return _gather(implementation, x, *indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(implementation, x, token_ids, inv, num_valid):
    del inv
    return _run(_FORWARD, implementation, x, token_ids, num_valid)


def _gather_forward(implementation, x, token_ids, inv, num_valid):
    return _gather(implementation, x, token_ids, inv, num_valid), (inv, num_valid)


def _gather_backward(implementation, residuals, grads):
    return _run(_GRADIENT, implementation, grads, *residuals), None, None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _run(table, implementation, *args):
    # Under vmap one element after the other, so that kernels keep their grid.
    return jax.custom_batching.sequential_vmap(functools.partial(dispatch, _OP, table, implementation))(*args)
