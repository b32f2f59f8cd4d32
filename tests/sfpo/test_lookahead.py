"""The wrapper is `optax.lookahead`, and the methods that use it go back when they should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.sfpo.lookahead import lookahead


def grads_at(step):
    random = np.random.default_rng(step)
    return {"w": jnp.asarray(random.normal(size=(3, 2)), jnp.float32), "b": jnp.asarray(random.normal(size=2))}


@pytest.mark.latest
@pytest.mark.parametrize("period", [1, 3])
def test_equals_optax_used_directly(period):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    inner = optax.adamw(0.1, weight_decay=0.1)
    direct, ours = optax.lookahead(inner, period, 0.3), lookahead(inner, period, 0.3)
    pair = optax.LookaheadParams.init_synced(params)
    pair_state, state = direct.init(pair), ours.init(params)
    update = jax.jit(ours.update)
    for step in range(7):
        grads = grads_at(step)
        updates, pair_state = direct.update(grads, pair_state, pair)
        pair = optax.apply_updates(pair, updates)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (params, state.slow), tuple(pair)
        )
    if period == 1:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, state.slow)


def test_the_state_shares_no_memory_with_the_parameters():
    params = {"w": jnp.ones(3)}
    state = lookahead(optax.sgd(0.1), 2, 0.5).init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state)) if leaf.ndim]
    assert len(set(pointers)) == len(pointers)


def test_bad_use():
    with pytest.raises(ValueError, match="Synchronization period"):
        lookahead(optax.sgd(0.1), 0, 0.5)
    ours = lookahead(optax.sgd(0.1), 2, 0.5)
    with pytest.raises(ValueError, match="params"):
        ours.update({"w": jnp.ones(3)}, ours.init({"w": jnp.ones(3)}))
