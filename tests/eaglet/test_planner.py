"""Planners: writing plans, the cold start, the reinforcement by gain."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.eaglet import (
    GridGuide,
    GridQuestEnv,
    PlanGRPOConfig,
    Planner,
    RolloutCache,
    ScriptedExecutor,
    evaluate,
    group_advantages,
    hcf_filter,
    reinforcement,
    train_grpo,
    train_sft,
)
from jaxlab.rl import SFPOConfig
from jaxlab.training import SFTConfig
from tests.eaglet import toys
from tests.eaglet.toys import BROKEN, TASK, EchoEnv, Says, equal, killed_at, plan, task

EXPERT, NOVICE = Says("expert", "half"), Says("novice", "huh")
SFT = SFTConfig(steps=60, batch_size=8, optimizer=toys.adam(1e-2))
GRPO = PlanGRPOConfig(
    prompts_per_step=2, num_generations=4, max_completion_length=16, max_prompt_length=16, learning_rate=2e-3, steps=12
)


@pytest.fixture(scope="module")
def start():
    return Planner(*toys.decoder(), toys.tokenizer(), max_tokens=16)


@pytest.fixture(scope="module")
def trained(start):
    """It writes "yes" half of the time."""
    return train_sft(start, [(TASK, plan("yes")), (TASK, plan("huh"))], SFT)


@pytest.mark.latest
def test_the_cold_start(trained, tmp_path):
    assert [row["step"] for row in trained.history] == list(range(1, 61))
    assert trained.history[-1]["loss"] < 0.3 < trained.history[0]["loss"]
    plans = trained.planner.plan_all([TASK.instruction] * 2, rng=jax.random.key(0), n=4)
    assert [len(group) for group in plans] == [4, 4]
    assert {each.plan for group in plans for each in group} == {"Step 1: yes", "Step 1: huh"}
    assert all(each.ok and each.thinking == "I think." for group in plans for each in group)
    greedy = trained.planner(TASK)
    assert greedy == trained.planner.plan(TASK.instruction, temperature=0.0)[0]
    loaded = Planner.load(trained.planner.save(tmp_path / "planner"), max_tokens=16)
    assert loaded(TASK) == greedy
    short = dataclasses.replace(trained.planner, max_plan_tokens=3)(TASK)
    assert (short.ok, short.reason, short.plan) == (False, "too_long", "Step 1:")


def test_the_planner_that_comes_with_the_package(tmp_path):
    """It is small, and on types of task that its training never had it helps as it is said to."""
    packaged = Planner.load()
    env, novice = GridQuestEnv(size=5, n_tasks=12), ScriptedExecutor("novice", GridGuide(), skill=0.1, follow=0.9)
    tasks = env.tasks("unseen")
    report = evaluate(env, novice, tasks, planner=packaged)
    assert (evaluate(env, novice, tasks).success.mean, report.success.mean) == (0, 1)
    assert all(row["plan"].startswith("Step 1: use ") for row in report.table)
    folder = packaged.save(tmp_path / "again", dtype="float16")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 200_000
    assert equal(Planner.load(folder).params, packaged.params)
    assert (packaged.max_tokens, Planner.load(max_tokens=9).max_tokens) == (48, 9)


def test_a_cold_start_goes_on(start, trained, tmp_path):
    pairs, early = [(TASK, plan("yes")), (TASK, plan("huh"))], dataclasses.replace(SFT, checkpoint_every=7)
    killed_at(20, lambda: train_sft(start, pairs, early, folder=tmp_path))
    again = train_sft(start, pairs, early, folder=tmp_path)
    assert again.history[0]["step"] == 15
    assert equal(again.planner.params, trained.planner.params)
    with pytest.raises(ValueError, match="batches: expected a position with rows"):
        train_sft(start, pairs[:1], dataclasses.replace(early, steps=61), folder=tmp_path)


def test_bad_inputs_of_the_cold_start(start):
    for pairs, message in (
        ([], "pairs: expected at least one to train on"),
        ([(TASK, BROKEN)], r"pairs\[0\]: expected a plan of the right format, got 'no_think' of 'toy'"),
        ([(TASK, plan(*["yes"] * 9))], r"pairs\[0\]: expected at most max_tokens = 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sft(start, pairs, SFT)
    with pytest.raises(ValueError, match="pairs: expected prompt and completion of at most 96 tokens"):
        train_sft(dataclasses.replace(start, max_tokens=999), [(TASK, plan(*["yes"] * 30))], SFT)
    with pytest.raises(ValueError, match="steps: expected a value >= 1"):
        SFTConfig(steps=0)
    with pytest.raises(ValueError, match="rng: expected a PRNG key"):
        start.plan("Say yes.")


@pytest.mark.latest
@pytest.mark.filterwarnings("ignore:.*no update is made")  # once it has learnt everything
def test_reinforcement(trained, tmp_path):
    """It learns to write what both gain from, compiles once, and goes on to the same bits."""
    tasks, cache = [task(f"toy-{k}") for k in range(3)], RolloutCache()
    options = {"env": EchoEnv(), "executors": (EXPERT, NOVICE), "config": GRPO}
    got = train_grpo(trained.planner, tasks, cache=cache, **options)
    assert np.mean([row["gain"] for row in got.history[-4:]]) > 1.5 > got.history[0]["gain"]
    assert got.planner(TASK).plan == "Step 1: yes"
    assert len(cache) == 6
    assert sum(row["compilations"] for row in got.history[1:]) == 0
    assert any(row["zero_variance_fraction"] == 1 for row in got.history[1:-1])  # no update there
    first = got.history[0]
    assert first["reward"] == pytest.approx(first["gain"] + first["format"])
    assert first["gain_factor_max"] == pytest.approx(1.01**4)
    assert first["env_steps"] > got.history[-1]["env_steps"]
    assert {"kl", "sampling_seconds", "reward_seconds", "zero_variance_fraction"} < first.keys()

    options["config"] = dataclasses.replace(GRPO, checkpoint_every=5)
    killed_at(8, lambda: train_grpo(trained.planner, tasks, folder=tmp_path, **options))
    again = train_grpo(trained.planner, tasks, folder=tmp_path, **options)
    assert [row["step"] for row in again.history] == list(range(6, 13))
    assert equal(again.planner.params, got.planner.params)
    options["config"] = dataclasses.replace(GRPO, alpha=0.1)
    with pytest.raises(ValueError, match=r"alpha: .* was trained with 0.01, got 0.1"):
        train_grpo(trained.planner, tasks, folder=tmp_path, **options)


def test_equal_rewards_make_no_update(start):
    config = dataclasses.replace(GRPO, steps=2, sfpo=SFPOConfig())
    with pytest.warns(RuntimeWarning, match=r"step [12]: the rewards of every group are equal, no update is made"):
        got = train_grpo(start, [TASK], env=EchoEnv(), executors=(EXPERT, NOVICE), config=config)
    assert equal(got.planner.params, start.params)
    told = [(row["step"], row["loss"], row["zero_variance_fraction"], row["sfpo_active"]) for row in got.history]
    assert told == [(1, 0, 1, False), (2, 0, 1, False)]


def rewards(reward, pairs, **options):
    planner = Planner(*toys.decoder(), toys.tokenizer())
    config = dataclasses.replace(GRPO, reward=reward, **options)
    rollouts = reinforcement.PlanRollouts(planner, [TASK], env=EchoEnv(), executors=(EXPERT, NOVICE), config=config)
    return rollouts._scored(pairs)


def test_kinds_of_reward():
    pairs = [(TASK, plan("half")), (TASK, BROKEN), (TASK, plan("die")), (TASK, plan("yes"))]
    two = 1.01**4
    for reward, want in {
        "gain": [1 + 1, 0, 1, 1 + 2 * two],
        "expert": [1, 0, 1, 1 + two],
        "novice": [1 + 1, 0, 1, 1 + two],
        "success": [1 + 0.5, 0, 1, 1 + 1],
    }.items():
        got, metrics = rewards(reward, pairs)
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=reward)
        assert metrics["format"] == 0.75
    assert metrics["gain_factor_max"] == pytest.approx(two)
    assert rewards("gain", pairs, max_decay=1.0)[0][-1] == pytest.approx(3)


def test_processes_try_out_their_own_tasks(monkeypatch):
    """Two processes played one after the other: each has its tasks' plans, both get all rewards."""
    pairs = [(TASK, plan(word)) for word in ("half", "yes", "huh", "yes", "half", "half", "yes", "half")]
    want, told = rewards("gain", pairs)
    tables = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(reinforcement, "_shared", lambda table, error: tables.append(table) or table)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        rewards("gain", pairs)
    assert [np.flatnonzero(table[2]).tolist() for table in tables] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    monkeypatch.undo()
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather",
        lambda value: np.array([value, False]) if value.ndim == 0 else np.stack([t.view(np.uint32) for t in tables]),
    )
    both = reinforcement._shared(tables[0], None)
    np.testing.assert_allclose(both[0], want, rtol=1e-6)
    assert both[4].sum() >= told["env_steps"]
    with pytest.raises(KeyError, match="mine"):
        reinforcement._shared(tables[0], KeyError("mine"))
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda value: np.array([False, True]))
    with pytest.raises(RuntimeError, match="another process failed"):
        reinforcement._shared(tables[0], None)


