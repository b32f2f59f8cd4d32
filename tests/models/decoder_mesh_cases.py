"""A sharded decoder is the decoder of one device: on 8 devices of one process, or of two with four each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh, shardings
from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, abstract_params

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 10)).astype(np.int32)
SEGMENTS = np.sort(np.random.default_rng(1).integers(1, 4, (4, 10)), axis=1).astype(np.int32)


def _sharded(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _compare(config, axes):
    model = Decoder(config)
    boxed = abstract_params(model)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), nn.meta.unbox(boxed))

    def loss(params, tokens, segments):
        out = model.apply({"params": params}, tokens, segment_ids=segments)
        return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) ** 2), out.logits

    step = jax.value_and_grad(loss, has_aux=True)
    (_, logits), gradients = jax.jit(step)(params, TOKENS, SEGMENTS)

    mesh = make_mesh(axes)
    where = shardings(boxed, mesh)
    batch = NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ("data", "fsdp") if axis in axes)))
    inputs = jax.tree.map(_sharded, params, where), _sharded(TOKENS, batch), _sharded(SEGMENTS, batch)
    with jax.set_mesh(mesh):
        (_, got_logits), got = jax.jit(step, out_shardings=((None, None), where))(*inputs)
    compared = zip(jax.tree.leaves((got_logits, got)), jax.tree.leaves((logits, gradients)))
    for sharded, whole in compared:
        whole = np.asarray(whole)
        for shard in sharded.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], atol=1e-5, rtol=1e-4)
    return got


def case_dense_over_data_fsdp_and_tensor(folder):
    got = _compare(CONFIG, {"data": 2, "fsdp": 2, "tensor": 2})
    assert got["blocks_0"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def case_sparse_over_fsdp_and_expert(folder):
    moe = MoESpec(4, 2, 8, shared_ffn_size=8, renormalise=True)
    _compare(dataclasses.replace(CONFIG, moe=moe, num_hidden_layers=1), {"fsdp": 2, "expert": 4})
