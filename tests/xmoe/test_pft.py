import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.xmoe import MoEConfig, build_pft, pft_gather, pft_scatter, top_k_gating

RNG = np.random.default_rng(1)
gate = jax.jit(top_k_gating, static_argnums=1, static_argnames="train")
build = jax.jit(build_pft, static_argnums=1)


def config(experts, top_k, **changes):
    return MoEConfig(num_experts=experts, top_k=top_k, hidden_size=4, ffn_size=4, **changes)


def routed(tokens, cfg):
    rng = np.random.default_rng(tokens)
    logits = jnp.asarray(rng.normal(size=(tokens, cfg.num_experts)) * 2, jnp.float32)
    return gate(logits, cfg, train=True)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "drop"),
    [(17, 6, 2, "none"), (17, 6, 2, "probs"), (30, 3, 3, "position"), (1, 5, 2, "none"), (0, 5, 2, "none"),
     (2, 40, 3, "none")],
)  # fmt: skip
def test_buffer(tokens, experts, top_k, drop):
    cfg = config(experts, top_k, drop_policy=drop, capacity_factor=0.6, min_capacity=1)
    routing = routed(tokens, cfg)
    pft = build(routing, cfg)
    ids, keep = np.asarray(routing.expert_ids), np.asarray(routing.keep)
    total = tokens * top_k
    rows = total if routing.capacity is None else min(total, experts * routing.capacity)
    want = sorted((ids.flat[s], s) for s in range(total) if keep.flat[s])
    slots = np.array([s for _, s in want], int)
    valid = len(slots)
    pad = rows - valid
    assert drop == "none" or not keep.all()
    assert int(pft.num_valid) == valid
    assert pft.slots.shape == (rows,)
    np.testing.assert_array_equal(pft.slots, np.r_[slots, np.full(pad, total)])
    np.testing.assert_array_equal(pft.token_ids, np.r_[slots // top_k, np.full(pad, tokens)])
    np.testing.assert_array_equal(pft.expert_ids, np.r_[ids.flat[slots], np.full(pad, experts)].astype(int))
    np.testing.assert_array_equal(pft.combine_weights, np.r_[np.asarray(routing.weights).flat[slots], np.zeros(pad)])
    counts = np.bincount(ids.flat[slots].astype(int), minlength=experts)
    np.testing.assert_array_equal(pft.tokens_per_expert, counts)
    np.testing.assert_array_equal(pft.bins, np.cumsum(counts))
    inv = np.full(total, rows)
    inv[slots] = np.arange(valid)
    np.testing.assert_array_equal(pft.inv, inv.reshape(tokens, top_k))
    for array in (pft.slots, pft.token_ids, pft.expert_ids, pft.tokens_per_expert, pft.bins, pft.num_valid, pft.inv):
        assert array.dtype == jnp.int32


@pytest.mark.latest
def test_gather_scatter_and_gradients():
    """Against one-hot matrices; what lies past the valid rows is NaN and must reach nothing."""
    cfg = config(6, 3, drop_policy="position", capacity_factor=0.9, min_capacity=1)
    routing = routed(16, cfg)
    pft = build(routing, cfg)
    valid, rows = int(pft.num_valid), len(pft.slots)
    assert valid < rows
    hot = np.asarray(jax.nn.one_hot(pft.token_ids, 16))
    x, y = (jnp.asarray(RNG.normal(size=(n, 4)), jnp.float32) for n in (16, rows))
    weights = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
    broken = y.at[valid:].set(jnp.nan)
    flat = np.zeros(rows, np.float32)
    flat[:valid] = np.asarray(weights).reshape(-1)[np.asarray(pft.slots[:valid])]

    @jax.jit
    def run(x, y, weights, d_rows, d_out):
        gathered, pull_gather = jax.vjp(lambda x: pft_gather(x, pft), x)
        out, pull_scatter = jax.vjp(lambda y, weights: pft_scatter(y, pft, weights), y, weights)
        return gathered, pull_gather(d_rows), out, pull_scatter(d_out)

    d_out = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
    gathered, (d_x,), out, (d_y, d_weights) = run(x, broken, weights, broken, d_out)
    np.testing.assert_allclose(gathered[:valid], (hot @ x)[:valid], rtol=1e-6)
    np.testing.assert_allclose(d_x, hot[:valid].T @ y[:valid], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, (hot * flat[:, None])[:valid].T @ y[:valid], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_y[:valid], (flat[:, None] * (hot @ d_out))[:valid], rtol=1e-5, atol=1e-6)
    want = np.zeros(16 * 3)
    want[np.asarray(pft.slots[:valid])] = np.sum(np.asarray(y) * (hot @ d_out), axis=1)[:valid]
    np.testing.assert_allclose(d_weights, want.reshape(16, 3), rtol=1e-5, atol=1e-6)


def test_combine_weights_are_differentiable():
    cfg = config(4, 2, drop_policy="position", capacity_factor=0.7, min_capacity=1)
    routing = routed(9, cfg)
    mix = jnp.asarray(RNG.normal(size=build(routing, cfg).slots.shape), jnp.float32)

    def value(weights):
        return jnp.sum(build_pft(routing.replace(weights=weights), cfg).combine_weights * mix)

    pft, got = build(routing, cfg), jax.jit(jax.grad(value))(routing.weights)
    want = np.where(np.asarray(routing.keep), np.r_[mix, 0.0][np.asarray(pft.inv)], 0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
