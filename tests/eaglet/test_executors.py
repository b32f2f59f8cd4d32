"""Executors and plan sources: scripted ones, and those behind a real endpoint on this machine."""

import dataclasses
import functools
import http.server
import json
import pickle
import threading

import numpy as np
import pytest

from jaxlab.eaglet import (
    Context,
    GoldGuide,
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    OpenAIExecutor,
    OpenAIPlanSource,
    PlanSourceError,
    ScriptedExecutor,
    ServedExecutor,
    Task,
    evaluate,
    executor_prompt,
    rollout,
)
from jaxlab.inference import SamplingParams, generate
from tests.eaglet import toys
from tests.eaglet.toys import TASK, EchoEnv

GOLD = ("go to hall", "take cup 2", "wait", "wait", "drop cup 2")


def act(executor, plan="", done=(), commands=(), seed=0):
    history = tuple((action, "Fine.") for action in done)
    return executor.act(Context(TASK, plan, history, "A room.", len(done), seed, commands))


@pytest.mark.latest
def test_full_skill_is_gold_and_full_trust_is_the_plan():
    env = GridQuestEnv()
    knows, follows = (ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("k", 1.0), ("f", 0.0)))
    for task in env.tasks("train")[:5]:
        gold = tuple(env.gold_actions(task))
        assert rollout(env, knows, task).actions == gold
        assert rollout(env, follows, task, plan=GoldPathPlanSource(env)(task).plan).actions == gold
        assert (
            rollout(env, follows, task, plan=GoldPathPlanSource(env)(task).plan, insert="observation").actions == gold
        )


def test_all_ways_that_bring_a_subgoal_nearer():
    env, guide = GridQuestEnv(), GridGuide()
    for task in env.tasks("seen")[:4]:
        observation = env.reset(task)
        context = Context(task, "", (), observation, 0, 0, env.commands())
        down, right = (np.array(task.data["cells"]["well"]) - task.data["start"]).tolist()
        ways = {"south" if down > 0 else "north"} if down else set()
        ways |= {"east" if right > 0 else "west"} if right else set()
        assert set(guide.towards(context, "use well")) == ways
        assert guide.next_action(context, "use well") in ways
        there = dataclasses.replace(context, observation="0 of 4 done. here: well. east: tower.")
        assert guide.towards(there, "use well") == ("use well",)
        assert guide.towards(context, "sing") == ()
        assert guide.next_action(context, "use the well") is None


def test_more_skill_earns_more():
    env = GridQuestEnv(n_tasks=8)
    rewards = [
        sum(rollout(env, ScriptedExecutor("x", GridGuide(), skill=skill), task).reward for task in env.tasks("seen"))
        for skill in (0.0, 0.3, 1.0)
    ]
    assert rewards[0] < rewards[1] < rewards[2] == 8


def test_a_wrong_plan_costs():
    env = GridQuestEnv()
    executor = ScriptedExecutor("x", GridGuide(), skill=1.0)
    task = env.tasks("train")[0]
    foreign = next(place for place in task.data["cells"] if place not in task.data["recipe"])
    with_plan = rollout(env, executor, task, plan=f"Step 1: sing Step 2: use {foreign}")
    assert with_plan.actions[0] == "sing"
    assert f"use {foreign}" in with_plan.actions
    assert with_plan.reward == 1.0
    assert with_plan.steps > rollout(env, executor, task).steps + 1


def test_gold_actions_guide_through_any_environment():
    executor = ScriptedExecutor("x", GoldGuide({TASK.id: GOLD}), skill=1.0)
    done = []
    for want in GOLD:
        assert act(executor, done=done) == want
        done.append(want)
    plan = "Step 1: take cup Step 2: wait Step 3: drop cup"
    assert act(executor, plan) == "go to hall"
    assert act(executor, plan, GOLD[:1]) == "take cup 2"
    assert act(executor, plan, GOLD[:3]) == "wait"  # the gold path waits twice
    assert act(executor, "Step 1: drop cup") == "drop cup 2"  # out of turn: tried on the spot
    assert act(executor, "Step 1: fly") == "fly"
    clueless = ScriptedExecutor("y", GoldGuide({TASK.id: GOLD}), skill=0.0, idle=("look around",))
    assert act(clueless) == "look around"
    assert {act(clueless, commands=("a", "b"), seed=seed) for seed in range(20)} == {"a", "b"}
    assert len({act(clueless, commands=tuple("abcdef"), seed=3) for _ in range(5)}) == 1


