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
# # SuperOffload
#
# Training with Adam takes about 16 bytes a parameter, of which the GPU needs two. SuperOffload
# ([arXiv:2509.21271](https://arxiv.org/abs/2509.21271)) keeps the others, float32 parameters and moments, in the memory
# of the CPU beside the GPU, and lets the CPU run Adam *while the GPU still runs the backward pass*. The step starts
# before the gradients' norm is known, and is undone if the norm was too large. Here undoing is exact to the last bit.
# Everything below ran on the CPU that built this page, which plays both parts.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import recipes
from jaxlab import superoffload as so

# %% [markdown]
# ## One speculative step, undone
#
# Parameters lie in flat buckets. `speculate` steps them and keeps a log: for every value an 8-bit difference between
# the old one and what algebra gives back from the new one, about 3 bytes a parameter instead of 12 for copies.

# %%
params = {"w": jax.random.normal(jax.random.key(0), (512, 256)), "b": jnp.zeros(256)}
spec = so.make_buckets(params, bucket_bytes=1 << 18)
hyper = so.AdamHyper(1e-3, weight_decay=0.1)


def gradients(seed):
    return so.flatten(jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed), x.shape), params), spec)


state = so.init_state(params, spec)
for step in range(20):
    state = so.replay(state, gradients(step), hyper)
before = jax.tree.map(np.asarray, state)
ahead, log = so.speculate(state, gradients(20), hyper, undo="residual")
print(f"{spec.n_buckets} buckets, log of {log.nbytes / spec.numel:.2f} bytes a parameter")
back = so.rollback(ahead, log)
assert all((np.asarray(a) == b).all() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(before)))

# %% [markdown]
# Without the log, algebra alone loses bits: this is what the released code does, and one gradient that is not finite
# would leave its moments NaN for ever.

# %%
m_new, g = np.asarray(ahead.m[0]), np.asarray(gradients(20)[0])
inverse = (m_new - np.float32(1 - 0.9) * g) / np.float32(0.9)
print(f"moments that algebra does not give back: {np.mean(inverse != before.m[0]):.0%}")

# %% [markdown]
# ## A training run, three times
#
# A byte-level decoder in float16 on the Python standard library's source, clipped, with a loss scaler, and with losses
# made NaN or infinite now and then: once synchronously, once speculating with copies, once with residuals. The config
# is the tour's; `jaxlab superoffload run` is the same.

# %%
from jaxlab.superoffload import recipe

settings = recipes.load(recipe.run, "configs/superoffload/laptop.yaml")
report = recipe.run(settings)
plots = dict(report.plots)


def show(start):
    title, columns, rows = next(table for table in report.tables if table[0].startswith(start))
    print(title)
    for row in (columns, *rows):
        cells = ("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in row)
        print(*(f"{cell:>18.18}" for cell in cells))


show("Ways")
print("different bits:", report.metrics["different_bits"])

# %%
plots["Loss"]

# %% [markdown]
# Steps are rolled back often at first, when gradients are larger than the clip, and rarely later.

# %%
plots["Rollbacks"]

# %% [markdown]
# ## Who works when
#
# Sleeps stand for the link between the memories. Without speculation the host waits for the verdict:

# %%
plots["Last step, synchronous (measured)"]

# %% [markdown]
# With it, Adam of a layer runs while the backward pass of the layers before it still does:

# %%
plots["Last step, copies (measured)"]

# %% [markdown]
# ## On a superchip
#
# Nothing here is a GPU, so what follows is modelled from bandwidths. The paper's four techniques on its 5B model:

# %%
show("Techniques")
plots["Techniques one by one"]

# %%
print(so.simulate(so.ModelShape(44, 3072, 4, 1024), so.get_machine("gh200")).to_ascii())
print(so.simulate(so.ModelShape(44, 3072, 4, 1024), so.get_machine("gh200"), method="zero_offload").to_ascii())

# %% [markdown]
# And what fits on one GH200, by arithmetic. The same sizes compiled, which is XLA's word and not ours, are on [the
# system's page](../systems/superoffload.md); `jaxlab plan configs/superoffload/paper.yaml --gpu gh200` compiles the
# largest.

# %%
show("The largest")
