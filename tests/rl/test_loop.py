"""The loop of policy optimisation, on a policy that is one distribution: rollouts of any kind, small programs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import core
from jaxlab.rl import SFPOConfig, make_pass, sfpo
from jaxlab.rl.batch import loss_mask, rollout_numbers, shaped_rewards
from jaxlab.rl.loop import PolicyTrainer
from jaxlab.rl.rollout import next_batch
from tests.oracles import adam
from tests.oracles import policy_objective as oracle
from tests.rl import toys

KEY = jax.random.key(0)


def trainer(config, *, rollout=toys.table_rollout, params=None, **options):
    params = toys.table_params() if params is None else params
    return PolicyTrainer(params, rollout, toys.table_logps, config, **{"tx": toys.adamw(), **options})


def drawn(draw=0, **options):
    return toys.table_rollout(None, None, draw, **options)


class SlowRun:
    """A run on the table policy as plain loops in float64: nothing of ours, no gradient but differences."""

    def __init__(self, config, *, ref=None):
        self.config, self.ref = config, None if ref is None else np.asarray(ref, np.float64)
        self.params = np.asarray(toys.table_params(), np.float64)
        self.moments = np.zeros(toys.VOCABULARY), np.zeros(toys.VOCABULARY), 0

    @staticmethod
    def logs(params):
        return params - np.log(np.sum(np.exp(params)))

    def step(self, rollout, fast_passes, alpha):
        config, mask, tokens = self.config, rollout.mask, rollout.inputs
        advantages = oracle.advantages(rollout.rewards, np.arange(toys.ROWS) // 4, config.advantage_kind)
        old = self.logs(self.params)[tokens]
        sampled = np.where(mask > 0, rollout.logps, 0)
        weights = None
        if config.importance_cap is not None:
            weights = np.minimum(np.exp(old - sampled), config.importance_cap)
        if not config.recompute_old_logps:
            old = sampled

        def loss(params, rows):
            logs = self.logs(params)
            entropy = np.full((len(rows), toys.LENGTH), -np.sum(np.exp(logs) * logs))
            return oracle.policy_loss(
                logs[tokens[rows]],
                old[rows],
                advantages[rows],
                mask[rows],
                epsilon=config.epsilon,
                epsilon_high=config.epsilon_high,
                aggregation=config.aggregation,
                max_length=config.max_completion_length,
                ref_logp=None if self.ref is None else self.logs(self.ref)[tokens[rows]],
                beta=config.beta,
                kl_kind=config.kl,
                entropy=entropy,
                entropy_coef=config.entropy_coef,
                weights=None if weights is None else weights[rows],
            )[0]

        slow = self.params
        for index in range(fast_passes + 1):
            if index == fast_passes:
                self.params = slow + alpha * (self.params - slow)
            for rows in np.split(np.arange(toys.ROWS), config.mini_batches):
                gradient = oracle.gradient(lambda params: loss(params, rows), self.params)  # noqa: B023
                gradient *= min(1.0, 1.0 / np.linalg.norm(gradient))
                m, v, t = self.moments
                rates = {"lr": toys.RATE, "eps": toys.EPS, "b2": 0.999}  # a vector: no decay
                self.params, m, v = adam.step(self.params, m, v, gradient, t=t + 1, **rates)
                self.moments = m, v, t + 1


OBJECTIVES = {
    "grpo": {},
    "two iterations in mini-batches": {"num_iterations": 2, "mini_batch_size": 4, "loss_type": "dapo"},
    "sfpo": {"sfpo": SFPOConfig(inner_steps=2, alpha=0.6), "mini_batch_size": 4, "micro_batch_size": 2},
    "everything": {
        "sfpo": SFPOConfig(inner_steps=1),
        "loss_type": "dr_grpo",
        "epsilon": 0.01,
        "epsilon_high": 0.02,
        "beta": 0.5,
        "kl": "k2",
        "entropy_coef": 0.1,
        "importance_cap": 1.1,
    },
    "the sampler's log-probabilities": {"loss_type": "rloo", "recompute_old_logps": False},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_equal_a_slow_loop(name):
    config = toys.table_config(steps=2, **OBJECTIVES[name])
    ref = 0.5 * toys.table_params() if config.beta else None
    slow = SlowRun(config, ref=ref)
    fast, alpha = (config.sfpo.inner_steps, config.sfpo.alpha) if config.sfpo else (config.num_iterations - 1, 1.0)
    for draw in range(2):
        slow.step(drawn(draw), fast, alpha)
    params, history = trainer(config, ref_params=ref).train()
    np.testing.assert_allclose(params, slow.params, atol=1e-5)
    assert [row["step"] for row in history] == [1, 2]
    assert history[1]["compilations"] == 0
    assert np.isfinite([list(row.values()) for row in history]).all()


def test_micro_batches_give_the_step_of_one():
    one = trainer(toys.table_config(mini_batch_size=4)).train()
    many = trainer(toys.table_config(mini_batch_size=4, micro_batch_size=1)).train()
    np.testing.assert_allclose(many.params, one.params, atol=1e-6)
    for name in ("loss", "grad_norm", "entropy", "approx_kl", "clip_fraction", "sampler_logp_gap"):
        np.testing.assert_allclose(many.history[0][name], one.history[0][name], atol=1e-6)


def test_history_and_kl_with_and_without_a_reference():
    [row] = trainer(toys.table_config(num_iterations=2)).train().history
    assert row["kl"] == row["approx_kl"] != 0
    want = {"step", "loss", "reward", "entropy", "grad_norm", "zero_variance_fraction", "kl", "clip_fraction"}
    want |= {"rollout_seconds", "update_seconds", "compilations", "sfpo_active", "skipped", "all_masked"}
    assert want <= row.keys()
    reference = toys.table_params() + jnp.arange(5.0)
    [row] = trainer(toys.table_config(), ref_params=reference).train().history  # beta = 0: a number, no term
    mine, theirs = (np.asarray(jax.nn.log_softmax(x)) for x in (toys.table_params(), reference))
    rollout = drawn()
    tokens = rollout.inputs[rollout.mask > 0]
    want = np.mean([oracle.kl(float(mine[token]), float(theirs[token]), "k3") for token in tokens])
    np.testing.assert_allclose(row["kl"], want, rtol=1e-4)


def test_eight_devices_give_the_steps_of_one_and_callers_keep_their_parameters():
    """Mini-batches and micro-batches lie over the data axes again, each of which has some of their rows."""
    params = toys.table_params()
    config = toys.table_config(steps=3, beta=0.1, mini_batch_size=4, sfpo=SFPOConfig(inner_steps=1))
    meshes = (None, core.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    one, many = (trainer(config, params=params, ref_params=params, mesh=mesh).train() for mesh in meshes)
    assert np.max(np.abs(one.params - params)) > 1e-3
    np.testing.assert_allclose(many.params, one.params, atol=1e-6)
    for ours, theirs in zip(numbers_of(many.history), numbers_of(one.history), strict=True):
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], atol=1e-5)


def test_gradients_that_are_not_finite():
    params = toys.table_params().at[0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=r"step 1: 2 gradients were not .*nonfinite='skip'"):
        trainer(toys.table_config(mini_batch_size=4), params=params).train()
    config = toys.table_config(mini_batch_size=4, nonfinite="skip", sfpo=SFPOConfig(inner_steps=2))
    left, [row] = trainer(config, params=params).train()
    assert row["skipped"] == 6
    np.testing.assert_array_equal(left, params)


def test_a_batch_without_tokens_changes_nothing_and_says_so():
    """Completions that were all cut off, which are masked: loss and gradient 0, and no entropy for the stop rule."""
    rollout = functools.partial(toys.table_rollout, lengths=[toys.LENGTH] * toys.ROWS)
    config = toys.table_config(mask_truncated=True, sfpo=SFPOConfig(window=2))
    run = trainer(config, rollout=rollout)
    params, [row] = run.train()
    assert (row["loss"], row["grad_norm"], row["all_masked"], row["truncated_fraction"]) == (0, 0, 1, 1)
    assert np.isfinite(list(row.values())).all()
    np.testing.assert_array_equal(params, toys.table_params())
    assert int(run._entropies.count) == 0


def test_penalty_and_masking_of_long_completions():
    rollout = drawn(lengths=[1, 2, 3, 3, 1, 1, 2, 3])
    config = toys.table_config(overlong_buffer=2, mask_truncated=True)
    penalty = np.array([0, 0.5, 1, 1, 0, 0, 0.5, 1])
    np.testing.assert_allclose(shaped_rewards(rollout, config), rollout.rewards - penalty, rtol=1e-6)
    assert shaped_rewards(rollout, toys.table_config()) is rollout.rewards
    np.testing.assert_array_equal(loss_mask(rollout, config).sum(axis=1), [1, 2, 0, 0, 1, 1, 2, 0])
    numbers = rollout_numbers(rollout, np.array([1, 1, 1, 1, 0, 1, 0, 1.0]), rollout.mask, 4)
    want = {"reward": 0.75, "reward_std": 0.25, "zero_variance_fraction": 0.5, "completion_length": 2,
            "truncated_fraction": 3 / 8, "all_masked": 0}  # fmt: skip
    assert numbers == want


def by_draw(rewards, metrics=({},)):
    """A rollout function whose n-th call has the n-th rewards."""

    def rollout(params, key, draw):
        return toys.table_rollout(params, key, draw, rewards=rewards[draw], metrics=metrics[draw % len(metrics)])

    return rollout


EQUAL, SOME, ALL = [1.0] * 8, [0.5] * 4 + [0, 0, 0, 1.0], [0, 1.0] * 4


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    seconds = [{"sampling_seconds": 1.0, "reward/a": 2.0}, {"sampling_seconds": 2.0}]
    rollout = by_draw([EQUAL, SOME, ALL, EQUAL, EQUAL, SOME], seconds)
    draw = functools.partial(next_batch, rollout, None, KEY, config=toys.table_config(dynamic_sampling=3))
    batch, following = draw(draw=0)
    assert following == 3
    np.testing.assert_array_equal(batch.rewards, SOME[4:] + ALL[:4])
    np.testing.assert_array_equal(batch.inputs, np.concatenate([drawn(1).inputs[4:], drawn(2).inputs[:4]]))
    mean = np.mean([EQUAL, SOME, ALL])
    assert batch.metrics == {
        "sampling_seconds": 4.0, "reward/a": 2.0, "sampling_rounds": 3.0, "drawn_reward": pytest.approx(mean),
        "drawn_zero_variance_fraction": pytest.approx(0.5),
    }  # fmt: skip
    batch, following = draw(draw=3)  # rounds run out: what is missing are the first of the others
    assert following == 6
    np.testing.assert_array_equal(batch.rewards, SOME[4:] + EQUAL[:4])
    batch, following = draw(draw=2)
    assert (following, batch.metrics["sampling_rounds"]) == (3, 1.0)
    plain, following = next_batch(rollout, None, KEY, 0, toys.table_config())
    assert (following, plain.metrics) == (1, seconds[0])
    np.testing.assert_array_equal(plain.rewards, EQUAL)


def test_drawing_again_and_the_fall_of_the_latch_compile_nothing():
    """The rule fires as soon as its window is full."""
    rollout = by_draw([ALL, EQUAL, ALL, ALL, SOME, SOME, ALL])
    config = toys.table_config(steps=5, dynamic_sampling=2, sfpo=SFPOConfig(window=3, threshold=-100.0))
    history = trainer(config, rollout=rollout).train().history
    assert [row["sampling_rounds"] for row in history] == [1, 2, 1, 2, 1]
    assert [row["sfpo_active"] for row in history] == [True, True, True, False, False]
    assert history[0]["compilations"] > 0
    assert [row["compilations"] for row in history[1:]] == [0] * 4


def numbers_of(history):
    return [{name: value for name, value in row.items() if "seconds" not in name and name != "compilations"}
            for row in history]  # fmt: skip


class Stop(Exception):
    pass


def stop_after(step):
    def callback(trainer, row):
        if row["step"] == step:
            raise Stop

    return callback


def bitwise(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if one.dtype == KEY.dtype:
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    """Parameters, moments, entropies and latch, data position, numbers; and only what config may change."""
    config = toys.table_config(
        steps=8, checkpoint_every=3, dynamic_sampling=2, sfpo=SFPOConfig(window=4, threshold=-100.0)
    )
    random = np.random.default_rng(5)
    rollout = by_draw([random.integers(0, 2, 8) if draw % 3 else EQUAL for draw in range(16)])
    whole = trainer(config, rollout=rollout)
    wanted = whole.train()
    with pytest.raises(Stop):
        trainer(config, rollout=rollout, folder=tmp_path, callback=stop_after(5)).train()
    resumed = trainer(config, rollout=rollout, folder=tmp_path)
    params, history = resumed.train()
    assert numbers_of(history) == numbers_of(wanted.history[3:])
    assert [row["sfpo_active"] for row in wanted.history] == [True] * 4 + [False] * 4
    bitwise(params, wanted.params)
    bitwise((resumed._state, resumed._entropies), (whole._state, whole._entropies))
    assert resumed._draw == whole._draw > 8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert [line["reward"] for line in lines] == [row["reward"] for row in wanted.history]

    again = resumed.train()  # done: nothing is made, logged or saved twice
    assert again.history == []
    bitwise(again.params, wanted.params)
    longer = toys.table_config(**{**vars(config), "steps": 9, "checkpoint_every": 0, "nonfinite": "skip"})
    assert len(trainer(longer, rollout=rollout, folder=tmp_path).train().history) == 1

    for changes, name in (
        ({"sfpo": SFPOConfig(window=4, threshold=-100.0, inner_steps=2)}, "sfpo.inner_steps: .* with 3, got 2"),
        ({"sfpo": SFPOConfig(window=4, threshold=-100.0, alpha=0.9)}, "sfpo.alpha: .* with 0.8, got 0.9"),
        ({"sfpo": None}, "sfpo: .* got None"),
        ({"seed": 1}, "seed: .* with 0, got 1; use another folder, or allow_changes=True"),
    ):
        other = toys.table_config(**{**vars(longer), "steps": 10, **changes})
        with pytest.raises(ValueError, match=name):
            trainer(other, rollout=rollout, folder=tmp_path).train()
    allowed = trainer(other, rollout=rollout, folder=tmp_path, allow_changes=True)
    assert [row["step"] for row in allowed.train().history] == [10]


def test_trained_again_without_a_folder_it_goes_on():
    config = toys.table_config(steps=4)
    wanted = trainer(config).train()
    run = trainer(config, callback=stop_after(2))
    with pytest.raises(Stop):
        run.train()
    params, history = run.train()
    assert numbers_of(history) == numbers_of(wanted.history[2:])
    bitwise(params, wanted.params)


def test_the_transformation_resumes_in_the_middle_of_its_cycle(tmp_path):
    """`sfpo(...)` as an Optax user runs it: saved after each update of two cycles, restored, and gone on with."""
    tx = sfpo(toys.adamw(), 2, 0.7, updates_per_pass=2, state_policy="reset_fast")
    one_update = jax.jit(make_pass(lambda w, rows: (jnp.mean((rows @ w - 1) ** 2), {}), tx))
    halves = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    params, state, seen = toys.table_params(), tx.init(toys.table_params()), []
    checkpointer = core.Checkpointer(tmp_path, keep=None)
    for update in range(9):
        if update in (2, 5):  # in the fast phase, and between jump and last update
            checkpointer.save(update, {"params": params, "state": state})
        params, state, _ = one_update(params, state, halves[update % 2])
        seen.append(params)
    assert int(state.count) == 3
    for start in (2, 5):
        like = {"params": toys.table_params(), "state": tx.init(toys.table_params())}
        restored, _ = checkpointer.restore(like, start)
        params, state = restored["params"], restored["state"]
        for update in range(start, 9):
            params, state, _ = one_update(params, state, halves[update % 2])
            bitwise(params, seen[update])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [0, 1, np.nan, 0] * 2}, "rollout.rewards: expected finite numbers, got nan in row 2"),
        ({"rewards": [1.0] * 4}, r"rollout.rewards: expected shape \(8,\), got \(4,\)"),
        ({"metrics": {"step": 1.0}}, "rollout.metrics: the name 'step' is taken"),
    ],
)
def test_rollouts_that_do_not_fit(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(toys.table_config(), rollout=functools.partial(toys.table_rollout, **change)).train()


def test_rollouts_of_other_shapes(unchecked):
    whole = drawn()
    for change, message in (
        ({"mask": whole.mask[:6]}, "rollout.mask: expected .* = 8 rows of tokens, got shape"),
        ({"logps": whole.logps[:, :2]}, r"rollout.logps: expected shape \(8, 3\), got \(8, 2\)"),
        ({"inputs": whole.inputs[:2]}, r"rollout.inputs: expected arrays of 8 rows, got shape \(2, 3\)"),
        ({"truncated": whole.truncated[:1]}, r"rollout.truncated: expected shape \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(toys.table_config(), rollout=lambda *_: whole.replace(**change)).train()  # noqa: B023


def test_arguments_that_cannot_work():
    with pytest.raises(ValueError, match=r"ref_params: expected parameters, since beta = 0\.1"):
        trainer(toys.table_config(beta=0.1))
    mesh = core.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for changes, message in (
        (
            {"num_generations": 3},
            r"prompts_per_step \* num_generations: expected a multiple of 4, .* data, fsdp, got 6",
        ),
        ({"mini_batch_size": 2}, "mini_batch_size: expected a multiple of 4, .* got 2"),
        ({"micro_batch_size": 2}, "micro_batch_size: .* got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(toys.table_config(**changes), mesh=mesh)


BAD_CONFIGS = [
    ({"num_generations": 1}, "num_generations: expected a value >= 2, got 1"),
    ({"num_generations": 0, "loss_type": "rloo"}, "num_generations: expected a value >= 1, got 0"),
    ({"epsilon": 1.0}, r"epsilon: expected a value in \[0, 1\), got 1.0"),
    ({"epsilon": -0.1}, r"epsilon: .* got -0.1"),
    ({"epsilon_high": -1.0}, "epsilon_high: .* got -1.0"),
    ({"dual_clip": 1.0}, "dual_clip: expected a value > 1, got 1.0"),
    ({"mini_batch_size": 5}, "mini_batch_size: expected a divisor of .* = 8, got 5"),
    (
        {"mini_batch_size": 4, "micro_batch_size": 3},
        "micro_batch_size: expected a divisor of the mini-batch = 4, got 3",
    ),
    ({"loss_type": "ppo"}, "loss_type: expected one of grpo, dr_grpo, dapo, rloo, got 'ppo'"),
    ({"kl": "k4"}, "kl: expected one of k1, k2, k3, got 'k4'"),
    ({"loss_agg_mode": "mean"}, "loss_agg_mode: expected one of token-mean, .* got 'mean'"),
    ({"nonfinite": "ignore"}, "nonfinite: expected one of raise, skip"),
    ({"temperature": 0.0}, "temperature: expected a value > 0, got 0.0"),
    ({"top_p": 0.0}, "top_p: .* got 0.0"),
    ({"beta": float("nan")}, "beta: .* got nan"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: .* got 0.0"),
    ({"overlong_buffer": 4}, "overlong_buffer: expected at most max_completion_length = 3, got 4"),
    ({"importance_cap": 2.0, "recompute_old_logps": False}, "importance_cap: needs recompute_old_logps=True"),
    (
        {"num_generations": 1, "loss_type": "rloo", "dynamic_sampling": 2},
        "dynamic_sampling: needs groups of at least 2",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_configs_that_cannot_work(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        toys.table_config(**changes)


def test_sfpo_configs_that_cannot_work(unchecked):
    for changes, message in (
        ({"inner_steps": 0}, "inner_steps: .* got 0"),
        ({"alpha": 1.5}, "alpha: .* got 1.5"),
        ({"window": 1}, "window: expected at least 2 entropies, got 1"),
        ({"state_policy": "keep"}, "state_policy: expected one of carry, reset_fast"),
    ):
        with pytest.raises(ValueError, match=message):
            SFPOConfig(**changes)


def test_the_optimiser_of_the_config():
    """Adam's first step is the rate, whatever the gradient; a vector does not decay."""
    params, _ = trainer(toys.table_config(learning_rate=1e-2, weight_decay=0.5), tx=None).train()
    np.testing.assert_allclose(np.abs(params - toys.table_params()), 1e-2, rtol=1e-3)
