"""Training on 8 devices, dense over data, fsdp and tensor axes, sparse over node and expert; in one process or two."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import PartitionSpec

from jaxlab import core
from jaxlab.models.decoder import Decoder, MoEPolicy, MoESpec, init_params
from jaxlab.training import OptimizerConfig, TrainState, fit, lm_loss, make_train_step, optimizer, perplexity
from jaxlab.training import text_batches as make_batches
from jaxlab.training.sharding import expert_policy, place_state, state_shardings
from tests.training import toys

_MESH = {"data": 2, "fsdp": 2, "tensor": 2}


class _Bytes:
    eos_token_id = 257

    def encode(self, text):
        return list(text.encode())


def _corpus(folder):
    if core.distributed.is_main():
        toys.corpus(folder / "text")
    sync_global_devices("corpus")
    return folder / "text"


def case_steps_equal_one_device_and_resume(folder):
    """Sharded steps, accumulated and with ZeRO-1, give one device's losses and parameters; so does a resumed run."""
    mesh, model = core.make_mesh(_MESH), Decoder(toys.MODEL)
    tx = optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3))
    corpus = _corpus(folder)

    def state():
        return TrainState.create(init_params(model, jax.random.key(0)), tx, jax.random.key(1))

    def batches(mesh):
        return make_batches(corpus, _Bytes(), batch_size=8, length=16, mesh=mesh)

    single, alone, wanted = make_train_step(lm_loss(model), tx), state(), []
    for batch in _take(batches(None), 4):
        alone, metrics = single(alone, batch)
        wanted.append(float(metrics["loss"]))

    step = make_train_step(lm_loss(model), tx, accumulate=2, mesh=mesh, shard_optimizer=True)
    sharded, got = state(), []
    for batch in _take(batches(mesh), 2):
        assert len({shard.index[0].start for shard in batch.tokens.addressable_shards}) == 4 // jax.process_count()
        sharded, metrics = step(sharded, batch)
        got.append(float(metrics["loss"]))
    for batch in list(_take(batches(None), 4))[2:]:  # host arrays, the same on each process, do as well
        sharded, metrics = step(sharded, batch)
        got.append(float(metrics["loss"]))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)

    query = sharded.params["blocks_0"]["attn"]["q"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    moments = [leaf for leaf in jax.tree.leaves(sharded.opt_state) if leaf.shape == query.shape]
    assert [leaf.sharding.spec for leaf in moments] == [PartitionSpec(None, ("fsdp", "data"), "tensor")] * 2
    _assert_close(sharded.params, alone.params)
    np.testing.assert_allclose(
        perplexity(model, sharded.params, _take(batches(None), 2)),
        perplexity(model, alone.params, _take(batches(None), 2)),
        rtol=1e-4,
    )

    where = state_shardings(state(), tx, mesh, lm_loss(model).abstract_params(), shard_optimizer=True)
    start = place_state(state(), where)
    checkpointer = core.Checkpointer(folder / "checkpoints")
    fit(jax.tree.map(jnp.copy, start), step, batches(mesh), steps=2, checkpointer=checkpointer)
    assert checkpointer.latest() == 2
    resumed = fit(start, step, batches(mesh), steps=4, checkpointer=checkpointer)
    _assert_close(resumed.params, alone.params)


def case_expert_parallel_steps_equal_one_device(folder):
    """Experts over two nodes of four: RBD's exchange crosses the processes."""
    mesh = core.make_mesh({"node": 2, "expert": 4})
    config = dataclasses.replace(
        toys.MODEL, model_type="olmoe", num_hidden_layers=1, moe=MoESpec(8, 3, 8), qk_norm="full"
    )
    tx = optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3))
    losses = []
    for where in (None, mesh):
        policy = expert_policy(MoEPolicy(dispatch="local" if where is None else "rbd"), where)
        loss = lm_loss(Decoder(config, mlp=policy), aux_loss_coef=0.0)
        state = TrainState.create(init_params(Decoder(config), jax.random.key(0)), tx, jax.random.key(1))
        step = make_train_step(loss, tx, mesh=where)
        for seed in range(3):
            state, metrics = step(state, toys.batch(seed))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-5)


def _take(batches, count):
    return (next(batches) for _ in range(count))


def _assert_close(got, want):
    whole = process_allgather(got, tiled=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, jax.tree.map(np.asarray, want))
