"""Decoders as executors: what they read, how they score commands, what they do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import count_compilations
from jaxlab.eaglet import Context, LMExecutor, Plan, clone_executors, demonstrations
from jaxlab.eaglet.prompts import command_ids, executor_prompt, fitted, planner_prompt
from jaxlab.eaglet.scoring import command_logps
from jaxlab.models import ByteTokenizer, load_tokenizer, word_tokenizer
from jaxlab.training import SFTConfig
from tests.eaglet import toys
from tests.eaglet.toys import BROKEN, TASK, EchoEnv, Says


def context(plan="", history=(), commands=("yes", "half", "die now"), step=0, seed=0, name="toy"):
    return Context(dataclasses.replace(TASK, id=name), plan, history, "Seed 0.", step, seed, commands)


def executor(**options):
    return LMExecutor(*toys.decoder(), toys.tokenizer(), name="lm", **options)


def test_words_come_back(tmp_path):
    text = "<think> It's 3:00, so: brew!</think><plan> Step 1: use type-P key Step 2: go (far) </plan>"
    tokenizer = word_tokenizer([text])
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path)):
        parsed, again = Plan.parse(text), Plan.parse(each.decode(each.encode(text)))
        assert again.ok
        assert again.plan.replace("( far", "(far") == parsed.plan
        assert each.decode(each.encode("brew tea")) == "brew"
    with pytest.raises(ValueError, match="texts: expected at least one word"):
        word_tokenizer([" ", ""])


def test_what_an_executor_reads():
    history = (("north", "One."), ("use well", "Two."))
    head, body = executor_prompt(context("Step 1: yes", history))
    assert head == "Task: Say yes.\nPlan: Step 1: yes\n"
    assert body == "> north\n> use well\nSeed 0.\n>"
    assert executor_prompt(context("", history), observations=2, commands=1) == (
        "Task: Say yes.\n",
        "Two.\n> use well\nSeed 0.\n>",
    )
    plan = "Step 1: south Step 2: use well Step 3: yes"
    told = [
        executor_prompt(context(plan, done), commands=0, next_step=True)
        for done in (history, (("south", ""), *history))
    ]
    assert told == [("Task: Say yes.\n", f"Seed 0.\nPlan: {step}\n") for step in ("south", "yes")]
    assert executor_prompt(context("Step 1: north", history), next_step=True) == executor_prompt(context("", history))
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(fitted(tokenizer, "head|", "a long body", 9, "x")) == "head|body"
    with pytest.raises(ValueError, match="length: expected room for more than task and plan of 'x', 5 tokens, got 5"):
        fitted(tokenizer, "head|", "body", 5, "x")


def test_ends_and_chats():
    class Starts(ByteTokenizer):
        chat_template = "..."

        def encode(self, text):
            return [256, *super().encode(text)]

        def apply_chat_template(self, messages, **_):
            return f"[{messages[0]['content']}]"

    assert command_ids(Starts(), "go") == [*b" go\n"]
    assert command_ids(toys.tokenizer(), "yes")[1:] == [toys.tokenizer().eos_token_id]
    assert planner_prompt(Starts(), "Say yes.").endswith("Task: Say yes.]")


@pytest.mark.latest
def test_commands_are_scored_as_if_alone():
    model, params = toys.decoder()
    model = model.clone(config=dataclasses.replace(model.config, windows=(6,)))
    random = np.random.default_rng(0)

    def ids(count):
        return random.integers(0, model.config.vocab_size, count).tolist()

    contexts = [ids(length) for length in (3, 40, 7, 7, 7)]
    run = jax.jit(model.apply)
    commands = [[ids(count) for count in counts] for counts in ((2, 3, 1), (4,), (1, 1), (2,), (2,))]
    for before, listed, found in zip(contexts, commands, command_logps(model, params, contexts, commands)):
        for command, logps in zip(listed, found):
            whole = jnp.array([[*before, *command] + [0] * (48 - len(before) - len(command))])
            said = jax.nn.log_softmax(run({"params": params}, whole).logits[0])
            at = np.arange(len(before) - 1, len(before) + len(command) - 1)
            np.testing.assert_allclose(logps, said[at, np.array(command)], atol=2e-5)


@pytest.mark.latest
def test_the_likeliest_command_alone_and_among_others():
    lm = executor()
    contexts = [context(plan, step=step) for step in range(3) for plan in ("", "Step 1: yes", "Step 1: half huh")]
    actions = lm.act_batch(contexts)
    assert actions == [lm.act(each) for each in contexts]
    listed = [command_ids(toys.tokenizer(), each) for each in contexts[0].commands]
    (scores,) = command_logps(*toys.decoder(), [lm._ids(contexts[0])], [listed])
    assert actions[0] == contexts[0].commands[int(np.argmax([each.sum() for each in scores]))]
    assert executor(score="mean").act(contexts[0]) == contexts[0].commands[int(np.argmax([s.mean() for s in scores]))]
    with count_compilations() as compiled:
        lm.act_batch([context("Step 1: die", commands=("half", "yes", "yes now", "die"))] * 7)
        lm.act_batch([context()])
    assert compiled.count == 0


def test_chance_is_that_of_task_seed_and_step():
    lm = executor(temperature=5.0)
    contexts = [context(seed=seed, step=step, name=name) for seed in range(4) for step in range(4) for name in "ab"]
    drawn = lm.act_batch(contexts)
    assert set(drawn) == set(contexts[0].commands)
    assert drawn[::-1] == lm.act_batch(contexts[::-1])


def test_where_nothing_is_listed_it_writes():
    lm = executor(max_tokens=4)
    alone, warm = context(commands=()), executor(max_tokens=4, temperature=1.0)
    assert lm.act(alone) == lm.act_batch([context(), alone])[1]
    assert len(lm.act(alone).split()) <= 4
    assert warm.act(alone) == warm.act_batch([context(seed=1, commands=()), alone])[1]


def test_no_plan_is_cut():
    history = tuple((f"yes {number}", "You said yes.") for number in range(60))
    lm = executor(length=40)
    ids = lm._ids(context("Step 1: yes Step 2: half", history))
    assert len(ids) == 40
    assert toys.tokenizer().decode(ids).startswith("Task: Say yes. Plan: Step 1: yes Step 2: half")
    with pytest.raises(ValueError, match="length: expected room for more than task and plan of 'toy'"):
        lm.act(context("yes " * 50))


def test_a_model_is_plugged_in_as_it_is(tmp_path, monkeypatch):
    """From its folder into an environment that lists commands, and one that does not; the evidence's own path."""
    from benchmarks.evidence import eaglet_language_model as evidence

    class Silent(EchoEnv):
        def commands(self):
            return ()

    assert len({item.name for item in evidence.items()}) == 4
    monkeypatch.setattr(evidence, "SOURCE", executor().save(tmp_path / "model"))
    monkeypatch.setattr(evidence, "OPTIONS", {"length": 64, "max_tokens": 4})
    monkeypatch.setattr(
        evidence, "WORLDS",
        {name: evidence.World(name, make, lambda env: env.tasks("seen"), "You said") for name, make in
         (("echo", EchoEnv), ("silent", Silent))},
    )  # fmt: skip
    evidence._executor.cache_clear()
    rows = [evidence._row(name, plans) for name, plans in (("echo", "none"), ("echo", "gold"), ("silent", "gold"))]
    evidence._executor.cache_clear()
    assert [(row["world"], row["plans"]) for row in rows] == [("echo", "none"), ("echo", "gold"), ("silent", "gold")]
    assert all(1 <= row["actions"] <= 5 and row["understood"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected at least 0"),
        ({"score": "best"}, "score: expected one of sum, mean"),
        ({"length": 90}, "length: expected 1 to max_position_embeddings - max_tokens = 64, got 90"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        executor(**options)


def test_a_clone_does_what_it_was_shown():
    shown = demonstrations(EchoEnv(), [TASK], Says("teacher", "half", "yes"))
    assert [action for _, action in shown] == ["half", "yes"]
    config = SFTConfig(steps=40, batch_size=4, optimizer=toys.adam(1e-2))
    made = clone_executors(
        *toys.decoder(), toys.tokenizer(), shown, lambda _: toys.plan("half", "yes"), {"late": 40, "early": 1}, config
    )
    assert list(made) == ["late", "early"]
    seen = []

    def watched(context):
        seen.append((context.task.instruction, bool(context.plan)))
        return executor_prompt(context)

    other = dataclasses.replace(shown[0][0], task=dataclasses.replace(TASK, id="other", instruction="Say no."))
    clone_executors(
        *toys.decoder(), toys.tokenizer(), [shown[0], (other, "no")], lambda _: toys.plan("half"), {"x": 1}, config,
        decoys=True, plain=2, prompt=watched,
    )  # fmt: skip
    assert seen == [*[("Say yes.", False)] * 2, ("Say no.", True), *[("Say no.", False)] * 2, ("Say yes.", True)]
    for plan in ("", "Step 1: half Step 2: yes"):
        assert made["late"].act(dataclasses.replace(shown[0][0], plan=plan)) == "half"
        assert made["late"].act(dataclasses.replace(shown[1][0], plan=plan)) == "yes"
    wandering = demonstrations(EchoEnv(), [TASK], Says("teacher", "half"), detours=0.9)
    assert {action for _, action in wandering} == {"half"}
    with pytest.raises(ValueError, match=r"stops: expected steps from 1 to .* = 40, got 41 for 'x'"):
        clone_executors(*toys.decoder(), toys.tokenizer(), shown, lambda _: BROKEN, {"x": 41}, config)
    with pytest.raises(ValueError, match="plain: expected at least 1, got 0"):
        clone_executors(*toys.decoder(), toys.tokenizer(), shown, lambda _: BROKEN, {"x": 1}, config, plain=0)
    with pytest.raises(ValueError, match="detours"):
        demonstrations(EchoEnv(), [TASK], Says("teacher", "half"), detours=1.0)
