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
# # PuzzleMoE
#
# A mixture of experts keeps all its experts in memory though a token visits a few. PuzzleMoE
# ([arXiv:2511.04805](https://arxiv.org/abs/2511.04805)) stores two trained experts in the space of one, with one pass
# of calibration and no training. The two stay different functions: they share magnitudes, and each keeps its signs
# and a mask, hidden in exponent bits that bfloat16 weights leave free. Everything below ran on the CPU that built
# this page.

# %%
# %matplotlib inline
import jax.numpy as jnp
import numpy as np

from jaxlab import recipes
from jaxlab.puzzlemoe import dual_mask_merge, pack_pair, reconstruct, unpack

# %% [markdown]
# ## One position
#
# Where two magnitudes are similar, `|a - b| <= tau (a + b)`, both experts use their mean. Elsewhere the more salient
# one keeps its weight, and the other's becomes zero.

# %%
w_i = jnp.array([0.020, -0.030, 0.004, -0.05], jnp.bfloat16)
w_j = jnp.array([-0.024, 0.009, -0.020, 0.0], jnp.bfloat16)
pair = dual_mask_merge(w_i, w_j, tau=0.4)
print("expert i", w_i, "->", reconstruct(pair, 0))
print("expert j", w_j, "->", reconstruct(pair, 1))

# %% [markdown]
# The pair is one 16-bit word a position: two signs, two masks, five bits of exponent, seven of mantissa.

# %%
words = pack_pair(pair)
for word in np.asarray(words):
    print(f"{word:016b}"[:1], f"{word:016b}"[1:2], f"{word:016b}"[2:3], f"{word:016b}"[3:4], f"{word:012b}"[-12:])
assert (unpack(words, 0) == reconstruct(pair, 0)).all()

# %% [markdown]
# ## A trained mixture
#
# Eight experts, two a token, trained for a few seconds on the Python standard library's own source; then compressed
# by PuzzleMoE and by three other methods, and judged on text that was held out. The config is the tour's; `jaxlab
# puzzlemoe run` is the same.

# %%
from jaxlab.puzzlemoe import recipe

settings = recipes.load(recipe.run, "configs/puzzlemoe/laptop.yaml")
report = recipe.run(settings)
plots = dict(report.plots)
plots["What compression costs, by method"]

# %% [markdown]
# The axis is logarithmic. Merging whole experts, or averaging pairs, costs what a mixture has learnt; two masks and
# signs keep nearly all of it. Longer runs, more methods and seeds are on [the system's
# page](../systems/puzzlemoe.md).


# %%
def show(start):
    title, columns, rows = next(table for table in report.tables if table[0].startswith(start))
    print(title)
    for row in (columns, *rows):
        cells = (
            "" if c is None else f"{c:.4g}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else c
            for c in row
        )
        print(*(f"{cell:>22}" for cell in cells))


show("Cross-entropy")

# %% [markdown]
# ## It runs from the words
#
# The packed folder is as small on disk as in memory, opens by its path like any model, and writes the same tokens as
# the decoded weights do. Nothing is decoded but the block that is being multiplied.

# %%
show("Packed folders")
print("same tokens:", report.metrics["same_tokens_as_decoded"])

# %% [markdown]
# ## Below 16 bits
#
# Without the sign of a masked member a position has eight cases, exactly three bits. With five bits of magnitude and
# a scale for every 128 inputs a pair takes a byte a position, with three bits six; both run as they are.

# %%
show("How the pairs are stored")

# %% [markdown]
# ## Why it fits: exponents
#
# A word holds the exponents 112 to 143. Trained weights hardly use others, and merged magnitudes less still, for they
# are the larger, or the mean, of two.

# %%
plots["Exponents of the weights, before and after merging"]

# %% [markdown]
# ## Why 0.4
#
# The mean of `a >= b` costs `(a - b)^2 / 2`, keeping the larger alone costs `b^2`: the first is cheaper where `(a -
# b) / (a + b) < sqrt(2) - 1 = 0.414`, whatever the distribution of the weights. The paper found 0.4 by trying.

# %%
plots["The threshold tau"]

# %%
plots["Error of the merged weights, by layer"]

# %% [markdown]
# Down projections lose more: calibration weighs their inputs, and of two magnitudes the more salient one may be the
# smaller.
#
# ## One GPU instead of two
#
# Whole models are compiled for GPUs that are not here; what fits is XLA's buffer assignment, not an estimate:
#
#     jaxlab puzzlemoe fits mixtral-8x7b --gpu h100
#     jaxlab plan configs/puzzlemoe/paper.yaml --gpu h100

# %%
show("Real models")
