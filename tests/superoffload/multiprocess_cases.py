"""The engine over 8 ranks: against one device, against itself without speculation, and from disk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import core
from jaxlab import superoffload as so
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.training import TokenBatch, lm_loss

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


def make(mesh=MESH, optimizer=HYPER, devices=None, **settings):
    config = so.SuperOffloadConfig(
        **({"bucket_bytes": 4 * 50, "compute_dtype": "float32", "clip_norm": CLIP} | settings)
    )
    return so.SuperOffload(mlp, optimizer, config, mesh=mesh and core.make_mesh(mesh, devices))


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
            assert held == [56 // jax.process_count()] * 3  # buckets of 50, filled up to whole slices
        return rows, trees(engine, state)


def case_speculation_gives_the_bits_of_the_synchronous_run(folder):
    batches = list(mlp_batches(6, odd=(3,)))
    want, exact = train(batches, speculation="never")
    assert 0 < sum(row["clipped"] for row in want) < 5
    assert want[3]["skipped"] == 1
    for undo in ("copy", "residual"):
        got, mine = train(batches, speculation="always", undo=undo)
        jax.tree.map(np.testing.assert_array_equal, mine, exact)
        assert [row["rolled_back"] for row in got] == [max(row["clipped"], row["skipped"]) for row in want]
        for name in ("loss", "grad_norm", "clipped", "skipped"):
            np.testing.assert_array_equal([row[name] for row in got], [row[name] for row in want])


def case_ranks_train_as_one_device_does(folder):
    """Whole batches or placed ones, accumulated or not, some buckets on the accelerators."""
    mesh = core.make_mesh(MESH)
    batches = list(mlp_batches(4))
    placed = [jax.tree.map(lambda x: place(x, mesh, PartitionSpec(("data", "fsdp"))), batch) for batch in batches]
    for settings in ({"offload_ratio": 0.5}, {"steps_per_update": 2, "compute_dtype": "bfloat16", "undo": "residual"}):
        want = train(batches, None, speculation="never", **settings)
        got = train(placed, speculation="always", **settings)
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if "compute_dtype" in settings else {"rtol": 1e-4, "atol": 1e-6}
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose([row[name] for row in got[0]], [row[name] for row in want[0]], **tolerance)
        jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got[1][0], want[1][0])


def case_a_state_moves_to_other_buckets_and_ranks(folder):
    """Saved by 8 ranks within a window of two batches; restored by them, in other buckets, and by 4."""
    shared = {"steps_per_update": 2, "compute_dtype": "float16", "loss_scale": so.LossScaleConfig(window=2)}
    batches = list(mlp_batches(8, odd=(1,)))
    with make(**shared) as engine:
        state, _ = run(engine, engine.init(mlp_params()), batches[:5])
        checkpointer = so.EngineCheckpointer(folder / "checkpoints", engine)
        checkpointer.save(5, state, {"seen": 5})
        saved = trees(engine, state)
        state, rows = run(engine, state, batches[5:])
        final = trees(engine, state)
    half = (
        [device for device in jax.devices() if device.id % 1000 % 4 < 2]
        if jax.process_count() > 1
        else jax.devices()[:4]
    )
    for mesh, devices, settings in (
        (MESH, None, {}),
        (MESH, None, {"bucket_bytes": 4 * 33, "offload_ratio": 0.5}),
        ({"data": 4}, half, {"split": "param"}),
    ):
        with make(mesh, devices=devices, **shared, **settings) as engine:
            like = engine.init(jax.tree.map(np.zeros_like, mlp_params()))
            restored, extra = so.EngineCheckpointer(folder / "checkpoints", engine).restore(like)
            assert (extra, int(restored.step), int(restored.count)) == ({"seen": 5}, 5, 1)
            jax.tree.map(np.testing.assert_array_equal, trees(engine, restored), saved)
            restored, again = run(engine, restored, batches[5:])
            close = (
                np.testing.assert_array_equal
                if not settings
                else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2)
            )
            for name in ("loss", "grad_norm", "loss_scale", "skipped"):
                close([row[name] for row in again], [row[name] for row in rows])
            if not settings:
                jax.tree.map(np.testing.assert_array_equal, trees(engine, restored), final)


def case_sequences_over_the_mesh(folder):
    """A decoder with Ulysses attention: gradients are summed over `sequence` too."""
    decoder = DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokens = np.random.default_rng(3).integers(0, 32, (2, 17)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    ones = np.ones((2, 16), np.int32)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32))
    params = init_params(Decoder(decoder), jax.random.key(0))
    losses = []
    for axes, model in (
        (None, Decoder(decoder)),
        ({"data": 2, "sequence": 4}, Decoder(decoder, attention=so.UlyssesAttention())),
    ):
        sums = lm_loss(model)

        def loss(params, batch, sums=sums):
            out = sums(params, batch, None)
            return out.total / out.weight

        config = so.SuperOffloadConfig(compute_dtype="float32", bucket_bytes=1 << 14)
        with so.SuperOffload(loss, HYPER, config, mesh=axes and core.make_mesh(axes)) as engine:
            losses.append([row["loss"] for row in run(engine, engine.init(params), [batch] * 3)[1]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][2] < losses[0][0]


def place(x, mesh, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