def test_advantages_are_those_of_the_population(trained):
    rewards = np.array([0.0, 1, 1, 3, 2, 2, 2, 2], np.float32)
    seen = []

    class Watched(reinforcement.PolicyTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append(np.asarray(self._advantages(rewards)))
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforcement, "PolicyTrainer", Watched)
        with pytest.raises(KeyboardInterrupt):
            train_grpo(trained.planner, [TASK], env=EchoEnv(), executors=(EXPERT, NOVICE), config=GRPO)
    np.testing.assert_allclose(seen[0].reshape(2, 4), group_advantages(rewards.reshape(2, 4)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations: expected a value >= 2"),
        ({"num_generations": 1, "loss_type": "rloo"}, "num_generations: expected a value >= 2"),
        ({"alpha": -1.0}, "alpha: expected a value > -1"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"reward": "luck"}, "reward: expected one of gain, expert, novice, success"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        PlanGRPOConfig(**options)


def test_bad_inputs_of_reinforcement(trained):
    planner = trained.planner
    for tasks, executors, config, message in (
        ([TASK], (EXPERT, EXPERT), GRPO, "'expert' twice"),
        ([], (EXPERT, NOVICE), GRPO, "tasks: expected at least one"),
        (
            [TASK],
            (EXPERT, NOVICE),
            dataclasses.replace(GRPO, max_prompt_length=3),
            "tasks: expected instructions of at",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train_grpo(planner, tasks, env=EchoEnv(), executors=executors, config=config)
    with pytest.raises(FloatingPointError, match="'bad' with plan"):
        train_grpo(planner, [task("bad", nan=True)], env=EchoEnv(), executors=(EXPERT, NOVICE), config=GRPO)


def test_a_filter_before_a_cold_start(start):
    kept = hcf_filter([(TASK, plan("yes")), (TASK, plan("die"))], EXPERT, NOVICE, env=EchoEnv()).kept
    assert train_sft(start, kept, SFT).planner(TASK).plan == "Step 1: yes"