def test_what_a_plan_leaves_open_takes_skill():
    guide = GoldGuide({TASK.id: GOLD})
    plan = "Step 1: take something Step 2: drop cup"
    knows = ScriptedExecutor("x", guide, skill=1.0)
    assert act(knows, plan) == "go to hall"
    assert act(knows, plan, GOLD[:1]) == "take cup 2"
    clueless = ScriptedExecutor("y", guide, skill=0.0)
    assert {act(clueless, plan, seed=seed) for seed in range(9)} == {"look around"}
    assert act(clueless, plan, GOLD[:2]) == "drop cup 2"  # whatever was taken, that step is done
    assert act(knows, "Step 1: sing something") == "sing something"
    reads = ScriptedExecutor("z", GoldGuide({TASK.id: ("say no", "say yes")}), skill=0.0)
    assert TASK.instruction == "Say yes."
    assert act(reads, "Step 1: say it") == "say yes"
    assert act(reads, "Step 1: sing it") == "sing it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"skill": 1.5}, "skill"), ({"skill": 0.5, "follow": -1}, "follow"), ({"skill": 0.5, "idle": ()}, "idle")],
)
def test_bad_inputs_of_scripts(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScriptedExecutor("x", GridGuide(), **arguments)


def test_plans_from_gold_and_their_faults():
    env = GridQuestEnv()
    right, wrong = GoldPathPlanSource(env), GoldPathPlanSource(env, corruption=1.0)
    faults = set()
    for task in env.tasks("train"):
        steps = [f"use {place}" for place in task.data["recipe"]]
        plan = right(task)
        assert plan.ok
        assert plan.plan == " ".join(f"Step {k}: {step}" for k, step in enumerate(steps, 1))
        assert right.fault(task) is None
        assert wrong(task) == wrong(task) != plan
        assert wrong(task).thinking == plan.thinking  # nothing but the steps tells
        faults.add(wrong.fault(task))
    assert faults == {"drop", "swap", "foreign"}
    assert task.instruction in plan.thinking
    brief = GoldPathPlanSource(env, restate=False)(task)
    assert (brief.plan, brief.thinking) == (plan.plan, "These steps lead there.")
    half = GoldPathPlanSource(env, corruption=0.5)
    share = sum(half.fault(task) is not None for task in env.tasks("train")) / 64
    assert 0.3 < share < 0.7
    with pytest.raises(ValueError, match="corruption: expected a probability, got 2"):
        GoldPathPlanSource(env, corruption=2)


class Wires(EchoEnv):
    """Six lamps of two makes, each with the wire that happens to be there."""

    fatal = ("focus",)
    wires = ("red", "red", "blue", "red", "red", "green")

    def _tasks(self, split):
        makes = [("lamp", f"Light the lamp {letter}.") for letter in "abcde"] + [("fan", "Start the fan by its cord.")]
        return [Task(f"{make}-{k}", told, 9, make, split, {"k": k}) for k, (make, told) in enumerate(makes)]

    def gold_actions(self, task):
        wire = self.wires[task.data["k"]]
        if task.type == "fan":
            return [f"take {wire} cord"]
        return ["take battery 2", f"take {wire} wire", f"turn {'abcde'[task.data['k']]} up", f"focus on {wire} lamp"]


def test_plans_say_what_can_be_told():
    """What most of a type have is told, but not where a mistake is fatal; a name in one task alone is "it"."""
    env = Wires()
    lamps, fan = env.tasks("train")[:5], env.tasks("train")[5]
    write = GoldPathPlanSource(env, open_steps=True)
    usual = "Step 1: take battery Step 2: take red wire Step 3: turn it up Step 4: focus on something lamp"
    assert write(lamps[0]).plan == usual
    assert write(lamps[2]).plan == usual.replace("red", "something")
    assert write(fan).plan == "Step 1: take something it"
    assert write(lamps[0]).plan == write(lamps[1]).plan
    assert GoldPathPlanSource(env)(lamps[0]).plan == usual.replace("something", "red").replace("it", "a")
    broken = GoldPathPlanSource(env, corruption=1.0, open_steps=True)
    assert {broken.fault(task) for task in env.tasks("train")} <= {"drop", "swap", "foreign"}


class Endpoint(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        always = self.server.always
        if callable(always):
            text = always(body) if "prompt" in body else always(body["messages"], body["max_tokens"])
        else:
            text = always
        status, text = self.server.answers.pop(0) if self.server.answers else (200, text)
        choice = {"text": text} if "prompt" in body else {"message": {"content": text}}
        data = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("httpx", reason="the extra 'agents' is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.seen, server.answers, server.always = [], [], "Thought: good.\nAction: yes"
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_behind_an_endpoint(endpoint):
    example = [{"role": "user", "content": "Task: Say no."}, {"role": "assistant", "content": "Action: no"}]
    executor = OpenAIExecutor(
        endpoint.url, "m", instruction="Act.", example=example, list_commands=True, max_retries=1, backoff_s=0.0
    )
    endpoint.answers = [(429, ""), (200, "Action: no\nAction: half \nObservation: made up")]
    got = rollout(EchoEnv(), pickle.loads(pickle.dumps(executor)), TASK, plan="Step 1: yes", seed=4)
    assert (got.executor, got.actions, got.reward) == ("m", ("half", "yes"), 1.0)
    asked = endpoint.seen[1]
    assert asked["messages"][:3] == [{"role": "system", "content": "Act."}, *example]
    task = (
        f"Task: Say yes.\n\n{got.observations[0]}\nPossible actions: yes, half\n\nThis plan may help you:\nStep 1: yes"
    )
    assert asked["messages"][3] == {"role": "user", "content": task}
    assert (asked["temperature"], asked["model"]) == (0.0, "m")
    assert endpoint.seen[2]["messages"][4:] == [
        {"role": "assistant", "content": "Action: half"},
        {"role": "user", "content": "Observation: You said half.\nPossible actions: yes, half"},
    ]
    assert "Possible" not in endpoint.seen[2]["messages"][3]["content"]
    assert endpoint.seen[2]["seed"] != asked["seed"] == endpoint.seen[0]["seed"]


def test_a_decoder_that_goes_on_from_a_text(endpoint):
    """What it sends is what `LMExecutor` reads; the contexts of a call are asked for at once."""
    prompt = functools.partial(executor_prompt, commands=0, next_step=True)
    executor = ServedExecutor(endpoint.url, "m", prompt=prompt, max_tokens=3, temperature=0.5)
    endpoint.always = lambda body: " half" if "Plan: half" in body["prompt"] else " yes"
    plan = "Step 1: half Step 2: yes"
    again = pickle.loads(pickle.dumps(executor))
    got = rollout(EchoEnv(), again, TASK, plan=plan, seed=2)
    assert (got.executor, got.actions, got.reward) == ("m", ("half", "yes"), 1.0)
    first, second = endpoint.seen
    assert first["prompt"] == f"Task: Say yes.\n{got.observations[0]}\nPlan: half\n"
    assert (first["max_tokens"], first["temperature"], first["stop"], first["model"]) == (3, 0.5, "\n", "m")
    assert first["seed"] != second["seed"]
    contexts = [Context(TASK, each, (), "A room.", 0, seed) for seed, each in enumerate(("", plan, ""))]
    assert executor.act_batch(contexts) == ["yes", "half", "yes"]
    assert executor.act_batch(contexts[:1]) == ["yes"]
    assert executor.act_batch([]) == []
    report = evaluate(EchoEnv, executor, [TASK], seeds=(0, 1))
    assert (report.success.mean, len(report.table)) == (1.0, 2)


def test_our_own_decoder_behind_an_endpoint(endpoint):
    """The loop of an agent over HTTP, around `generate`, acts as the same model does without it."""
    model, params = toys.decoder()
    tokenizer = toys.tokenizer()

    def answer(messages, max_tokens):
        prompt = tokenizer.encode(" ".join(message["content"] for message in messages))[-64:]
        out = generate(model, params, [prompt], SamplingParams(max_tokens, 0.0), tokenizer=tokenizer, prompt_length=64)
        return out.text[0]

    class Direct(OpenAIExecutor):
        def act(self, context):
            return answer(self.messages(context), 4).strip()

    endpoint.always = answer
    plan = "Step 1: half Step 2: yes"
    env = EchoEnv()
    got = rollout(env, OpenAIExecutor(endpoint.url, "m", instruction="yes", max_tokens=4), TASK, plan=plan)
    assert got == rollout(env, Direct(endpoint.url, "m", instruction="yes"), TASK, plan=plan)
    assert got.steps == len(endpoint.seen)
    assert plan in endpoint.seen[-1]["messages"][1]["content"]


@pytest.mark.parametrize(
    ("answer", "action"),
    [("Action: a\n", "a"), ("I think\n\ngo east\n", "go east"), ("", ""), ("Action:", ""), ("Action:\n go", "go")],
)
def test_actions_in_answers(endpoint, answer, action):
    endpoint.always = answer
    assert act(OpenAIExecutor(endpoint.url, "m")) == action


def test_plans_by_a_model(endpoint, tmp_path):
    path = tmp_path / "plans.jsonl"
    endpoint.always = "<think> easy </think><plan> Step 1: say yes </plan>"
    options = {"gold": EchoEnv().gold_actions, "backoff_s": 0.0, "path": path}
    source = OpenAIPlanSource(endpoint.url, "m", max_retries=2, **options)
    endpoint.answers = [(503, ""), (429, "")]
    plan = source(TASK)
    assert (plan.plan, plan.ok, len(endpoint.seen)) == ("Step 1: say yes", True, 3)
    prompt = endpoint.seen[0]["messages"][0]["content"]
    assert "Task: Say yes.\n\nActions:\nhalf\nyes" in prompt
    other = type(TASK)("toy-2", "Say no.", 5, "toy", "train")
    endpoint.answers = [(503, "")] * 3
    with pytest.raises(PlanSourceError, match=r"no plan for 'toy-2': .*HTTP 503.*\(attempt 3\)") as caught:
        source(other)
    assert (caught.value.task_id, caught.value.finished) == ("toy-2", {"toy": plan})
    asked = len(endpoint.seen)
    again = OpenAIPlanSource(endpoint.url, "m", **options)
    assert again(TASK) == plan
    assert len(endpoint.seen) == asked
    endpoint.always = "Say no."
    assert (again(other).ok, again(other).reason) == (False, "no_think")


def test_nobody_there():
    pytest.importorskip("httpx", reason="the extra 'agents' is not installed")
    with pytest.raises(PlanSourceError, match="no plan for 'toy'"):
        OpenAIPlanSource("http://127.0.0.1:9/v1", "m", max_retries=0)(TASK)
