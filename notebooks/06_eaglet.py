# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # EAGLET
#
# An agent with a long task before it tends to try things at random. EAGLET
# ([arXiv:2510.05608](https://arxiv.org/abs/2510.05608)) puts a small planner in front of it: the planner reads the
# task once and writes a plan, the *executor* gets the plan with the task and acts alone. No executor is ever trained;
# the planner learns from what its plans are worth to two of them, a strong one and a weak one.

# %%
# %matplotlib inline
import collections
import tempfile

import numpy as np

from jaxlab import recipes
from jaxlab.core.figures import BLUE, GREEN, GREY, figure
from jaxlab.eaglet import (
    Context,
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    OpenAIExecutor,
    Plan,
    ScriptedExecutor,
    capability_gain,
    compare,
    evaluate,
    hcf_filter,
    rollout,
)

# %% [markdown]
# ## One episode, with a plan and without
#
# In the grid world the way is in sight and what to do is not: a task such as "Brew the amber tonic." takes four places
# in order, which are told nowhere. The novice below finds its way to any place it is told of, but knows next to
# nothing of recipes.

# %%
env = GridQuestEnv(size=5)
task = env.tasks("seen")[0]
novice = ScriptedExecutor("novice", GridGuide(), skill=0.1, follow=0.9)
gold = GoldPathPlanSource(env)
print(f"Task: {task.instruction}\nSees: {env.reset(task)}\nPlan: {gold(task).plan}\n")

without, planned = (rollout(env, novice, task, plan=plan) for plan in ("", gold(task).plan))
for name, run in (("without", without), ("with", planned)):
    print(f"{name:8} reward {run.reward:.2f} after {run.steps:2} steps: {', '.join(run.actions[:12])}, ...")

# %% [markdown]
# The same two episodes as walks, from the dot; numbers are the recipe:

# %%
MOVES = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}
drawn, axes = figure(8.0, 3.9)
for left, name, colour, run in ((0, "without a plan", GREY, without), (6.5, "with a plan", BLUE, planned)):
    way = [np.array(task.data["start"])]
    for action in run.actions:
        at = way[-1] + MOVES.get(action, (0, 0))
        way.append(at if ((at >= 0) & (at < env.size)).all() else way[-1])
    cells = np.indices((env.size, env.size)).reshape(2, -1)
    axes.plot(left + cells[1], -cells[0], "+", color=GREY, markersize=4, alpha=0.5)
    axes.plot(left + way[0][1], -way[0][0], "o", color=colour)
    shifted = np.array(way) + np.random.default_rng(0).normal(0, 0.04, (len(way), 2))
    axes.plot(left + shifted[:, 1], -shifted[:, 0], color=colour, linewidth=1.2, alpha=0.8)
    for place, (row, column) in task.data["cells"].items():
        number = 1 + task.data["recipe"].index(place) if place in task.data["recipe"] else None
        colour_of_place = GREEN if number else GREY
        axes.text(left + column, 0.13 - row, place, ha="center", fontsize=8, color=colour_of_place)
        if number:
            axes.text(left + column, -0.22 - row, str(number), ha="center", fontsize=9, color=GREEN, weight="bold")
    axes.text(left + 2, 0.75, f"{name}: {run.steps} steps, reward {run.reward:.2f}", ha="center", fontsize=10)
axes.set_axis_off()
axes.set_aspect("equal")
drawn

# %% [markdown]
# ## What a plan is worth
#
# Reinforcement rewards a plan by each executor's *gain*: 1 if the executor got further with it than without, and more,
# the more steps it saved; 0 otherwise. Baselines are run once, with the same seeds.

# %%
gain = capability_gain(
    [[1.0, 1.0], [1.0, 0.5], [0.5, 0.5]],  # reward with the plan: expert, novice
    [[0.5, 0.0], [1.0, 0.0], [0.5, 0.75]],  # without
    [[40, 40], [18, 40], [40, 40]],  # steps without
    [[15, 20], [14, 40], [40, 40]],  # with
    alpha=0.05,
)
for told, row in zip(("both get there", "only the novice got further", "nobody is better off"), gain):
    print(f"{told:28} expert {row[0]:.2f}  novice {row[1]:.2f}")

# %% [markdown]
# ## Which plans to learn from
#
# The first lesson comes from plans somebody else wrote, some of them wrong. The consensus filter keeps a plan if
# neither the expert nor the novice does worse with it. Here the faults are known, for we put them there: in half of
# the plans a step is left out, two steps are swapped, or one is another task's.

