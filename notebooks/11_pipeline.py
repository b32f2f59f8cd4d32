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
# # One pipeline
#
# One small model goes through five of the systems: trained as a mixture of experts (X-MoE), improved by rewards (SFPO),
# compressed to half the bytes of its experts (PuzzleMoE), served by two workers whose clocks a controller sets
# (VoltanaLLM), and put to work as an agent that a planner helps (EAGLET). Each stage hands a folder to the next one.

# %%
# %matplotlib inline
import functools
import tempfile

from jaxlab import recipes
from jaxlab.eaglet import LMExecutor, Planner, executor_prompt, rollout
from jaxlab.pipeline import Pipeline, recipe

config = recipes.load(recipe.run, "configs/pipeline/laptop.yaml", [f"folder={tempfile.mkdtemp()}"])
line = Pipeline(config, config.folder)

# %% [markdown]
# ## The task
#
# In the grid world the way is in sight and what to do is not. A prompt is what the agent sees, then the next step of a
# plan if it has one. A command is right if it brings that step nearer; often there are two.

# %%
for row in (line.quest.rows("seen", planned=True, count=1), line.quest.rows("seen", planned=False, count=1)):
    print(row[0]["prompt"], "\nright:", " or ".join(row[0]["right"]), "\n")

# %% [markdown]
# ## All stages

# %%
report = recipe.run(config)
plots = dict(report.plots)
for title, columns, rows in report.tables:
    print(title)
    for row in (columns, *rows):
        told = [f"{each:.2f}" if isinstance(each, float) else "" if each is None else str(each) for each in row]
        print("  ".join(f"{text:>{40 if k == 0 else 12}}" for k, text in enumerate(told)))
    print()

# %% [markdown]
# The supervised stage is stopped early. From there on the model is told no answers any more, only whether the command
# that it drew was right. The grey curve counts words of the teacher's commands, the blue one whole commands that are
# drawn and right, so the two do not meet.

# %%
plots["Learning to act"]

# %%
plots["Right commands, stage by stage"]

# %% [markdown]
# No auxiliary loss keeps the experts' load even during reinforcement; this is what becomes of it:

# %%
plots["Load of the experts"]

# %% [markdown]
# ## At work
#
# The packed folder is served by a prefill and a decode worker; the agent asks for each command over HTTP. Its plans
# come from the planner in the package, which has never seen this agent. Joules are a power model's, of two A100s that
# are not here.

# %%
plots["The agent at work"]

# %%
plots["Power while the agent works with plans (simulated)"]

# %% [markdown]
# ## The folders
#
# Every stage left a folder that other tools take as it is: `jaxlab voltanallm serve` the packed one, `jaxlab puzzlemoe
# compress` the improved one. Here the improved model acts in this process, without a server, in a task that the served
# agent solved. It chooses among the commands that are possible, so the two need not do the same:

# %%
prompt = functools.partial(executor_prompt, commands=0, next_step=True)
agent = LMExecutor.load(
    line.improved.model, name="improved", prompt=prompt, max_tokens=4, temperature=config.agent.temperature
)
solved = [name for name, _, _, done in line.worked.told["runs"][-1]["lengths"] if done]
task = next(each for each in line.quest.held_out(config.agent.tasks) if each.id in solved)
plan = Planner.load()(task).plan
run = rollout(line.quest.env, agent, task, plan=plan)
print(f"{task.instruction}  {plan}\nreward {run.reward:.2f} after {run.steps} steps: {', '.join(run.actions)}")
