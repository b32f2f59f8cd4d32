import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.xmoe import MoEConfig, Routing, expert_capacity, top_k_gating
from tests.oracles import moe as oracle

RNG = np.random.default_rng(0)
gate = jax.jit(top_k_gating, static_argnums=1, static_argnames="train")


def config(experts=8, top_k=3, **changes):
    return MoEConfig(num_experts=experts, top_k=top_k, hidden_size=4, ffn_size=4, **changes)


def check(routing, want, rtol=1e-5):
    np.testing.assert_array_equal(routing.expert_ids, want["expert_ids"])
    np.testing.assert_array_equal(routing.keep, want["keep"])
    np.testing.assert_allclose(routing.weights, want["weights"], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(routing.aux_loss, want["aux_loss"], rtol=rtol)
    np.testing.assert_allclose(routing.z_loss, want["z_loss"], rtol=rtol)
    assert routing.capacity == want["capacity"]
    assert routing.expert_ids.dtype == jnp.int32
    assert routing.weights.dtype == jnp.float32


@pytest.mark.parametrize("combine", ["softmax", "softmax_renorm", "logits", "sigmoid", "sigmoid_scores"])
def test_every_weight_and_drop_policy(combine):
    logits = (RNG.normal(size=(24, 8)) * 2).astype(np.float32)
    for drop, factor, least in (("none", 1.0, 4), ("probs", 0.6, 1), ("position", 0.6, 1), ("probs", 1.0, 11)):
        cfg = config(drop_policy=drop, combine_weight=combine, capacity_factor=factor, min_capacity=least)
        routing = gate(logits, cfg, train=True)
        check(routing, oracle.route(logits, 3, combine=combine, drop=drop, factor=factor, min_capacity=least))
        assert drop == "none" or least > 4 or not np.all(routing.keep)


def test_capacity():
    assert expert_capacity(1024, 64, 6, 1.25, 4) == 120
    assert expert_capacity(10, 64, 6, 1.25, 4) == 4
    assert expert_capacity(10, 3, 2, 1.0, 1) == 7
    assert expert_capacity(0, 3, 2, 1.0, 2) == 2
    cfg = config(drop_policy="probs", capacity_factor=2, eval_capacity_factor=0.5, min_capacity=1)
    logits = jnp.zeros((16, 8))
    assert gate(logits, cfg, train=True).capacity == 12
    assert gate(logits, cfg, train=False).capacity == 3
    with pytest.raises(ValueError, match="capacity_factor must be positive, got 0"):
        expert_capacity(8, 4, 2, 0, 4)


def test_ties_go_to_the_lower_index():
    logits = np.zeros((6, 4), np.float32)
    for drop in ("probs", "position"):
        cfg = config(4, 2, drop_policy=drop, capacity_factor=0.01, min_capacity=2)
        routing = gate(logits, cfg, train=True)
        np.testing.assert_array_equal(routing.expert_ids, [[0, 1]] * 6)
        np.testing.assert_array_equal(routing.keep[:, 0], [True] * 2 + [False] * 4)


def test_ranks_are_exact_beyond_half_precision():
    """The released code ranks in float16, which stops counting at 2048."""
    tokens = 5000
    logits = np.stack([np.linspace(1, 3, tokens), np.zeros(tokens)], axis=1).astype(np.float32)
    cfg = config(2, 1, drop_policy="probs", capacity_factor=1.2)
    routing = gate(logits, cfg, train=True)
    np.testing.assert_array_equal(np.flatnonzero(routing.keep[:, 0]), np.arange(tokens - routing.capacity, tokens))


def test_negative_logits_are_no_worse_than_none():
    """The released padded path ranks selected negative logits behind entries that nobody selected."""
    logits = np.array([[-3.0, -9.0], [-1.0, -9.0], [-2.0, -9.0]], np.float32)
    cfg = config(2, 1, drop_policy="probs", combine_weight="logits", capacity_factor=0.01, min_capacity=2)
    np.testing.assert_array_equal(gate(logits, cfg, train=True).keep[:, 0], [False, True, True])


def test_selection_bias_chooses_and_does_not_weigh():
    logits = (RNG.normal(size=(12, 8))).astype(np.float32)
    bias = RNG.normal(size=8).astype(np.float32)
    cfg = config(combine_weight="sigmoid", drop_policy="probs", capacity_factor=0.7, min_capacity=1)
    routing = gate(logits, cfg, train=True, selection_bias=bias)
    want = oracle.route(logits, 3, combine="sigmoid", drop="probs", factor=0.7, min_capacity=1, selection_bias=bias)
    check(routing, want)


def test_balance_is_one():
    logits = np.where(np.arange(16)[:, None] % 8 == np.arange(8), 60.0, 0.0)
    logits += np.where((np.arange(16)[:, None] + 1) % 8 == np.arange(8), 60.0, 0.0)
    routing = gate(logits.astype(np.float32), config(8, 2, drop_policy="position"), train=True)
    np.testing.assert_allclose(routing.aux_loss, 1.0, rtol=1e-6)


def test_gradients():
    logits = RNG.normal(size=(6, 5))
    mix = RNG.normal(size=(6, 2))
    for combine in ("softmax", "softmax_renorm", "logits", "sigmoid"):
        cfg = config(5, 2, combine_weight=combine, drop_policy="probs", capacity_factor=0.8, min_capacity=1)

        def value(routing):
            get = routing.get if isinstance(routing, dict) else lambda name: getattr(routing, name)
            return (get("weights") * mix).sum() + 0.3 * get("aux_loss") + 0.2 * get("z_loss")

        got = jax.jit(jax.grad(lambda x: value(top_k_gating(x, cfg, train=True))))(jnp.float32(logits))  # noqa: B023
        settings = {"combine": combine, "drop": "probs", "factor": 0.8, "min_capacity": 1}
        want = oracle.gradient(lambda x: value(oracle.route(x, 2, **settings)), logits)  # noqa: B023
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_edges():
    assert gate(jnp.zeros((0, 8)), config(), train=True).aux_loss == 0
    every = gate(jnp.asarray(RNG.normal(size=(1, 4)), jnp.float32), config(4, 4), train=True)
    assert sorted(np.asarray(every.expert_ids)[0]) == [0, 1, 2, 3]
    for combine in ("softmax", "sigmoid"):
        cfg = config(combine_weight=combine, drop_policy="probs", capacity_factor=0.5, min_capacity=1)
        broken = gate(jnp.full((5, 8), jnp.nan), cfg, train=True)
        assert np.all((np.asarray(broken.expert_ids) >= 0) & (np.asarray(broken.expert_ids) < 8))
        for row in np.asarray(broken.expert_ids):
            assert len(set(row)) == 3
    assert isinstance(broken, Routing)


def test_bad_inputs(unchecked):
    with pytest.raises(ValueError, match=r"logits must be \[S, num_experts=8\], got shape \(3, 7\)"):
        top_k_gating(jnp.zeros((3, 7)), config(), train=True)
    with pytest.raises(TypeError, match="logits must be floating, got int32"):
        top_k_gating(jnp.zeros((3, 8), jnp.int32), config(), train=True)
    with pytest.raises(ValueError, match="selection_bias needs combine_weight='sigmoid', got 'softmax'"):
        top_k_gating(jnp.zeros((3, 8)), config(), train=True, selection_bias=jnp.zeros(8))
    with pytest.raises(ValueError, match=r"selection_bias must have shape \(8,\), got \(7,\)"):
        top_k_gating(jnp.zeros((3, 8)), config(combine_weight="sigmoid"), train=True, selection_bias=jnp.zeros(7))
