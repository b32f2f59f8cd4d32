import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.xmoe import MoE, MoEConfig
from jaxlab.xmoe.baselines import padded_gating
from tests.oracles import moe as oracle

RNG = np.random.default_rng(3)
SIZES = {"num_experts": 6, "top_k": 2, "hidden_size": 8, "ffn_size": 5}
ONE_DEVICE = ["dense", "padded", "tutel", "megablocks", "ragged_dot"]


def tokens(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@functools.cache
def problem(**changes):
    x = tokens(19, 8)
    layer = MoE(MoEConfig(**SIZES, **changes))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))["params"]
    return jax.tree.map(lambda leaf: 2 * leaf, params), x, tokens(19, 8)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, x, mix):
    def loss(params, x):
        y, metrics = MoE(config).apply({"params": params}, x, train=True)
        return jnp.sum(y * mix) + metrics.aux_loss, (y, metrics)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def check_equal(got, want, bound=1e-5):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(theirs))), 1e-30)
        assert np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max() < bound * scale


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dispatch", ONE_DEVICE)
def test_equal_to_local(dispatch, activation):
    """Dropless: values, every gradient and the metrics."""
    params, x, mix = problem(activation=activation)
    want = run(MoEConfig(**SIZES, activation=activation), params, x, mix)
    check_equal(run(MoEConfig(**SIZES, activation=activation, dispatch=dispatch), params, x, mix), want)


@pytest.mark.parametrize("dispatch", ONE_DEVICE)
def test_equal_to_local_where_slots_drop(dispatch):
    changes = {"drop_policy": "probs", "capacity_factor": 0.7, "min_capacity": 1, "combine_weight": "softmax_renorm"}
    params, x, mix = problem()
    want = run(MoEConfig(**SIZES, **changes), params, x, mix)
    assert want[1][1].dropped_fraction > 0.1
    check_equal(run(MoEConfig(**SIZES, **changes, dispatch=dispatch), params, x, mix), want)


@pytest.mark.parametrize("dispatch", ["padded", "tutel", "megablocks"])
def test_no_tokens(dispatch):
    params, _, _ = problem()
    for drop in ("none", "position"):
        layer = MoE(MoEConfig(**SIZES, dispatch=dispatch, drop_policy=drop))
        assert jax.jit(layer.apply)({"params": params}, jnp.zeros((0, 8)))[0].shape == (0, 8)


@pytest.mark.parametrize("drop", ["none", "position", "probs"])
def test_padded_gating(drop):
    logits = RNG.normal(size=(13, 6)).astype(np.float32)
    config = MoEConfig(**SIZES, drop_policy=drop, combine_weight="softmax_renorm", capacity_factor=0.7, min_capacity=1)
    combine, dispatch, aux_loss = jax.jit(lambda x: padded_gating(x, config, train=True))(logits)
    want = oracle.route(logits, 2, combine="softmax_renorm", drop=drop, factor=0.7, min_capacity=1)
    capacity = want["capacity"] or 13
    expected = np.zeros((13, 6, capacity))
    seen = np.zeros(6, int)
    for t in range(13):
        for j in range(2):
            if want["keep"][t, j]:
                e = want["expert_ids"][t, j]
                expected[t, e, seen[e]] = want["weights"][t, j]
                seen[e] += 1
    assert dispatch.dtype == bool
    np.testing.assert_allclose(combine, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(dispatch, expected > 0)
    np.testing.assert_allclose(aux_loss, want["aux_loss"], rtol=1e-5)
