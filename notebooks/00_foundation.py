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
# # First light
#
# Four things the foundation can do on a laptop, before any of the ten systems enters: a pretrained language model
# answers, a small one learns, a kernel is held against its alternatives, and a training step is planned for 64 GPUs
# that are not here. Everything below ran on the CPU that built this page.

# %%
# %matplotlib inline
from jaxlab import core, doctor, recipes

doctor.machine()

# %% [markdown]
# ## A pretrained model answers
#
# SmolLM2-135M comes as a quantised GGUF file inside a PyPI package. `load_pretrained` reads it strictly (a missing,
# unexpected or mis-shaped weight is an error) into one parameter tree that every family of decoders shares.

# %%
from jaxlab.foundation import answer

asked = answer.run(answer.AnswerConfig(max_tokens=48, batch=1))
for name, value in asked.metrics.items():
    print(f"{name:32}", f"{value:.3g}" if isinstance(value, float) else value.replace(". ", ".\n" + 33 * " "))
asked.plots[0][1]

# %% [markdown]
# The bars are the probabilities the model gave to each token it wrote; orange marks those it was unsure of.
#
# ## A small model learns
#
# Text that is on any machine: the Python standard library's own source, as bytes. The config is the tour's, with fewer
# steps; `jaxlab train configs/foundation/laptop.yaml out/lm` is the same run with checkpoints, resumable.

# %%
from jaxlab.foundation import recipe

config = recipes.load(recipe.run, "configs/foundation/laptop.yaml", ["steps=200"])
learned = recipe.run(config)
learned.plots[0][1]

# %%
for when, text in learned.tables[0][2]:
    print(f"--- {when}\n{text.strip()}\n")

# %% [markdown]
# Noise before, the shape of Python after: words, indentation, `self`. The tour trains three times as long.
#
# ## A kernel against its alternatives
#
# A mixture of experts multiplies each group of rows by its own matrix. `lax.ragged_dot` on this backend computes every
# row with every matrix and masks; ours does not.

# %%
from jaxlab.foundation import kernel

matmul = kernel.run(recipes.load(kernel.run, "configs/foundation/kernel.yaml"))
matmul.plots[0][1]

# %%
for title, columns, rows in matmul.tables:
    print(title)
    for row in (columns, *rows):
        print("   ", *(f"{cell:>18.3g}" if isinstance(cell, float) else f"{cell!s:>18}" for cell in row))

# %% [markdown]
# The second table needs no GPU either: XLA compiles for one that is not there, and NVIDIA's assembler reads out the
# registers.
#
# ## A training step on 64 H100s
#
# The same training code, at Llama 3.1 8B's shape. Nothing runs; the bytes are XLA's buffer assignment for one device
# and the collectives are read from the compiled program.

# %%
from jaxlab.foundation import layouts

try:
    two = "meshes=[{fsdp: 64}, {data: 8, fsdp: 8}]"
    planned = layouts.run(recipes.load(layouts.run, "configs/foundation/plan_8b.yaml", [two]))
except core.MissingExtra as missing:
    print(missing)
else:
    display(planned.plots[0][1])

# %% [markdown]
# One command gives the same for any config and cluster:
#
#     jaxlab plan configs/foundation/plan_8b.yaml --gpu h100 --topology 1x8x8 --mesh data=8,fsdp=8
