import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.xmoe import MoE, MoEConfig, router_loss
from tests.oracles import moe as oracle

RNG = np.random.default_rng(2)
SIZES = {"num_experts": 5, "top_k": 2, "hidden_size": 6, "ffn_size": 4}


def tokens(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def init(layer, x):
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))["params"]
    return jax.tree.map(lambda leaf: 2 * leaf, params)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames="train")
def apply(layer, params, x, *, train=False, rng=None):
    return layer.apply({"params": params}, x, train=train, rng=rng)


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), 1e-30)


CASES = {
    "swiglu": {},
    "gelu, renormalised, dropping": {
        "activation": "gelu", "combine_weight": "softmax_renorm", "drop_policy": "probs", "capacity_factor": 0.6,
        "min_capacity": 1,
    },
    "silu, logits, first slots": {
        "activation": "silu", "combine_weight": "logits", "drop_policy": "position", "capacity_factor": 0.6,
        "min_capacity": 1, "num_shared_experts": 2,
    },
    "sigmoid, gated shared expert": {
        "combine_weight": "sigmoid", "shared_ffn_size": 3, "shared_gate": True, "weight_scale": 1.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """y, every gradient and the metrics, against the numpy oracle and its central differences."""
    config = MoEConfig(**SIZES, **CASES[name])
    layer, x = MoE(config), tokens(2, 4, 6)
    params = init(layer, x)
    mix = tokens(8, 6)
    settings = {
        "combine": config.combine_weight, "drop": config.drop_policy, "factor": config.capacity_factor,
        "min_capacity": config.min_capacity, "name": config.activation, "weight_scale": config.weight_scale,
    }  # fmt: skip

    def loss(tree):
        y, metrics = layer.apply({"params": tree["params"]}, tree["x"], train=True)
        return jnp.sum(y.reshape(8, 6) * mix) + 0.5 * metrics.aux_loss + 0.3 * metrics.z_loss, (y, metrics)

    def want_loss(tree):
        y, routing = oracle.layer(tree["params"], tree["x"].reshape(8, 6), 2, **settings)
        return (y * np.asarray(mix)).sum() + 0.5 * routing["aux_loss"] + 0.3 * routing["z_loss"]

    got, (y, metrics) = jax.jit(jax.grad(loss, has_aux=True))({"params": params, "x": x})
    want, routing = oracle.layer(params, np.asarray(x).reshape(8, 6), 2, **settings)
    assert relative_error(y.reshape(8, 6), want) < 1e-5
    differences = oracle.gradient(want_loss, {"params": params, "x": x})
    for path, grad in jax.tree_util.tree_leaves_with_path(got):
        expected = differences
        for key in path:
            expected = expected[key.key]
        assert relative_error(grad, expected) < 1e-5, path
    keep, ids = routing["keep"], routing["expert_ids"]
    assert keep.all() == (config.drop_policy == "none")
    np.testing.assert_array_equal(metrics.tokens_per_expert, np.bincount(ids[keep], minlength=5))
    np.testing.assert_allclose(metrics.dropped_fraction, 1 - keep.mean(), atol=1e-7)
    np.testing.assert_allclose(metrics.aux_loss, routing["aux_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics.z_loss, routing["z_loss"], rtol=1e-5)
    assert metrics.dropped_recv == metrics.inter_node_rows == 0


@pytest.mark.latest
def test_bfloat16():
    config = MoEConfig(**SIZES, shared_ffn_size=4)
    x = tokens(16, 6).astype(jnp.bfloat16)
    params = init(MoE(config), x)
    mix = tokens(16, 6)

    def loss(params, x, layer):
        return jnp.sum(layer.apply({"params": params}, x)[0] * mix)

    y, metrics = apply(MoE(config), params, x)
    assert y.dtype == jnp.bfloat16
    assert metrics.aux_loss.dtype == jnp.float32
    want = oracle.layer(params, np.asarray(x, np.float64), 2)[0]
    assert relative_error(y, want) < 2e-2
    assert jax.eval_shape(functools.partial(apply, MoE(config, dtype=jnp.float32)), params, x)[0].dtype == jnp.float32
    got = jax.jit(jax.grad(loss), static_argnums=2)(params, x, MoE(config))
    exact = jax.jit(jax.grad(loss), static_argnums=2)(params, x.astype(jnp.float32), MoE(config))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
        assert ours.dtype == jnp.float32
        assert relative_error(ours, np.asarray(theirs)) < 2e-2


def test_parameters():
    config = MoEConfig(**SIZES, shared_ffn_size=3, shared_gate=True)
    boxed = jax.eval_shape(MoE(config, param_dtype="bfloat16").init, jax.random.key(0), tokens(1, 6))["params"]
    names = {
        "/".join(key.key for key in path): (leaf.value.shape, leaf.names)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
        )
    }
    assert names == {
        "router/kernel": ((6, 5), ("embed", None)),
        "gate": ((5, 6, 4), ("expert", "embed", "mlp")),
        "up": ((5, 6, 4), ("expert", "embed", "mlp")),
        "down": ((5, 4, 6), ("expert", "mlp", "embed")),
        "shared/gate/kernel": ((6, 3), ("embed", "mlp")),
        "shared/up/kernel": ((6, 3), ("embed", "mlp")),
        "shared/down/kernel": ((3, 6), ("mlp", "embed")),
        "shared_gate/kernel": ((6, 1), ("embed", None)),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed)} == {jnp.dtype("bfloat16")}
    plain = jax.eval_shape(MoE(MoEConfig(**SIZES, activation="gelu")).init, jax.random.key(0), tokens(1, 6))["params"]
    assert sorted(plain) == ["down", "router", "up"]
    sequence_sharded = MoEConfig(**SIZES, expert_axes=("expert", "tensor"), tp_axis="tensor")
    boxed = jax.eval_shape(MoE(sequence_sharded).init, jax.random.key(0), tokens(1, 6))["params"]
    assert boxed["up"].names == ("expert_tensor", "embed", "mlp")


def test_shapes_and_capacities():
    config = MoEConfig(**SIZES, drop_policy="position", capacity_factor=5, eval_capacity_factor=0.3, min_capacity=1)
    layer = MoE(config)
    params = init(layer, tokens(3, 6))
    x = tokens(2, 3, 4, 6)
    y, metrics = apply(layer, params, x, train=True)
    assert y.shape == x.shape
    assert metrics.dropped_fraction == 0
    np.testing.assert_allclose(apply(layer, params, x.reshape(24, 6), train=True)[0], y.reshape(24, 6), atol=1e-6)
    assert apply(layer, params, x)[1].dropped_fraction > 0.3
    for shape in ((6,), (1, 6), (0, 6)):
        y, metrics = apply(layer, params, tokens(*shape))
        assert y.shape == shape
        assert np.isfinite(metrics.aux_loss)
    every = MoE(MoEConfig(**(SIZES | {"top_k": 5})))
    y, metrics = apply(every, params, x)
    np.testing.assert_array_equal(metrics.tokens_per_expert, [24] * 5)
    want = oracle.layer(params, np.asarray(x).reshape(24, 6), 5)[0]
    assert relative_error(y.reshape(24, 6), want) < 1e-5


def test_a_fully_dropped_token_keeps_its_shared_part():
    config = MoEConfig(**SIZES, drop_policy="position", capacity_factor=0.01, min_capacity=1, shared_ffn_size=3)
    layer, x = MoE(config), jnp.broadcast_to(tokens(1, 6), (4, 6))
    params = init(layer, x)
    y, _ = apply(layer, params, x, train=True)
    gate, up, down = (np.asarray(params["shared"][name]["kernel"], np.float64) for name in ("gate", "up", "down"))
    shared = oracle.expert(np.asarray(x, np.float64), gate, up, down)
    assert relative_error(y[1:], shared[1:]) < 1e-5
    assert relative_error(y[0], shared[0]) > 1e-2


def test_jitter():
    config = MoEConfig(**SIZES, jitter_eps=0.3)
    layer, x = MoE(config), tokens(32, 6)
    params = init(layer, x)
    still = apply(layer, params, x)[0]
    np.testing.assert_array_equal(apply(layer, params, x, rng=jax.random.key(1))[0], still)
    moved = apply(layer, params, x, train=True, rng=jax.random.key(1))
    assert relative_error(moved[0], np.asarray(still)) > 1e-3
    np.testing.assert_array_equal(apply(layer, params, x, train=True, rng=jax.random.key(1))[0], moved[0])
    y, _ = jax.eval_shape(
        lambda key: layer.apply({"params": params}, x, train=True, rngs={"mlp": key}), jax.random.key(1)
    )
    assert y.shape == x.shape
    with pytest.raises(ValueError, match=r"jitter_eps=0\.3 needs rng"):
        layer.apply({"params": params}, x, train=True)


def test_router_loss():
    config = MoEConfig(**SIZES, aux_loss_coef=0.2, z_loss_coef=0.1)
    layer, x = MoE(config), tokens(8, 6)
    _, metrics = apply(layer, init(layer, x), x)
    np.testing.assert_allclose(router_loss(metrics, config), 0.2 * metrics.aux_loss + 0.1 * metrics.z_loss, rtol=1e-6)


def test_bad_inputs(unchecked):
    config = MoEConfig(**SIZES)
    layer, x = MoE(config), tokens(8, 6)
    params = init(layer, x)
    with pytest.raises(ValueError, match=r"x must be \[..., hidden_size=6\], got shape \(8, 5\)"):
        layer.apply({"params": params}, x[:, :5])
    with pytest.raises(TypeError, match="x must be floating, got int32"):
        layer.apply({"params": params}, x.astype(jnp.int32))
    with pytest.raises(
        ValueError, match=r"up must hold 5 of the 5 experts on each of 1 devices, got shape \(4, 6, 4\)"
    ):
        layer.apply({"params": params | {"up": params["up"][:4]}}, x)
    for changes, message in (
        ({"dispatch": "rbd"}, r"dispatch='rbd' needs expert_axes, got \(\)"),
        ({"expert_axes": ("expert",)}, "expert_axes .* must be bound by jax.shard_map"),
        ({"tp_axis": "tensor"}, "tp_axis 'tensor' must be bound by jax.shard_map"),
    ):
        layer = MoE(MoEConfig(**SIZES, **changes))
        jax.eval_shape(layer.init, jax.random.key(0), x)
        with pytest.raises(ValueError, match=message):
            layer.apply({"params": params}, x)
