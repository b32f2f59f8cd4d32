"""Expert-parallel training on 8 devices gives one device's losses; its checkpoints go on wherever they are restored."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab import core
from jaxlab.core import plan as planning
from jaxlab.models.decoder import Decoder, MoEPolicy, MoESpec, abstract_params, init_params
from jaxlab.training import OptimizerConfig, TrainState, lm_loss, make_train_step, optimizer, perplexity, plan
from jaxlab.training.sharding import expert_policy, place_state, state_shardings
from tests.training import toys

MODEL = dataclasses.replace(
    toys.MODEL, model_type="deepseek", num_hidden_layers=1, moe=MoESpec(16, 3, 8, shared_ffn_size=16)
)
MESH = {"node": 2, "expert": 4}
TX = optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3))


def _loss(mesh=None, aux=0.0, **policy):
    return lm_loss(Decoder(MODEL, mlp=expert_policy(MoEPolicy(**policy), mesh)), aux_loss_coef=aux)


def _state(mesh=None):
    state = TrainState.create(init_params(Decoder(MODEL), jax.random.key(0)), TX, jax.random.key(1))
    if mesh is None:
        return state
    return place_state(state, state_shardings(state, TX, mesh, _loss().abstract_params(), shard_optimizer=True))


def _run(step, state, seeds):
    rows = []
    for seed in seeds:
        state, metrics = step(state, toys.batch(seed))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def _losses(rows):
    return [row["loss"] for row in rows]


@functools.cache
def _step(dispatch, mesh=None):
    """A step that several tests use, compiled once."""
    return make_train_step(_loss(mesh, dispatch=dispatch), TX, mesh=mesh, shard_optimizer=mesh is not None)


@pytest.fixture(scope="module")
def alone():
    """Four steps on one device: the state after them, and their metrics."""
    return _run(_step("local"), _state(), range(4))


@pytest.mark.parametrize("dispatch", ["local", "pft", pytest.param("rbd", marks=pytest.mark.latest)])
def test_eight_devices_give_the_losses_of_one(dispatch, alone):
    mesh = core.make_mesh(MESH)
    state, rows = _run(_step(dispatch, mesh), _state(mesh), range(4))
    np.testing.assert_allclose(_losses(rows), _losses(alone[1]), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, alone[0].params)
    np.testing.assert_allclose(rows[-1]["expert_load_max"], alone[1][-1]["expert_load_max"], rtol=1e-5)
    assert rows[-1]["dropped_recv"] == rows[-1]["dropped_fraction"] == 0
    assert state.params["blocks_0"]["mlp"]["gate"].sharding.spec == PartitionSpec(None, ("node", "expert"))
    if dispatch == "rbd":  # evaluated without a key
        spread = Decoder(MODEL, mlp=expert_policy(MoEPolicy(dispatch=dispatch), mesh))
        want = perplexity(Decoder(MODEL), alone[0].params, [toys.batch(9)])
        np.testing.assert_allclose(perplexity(spread, state.params, [toys.batch(9)]), want, rtol=1e-5)


def test_the_balance_loss_is_the_mean_of_the_devices_own():
    """As many pieces one after the other, each with the loss of its own rows, are the same."""
    mesh = core.make_mesh(MESH)
    batch = toys.batch().replace(weights=np.ones((8, 12), np.float32))
    together, apart = (
        make_train_step(_loss(mesh, aux=1.0, dispatch="pft"), TX, mesh=mesh, shard_optimizer=True),
        make_train_step(_loss(aux=1.0), TX, accumulate=8),
    )
    (_, got), (_, want) = together(_state(mesh), batch), apart(_state(), batch)
    for name in ("loss", "grad_norm", "aux_loss"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    assert float(got["aux_loss"]) > 1


def test_a_checkpoint_of_eight_goes_on_elsewhere(alone, tmp_path):
    """Saved under EP 8, restored under EP 2 and on one device: the same numbers, and the same losses from there."""
    mesh = core.make_mesh(MESH)
    saved, _ = _run(_step("rbd", mesh), _state(mesh), range(2))
    checkpointer = core.Checkpointer(tmp_path)
    checkpointer.save(2, saved)

    two = core.make_mesh({"expert": 2}, jax.devices()[:2])
    for dispatch, where in (("pft", two), ("local", None)):
        restored, _ = checkpointer.restore(_state(where))
        jax.tree.map(np.testing.assert_array_equal, restored.params, saved.params)
        jax.tree.map(np.testing.assert_array_equal, restored.opt_state, saved.opt_state)
        if where is not None:
            assert restored.params["blocks_0"]["mlp"]["down"].sharding.spec == PartitionSpec(None, "expert")
        _, rows = _run(_step(dispatch, where), restored, (2, 3))
        np.testing.assert_allclose(_losses(rows), _losses(alone[1])[2:], rtol=1e-5)


def test_expert_axes_come_from_the_mesh():
    mesh = core.make_mesh({"node": 2, "expert": 2, "tensor": 2})
    assert expert_policy(MoEPolicy(dispatch="pft"), mesh).expert_axes == ("node", "expert")
    assert expert_policy(MoEPolicy(dispatch="rbd", tp_axis="tensor"), mesh).expert_axes == ("node", "expert", "tensor")
    tensor_sliced = MoEPolicy(dispatch="padded", expert_axes=("expert",), tp_axis="tensor")
    assert expert_policy(tensor_sliced, mesh) == tensor_sliced
    assert expert_policy(MoEPolicy(), mesh).expert_axes == ()
    assert expert_policy(MoEPolicy(dispatch="pft"), None).expert_axes == ()
    assert expert_policy(MoEPolicy(dispatch="pft"), core.make_mesh({"data": 8})).expert_axes == ()


def test_plan_of_an_expert_parallel_step():
    """Compiled without running: what a device holds, and an exchange over the axes that the mesh gave."""
    moe = dataclasses.replace(MODEL.moe, shared_ffn_size=0)
    config = toys.config(
        "python-stdlib",
        model=dataclasses.replace(MODEL, moe=moe),
        batch_size=8,
        moe=MoEPolicy(dispatch="pft"),
        shard_optimizer=True,
    )
    made = plan(config, planning.target("cpu", mesh=MESH))
    exchanged = [item for item in made.collectives if item.op == "all-to-all" and set(item.axes) == set(MESH)]
    assert exchanged
    experts = 4 * 3 * moe.num_experts * moe.ffn_size * MODEL.hidden_size
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Decoder(config.model))))
    assert made.bytes["parameters"] == whole - experts + experts // 8