# %%
expert = ScriptedExecutor("expert", GridGuide(), skill=0.5, follow=0.95)
broken = GoldPathPlanSource(env, corruption=0.5, seed=0)
pairs = [(each, broken(each)) for each in env.tasks("train")]
fault = {each.id: broken.fault(each) for each, _ in pairs}
print(f"{'':12}{'kept':>6}{'precision':>11}{'recall':>8}")
for name, strict in (("as published", False), ("strict", True)):
    report = hcf_filter(pairs, expert, novice, env=env, seeds=(0, 1, 2, 3), strict=strict)
    wrong = [fault[each.id] is not None for each, _ in report.dropped]
    every = sum(found is not None for found in fault.values())
    print(f"{name:12}{len(report.kept):6}{np.mean(wrong):11.2f}{sum(wrong) / every:8.2f}")
    print("  faults kept:", dict(collections.Counter(fault[each.id] or "none" for each, _ in report.kept)))

# %% [markdown]
# Precision is the share of dropped plans that had a fault, recall the share of faults that were dropped. The published
# filter is lenient: a faulty plan is still better than none for a novice, and what harms nobody stays. Asking for a
# gain of both drops more of either kind.
#
# ## All stages
#
# Plans, filter, cold start, reinforcement, for a planner of a tenth of a million parameters. Nine in ten of the plans
# it starts from are faulty. After 100 updates in place of 50 it is the planner that comes with the package
# (`Planner.load()`).

# %%
from jaxlab.eaglet import recipe
from jaxlab.eaglet.plans import plan_steps
from jaxlab.eaglet.study import Study

config = recipes.load(recipe.run, "configs/eaglet/study.yaml", ["grpo.steps=50", f"folder={tempfile.mkdtemp()}"])
report = recipe.run(config)
plots = dict(report.plots)
for title, columns, rows in report.tables:
    print(f"{title}\n{'':26}{'R_final':>9}{'expert':>9}{'novice':>9}{'other':>9}{'steps':>7}")
    for row in rows:
        told = dict(zip(columns, row))
        successes = (row[k] for k in (2, 5, 8))
        final = "" if told["R_final"] is None else f"{told['R_final']:.2f}"
        print(f"{told['plans']:26}{final:>9}{''.join(f'{each:9.0%}' for each in successes)}{row[-1]:7.1f}")
    print()

# %% [markdown]
# Plans of another type are the control: they harm the expert, and give the others next to nothing. Reinforcement
# repairs what faulty plans taught:

# %%
plots["Reinforcement"]

# %%
plots["Success gained over no plan, seen tasks"]

# %% [markdown]
# ## An executor it never met
#
# The planner plugs into anything with a `name` and `act(context) -> str`. This one is of another family: it wanders,
# and pursues a plan only where the next step of it is in the very same row or column.

# %%
study = Study(config, config.folder)
planner = study.planner("grpo")
print(planner(task).text, "\n")


class Wanderer:
    """Knows no recipe and no way; it goes where the plan's next place lies straight ahead, else anywhere."""

    name = "wanderer"

    def act(self, context: Context) -> str:
        done = int(context.observation.partition(" of 4 done")[0][-1])
        place = "".join(plan_steps(context.plan)[done : done + 1]).removeprefix("use ")
        ways = context.observation.partition(f": {place}.")[0].rpartition(". ")[2].split()
        chance = np.random.default_rng((context.seed, context.step, len(context.task.id)))
        if ways == ["here"]:
            return f"use {place}"
        return ways[0] if len(ways) == 1 else context.commands[chance.integers(len(context.commands))]


tasks = study.held_out["unseen"]
alone = evaluate(study.env, Wanderer(), tasks, seeds=(0, 1, 2))
helped = evaluate(study.env, Wanderer(), tasks, planner=planner, seeds=(0, 1, 2))
gained = compare(helped, alone)
for name in ("reward", "success", "steps"):
    before, after, change = (getattr(each, name) for each in (alone, helped, gained))
    interval = f"{change.low:+.2f} to {change.high:+.2f}"
    print(f"{name:8}{before.mean:7.2f} -> {after.mean:6.2f}   {change.mean:+.2f} ({interval})")

# %% [markdown]
# ## A model behind an endpoint
#
# Most executors worth helping run elsewhere. `OpenAIExecutor` takes the address of any OpenAI-compatible server, such
# as vLLM's, and nothing is contacted before its first action; what the model will be sent can be looked at first.
# Against a server the evaluation is the one above: `evaluate(env, remote, tasks, planner=planner)`.

# %%
remote = OpenAIExecutor("http://localhost:8000/v1", "llama-3.1-8b-instruct", list_commands=True)
plan: Plan = planner(task)
observation = env.reset(task)
for message in remote.messages(Context(task, plan.plan, (), observation, step=0, seed=0, commands=env.commands())):
    print(f"[{message['role']}]\n{message['content']}\n")
