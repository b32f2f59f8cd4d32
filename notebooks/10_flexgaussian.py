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
# # FlexGaussian
#
# A trained scene of 3D Gaussians is hundreds of megabytes of float32. FlexGaussian
# ([arXiv:2507.06671](https://arxiv.org/abs/2507.06671)) shrinks it without training: it drops the Gaussians that
# cameras hardly see, drops the view-dependent colour of the next ones, gives each attribute the bits it needs, and
# searches for how far it can go before the picture suffers more than you allow. Everything below ran on the CPU that
# built this page.

# %%
# %matplotlib inline
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import recipes
from jaxlab.core import data_path
from jaxlab.flexgaussian import (
    CANDIDATES,
    QuantConfig,
    decompress,
    dequantize,
    importance_scores,
    load_scene,
    metrics,
    orbit_cameras,
    prune,
    quantize,
    recipe,
    render,
    save_compressed,
)

# %% [markdown]
# ## A scene, and what cameras see of it
#
# PLAYBOT, by Stephane Agullo (sa3d.fr, CC BY 4.0), at its fourth level of detail. `render` is the library's own
# rasteriser: Gaussians are listed by tiles of 16 x 16 pixels, sorted by depth and blended from front to back. It is
# exact (no Gaussian is cut off before it falls below 1/255) and differentiable.

# %%
scene = load_scene(data_path("splats/playbot_lod4.sog"))
cameras = orbit_cameras(scene, 8, 256, 192)
print(f"{scene.num_gaussians} Gaussians, harmonics of degree {scene.degree}, {scene.num_bytes / 2**20:.1f} MiB")

render(scene, cameras[0])  # compiled here, once for all cameras of this size
started = time.perf_counter()
images = [np.asarray(render(scene, camera, (1, 1, 1))) for camera in cameras]
print(f"{(time.perf_counter() - started) / len(cameras) * 1e3:.0f} ms a view")

# %% [markdown]
# ## What matters
#
# A Gaussian counts by its opacity in every pixel where it is seen, over all training views. Photographs are not needed.

# %%
scores = importance_scores(scene, cameras[::2])
ranked = np.sort(scores)[::-1].cumsum() / scores.sum()
print(
    {
        f"the first {share:.0%}": f"{ranked[int(share * len(ranked)) - 1]:.0%} of all importance"
        for share in (0.1, 0.25, 0.5)
    }
)

# %% [markdown]
# ## Fewer Gaussians, fewer harmonics, fewer bits
#
# One candidate by hand: 40 % of the Gaussians go, another 50 % lose their harmonics, and what is left is stored in 8
# and 4 bits a number.

# %%
pruned, kept = prune(scene, scores, 0.4, 0.5)
compressed = quantize(pruned, QuantConfig())
back = dequantize(compressed)
sizes = compressed.size_report()
print(sizes, f"{scene.num_bytes / sizes['total']:.1f} times less")
print({name: f"{part.bits} bits, {part.packed.shape}" for name, part in compressed.codes.items()})
quality = [metrics.psnr(render(back, camera, (1, 1, 1)), image) for camera, image in zip(cameras, images)]
print(f"{np.mean(quality):.2f} dB against the scene as it was")

# %% [markdown]
# ## As far as the target allows
#
# `search` tries candidates from gentle to harsh; sorted by the size they will have, at most six of the twenty. The
# config is the tour's, and `jaxlab flexgaussian run` the same.

# %%
report = recipe.run(recipes.load(recipe.run, "configs/flexgaussian/laptop.yaml"))
plots = dict(report.plots)
title, columns, rows = report.tables[0]
print(*columns, sep=" | ")
for row in rows:
    print(*(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row), sep=" | ")

# %%
plots["Scene, compressed, four times the difference"]

# %%
plots["Quality by size"]

# %%
plots["Importance"]

# %% [markdown]
# ## A file, and back
#
# The compressed file has a checksum for every stream and no time stamp: the same scene gives the same bytes. What comes
# back opens in any viewer.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_compressed(Path(folder) / "robot.jxg", compressed)
    for name in ("robot.ply", "robot.spz"):
        decompress(Path(folder) / "robot.jxg", Path(folder) / name)
    print({path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())})

# %% [markdown]
# ## Gradients
#
# The same rasteriser learns scenes from photographs (`jaxlab flexgaussian fit`). Here it moves one colour: a robot that
# was painted grey gets its own back, from its pictures alone.

# %%
camera, wanted = cameras[0], jnp.asarray(images[0])


@jax.jit
def step(scene, sh0):
    def loss(sh0):
        return jnp.mean((render(scene.replace(sh0=sh0, shN=0 * scene.shN), camera, (1, 1, 1)) - wanted) ** 2)

    value, slope = jax.value_and_grad(loss)(sh0)
    return sh0 - 0.05 * slope / (jnp.abs(slope).max(axis=1, keepdims=True) + 1e-12), value


painted = jax.device_put(scene)
sh0 = jnp.zeros_like(painted.sh0)
losses = []
for _ in range(30):
    sh0, value = step(painted, sh0)
    losses.append(float(value))
print(f"mean squared error {losses[0]:.4f} -> {losses[-1]:.4f}")
print(f"{len(CANDIDATES)} candidates, {len(report.tables[0][2])} tried")
