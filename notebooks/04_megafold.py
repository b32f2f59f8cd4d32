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
# # MegaFold
#
# Training AlphaFold3 is slow for reasons that have little to do with its mathematics: hosts that build features while
# the GPU waits, attention whose logits are larger than everything else, and many small operations. MegaFold
# ([arXiv:2506.20686](https://arxiv.org/abs/2506.20686)) caches the deterministic half of the data pipeline, computes
# attention with a pair bias without storing logits, and fuses the small operations. The numbers stay what they were.
# Everything below ran on the CPU that built this page.

# %%
# %matplotlib inline
import tempfile
import time

import jax
import jax.numpy as jnp

from jaxlab import recipes
from jaxlab.core import data_path
from jaxlab.megafold.data import FeatureCache, crop, make_batch
from jaxlab.megafold.network import Network
from pallas_kernels.evo_attention import evo_attention

# %% [markdown]
# ## Features, built once
#
# H-Ras (721P) is two chains of 166 residues with an alignment of 15,953 rows. What follows from the files alone is kept
# under a hash of their content; what is drawn, crops and alignment rows, comes from keys and is the same either way.

# %%
folder = tempfile.TemporaryDirectory()
cache = FeatureCache(folder.name)
structure = data_path("af3/mmcif/721p-assembly1.cif")
msas = {"A": data_path("af3/msa/721p-assembly1A_protein.a3m")}


def seconds():
    started = time.perf_counter()
    features = cache.get(structure, msas=msas)
    return features, time.perf_counter() - started


features, built = seconds()
features, read = seconds()
print(f"built in {built:.2f} s, read in {1e3 * read:.0f} ms: {built / read:.0f} times as fast")
print({name: features[name].shape for name in ("restype", "coords", "msa")})

# %%
config, key = Network("tiny").config, jax.random.key(0)
batch = make_batch([crop(features, key, max_tokens=config.max_tokens, max_atoms=config.max_atoms)], config, key)
print({name: batch[name].shape for name in ("restype", "coords", "msa", "token_bonds")})

# %% [markdown]
# ## Attention without its logits
#
# Triangle attention makes N x N x N logits for each head, and the gradient of its pair bias is a sum over one of them.
# What the compiler sets aside for all four gradients, with the logits and without:

# %%
tokens, heads, width = 128, 4, 32
shape = jax.ShapeDtypeStruct((1, tokens, tokens, heads, width), jnp.float32)
bias = jax.ShapeDtypeStruct((1, 1, heads, tokens, tokens), jnp.float32)


def temporaries(implementation):
    def loss(q, k, v, bias):
        return jnp.sum(evo_attention(q, k, v, pair_bias=bias, implementation=implementation) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(shape, shape, shape, bias).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


print(f"plain JAX {temporaries('reference'):.0f} MiB, ours {temporaries(None):.0f} MiB")

# %% [markdown]
# ## A network that learns one structure
#
# A small AlphaFold3, of every part of the large one but templates, sees the first 24 residues of H-Ras again and again:
# a strand, the loop that holds the phosphates of GTP, and the beginning of a helix. The config is the tour's;
# `jaxlab megafold run` is the same.

# %%
from jaxlab.megafold import recipe

report = recipe.run(recipes.load(recipe.run, "configs/megafold/laptop.yaml"))
plots = dict(report.plots)
for name, value in report.metrics.items():
    print(f"{name:36}{value:.4g}")

# %% [markdown]
# Samples start from noise; the trained network's first guess, chosen by its own confidence, is drawn over the truth's
# frame. Colours are its confidence, as AlphaFold shows it. So short a training teaches no hand: a sample may be the
# mirror image, which distances cannot tell and the title does.

# %%
name = report.tables[0][2][0][0]
plots[f"{name}: structure"]

# %% [markdown]
# The distogram is read off the pair representation, before any coordinates exist:

# %%
plots[f"{name}: distances"]

# %% [markdown]
# How wrong the network thinks it is, and how wrong it is, seen from each residue's own frame:

# %%
plots[f"{name}: aligned error"]

# %%
plots["Losses"]

# %% [markdown]
# ## The data stall
#
# The same training steps, when features are built for every step, come from the cache, or are read ahead from it on a
# thread. Here one CPU does both; beside a GPU, reading ahead hides all of it.

# %%
plots["Data stall"]

# %% [markdown]
# ## At full size
#
# `jaxlab plan configs/megafold/paper.yaml --gpu h200` compiles a step of the whole network, 384 tokens and 48 noise
# samples, for a GPU that is not here. Its bytes, with our kernels and without, are on [the system's
# page](../systems/megafold.md). `jaxlab megafold train` trains on any structures, and `jaxlab megafold fold` folds
# sequences with what was trained.

# %%
folder.cleanup()
