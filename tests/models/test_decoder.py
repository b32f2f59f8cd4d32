"""The decoder against a float64 oracle, its forms against each other, its seams, its refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.core import make_mesh
from jaxlab.models.cost import parameter_count
from jaxlab.models.decoder import (
    Cache,
    Decoder,
    DecoderConfig,
    KVCache,
    MoEPolicy,
    MoESpec,
    RopeConfig,
    abstract_params,
    default_mlp,
    head_weight,
    init_params,
)
from tests.oracles.decoder import decoder

TINY = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
)
CONFIGS = {
    "plain": TINY,
    "windows": dataclasses.replace(TINY, windows=(None, 3), qk_norm="head", tie_word_embeddings=True),
    "sparse": dataclasses.replace(
        TINY,
        moe=MoESpec(5, 2, 12, shared_ffn_size=8, shared_gate=True, renormalise=True, sparse_layers=(1,)),
        qkv_bias=True,
    ),
    "sigmoid": dataclasses.replace(
        TINY, moe=MoESpec(4, 3, 12, shared_ffn_size=8, scoring="sigmoid", scale=1.7), qk_norm="full", head_dim=6
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 13)).astype(np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 8, [7] * 4 + [9] * 6 + [0] * 3], np.int32)


@functools.cache
def _model(name, **changes):
    """A model, and random parameters in which nothing hides (norms and biases are random, too)."""
    model = Decoder(dataclasses.replace(CONFIGS[name], **changes))
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        centre = float(path[-1].key == "scale")
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(abstract_params(model)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, *args, **kwargs):
    return model.apply({"params": params}, *args, **kwargs)


@pytest.mark.latest
@pytest.mark.parametrize("name", CONFIGS)
def test_oracle(name):
    model, params = _model(name)
    out = _apply(model, params, TOKENS, segment_ids=SEGMENTS)
    want = decoder(model.config, params, TOKENS, segment_ids=SEGMENTS)
    seen = SEGMENTS != 0
    np.testing.assert_allclose(np.asarray(out.logits)[seen], want[seen], atol=3e-5)
    assert out.logits.dtype == out.hidden.dtype == jnp.float32
    assert out.cache is None
    assert list(out.aux) == [f"blocks_{i}" for i, run in enumerate(model.config.layer_runs()) if run.sparse]
    np.testing.assert_allclose(_apply_unembed(model, params, out.hidden[0, 3]), out.logits[0, 3], atol=1e-5)
    np.testing.assert_allclose(out.hidden @ head_weight(params), out.logits, atol=1e-5)


def _apply_unembed(model, params, hidden):
    return model.apply({"params": params}, hidden, method="unembed")


def test_tree_is_the_contract():
    model, params = _model("sparse")
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    assert shapes == {
        "embed/embedding": (19, 16),
        "final_norm/scale": (16,),
        "head/kernel": (16, 19),
        **{
            f"blocks_{i}/{name}": (n, *shape)
            for i, n in ((0, 1), (1, 1))
            for name, shape in {
                "attn_norm/scale": (16,),
                "mlp_norm/scale": (16,),
                "attn/q/kernel": (16, 4, 4),
                "attn/k/kernel": (16, 2, 4),
                "attn/v/kernel": (16, 2, 4),
                "attn/q/bias": (4, 4),
                "attn/k/bias": (2, 4),
                "attn/v/bias": (2, 4),
                "attn/o/kernel": (4, 4, 16),
            }.items()
        },
        **{f"blocks_0/mlp/{name}/kernel": (1, 16, 24) for name in ("gate", "up")},
        "blocks_0/mlp/down/kernel": (1, 24, 16),
        "blocks_1/mlp/router/kernel": (1, 16, 5),
        "blocks_1/mlp/gate": (1, 5, 16, 12),
        "blocks_1/mlp/up": (1, 5, 16, 12),
        "blocks_1/mlp/down": (1, 5, 12, 16),
        "blocks_1/mlp/shared/gate/kernel": (1, 16, 8),
        "blocks_1/mlp/shared/up/kernel": (1, 16, 8),
        "blocks_1/mlp/shared/down/kernel": (1, 8, 16),
        "blocks_1/mlp/shared_gate/kernel": (1, 16, 1),
    }
    boxed = abstract_params(model)
    assert boxed["blocks_1"]["mlp"]["gate"].names == ("layers", "expert", "embed", "mlp")
    assert boxed["blocks_0"]["attn"]["k"]["kernel"].names == ("layers", "embed", "kv_heads", "head_dim")
    assert "head" not in _model("windows")[1]
    assert _model("sigmoid")[1]["blocks_0"]["attn"]["q_norm"]["scale"].shape == (2, 24)


def test_scan_unrolled_and_remat_agree():
    """Values and gradients of every form are those of the scanned one, over the same tree."""
    model, params = _model("plain")

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, params):
        def loss(params):
            out = model.apply({"params": params}, TOKENS, segment_ids=SEGMENTS)
            return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) ** 2)

        return jax.value_and_grad(loss)(params)

    want = gradients(model, params)
    for changes in ({"scan": False, "remat": "block"}, {"remat": "block"}):
        got = gradients(Decoder(dataclasses.replace(TINY, **changes)), params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "by_layer"), [("plain", False), ("windows", True), ("sparse", True), ("sigmoid", False)]
)
def test_cache_token_by_token(name, by_layer):
    """A prompt padded on the right, then single tokens, gives the logits of the pass without a cache."""
    model, params = _model(name, scan=not by_layer)
    want = _apply(model, params, TOKENS).logits
    cache = KVCache.create(model.config, 2, 16, by_layer=by_layer)
    assert isinstance(cache, Cache)
    assert cache.length == 16
    lengths = np.array([10, 9])
    columns = np.arange(10)
    positions = np.where(columns < lengths[:, None], columns, -1).astype(np.int32)
    out = _apply(model, params, TOKENS[:, :10], positions, cache=cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[row, :length], want[row, :length], atol=1e-5)
    cache = out.cache
    for step in range(3):
        at = (lengths + step).astype(np.int32)
        out = _apply(model, params, TOKENS[np.arange(2), at][:, None], at[:, None], cache=cache)
        np.testing.assert_allclose(out.logits[:, 0], want[np.arange(2), at], atol=1e-5)
        cache = out.cache


def test_cache_position_minus_one_writes_nothing():
    model, params = _model("plain")
    cache = KVCache.create(model.config, 2, 8)
    filled = _apply(model, params, TOKENS[:, :4], np.arange(4, dtype=np.int32)[None].repeat(2, 0), cache=cache).cache
    after = _apply(model, params, TOKENS[:, 4:5], np.array([[4], [-1]], np.int32), cache=filled).cache
    for old, new in zip(jax.tree.leaves(filled), jax.tree.leaves(after)):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
        assert (old[:, 0] != new[:, 0]).any()


def test_embeddings_and_rope_positions():
    model, params = _model("plain")
    embeddings = params["embed"]["embedding"][TOKENS]
    want = _apply(model, params, TOKENS).logits
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13)).astype(jnp.int32)
    np.testing.assert_allclose(_apply(model, params, None, embeddings=embeddings).logits, want, atol=1e-6)
    sections = Decoder(dataclasses.replace(TINY, rope=RopeConfig(mrope_section=(1, 1, 0))))
    three = jnp.stack([positions] * 3)
    np.testing.assert_allclose(_apply(sections, params, TOKENS, rope_positions=three).logits, want, atol=1e-5)
    # Only the second frequency follows the height.
    moved = _apply(sections, params, TOKENS, rope_positions=three.at[1].mul(2)).logits
    same = _apply(sections, params, TOKENS, rope_positions=three.at[2].mul(2)).logits
    assert np.abs(moved - want).max() > 1e-4
    np.testing.assert_allclose(same, want, atol=1e-5)


class _Reporting(nn.Module):
    """An MLP of the protocol that reports and draws random numbers."""

    @nn.compact
    def __call__(self, x, *, train=False):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        noise = jax.random.uniform(self.make_rng("mlp")) if train else jnp.zeros(())
        return x * scale, {"mean": jnp.mean(x), "noise": noise}


def _reporting_mlp(config, layer_is_sparse):
    return _Reporting() if layer_is_sparse else default_mlp(config, False)


REPORTING = dataclasses.replace(TINY, num_hidden_layers=3, moe=MoESpec(5, 2, 12, sparse_layers=(1, 2)))


def test_mlp_protocol():
    model = Decoder(REPORTING, mlp=_reporting_mlp)
    params = init_params(model, jax.random.key(1))
    assert params["blocks_1"]["mlp"]["scale"].shape == (2, 16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        return model.apply({"params": params}, TOKENS, train=True, rngs={"mlp": jax.random.key(2)}).aux

    aux = run(model, params)
    assert set(aux) == {"blocks_1"}
    assert aux["blocks_1"]["mean"].shape == (2,)
    assert aux["blocks_1"]["noise"][0] != aux["blocks_1"]["noise"][1]
    unrolled = run(Decoder(dataclasses.replace(REPORTING, scan=False), mlp=_reporting_mlp), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), unrolled, aux)


def test_how_experts_run_does_not_change_the_model():
    """Over a mesh and without a key, too: pilots are then the first slots. Training asks for the key."""
    model, params = _model("sigmoid")
    want = _apply(model, params, TOKENS)
    policy = MoEPolicy(dispatch="rbd", expert_axes=("node",), node_size=1)
    assert hash(policy) == hash(dataclasses.replace(policy))
    spread = Decoder(model.config, mlp=policy)
    with jax.set_mesh(make_mesh({"node": 2}, jax.devices()[:2])):
        got = _apply(spread, params, TOKENS)
        with pytest.raises(ValueError, match="pilot='random' needs rng"):
            jax.eval_shape(lambda: spread.apply({"params": params}, TOKENS, train=True))
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    ours, theirs = got.aux["blocks_0"], want.aux["blocks_0"]
    np.testing.assert_array_equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert np.all(ours.inter_node_rows > 0)


def test_experts_of_two_matrices():
    config = dataclasses.replace(
        TINY, moe=MoESpec(4, 2, 12, shared_ffn_size=8, activation="gelu"), model_type="mixtral"
    )
    shapes = abstract_params(Decoder(config))
    assert sorted(shapes["blocks_0"]["mlp"]) == ["down", "router", "shared", "up"]
    assert parameter_count(config).total == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    with pytest.raises(NotImplementedError, match="experts of two matrices"):
        config.to_hf()
    with pytest.raises(ValueError, match="activation must be 'swiglu', 'silu' or 'gelu', got 'relu'"):
        MoESpec(4, 2, 12, activation="relu")


def test_attention_is_replaced():
    seen = []

    def attention(q, k, v, *, positions, segment_ids, scale, window):
        seen.append((q.shape, k.shape, positions.shape, segment_ids.shape, scale, window))
        return jnp.zeros_like(q)

    model, params = _model("windows")
    other = Decoder(model.config, attention=attention)
    jax.eval_shape(lambda params: other.apply({"params": params}, TOKENS, segment_ids=SEGMENTS), params)
    assert seen == [((2, 13, 4, 4), (2, 13, 2, 4), (2, 13), (2, 13), 0.5, window) for window in (None, 3)]


def test_unused_logits_cost_nothing():
    model, params = _model("plain")

    def flops(which):
        lowered = jax.jit(lambda params: which(model.apply({"params": params}, TOKENS))).lower(params)
        return lowered.compile().cost_analysis()["flops"]

    head = 2 * TOKENS.size * 16 * 19
    assert flops(lambda out: out.logits) - flops(lambda out: out.hidden) == pytest.approx(head, rel=0.05)


def test_bfloat16_policy():
    model, params = _model("plain")
    config = dataclasses.replace(TINY, dtype="bfloat16")
    out = _apply(Decoder(config), params, TOKENS)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(out.logits, _apply(model, params, TOKENS).logits, atol=0.3)
    small = abstract_params(Decoder(dataclasses.replace(config, param_dtype="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}


def test_refusals(unchecked):
    model, params = _model("plain")
    run = functools.partial(model.apply, {"params": params})
    cache = KVCache.create(TINY, 2, 16)
    with pytest.raises(ValueError, match="segment_ids cannot be used with a cache"):
        run(TOKENS, None, SEGMENTS, cache)
    with pytest.raises(ValueError, match="either tokens or embeddings, got neither"):
        run(None)
    with pytest.raises(ValueError, match="either tokens or embeddings, got both"):
        run(TOKENS, embeddings=jnp.zeros((2, 13, 16)))
    with pytest.raises(ValueError, match=r"positions: expected shape \(2, 13\)"):
        run(TOKENS, np.zeros((2, 12), np.int32))
    with pytest.raises(ValueError, match="rope_positions: expected shape"):
        run(TOKENS, rope_positions=np.zeros((2, 13), np.int32))
    with pytest.raises(ValueError, match="rope sections"):
        run(TOKENS, rope_positions=np.zeros((3, 2, 13), np.int32))
    with pytest.raises(TypeError, match="by_layer"):
        run(TOKENS, cache=KVCache.create(TINY, 2, 16, by_layer=True))
