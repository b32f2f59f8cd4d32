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
# # X-MoE
#
# Many small experts, a large top-k: such mixtures learn well, and sink systems that pad every expert to a capacity and
# send a token once for each of its experts. [X-MoE](https://arxiv.org/abs/2508.13337) routes, moves and computes real
# tokens only (PFT), sends a token to a node once (RBD), and lets tensor-parallel ranks share out the sequence (SSMB).
# Everything below ran on the CPU that built this page, as eight simulated devices.

# %%
# %matplotlib inline
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from jaxlab import core, recipes
from jaxlab.xmoe import MoE, MoEConfig

# %% [markdown]
# ## A layer
#
# `MoE` is the layer that every mixture-of-experts decoder of this library uses. It says what its router did.

# %%
config = MoEConfig(num_experts=64, top_k=6, hidden_size=64, ffn_size=32)
x = jax.random.normal(jax.random.key(0), (16, 128, 64))
params = MoE(config).init(jax.random.key(1), x)
y, metrics = jax.jit(MoE(config).apply)(params, x)
print(y.shape, "| balance loss", metrics.aux_loss, "| dropped", metrics.dropped_fraction)

# %% [markdown]
# ## The same layer over two nodes of four devices
#
# Nothing changes but where it runs: `expert_axes` names the mesh axes that hold the experts, the first one across
# nodes. PFT sends a row for each slot. RBD sends one row to a node, and copies it there.

# %%
import dataclasses

mesh = core.make_mesh({"node": 2, "expert": 4})
for dispatch in ("pft", "rbd"):
    spread = dataclasses.replace(config, dispatch=dispatch, expert_axes=("node", "expert"))
    layer = MoE(spread, mesh=mesh)
    there, told = jax.jit(lambda params, x, layer=layer: layer.apply(params, x, rng=jax.random.key(2)))(params, x)
    error = jnp.max(jnp.abs(there - y)) / jnp.max(jnp.abs(y))
    print(f"{dispatch}: {told.inter_node_rows} rows between nodes, largest relative difference {error:.0e}")

# %% [markdown]
# ## A model that learns
#
# Three layers of 64 experts, six a token, and a shared one, on the Python standard library's own source. The config is
# the tour's with fewer steps; `jaxlab xmoe run` is the same.

# %%
from jaxlab.xmoe import recipe

settings = recipes.load(recipe.run, "configs/xmoe/laptop.yaml", ["steps=100", "eval_batches=10"])
report = recipe.run(settings)
plots = dict(report.plots)
plots["Loss, nats a token"]

# %% [markdown]
# A byte at random costs 5.55 nats. The balance loss, one at perfect balance, keeps the router from favourites and the
# experts from idling. Each row below is a layer, each column an expert.

# %%
print(report.metrics["idle_experts"], "of", 3 * 64, "experts were not chosen by any held-out token")
plots["Load of the experts on held-out text, over the mean"]

# %% [markdown]
# ## What the routing means for the network
#
# A slot is redundant if its token visits that node for another expert already. With six choices among few nodes most
# slots are; the closed form assumes uniform routing, and the trained router comes close to it.

# %%
plots["What RBD can save: redundancy of the routing"]

# %%
plots["Rows that 8 devices send, one layer"]

# %% [markdown]
# RBD trades the slow network for the fast one: fewer rows between nodes, more inside them. The padded dispatch moves
# its experts' capacity whether it is used or not, and dropped what did not fit.
#
# All of them compute the same layer. The last two rows ran on eight devices, and the rows they report are those that
# the router's choices imply.

# %%
title, columns, rows = next(table for table in report.tables if table[0].startswith("The first sparse layer"))
for row in (columns, *rows):
    cells = (f"{cell:.1e}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row)
    print(*(f"{cell:>24}" for cell in cells))

# %% [markdown]
# ## What it means for memory
#
# Between forward and backward pass a layer keeps its experts' inputs, outputs and intermediates; padded ones also their
# masks. This is a closed form at the sizes of the paper's Large, not a measurement.

# %%
plots["Activations of one layer of the paper's Large (modelled)"]

# %% [markdown]
# The whole training step at the paper's sizes, compiled for a thousand GPUs that are not here:
#
#     jaxlab plan configs/xmoe/large.yaml --gpu mi250x --topology 1x32x8
#     jaxlab xmoe trainable --gpu mi250x --devices 1024
