"""Layers fetched one ahead equal a plain scan bit for bit; for a GH200 the compiler says what that saves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, abstract_params
from jaxlab.superoffload.placement import offload_tree, remat_offload_policy
from jaxlab.superoffload.stack import BLOCK_INPUT, OffloadedScan, OffloadedStack
from pallas_kernels.flash_attention import flash_attention
from tests.aot import needs_aot

WIDTH, LAYERS, MIB = 16, 5, 2**20


class Block(nn.Module):
    """A residual MLP, shifted by what all layers share and masked by integers."""

    width: int = WIDTH
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, shift=None, mask=None):
        y = nn.Dense(self.width, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)(x)
        y = jnp.tanh(y if shift is None else y + shift)
        y = y if mask is None else y * (mask > 0)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, param_dtype=self.dtype)(y)


def plain(weights, x, *shared):
    return jax.lax.scan(lambda x, layer: (Block().apply({"params": layer}, x, *shared), None), x, weights)[0]


@pytest.mark.latest
@pytest.mark.parametrize("offload_inputs", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_bits_of_a_plain_scan(host, offload_inputs):
    rng = np.random.default_rng(0)
    x, shift = (rng.normal(size=shape).astype(np.float32) for shape in ((3, WIDTH), (WIDTH,)))
    mask = np.array([[1], [0], [2]], np.int32)
    stack = OffloadedStack(Block(), LAYERS, offload_inputs)
    params = stack.init(jax.random.key(0), x, shift, mask)["params"]
    assert set(params) == {"layers"}
    assert params["layers"]["Dense_0"]["kernel"].shape == (LAYERS, WIDTH, WIDTH)
    assert np.unique(np.asarray(params["layers"]["Dense_0"]["kernel"])).size > LAYERS * WIDTH * (WIDTH - 1)

    def run(function, weights):
        def loss(weights, x, shift):
            y = function(weights, x, shift, mask)
            return jnp.sum(y**2), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, x, shift)

    expected = run(plain, params["layers"])
    weights = offload_tree(params["layers"]) if host else params["layers"]
    got = run(lambda weights, *args: stack.apply({"params": {"layers": weights}}, *args), weights)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(got[1][0])}
    assert kinds == ({"pinned_host"} if host else {"device"})


def test_one_layer_and_names():
    x = np.ones((2, WIDTH), np.float32)
    stack = OffloadedStack(Block(), 1)
    params = stack.init(jax.random.key(0), x)
    layer = jax.tree.map(lambda leaf: leaf[0], params["params"]["layers"])
    np.testing.assert_array_equal(stack.apply(params, x), jax.jit(Block().apply)({"params": layer}, x))
    # A policy from outside finds the blocks' inputs by their name.
    saved = jax.checkpoint(lambda p: stack.apply(p, x).sum(), policy=remat_offload_policy([BLOCK_INPUT]))
    assert f"f32<host>[1,2,{WIDTH}]" in str(jax.make_jaxpr(jax.grad(saved))(params))


@pytest.mark.parametrize("offload_inputs", [False, True])
def test_a_decoder_on_weights_in_host_memory(offload_inputs):
    """Packed rows; layers on the host, embedding and head on the device: the bits of the decoder that recomputes."""
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, remat="block",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (2, 9)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (2, 9)), axis=1).astype(np.int32)

    def run(model, params):
        def loss(params, tokens, segments):
            return jnp.mean(model.apply({"params": params}, tokens, segment_ids=segments).logits ** 2)

        return jax.jit(jax.value_and_grad(loss))(params, tokens, segments)

    def attention(q, k, v, *, positions, **where):
        return flash_attention(q, k, v, **where, implementation="reference")

    names = nn.meta.unbox(abstract_params(Decoder(config)))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), names)
    there = {**params, "blocks_0": offload_tree(params["blocks_0"])}
    model = Decoder(config, attention=attention, repeat=OffloadedScan(offload_inputs))
    value, gradients = run(model, there)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(gradients["blocks_0"])} == {"pinned_host"}
    expected = run(Decoder(config, attention=attention), params)
    jax.tree.map(np.testing.assert_array_equal, (value, gradients), expected)


def test_a_decoder_with_experts_cannot(unchecked):
    config = DecoderConfig(32, 16, 24, 1, 2, 1, moe=MoESpec(2, 1, 8))
    model = Decoder(config, repeat=OffloadedScan())
    params = nn.meta.unbox(abstract_params(model))
    with pytest.raises(NotImplementedError, match="repeat: layers with experts report about themselves"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 2), np.int32))


def test_bad_inputs(unchecked):
    class Widens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.concatenate([nn.Dense(x.shape[-1])(x)] * 2, -1)

    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("seen", "count", jnp.zeros, ())
            return nn.Dense(x.shape[-1])(x)

    x = np.ones((2, WIDTH), np.float32)
    with pytest.raises(ValueError, match="n_layers: expected at least 1, got 0"):
        OffloadedStack(Block(), 0).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"block: expected a result of shape \(2, 16\) and dtype float32 like x, got"):
        OffloadedStack(Widens(), 2).init(jax.random.key(0), x)
    with pytest.raises(NotImplementedError, match="block: expected parameters only, got the collections params, seen"):
        OffloadedStack(Counts(), 2).init(jax.random.key(0), x)


def gh200_plan(over, layers, *, offload_inputs=False, options=None, width=1024, rows=256):
    stack = OffloadedStack(Block(4 * width, jnp.bfloat16), layers, offload_inputs)
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=NamedSharding(over.mesh, PartitionSpec()))
    params = jax.eval_shape(stack.init, jax.eval_shape(lambda: jax.random.key(0)), x)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=x.sharding), params)
    gradient = jax.grad(lambda params, x: stack.apply(params, x).astype(jnp.float32).sum())
    return plan.compile(gradient, offload_tree(params), x, target=over, labels=("parameters", "input"), options=options)


@pytest.mark.latest
@needs_aot
def test_depth_costs_a_gpu_nothing():
    """Bytes of one GH200 by XLA's buffers: 8 MiB weights in two kernels and half a MiB of input a layer."""
    over = plan.target("gh200")
    few, many = (gh200_plan(over, layers, offload_inputs=True) for layers in (4, 16))
    weights = 16 * MIB + 2 * 1024
    assert many.bytes["host"] == 16 * weights
    assert "outputs in host memory" in many.notes[0]
    assert many.bytes["total"] == pytest.approx(few.bytes["total"], abs=MIB)
    assert many.bytes["total"] < 4.5 * weights  # two layers, the gradient of one, and what a block needs
    kept = gh200_plan(over, 16)
    assert kept.bytes["total"] - many.bytes["total"] == pytest.approx(16 * MIB // 2, abs=1.5 * MIB)


@needs_aot
def test_the_next_layer_comes_while_this_one_computes():
    """In the scheduled forward loop matrix products stand between start and end of both kernels' fetches.

    For that XLA must be let have more than its two copies in flight.
    """
    options = {"xla_gpu_experimental_parallel_async_compute_limit": 16}
    text = gh200_plan(plan.target("gh200"), 4, options=options).hlo
    hidden = {}
    for computation in text.split("\n}\n"):
        lines = computation.splitlines()
        starts = [
            i for i, line in enumerate(lines) if re.match(r" *%dynamic-slice-start\S* = .*bf16\[1,\d+,\d+\]", line)
        ]
        if "ENTRY" in computation or not starts:
            continue
        ends = [
            next(j for j, line in enumerate(lines) if f"fusion-done({lines[i].split()[0]})" in line) for i in starts
        ]
        loop = "backward" if "dynamic-update-slice-start" in computation else "forward"
        hidden[loop] = [any("%gemm" in line for line in lines[i:j]) for i, j in zip(starts, ends)]
    assert hidden.keys() == {"forward", "backward"}
    assert hidden["forward"] == [True, True]
