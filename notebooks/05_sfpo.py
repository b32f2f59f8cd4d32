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
# # SFPO
#
# A GRPO step draws completions, rewards them, and makes one pass of updates over them. Slow-fast policy optimisation
# ([arXiv:2510.04072](https://arxiv.org/abs/2510.04072)) changes the last part only: K *fast* passes over the same
# rollouts, part of the way back towards where they started, and one *slow* pass from there. With large models rollouts
# are what costs, so the question is how many are saved.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import recipes
from jaxlab.core.figures import BLUE, GREY, ORANGE, figure
from jaxlab.rl import (
    EntropyZScoreStop,
    compute_advantages,
    make_pass,
    math_reward,
    policy_loss,
    sfpo,
    sfpo_update,
)

# %% [markdown]
# ## The update alone
#
# A narrow valley, gradient descent, K = 3. The fast passes run down the wall of the valley and beyond; going back to
# alpha = 0.8 of the way and stepping from there is one SFPO step. `sfpo` is a drop-in for any Optax optimiser:

# %%
valley = jnp.array([1.0, 12.0])


def loss_fn(params, batch):
    return 0.5 * jnp.sum(batch * params**2), {}


tx = sfpo(optax.sgd(0.1), inner_steps=3, alpha=0.8)
params = jnp.array([2.0, 0.6])
state, path = tx.init(params), [params]
for _ in range(4):
    updates, state = tx.update(jax.grad(lambda p: loss_fn(p, valley)[0])(params), state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)

drawn, axes = figure(6.4, 2.6)
x, y = np.meshgrid(np.linspace(0.9, 2.2, 80), np.linspace(-0.3, 0.75, 80))
axes.contour(x, y, 0.5 * (x**2 + 12 * y**2), levels=12, colors=GREY, linewidths=0.6)
way = np.array(path)
axes.plot(*way[:3].T, "o-", color=BLUE, label="fast")
axes.plot(*way[2:4].T, "o--", color=ORANGE, label="third fast update and the way back")
axes.plot(*way[3:].T, "o-", color="#222222", label="slow")
axes.legend(frameon=False, fontsize=9)
drawn

# %% [markdown]
# The fused form makes all passes in one compiled call, on the same batch; the numbers are those of the transformation.

# %%
one_pass = make_pass(loss_fn, optax.sgd(0.1))
start = jnp.array([2.0, 0.6])
fused, _, _ = jax.jit(lambda p, s: sfpo_update(one_pass, p, s, valley, inner_steps=3, alpha=0.8))(
    start, optax.sgd(0.1).init(start)
)
print("transformation", params, " fused", fused)

# %% [markdown]
# ## What a policy-gradient loss says, and what it does not
#
# Four completions of one prompt, two of them right. In the first pass every probability ratio is 1 and advantages are
# centred: the loss is 0. Its gradient is not.

# %%
rewards = math_reward(
    ["What is 6 * 7?"] * 4, [r"\boxed{42}", r"\boxed{48}", r"so $\frac{84}{2}$", "42.5"], answer=["42"] * 4
)
advantages = compute_advantages(jnp.array(rewards), group_size=4)
logp, mask = jnp.log(jnp.full((4, 5), 0.3)), jnp.ones((4, 5))
value, gradient = jax.value_and_grad(lambda logp: policy_loss(logp, logp * 0 + jnp.log(0.3), advantages, mask)[0])(logp)
print("rewards", rewards, " advantages", np.round(advantages, 2))
print(f"loss {abs(value):.1e}, norm of its gradient {optax.global_norm(gradient):.2f}")

# %% [markdown]
# ## GRPO against SFPO
#
# A decoder of a third of a million parameters spells words backward, right now and then; rewards make it better. Both
# ways start from the same weights and see the same problems in the same order. The config is the tour's; `jaxlab sfpo
# run` is the same, and `jaxlab sfpo compare grpo sfpo more_passes larger_rate --seed 0 --seed 1` compares more ways.

# %%
from jaxlab.sfpo import recipe

report = recipe.run(recipes.load(recipe.run, "configs/sfpo/laptop.yaml"))
plots = dict(report.plots)
for name, value in report.metrics.items():
    print(f"{name:24}{value:.4g}")

# %%
plots["Accuracy by rollouts"]

# %% [markdown]
# Drawing costs next to nothing with so small a model, so the same runs against seconds tell another story:

# %%
plots["Accuracy by seconds"]

# %% [markdown]
# One seed is an anecdote. [The system's page](../systems/sfpo.md) has five of each, on several families of problems,
# with intervals, and the ways that are not SFPO but reuse rollouts as well.
#
# ## When fast passes end
#
# The rule looks at the policy's entropy: once the last of `window` values lies `threshold` deviations above their mean,
# every later step is a plain one. Entropies that only fall, as these mostly do, never fire it; a rise does.

# %%
plots["Entropy"]

# %%
rule = EntropyZScoreStop(window=10, threshold=1.0)
state = rule.init()
entropies = np.concatenate([np.linspace(1.0, 0.4, 25), [0.42, 0.5, 0.7]])
for step, entropy in enumerate(entropies):
    state = rule.update(state, entropy)
    if state.stopped:
        print(f"fast passes end after step {step}, at an entropy of {entropy:.2f}")
        break
