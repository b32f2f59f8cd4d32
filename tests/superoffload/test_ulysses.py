"""Sequences over devices equal those of one: the exchanges, attention, a whole decoder, forwards and backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxlab.core import make_mesh
from jaxlab.models.decoder import Decoder, DecoderConfig, abstract_params
from jaxlab.superoffload.ulysses import UlyssesAttention, gather_heads, scatter_heads, ulysses_attention
from jaxlab.training import TokenBatch, lm_loss
from pallas_kernels.flash_attention import flash_attention
from tests.oracles import attention as oracle

RNG = np.random.default_rng(0)


FIRST = P("sequence")


def spread(function, size=4, spec=FIRST, count=1, out=FIRST):
    mesh = make_mesh({"sequence": size}, jax.devices()[:size])
    return jax.shard_map(function, mesh=mesh, in_specs=(spec,) * count, out_specs=out)


@pytest.mark.latest
def test_each_rank_gets_its_heads_and_the_whole_sequence():
    x = RNG.normal(size=(8, 2, 12, 3)).astype(np.float32)

    def ranks(x):
        got = scatter_heads(x, "sequence")
        return got[None], gather_heads(got, "sequence")

    got, back = jax.jit(spread(ranks, out=(FIRST, FIRST)))(x)
    for rank in range(4):
        np.testing.assert_array_equal(got[rank], x[:, :, 3 * rank : 3 * rank + 3])
    np.testing.assert_array_equal(back, x)
    # In the decoder's layout, axes counted from the end.
    x = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
    scatter = functools.partial(scatter_heads, axis_name="sequence", seq_axis=1, head_axis=-2)
    got = jax.jit(spread(scatter, spec=P(None, "sequence"), out=P(None, None, "sequence")))(x)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("kv_heads", [12, 6, 3])
def test_attention_and_its_gradients(kv_heads):
    """Twelve query heads on four ranks: keys that divide, and that are repeated two and four times."""
    shape, kv_shape = (16, 1, 12, 4), (16, 1, kv_heads, 4)
    q, k, v, mix = (RNG.normal(size=s).astype(np.float32) for s in (shape, kv_shape, kv_shape, shape))

    def whole(q, k, v):
        swapped = (x.swapaxes(0, 1) for x in (q, k, v))
        return flash_attention(*swapped, implementation="reference").swapaxes(0, 1)

    @jax.jit
    def both(q, k, v):
        out, back = jax.vjp(sharded, q, k, v)
        return out, back(mix)

    sharded = spread(functools.partial(ulysses_attention, axis_name="sequence", attn_fn=whole), count=3)
    out, gradients = both(q, k, v)
    batched = [x.swapaxes(0, 1) for x in (q, k, v, mix)]
    np.testing.assert_allclose(out.swapaxes(0, 1), oracle.attention(*batched[:3]), atol=1e-6)
    for got, expected in zip(gradients, oracle.attention_gradients(*batched)):
        np.testing.assert_allclose(got.swapaxes(0, 1), expected, atol=1e-5)


CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
TOKENS = RNG.integers(0, 32, (2, 16)).astype(np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 9 + [0] * 2, [1] * 10 + [2] * 6], np.int32)
POSITIONS = np.array([[*range(5), *range(9), 0, 1], [*range(10), *range(6)]], np.int32)


BATCH = TokenBatch(
    TOKENS, RNG.integers(0, 32, (2, 16)).astype(np.int32), POSITIONS, SEGMENTS, SEGMENTS.astype(np.float32)
)


def loss(params, batch, model):
    return lm_loss(model)(params, batch, None).total


@pytest.fixture(scope="module")
def one_device():
    def attention(q, k, v, *, positions, **where):
        return flash_attention(q, k, v, **where, implementation="reference")

    model = Decoder(CONFIG, attention=attention)
    shapes = nn.meta.unbox(abstract_params(model))
    params = jax.tree.map(lambda leaf: (0.3 * RNG.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
    return params, jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))(params, BATCH)


def close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), got, expected)


@pytest.mark.latest
@pytest.mark.parametrize("axes", [{"data": 2, "sequence": 4}, {"sequence": 2, "tensor": 2}])
def test_a_decoder_on_a_mesh(one_device, axes, monkeypatch):
    """Whole arrays in; segments cross the borders of the parts, the loss takes each device's tokens in two pieces."""
    monkeypatch.setattr(
        "jaxlab.training.loss._CHUNK_LOGITS", BATCH.tokens.size * 32 // np.prod(list(axes.values())) // 2
    )
    params, expected = one_device
    model = Decoder(CONFIG, attention=UlyssesAttention(implementation="reference"))
    count = int(np.prod(list(axes.values())))
    with jax.set_mesh(make_mesh(axes, jax.devices()[:count])):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))
        assert "all_to_all" in step.lower(params, BATCH).as_text()
        close(step(params, BATCH), expected)


