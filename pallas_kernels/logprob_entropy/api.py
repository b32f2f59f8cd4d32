"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.logprob_entropy import reference, triton, xla

AnyArray = Array | np.ndarray
_OP = "logprob_entropy"
_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


class LogprobEntropy(NamedTuple):
    """What is known of each row's distribution over the vocabulary.

    Attributes:
        logp: `[N]`, log-probability of the target, logit - lse.
        entropy: `[N]`, in nats.
        lse: `[N]`, the log-sum-exp of the logits.
    """

    logp: Array
    entropy: Array
    lse: Array


def logprob_entropy(
    hidden: Float[AnyArray, "n d"],
    head: Float[AnyArray, "d v"],
    targets: Integer[AnyArray, " n"],
    *,
    temperature: Any = 1.0,
    implementation: Implementation = None,
) -> LogprobEntropy:
    """Log-probability of each target under softmax(hidden head / temperature), with entropy and log-sum-exp.

    The `[N,V]` logits, the memory peak of a language model's training, exist a tile at a time (section 4.4 of SFPO's
    specification; the method of cut cross-entropy, Wijmans et al., arXiv:2411.09009). Products are taken in the
    promoted dtype of hidden and head; their sums and all that follows are float32 (float64 for float64 inputs). The
    backward pass keeps the arguments, entropy and lse, and makes the logits again.

    Differentiable in hidden, head and temperature through each of the three results. Usable under `jit`,
    `jax.checkpoint` and `shard_map`; arrays that lie over a mesh need a `shard_map`, over the rows. An embedding given
    as `table.T` is copied to lie as a head does.

    Args:
        hidden: `[N,d]`, any floating dtype; N may be 0.
        head: `[d,V]`, any floating dtype.
        targets: `[N]` integers. Outside [0, V), which is not an error so that padding may be marked, logp is -inf and
            passes no gradient; entropy and lse are as ever. Select such rows away (`where`), do not multiply them by 0.
        temperature: divides the logits; a positive number or scalar array. Traced values compile nothing anew and are
            not checked.
        implementation: None, "reference" (plain JAX, differentiated by JAX), "xla", "triton" or "interpret", or several
            in order.

    Returns:
        Three `[N]` arrays, float32 (float64 for float64 inputs); gradients have each argument's dtype.

    Raises:
        ValueError: shapes that do not fit, d = 0 or V = 0, a temperature that is not a positive finite scalar, an
            unknown implementation.
        TypeError: hidden or head not floating, targets not integer.
        NotImplementedError: the implementation asked for cannot run here.
    """
    names = check_names(_OP, _FORWARD, implementation)
    hidden, head, targets = map(jnp.asarray, (hidden, head, targets))
    _check(hidden, head, targets, temperature)
    return LogprobEntropy(*_jitted(hidden, head, targets, jnp.asarray(temperature), implementation=names))


# Jitted, so that an eager call is one program too, and the platform is that of the arguments.
@functools.partial(jax.jit, static_argnames="implementation")
def _jitted(hidden, head, targets, temperature, *, implementation):
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, head.dtype), jnp.float32)
    if targets.size == 0:
        return (jnp.zeros(0, wide),) * 3
    targets = targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32)
    inside = (targets >= 0) & (targets < head.shape[1])
    targets = jnp.where(inside, targets.astype(jnp.int32), -1)
    args = vary_alike(hidden, head, targets, temperature.astype(wide))
    if implementation == ("reference",):
        logp, entropy, lse = reference.forward(*args)
    else:
        logp, entropy, lse = _rows(implementation, *args)
    return jnp.where(inside, logp, -jnp.inf), entropy, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(implementation, hidden, head, targets, temperature):
    return _fwd(implementation, hidden, head, targets, temperature)[0]


def _fwd(implementation, *args):
    logp, entropy, lse = dispatch(_OP, _FORWARD, implementation, *args)
    return (logp, entropy, lse), (*args, entropy, lse)


def _bwd(implementation, saved, cotangents):
    hidden, head, _, temperature, *_ = saved
    d_hidden, d_head = dispatch(_OP, _BACKWARD, implementation, *saved, *cotangents)
    # Euler: a logit is linear in hidden and in 1 / temperature.
    d_temperature = -jnp.sum(hidden.astype(temperature.dtype) * d_hidden) / temperature
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, d_temperature


_rows.defvjp(_fwd, _bwd)


def _check(hidden, head, targets, temperature):
    for name, x, axes in (("hidden", hidden, "N, d"), ("head", head, "d, V")):
        if x.ndim != 2:
            raise ValueError(f"{name}: expected 2 axes [{axes}], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden: expected [N, d] with d at least 1, got shape {hidden.shape}")
    if head.shape[0] != hidden.shape[1] or head.shape[1] == 0:
        expected = f"[{hidden.shape[1]}, V] with V at least 1"
        raise ValueError(f"head: expected shape {expected} beside hidden of shape {hidden.shape}, got {head.shape}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected shape {hidden.shape[:1]}, got {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets: expected integers, got {targets.dtype}")
    if np.shape(temperature) != ():
        raise ValueError(f"temperature: expected a scalar, got shape {np.shape(temperature)}")
    if not isinstance(temperature, jax.core.Tracer) and not 0 < float(temperature) < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
