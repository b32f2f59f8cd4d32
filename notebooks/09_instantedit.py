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
# # InstantEdit
#
# A picture, a sentence that says what it shows, and a sentence that says what it shall show. InstantEdit
# ([arXiv:2508.06033](https://arxiv.org/abs/2508.06033)) carries the picture to noise in four steps of a piecewise
# rectified flow and back in four, held to its own way so that what the sentences do not change stays. The networks here
# are Stable Diffusion's classes at a small width, trained on emoji: small enough for the CPU that built this page, and
# with true outcomes to compare with. A full-size checkpoint in diffusers' layout goes through the same calls.

# %%
# %matplotlib inline
import numpy as np
from matplotlib.figure import Figure

from jaxlab import recipes
from jaxlab.instantedit import canny, emoji, recipe
from jaxlab.instantedit.small_editor import load_editor

pipeline = load_editor()
pairs, sources, targets = emoji.packaged_pairs()
pair, source, target = pairs[1], sources[1], targets[1]
print(f"{pair.source} -> {pair.target}")

# %% [markdown]
# ## To noise, once
#
# Four samples of the network. Edges of the picture guide all steps through a ControlNet. The inversion is kept, and
# every edit of the picture starts from it.

# %%
inversion = pipeline.invert(source)
drawn = Figure(figsize=(11, 2.4), layout="constrained")
panels = [("edges", inversion.edges), *((f"step {i}", z) for i, z in enumerate(np.asarray(inversion.trajectory)))]
for axes, (title, image) in zip(drawn.subplots(1, len(panels)), panels):
    axes.imshow(np.clip(image / 2 + 0.5, 0, 1) if image.ndim == 3 else image, cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
drawn

# %% [markdown]
# ## And back, towards another sentence
#
# Where the word of the edit looks is where the picture may change: the mask comes from the attention of the first step.

# %%
result = pipeline.edit(inversion, pair.source, pair.target, blend_word=pair.word)
drawn = Figure(figsize=(9, 2.6), layout="constrained")
panels = {"source": source, "edit": result.image, "true outcome": target, "mask": result.masks[-1]}
for axes, (title, image) in zip(drawn.subplots(1, 4), panels.items()):
    axes.imshow(image, cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
drawn

# %% [markdown]
# Equal sentences give the picture back, bit for bit, whatever the network is:

# %%
same = pipeline.edit(inversion, pair.source, pair.source)
print(np.array_equal(same.latents, np.asarray(inversion.trajectory)[0]))

# %% [markdown]
# A further edit of the same picture takes over what does not depend on its sentence: ten samples instead of nineteen.
# Several sentences go in one batch.

# %%
results = pipeline.edit_many(inversion, pair.source, [pair.target, "red heart", "cat"])
print({stage: f"{seconds * 1e3:.0f} ms" for stage, seconds in results[0].timings.items()}, "with compilation")

# %% [markdown]
# ## Held to the truth
#
# The held-out pairs were never trained on: neither the target nor any other picture of its concept with a tone or a
# gender. The config is the tour's; `jaxlab instantedit run` is the same.

# %%
report = recipe.run(recipes.load(recipe.run, "configs/instantedit/laptop.yaml"))
plots = dict(report.plots)
title, columns, rows = report.tables[0]
print(title, columns, sep="\n")
for row in rows:
    print(*(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row), sep=" | ")

# %%
plots["Edits"]

# %%
plots["One picture, several prompts"]

# %% [markdown]
# ## Edges without OpenCV
#
# Canny's detector is JAX, too, and draws OpenCV's edges pixel for pixel:

# %%
print(f"{canny(source, 100, 200).mean():.1%} of the pixels are edges")
