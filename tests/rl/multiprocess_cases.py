"""Training and evaluation over eight devices, in any number of processes, against what one device left in a file."""

import pickle

import jax
import numpy as np
import optax
import pytest
from jax.experimental.multihost_utils import process_allgather

from jaxlab import core
from jaxlab.models import load_pretrained
from jaxlab.rl import SFPOConfig, evaluate
from tests.rl import toys

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
CONFIG = toys.config(steps=4, mini_batch_size=8, beta=0.1, checkpoint_every=2, sfpo=SFPOConfig(inner_steps=1, window=2))
# A compiler's favourite, and steps small enough that they do not magnify how sums are rounded.
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))


def evaluated(mesh=None, reward_fn=toys.low_characters):
    options = {"max_tokens": 6, "batch_size": 4, "mesh": mesh}
    return evaluate(toys.MODEL, toys.params(), toys.DATA[:4], [reward_fn], toys.TOKENIZER, **options)


def leave_one_devices_results(folder):
    """The reference is given, whereas the cases take it from the start."""
    trained = toys.trainer(CONFIG, tx=TX, ref_params=toys.params()).train()
    results = {"history": trained.history, "params": jax.tree.map(np.asarray, trained.params), "found": evaluated()}
    (folder / "one_device.pickle").write_bytes(pickle.dumps(results))


def one_devices_results(folder):
    return pickle.loads((folder.parent / "one_device.pickle").read_bytes())


class Stop(Exception):
    pass


def case_steps_equal_those_of_one_device(folder):
    """Data over data and fsdp, parameters over fsdp and tensor.

    The run is stopped after its third step, when it was exported, and goes on from the second.
    """
    calls, rows, exported = [], [], []

    def reward(prompts, completions, *, bound):
        calls.append(len(prompts))
        return toys.low_characters(prompts, completions, bound=bound)

    def export_and_stop(trainer, row):
        rows.append(row)
        if len(rows) == 3:
            exported.extend((trainer.export(folder / "policy"), process_allgather(trainer.params, tiled=True)))
            raise Stop

    options = {"mesh": core.make_mesh(MESH), "folder": folder / "run", "callback": export_and_stop, "tx": TX}
    trainer = toys.trainer(CONFIG, reward_fns=[reward], **options)
    assert trainer.params["head"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    with pytest.raises(Stop):
        trainer.train()
    params, rest = trainer.train()
    assert [row["step"] for row in rest] == [3, 4]
    assert [row["compilations"] for row in [*rows[1:], *rest]] == [0] * 6
    assert calls == [16] * (5 if core.distributed.is_main() else 0)

    wanted = one_devices_results(folder)
    for ours in (*rows[:3], *rest):
        theirs = wanted["history"][ours["step"] - 1]
        for name in ("reward", "loss", "entropy", "kl", "grad_norm", "clip_fraction", "sampler_logp_gap"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=f"{name}, step {theirs['step']}")
    whole = process_allgather(params, tiled=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, wanted["params"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, jax.tree.map(np.asarray, toys.params()))
    assert min(jax.tree.leaves(moved)) > 1e-4

    saved, then = exported
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, load_pretrained(saved)[1]), then)


def case_evaluation_equals_that_of_one_device(folder):
    got, wanted = evaluated(core.make_mesh(MESH)), one_devices_results(folder)["found"]
    np.testing.assert_array_equal(got.rewards, wanted.rewards)
    assert (got.completions, got.pass_at_1) == (wanted.completions, wanted.pass_at_1)


def case_a_reward_that_fails_fails_everywhere(folder):
    def broken(prompts, completions):
        raise KeyError("no such thing")

    message = "reward function broken raised" if core.distributed.is_main() else "the first process failed"
    with pytest.raises(RuntimeError, match=message):
        evaluated(core.make_mesh(MESH), broken)


def case_several_processes_need_a_mesh(folder):
    if jax.process_count() > 1:
        with pytest.raises(ValueError, match="mesh: expected one over the devices of all 2 processes, got None"):
            toys.trainer(CONFIG)
