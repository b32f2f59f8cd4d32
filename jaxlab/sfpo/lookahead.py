"""`optax.lookahead` (Zhang et al., arXiv 1907.08610) for a loop that knows one set of parameters only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LookaheadParamsState(NamedTuple):
    """State of `optax.lookahead`, and the slow parameters that it pairs with the loop's own, the fast ones."""

    inner_state: Any
    slow: Any


def lookahead(
    fast_optimizer: optax.GradientTransformation, sync_period: int, slow_step_size: float
) -> optax.GradientTransformation:
    """`optax.lookahead` with its slow parameters in its state: any loop that passes `params` can use it.

    Unlike SFPO it goes part of the way back every so many updates whatever batch they were on, and makes no correction
    there.

    Args:
      fast_optimizer: of the loop's parameters.
      sync_period: updates between two synchronisations.
      slow_step_size: part of the way from the slow to the fast parameters that is kept, in [0, 1].

    Raises:
      ValueError: `sync_period` below 1; from `update`, no `params`.
    """
    both: Any = optax.lookahead(fast_optimizer, sync_period, slow_step_size)

    def init(params):
        slow = jax.tree.map(jnp.copy, params)  # the loop may donate its own
        return LookaheadParamsState(both.init(optax.LookaheadParams(params, slow)), slow)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: lookahead needs the parameters in update(grads, state, params), got None")
        updates, inner_state = both.update(updates, state.inner_state, optax.LookaheadParams(params, state.slow))
        slow = optax.apply_updates(state.slow, updates.slow)
        return updates.fast, LookaheadParamsState(inner_state, slow)

    return optax.GradientTransformation(init, update)
