"""The engine over a mesh beyond the cases of two processes; kills, failures and bad inputs."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import core
from jaxlab import superoffload as so
from jaxlab.core import plan
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.superoffload import engine as engine_module
from jaxlab.superoffload.partition import Partition
from jaxlab.superoffload.segmented import _head_gradients
from jaxlab.training import TokenBatch, fit, lm_loss
from jaxlab.training.sharding import batch_sharding
from tests.aot import needs_aot
from tests.superoffload import killed
from tests.superoffload import multiprocess_cases as cases


def test_sequences_over_the_mesh():
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
        with so.SuperOffload(loss, cases.HYPER, config, mesh=axes and core.make_mesh(axes)) as engine:
            losses.append([row["loss"] for row in cases.run(engine, engine.init(params), [batch] * 3)[1]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][2] < losses[0][0]


def test_an_optax_transformation_over_a_mesh_and_frozen_leaves():
    """Its masks see the trained leaves only; decay applies to matrices."""
    tx = optax.adamw(1e-2, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    batches = list(cases.mlp_batches(3))
    params, got = cases.mlp_params(), []
    for mesh in (None, cases.MESH):
        with cases.make(mesh, tx, clip_norm=None) as engine:
            state, _ = cases.run(engine, engine.init(params), batches)
            got.append(jax.tree.map(np.array, engine.master(state)))
            assert len(jax.tree.leaves(state.opt_state)) == 2 * 3 + 1
    ids = {"ids": params.pop("ids")}
    opt, step = tx.init(params), jax.jit(jax.grad(cases.mlp))
    for batch in batches:
        updates, opt = tx.update(step(params, batch), opt, params)
        params = optax.apply_updates(params, updates)
    for tree in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tree, params | ids)


@needs_aot
def test_gradients_are_summed_straight_into_slices():
    """Compiled for 8 H100: one reduce-scatter of bfloat16, however the buckets cut leaves; little else is sent."""
    width, target = 128, plan.target("h100", "1x1x8", {"data": 8})
    partition = Partition(target.mesh)
    params = {f"w{i}": jax.ShapeDtypeStruct((width, width), jnp.bfloat16) for i in range(2)}
    spec = so.make_buckets(params, bucket_bytes=4 * (width * width + 4321))

    def loss(params, _, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["w0"]) @ params["w1"]).astype(jnp.float32))

    head = _head_gradients(loss, spec, partition)
    batch = jax.ShapeDtypeStruct((64, width), jnp.bfloat16, sharding=batch_sharding(target.mesh, (64, width)))
    made = plan.compile(
        jax.jit(head, out_shardings=(partition.replicated, partition.sliced, None)),
        params,
        None,
        batch,
        jax.ShapeDtypeStruct((), jnp.float32),
        target=target,
        labels=["parameters", "input", "input", "input"],
        read_kernels=False,
    )
    sent: dict[str, int] = {}
    for collective in made.collectives:
        sent[collective.op] = sent.get(collective.op, 0) + collective.bytes * collective.count
    whole = 2 * spec.numel
    assert sent.pop("reduce-scatter") == whole
    assert sum(sent.values()) < whole / 4


@pytest.mark.parametrize("name", ["speculate_bucket", "step_bucket"])
def test_a_step_that_the_host_fails_leaves_the_state_as_it_was(monkeypatch, name):
    """A new engine goes on from it, to the bits of a run without a failure."""
    batches = list(cases.mlp_batches(3))
    want = cases.train(batches, speculation="never")[1]
    works, calls = getattr(engine_module, name), []

    def fails(*args, **settings):
        calls.append(None)
        if len(calls) == 2:
            raise ArithmeticError("out of luck")
        return works(*args, **settings)

    with cases.make(speculation="always") as engine:
        if name == "step_bucket":
            monkeypatch.setattr(engine, "_speculates", lambda: False)
        state, _ = engine.train_step(engine.init(cases.mlp_params()), batches[0])
        monkeypatch.setattr(engine_module, name, fails)
        with pytest.raises(RuntimeError, match=r"(?s)worker died at bucket \d.*ArithmeticError: out of luck"):
            engine.train_step(state, batches[1])
        monkeypatch.setattr(engine_module, name, works)
    with cases.make(speculation="always") as engine:
        engine.init(cases.mlp_params())
        state, _ = cases.run(engine, state, batches[1:])
        jax.tree.map(np.testing.assert_array_equal, cases.trees(engine, state), want)


def test_killed_between_speculation_and_commit(tmp_path):
    """The next run resumes from the checkpoint before, to the bits of a run that nobody killed."""
    command = [sys.executable, "-m", "tests.superoffload.killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    batches = list(cases.mlp_batches(4))
    with killed.make() as engine:
        checkpointer = so.EngineCheckpointer(tmp_path, engine)
        assert checkpointer.steps() == (2,)
        state = fit(engine.init(cases.mlp_params()), engine.train_step, batches, steps=4, checkpointer=checkpointer)
        got = cases.trees(engine, state)
    with killed.make() as engine:
        state, _ = cases.run(engine, engine.init(cases.mlp_params()), batches)
        jax.tree.map(np.testing.assert_array_equal, got, cases.trees(engine, state))


@pytest.mark.usefixtures("unchecked")
def test_what_a_checkpoint_refuses(tmp_path):
    with cases.make(None, steps_per_update=2) as engine:
        checkpointer = so.EngineCheckpointer(tmp_path, engine)
        with pytest.raises(RuntimeError, match="call init first"):
            checkpointer.save(0, None)
        state, _ = cases.run(engine, engine.init(cases.mlp_params()), cases.mlp_batches(1))
        checkpointer.save(1, state)
    with cases.make(None) as engine:
        state = engine.init(cases.mlp_params())
        checkpointer = so.EngineCheckpointer(tmp_path, engine)
        with pytest.raises(core.CheckpointError, match=r"within an update of 2 batches, expected .* got 1"):
            checkpointer.restore(state)
        core.Checkpointer(tmp_path).save(2, state)
        with pytest.raises(core.CheckpointError, match="step 2: expected one of an EngineCheckpointer"):
            checkpointer.restore(state)
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
            checkpointer.restore(state, 3)
        params = cases.mlp_params() | {"w": np.zeros((6, 14), np.float32)}
        with pytest.raises(core.CheckpointError, match=r"leaf \['w'\] of shape \[6, 13\], expected .*\[6, 14\]"):
            checkpointer.restore(engine.init(params), 1)
        with pytest.raises(core.CheckpointError, match=r"saved was no leaf, expected leaf \['z'\]"):
            checkpointer.restore(engine.init(cases.mlp_params() | {"z": np.zeros(2, np.float32)}), 1)


@pytest.mark.usefixtures("unchecked")
def test_bad_meshes():
    with pytest.raises(ValueError, match="mesh: expected no axes but data, fsdp, sequence, got tensor"):
        cases.make({"data": 4, "tensor": 2})
    with cases.make() as engine:
        state = engine.init(cases.mlp_params())
        with pytest.raises(ValueError, match=r"expected a multiple of 8 .*, got 12"):
            engine.train_step(state, jax.tree.map(lambda x: x[:12], next(cases.mlp_batches(1))))
