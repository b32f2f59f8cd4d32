"""The engine and its training runs over 8 ranks: against one device, against themselves, and from disk."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import core
from jaxlab import superoffload as so
from jaxlab.models import ByteTokenizer, load_pretrained
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.superoffload import trainer
from jaxlab.superoffload.pieces import scalar_loss
from jaxlab.training import OptimizerConfig, decay_mask, lm_loss, text_batches
from tests.training import toys

HYPER = so.AdamHyper(optax.linear_schedule(5e-3, 1e-3, 20), 0.9, 0.95, weight_decay=0.1)
MESH = {"data": 4, "fsdp": 2}
CLIP = 8.0


def mlp(params, batch):
    """A weighted mean, whose denominator no rank knows alone."""
    x, y, weight = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum(weight * (hidden @ params["u"] - y) ** 2) / jnp.sum(weight)


def mlp_params():
    rng = np.random.default_rng(0)
    made = {"w": rng.normal(size=(6, 13)), "b": np.zeros(13), "u": rng.normal(size=(13, 3))}
    return {name: (0.5 * x).astype(np.float32) for name, x in made.items()} | {"ids": np.arange(3)}


def mlp_batches(steps, odd=()):
    rng = np.random.default_rng(1)
    for i in range(steps):
        x = rng.normal(size=(16, 6))
        x[3, 0] = np.inf if i in odd else x[3, 0]
        yield tuple(a.astype(np.float32) for a in (x, rng.normal(size=(16, 3)), rng.integers(1, 4, (16, 1))))


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def make(mesh=MESH, optimizer=HYPER, devices=None, mask=matrices, **settings):
    """Of two groups of buckets, as `b` does not decay."""
    config = so.SuperOffloadConfig(
        **({"bucket_bytes": 4 * 50, "compute_dtype": "float32", "clip_norm": CLIP} | settings)
    )
    mask = mask if optimizer is HYPER else None
    return so.SuperOffload(mlp, optimizer, config, mesh=mesh and core.make_mesh(mesh, devices), decay_mask=mask)


def run(engine, state, batches):
    """The state after the batches, and the metrics of every step as numbers."""
    rows = []
    for batch in batches:
        state, metrics = engine.train_step(state, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def trees(engine, state):
    """Master parameters and moments on the host."""
    return jax.tree.map(np.array, (engine.master(state), *engine.moments(state)))


def train(batches, mesh=MESH, **settings):
    with make(mesh, **settings) as engine:
        state, rows = run(engine, engine.init(mlp_params()), batches)
        if mesh is not None:
            for leaf in jax.tree.leaves(state.params):
                assert leaf.sharding.is_fully_replicated
                assert len(leaf.sharding.device_set) == 8
            held = [sum(shard.data.size for shard in x.addressable_shards) for x in state.master.p]
            # Buckets of 50, the last of each kind filled up; every piece of a leaf in whole slices.
            assert held == [n // jax.process_count() for n in (56, 56, 64, 56)]
        return rows, trees(engine, state)


def case_speculation_gives_the_bits_of_the_synchronous_run(folder):
    batches = list(mlp_batches(6, odd=(3,)))
    want, exact = train(batches, speculation="never")
    assert 0 < sum(row["clipped"] for row in want) < 5
    assert want[3]["skipped"] == 1
    got, mine = train(batches, speculation="always", undo="residual")
    jax.tree.map(np.testing.assert_array_equal, mine, exact)
    assert [row["rolled_back"] for row in got] == [max(row["clipped"], row["skipped"]) for row in want]
    for name in ("loss", "grad_norm", "clipped", "skipped"):
        np.testing.assert_array_equal([row[name] for row in got], [row[name] for row in want])


def case_ranks_train_as_one_device_does(folder):
    """Placed batches, accumulated, and a bucket that stays on the accelerators."""
    mesh = core.make_mesh(MESH)
    batches = list(mlp_batches(4))
    placed = [jax.tree.map(lambda x: place(x, mesh, PartitionSpec(("data", "fsdp"))), batch) for batch in batches]
    settings = {"offload_ratio": 0.5, "steps_per_update": 2}
    want = train(batches, None, speculation="never", **settings)
    got = train(placed, speculation="always", undo="residual", **settings)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in got[0]], [row[name] for row in want[0]], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got[1], want[1])


def case_a_state_moves_to_other_buckets_and_ranks(folder):
    """Saved by 8 ranks within a window of two batches; restored by them, and in other buckets of one group by 4."""
    shared = {"steps_per_update": 2, "compute_dtype": "float16", "loss_scale": so.LossScaleConfig(window=2)}
    batches = list(mlp_batches(8, odd=(1,)))
    with make(**shared) as engine:
        state, _ = run(engine, engine.init(mlp_params()), batches[:5])
        checkpointer = so.EngineCheckpointer(folder / "checkpoints", engine)
        checkpointer.save(5, state, {"seen": 5})
        saved = trees(engine, state)
        state, rows = run(engine, state, batches[5:])
        final = trees(engine, state)
    local = jax.local_device_count() // 2
    half = [d for d in jax.devices() if d in [x for x in jax.devices() if x.process_index == d.process_index][:local]]
    other = {"bucket_bytes": 4 * 33, "split": "param", "offload_ratio": 0.5, "mask": None}
    for mesh, devices, settings in ((MESH, None, {}), ({"data": 4}, half, other)):
        with make(mesh, devices=devices, **shared, **settings) as engine:
            like = engine.init(jax.tree.map(np.zeros_like, mlp_params()))
            restored, extra = so.EngineCheckpointer(folder / "checkpoints", engine).restore(like)
            assert (extra, int(restored.step), int(restored.count)) == ({"seen": 5}, 5, 1)
            jax.tree.map(np.testing.assert_array_equal, trees(engine, restored), saved)
            np.testing.assert_array_equal(restored.params["ids"], np.arange(3))
            restored, again = run(engine, restored, batches[5:])
            tolerance = 1e-2 if settings else 0
            for name in ("loss", "grad_norm", "loss_scale", "skipped"):
                np.testing.assert_allclose([r[name] for r in again], [r[name] for r in rows], rtol=tolerance)
            if not settings:
                jax.tree.map(np.testing.assert_array_equal, trees(engine, restored), final)


def case_a_run_over_a_mesh_is_that_of_one_device(folder):
    """Pieces, sequences over devices, decay of matrices only; begun again in the middle it gives the same bits."""
    if core.distributed.is_main():
        toys.corpus(folder / "text")
    sync_global_devices("corpus")
    config = toys.config(
        folder / "text",
        steps=4,
        checkpoint_every=2,
        mesh={"data": 2, "fsdp": 2, "sequence": 2},
        eval_batches=1,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3, weight_decay=0.5),
    )
    settings = so.SuperOffloadConfig(bucket_bytes=1 << 15, speculation="always")
    trainer.train(config, folder / "run", settings)
    got, rows = final(folder)
    if core.distributed.is_main():
        shutil.rmtree(folder / "run" / "checkpoints" / "4")
    sync_global_devices("step 4 is gone")
    trainer.train(config, folder / "run", settings)
    jax.tree.map(np.testing.assert_array_equal, final(folder), (got, rows))

    if core.distributed.is_main():  # one process is enough for one device
        want, master = alone(config)
        np.testing.assert_allclose(rows["loss"], want, rtol=1e-5)
        assert len(rows["validation_perplexity"]) == 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, master)


def alone(config):
    """The losses and the final parameters of a run on this process's first device, the decoder as one piece."""
    loss = scalar_loss(lm_loss(Decoder(config.model)))
    batches = text_batches(config.data, ByteTokenizer(), batch_size=config.batch_size, length=config.length)
    settings = trainer.engine_config(config, so.SuperOffloadConfig(speculation="never"))
    with so.SuperOffload(loss, trainer.adam_of(config), settings, decay_mask=decay_mask) as engine:
        params = init_params(Decoder(config.model), core.named_key(jax.random.key(config.seed), "params"))
        state, rows = run(engine, engine.init(params), (next(batches) for _ in range(config.steps)))
        return [row["loss"] for row in rows], jax.tree.map(np.array, engine.master(state))


def final(folder):
    """The final model of a run, and what it logged, which the first process knows."""
    model = jax.tree.map(np.array, load_pretrained(folder / "run" / "model")[1])
    rows = core.jsonl.read(folder / "run" / "metrics.jsonl") if core.distributed.is_main() else []
    return model, {name: [row[name] for row in rows if name in row] for name in ("loss", "validation_perplexity")}


def place(x, mesh, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
