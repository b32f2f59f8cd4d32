"""Training and evaluation over eight devices, in one process and in two, against one device."""

import jax
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather

from jaxlab import core
from jaxlab.models import load_pretrained
from jaxlab.rl import SFPOConfig, evaluate
from tests.rl import toys

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def config():
    sfpo = SFPOConfig(inner_steps=1, window=2)
    return toys.config(steps=4, mini_batch_size=8, micro_batch_size=4, beta=0.1, checkpoint_every=2, sfpo=sfpo)


def one_device():
    """In every process its own."""
    return core.make_mesh({"data": 1}, jax.local_devices()[:1])


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

    tx = toys.adamw(learning_rate=2e-3)  # steps small enough that they do not magnify how sums are rounded
    many = toys.trainer(
        config(), reward_fns=[reward], mesh=core.make_mesh(MESH), folder=folder / "run", callback=export_and_stop, tx=tx
    )
    assert many.params["head"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    with pytest.raises(Stop):
        many.train()
    params, rest = many.train()
    assert [row["step"] for row in rest] == [3, 4]
    assert [row["compilations"] for row in [*rows[1:], *rest]] == [0] * 6
    assert calls == [16] * (5 if core.distributed.is_main() else 0)

    wanted = toys.trainer(config(), mesh=one_device(), ref_params=toys.params(), tx=tx).train()
    for ours in (*rows[:3], *rest):
        theirs = wanted.history[ours["step"] - 1]
        for name in ("reward", "loss", "entropy", "kl", "grad_norm", "clip_fraction", "sampler_logp_gap"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=f"{name}, step {theirs['step']}")
    whole = process_allgather(params, tiled=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, jax.tree.map(np.asarray, wanted.params)
    )

    saved, then = exported
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, load_pretrained(saved)[1]), then)


def case_a_reward_that_fails_fails_everywhere(folder):
    def broken(prompts, completions):
        raise KeyError("no such thing")

    options = {"max_tokens": 6, "batch_size": 4, "mesh": core.make_mesh(MESH)}
    message = "reward function broken raised" if core.distributed.is_main() else "the first process failed"
    with pytest.raises(RuntimeError, match=message):
        evaluate(toys.MODEL, toys.params(), toys.DATA[:4], [broken], toys.TOKENIZER, **options)
    got = evaluate(toys.MODEL, toys.params(), toys.DATA[:4], [toys.low_characters], toys.TOKENIZER, **options)
    options["mesh"] = one_device()
    want = evaluate(toys.MODEL, toys.params(), toys.DATA[:4], [toys.low_characters], toys.TOKENIZER, **options)
    np.testing.assert_array_equal(got.rewards, want.rewards)
    assert got.completions == want.completions


def case_several_processes_need_a_mesh(folder):
    if jax.process_count() > 1:
        with pytest.raises(ValueError, match="mesh: expected one over the devices of all 2 processes, got None"):
            toys.trainer(config())