def test_a_decoder_inside_shard_map(one_device):
    params, expected = one_device
    model = Decoder(CONFIG, attention=UlyssesAttention(implementation="reference"))

    def local(params, batch):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "sequence", to="varying"), params)
        return jax.lax.psum(loss(params, batch, model), "sequence")

    mesh = make_mesh({"sequence": 4}, jax.devices()[:4])
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "sequence")), out_specs=P())
    close(jax.jit(jax.value_and_grad(sharded))(params, BATCH), expected)


def test_against_the_oracle():
    q, k, v = (RNG.normal(size=(1, 8, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    positions = jnp.arange(8)[None]
    sharded = functools.partial(UlyssesAttention(), positions=positions, segment_ids=None, scale=0.5, window=3)
    with jax.set_mesh(make_mesh({"sequence": 4}, jax.devices()[:4])):
        out = jax.jit(sharded)(q, k, v)
    np.testing.assert_allclose(out, oracle.attention(q, k, v, scale=0.5, window=3), atol=1e-6)


def test_bad_inputs(unchecked):
    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(function, *args, size=4, **where):
        return jax.eval_shape(spread(functools.partial(function, **where), size, count=len(args)), *args)

    scatter = functools.partial(scatter_heads, axis_name="sequence")
    gather = functools.partial(gather_heads, axis_name="sequence")
    with pytest.raises(ValueError, match="heads: expected a multiple of the 4 devices of axis 'sequence', got 6"):
        run(scatter, shaped(8, 1, 6, 2))
    with pytest.raises(ValueError, match="positions: expected a multiple of the 4 devices of axis 'sequence', got 2"):
        run(gather, shaped(8, 1, 4, 2))
    with pytest.raises(ValueError, match=r"seq_axis and head_axis: expected two axes of shape \(2, 1, 4, 2\), got"):
        run(scatter, shaped(8, 1, 4, 2), seq_axis=2)
    with pytest.raises(ValueError, match="seq_axis and head_axis"):
        run(gather, shaped(8, 1, 4, 2), head_axis=4)
    with pytest.raises(ValueError, match="axis 'sequence' is not bound"):
        scatter(np.ones((8, 1, 4, 2)))
    attention = functools.partial(ulysses_attention, axis_name="sequence", attn_fn=lambda q, k, v: q)
    with pytest.raises(ValueError, match="axis 'sequence' is not bound"):
        attention(*np.ones((3, 8, 1, 4, 2)))
    with pytest.raises(ValueError, match="heads: expected a multiple of the 4 devices of axis 'sequence', got 6"):
        run(attention, shaped(8, 1, 6, 2), shaped(8, 1, 6, 2), shaped(8, 1, 6, 2))
    with pytest.raises(ValueError, match="k: expected a number of heads that divides q's 8, got 3"):
        run(attention, shaped(8, 1, 8, 2), shaped(8, 1, 3, 2), shaped(8, 1, 3, 2))
    with pytest.raises(ValueError, match="k and v: expected one shape with 4 axes like q"):
        run(attention, shaped(8, 1, 8, 2), shaped(8, 1, 4, 2), shaped(8, 1, 2, 2))
    policy = functools.partial(UlyssesAttention(), positions=None, segment_ids=None, scale=1.0, window=None)
    with pytest.raises(ValueError, match="axis_name: expected an axis of the mesh in force"):
        policy(*np.ones((3, 1, 8, 4, 2)))
    with (
        jax.set_mesh(make_mesh({"sequence": 8})),
        pytest.raises(ValueError, match="positions: expected a multiple of the 8 devices of axis 'sequence', got 12"),
    ):
        policy(*np.ones((3, 1, 12, 8, 2)))
