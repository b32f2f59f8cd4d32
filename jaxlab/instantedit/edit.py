"""Regeneration: down the flow again towards the target prompt, held to the inversion by ILI (InstantEdit, section 2.3).

Predictions of the source prompt at the inversion's own latents depend on no target, so `source_program` makes them once
and every edit of the image uses them: N + 1 samples, and 1 + 3 (N - 1) more a target prompt, 15 at N = 4 where the
official code evaluates 16. A further edit takes those 10.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, UInt8

from jaxlab.instantedit.attention_map import blend_mask
from jaxlab.instantedit.guidance import dpg, ili
from jaxlab.instantedit.network import Control, EditorNetwork, Text
from jaxlab.instantedit.scheduler import PeRFlowSchedule
from pallas_kernels.dpg_ili_update import dpg_ili_update

_TOGETHER = 5  # samples of the source branch in one batch: all of them at N = 4


class Source(struct.PyTreeNode):
    """Predictions at an inversion's latents, of `b` images.

    Attributes:
      eps_null: `[b, h, w, C]`, the empty prompt at the last latents.
      eps: `[N, b, h, w, C]`, the source prompt at the latents of each step, from the last down.
      maps: `[L, b, T, S]`, its attention at the first step.
    """

    eps_null: Any
    eps: Any
    maps: Any


class Knobs(struct.PyTreeNode):
    """Numbers of an edit, all traced.

    Attributes:
      cfg: weight of ordinary guidance.
      dpg: weight of disentangled guidance.
      threshold: of the mask.
      control_scale: of the ControlNet.
      masked: whether the result is the last latents after masking, or before it.
    """

    cfg: Any
    dpg: Any
    threshold: Any
    control_scale: Any
    masked: Any


class Prompts(struct.PyTreeNode):
    """Prompts of `B` edits.

    Attributes:
      null: `[1, S, D]`, states of the empty prompt.
      source: `[b, S, D]`; b is 1 where all have the same.
      target: `[B, S, D]`.
      word_weights: `[B, S]`, of the target's words in the mask.
      target_length: int `[B]`, tokens of the target with begin and end.
    """

    null: Any
    source: Any
    target: Any
    word_weights: Any
    target_length: Any


class Edited(struct.PyTreeNode):
    """Outcome of `B` edits.

    Attributes:
      latents: `[B, h, w, C]`, those to decode.
      masks: bool `[N - 1, B, h, w]`, of the steps after the first.
      steps: `[N, B, h, w, C]`, after ILI and before masking.
      guided_first: `[B, h, w, C]`, guidance of the first step.
      attention: `[L, 2, B, T, S]`, of the target and of the source prompt at the first step.
    """

    latents: Any
    masks: Any
    steps: Any
    guided_first: Any
    attention: Any


Predict = Callable[..., Any]
"""(K latents `[B, h, w, C]`, K texts of B, time, capture) -> eps `[K, B, h, w, C]`; maps `[L, K, B, T, S]`."""


def predictor(network: EditorNetwork, features: Any, control_scale: Any) -> Predict:
    """All predictions in one batch."""

    def predict(latents: Sequence[Any], texts: Sequence[Text], time: Any, *, capture: bool = False) -> Any:
        return predict_stacked(network, features, control_scale, *stacked(latents, texts, time), capture=capture)

    return predict


def stacked(latents: Sequence[Any], texts: Sequence[Text], time: Any) -> tuple[Any, Text, Any]:
    """Branches along a new first axis: latents `[K, B, ...]`, texts of `[K, B, ...]`, times `[K]`."""
    batch = max(leaf.shape[0] for leaf in jax.tree.leaves((latents, texts)))
    rows = [jax.tree.map(lambda leaf: _rows(leaf, batch), text) for text in texts]
    time = jnp.broadcast_to(jnp.asarray(time, jnp.float32), (len(latents),))
    return jnp.stack([_rows(z, batch) for z in latents]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows), time


def predict_stacked(
    network: EditorNetwork, features: Any, control_scale: Any, z: Any, text: Text, time: Any, *, capture: bool
) -> Any:
    """Predictions `[K, B, h, w, C]` of stacked branches, and with capture their maps `[L, K, B, T, S]`."""
    lead = z.shape[:2]
    z = z.reshape(-1, *z.shape[2:])
    text = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), text)
    control = None if features is None else Control(features, control_scale)
    time = jnp.repeat(time, lead[1])
    if not capture:
        return network.eps(z, time, text, control=control).reshape(*lead, *z.shape[1:])
    eps, maps = network.eps_and_maps(z, time, text, control=control)
    return eps.reshape(*lead, *z.shape[1:]), maps.reshape(maps.shape[0], *lead, *maps.shape[2:])


def source_branch(
    network: EditorNetwork,
    trajectory: Float[Array, "n b h w c"],
    features: Float[Array, "b h w c0"] | None,
    control_scale: Any,
    null: Float[Array, "1 s d"],
    source: Float[Array, "b s d"],
) -> Source:
    """N + 1 samples at known latents: as many at a time as memory of one step allows, whatever N."""
    steps = trajectory.shape[0] - 1
    times = network.schedule.timesteps(steps).astype(np.float32)
    chunks = -(-(steps + 1) // _TOGETHER)
    size = -(-(steps + 1) // chunks)
    order = np.resize(np.concatenate([[0], np.arange(steps)]), (chunks, size))  # what is too much, is done again
    prompt = np.zeros((chunks, size), np.int32)
    prompt.flat[1:] = 1
    down = trajectory[:0:-1]
    batch = trajectory.shape[1]
    prompts = [jax.tree.map(lambda leaf: _rows(leaf, batch), network.text(states)) for states in (null, source)]
    prompts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prompts)

    def some(rows):
        at, which = rows
        z, time = down[at], jnp.asarray(times)[at]
        return predict_stacked(network, features, control_scale, z, prompts[which], time, capture=True)

    eps, maps = jax.lax.map(some, (jnp.asarray(order), jnp.asarray(prompt)))
    eps = eps.reshape(-1, *trajectory.shape[1:])[: steps + 1]
    return Source(eps[0], eps[1:], maps[0, :, 1])


def edited(
    network: EditorNetwork,
    trajectory: Float[Array, "n b h w c"],
    features: Float[Array, "b h w c0"] | None,
    prompts: Prompts,
    knobs: Knobs,
    source: Source | None = None,
    *,
    predict: Predict | None = None,
    dpg_axes: tuple[int, ...] = (1, 2),
) -> Edited:
    """B edits: of B images, or of one, then b is 1 in everything that is the image's.

    Args:
      network: the network.
      trajectory: of the inversion.
      features: of the edges.
      prompts: source and target.
      knobs: the numbers.
      source: its branch; None: evaluated here, one sample more in each step after the first, two more in that.
      predict: evaluates branches; None: all of a step in one batch.
      dpg_axes: axes of `[B, h, w, C]` that the sums of DPG run over.
    """
    schedule, steps = network.schedule, trajectory.shape[0] - 1
    batch = prompts.target.shape[0]
    predict = predict or predictor(network, features, knobs.control_scale)
    null, known, wanted = (network.text(states) for states in (prompts.null, prompts.source, prompts.target))
    same = jnp.all(prompts.source == prompts.target, axis=(1, 2))
    times = schedule.timesteps(steps)
    down = trajectory[::-1]

    def update(z, i, eps, mask):
        """New latents before and after masking, of the step from times[i]."""
        null, src, tgt, cross = (_rows(each, batch) for each in eps)
        z_src, z_inv = _rows(down[i], batch), _rows(down[i + 1], batch)
        z_new, masked = updated(
            schedule, times, i, z, z_src, z_inv, null, src, tgt, cross, mask, knobs, dpg_axes=dpg_axes
        )
        # Equal prompts make equal branches. Where their predictions come from batches of different sizes rounding may
        # part them, so what follows from their equality is taken as it is.
        equal = same[:, None, None, None]
        return jnp.where(equal, z_inv, z_new), jnp.where(equal, z_inv, masked)

    first = down[0]
    if source is None:
        (eps_null, eps_src, eps_tgt), maps = predict([first] * 3, [null, known, wanted], times[0], capture=True)
        maps_src, maps_tgt = maps[:, 1], maps[:, 2]
    else:
        eps, maps = predict([first], [wanted], times[0], capture=True)
        (eps_tgt,), maps_tgt = eps, maps[:, 0]
        eps_null, eps_src, maps_src = source.eps_null, source.eps[0], source.maps
    attention = jnp.stack(jnp.broadcast_arrays(maps_tgt, maps_src), axis=1)
    null_rows, src_rows = _rows(eps_null, batch), _rows(eps_src, batch)
    guided = dpg(null_rows, eps_tgt, src_rows, w_cfg=knobs.cfg, w_dpg=knobs.dpg, axes=dpg_axes)
    everywhere = jnp.ones((batch, *first.shape[1:3]), bool)
    z_first, z = update(_rows(first, batch), 0, (eps_null, eps_src, eps_tgt, eps_src), everywhere)
    masks = _masks(network, attention, prompts, knobs.threshold, times[1:], first.shape[1:3])

    def step(z, inputs):
        i, mask, eps_src = inputs
        time = jnp.asarray(times, jnp.float32)[i]
        latents, texts = [z, z, z], [null, wanted, known]
        if eps_src is None:
            eps_null, eps_tgt, eps_cross, eps_src = predict([*latents, down[i]], [*texts, known], time)
        else:
            eps_null, eps_tgt, eps_cross = predict(latents, texts, time)
        used = mask | ~jnp.any(mask, axis=(1, 2), keepdims=True)  # an empty mask masks nothing
        z_new, z = update(z, i, (eps_null, eps_src, eps_tgt, eps_cross), used)
        return z, z_new

    rest = None if source is None else source.eps[1:]
    z, others = jax.lax.scan(step, z, (np.arange(1, steps), masks, rest))
    stepped = jnp.concatenate([z_first[None], others])
    latents = jnp.where(knobs.masked, z, stepped[-1])
    return Edited(latents, masks, stepped, guided, attention)


def updated(
    schedule: PeRFlowSchedule,
    times: np.ndarray,
    i: Any,
    z: Float[Array, "b h w c"],
    z_src: Float[Array, "b h w c"],
    z_inv: Float[Array, "b h w c"],
    eps_null: Float[Array, "b h w c"],
    eps_src: Float[Array, "b h w c"],
    eps_tgt: Float[Array, "b h w c"],
    eps_cross: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w"],
    knobs: Knobs,
    *,
    dpg_axes: tuple[int, ...] = (1, 2),
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Latents after the step from `times[i]`, guided and injected, before and after masking."""
    after = np.append(times[1:], 0)
    if schedule.prediction_type == "diff_eps" and dpg_axes == (1, 2):
        windows = [schedule.window(int(t)) for t in times]
        columns = np.array(
            [(w.gamma, w.t_start, w.t_end, t / 1000, n / 1000) for w, t, n in zip(windows, times, after)]
        )
        gamma, start, end, t, t_next = jnp.asarray(columns, jnp.float32)[i]
        given = (z, z_src, z_inv, eps_null, eps_src, eps_tgt, eps_cross)
        return dpg_ili_update(*given, gamma, start, end, t, t_next, mask, knobs.cfg, knobs.dpg)
    t, t_next = jnp.asarray(times, jnp.float32)[i], jnp.asarray(after, jnp.float32)[i]
    guided = dpg(eps_null, eps_tgt, eps_cross, w_cfg=knobs.cfg, w_dpg=knobs.dpg, axes=dpg_axes)
    plain = eps_null + knobs.cfg * (eps_src - eps_null)
    z_new = ili(z_inv, schedule.step(guided, t, t_next, z), schedule.step(plain, t, t_next, z_src))
    return z_new, jnp.where(mask[..., None], z_new, z_inv)


def _masks(
    network: EditorNetwork, attention: Any, prompts: Prompts, threshold: Any, times: np.ndarray, size: Sequence[int]
) -> Bool[Array, "n b h w"]:
    """A mask for each step after the first and each edit, from the maps `[L, 2, B, T, S]` of the first step."""
    alphas = np.array([network.schedule.alpha_bar(int(t)) for t in times], np.float32)

    def of_edit(maps, weights, length, alpha):
        maps = maps.reshape(-1, *maps.shape[2:])
        return blend_mask(maps, weights, length, alpha, threshold=threshold, size=(size[0], size[1]))

    of_edits = jax.vmap(of_edit, (2, 0, 0, None))
    return jax.vmap(of_edits, (None, None, None, 0))(attention, prompts.word_weights, prompts.target_length, alphas)


def _rows(x: Any, batch: int) -> Any:
    """One row for each edit: an image's own serves all edits of it."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def decoded(network: EditorNetwork, latents: Float[Array, "b h w c"]) -> UInt8[Array, "b height width 3"]:
    """Images of latents, one after another: decoding takes more memory than all else."""
    images = jax.lax.map(lambda z: network.decode(z[None])[0], latents)
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


decode_program: Callable[..., Any] = jax.jit(decoded)


@jax.jit
def source_program(
    network: EditorNetwork, trajectory: Any, features: Any, control_scale: Any, null: Any, source: Any
) -> Source:
    """`source_branch` as one program."""
    return source_branch(network, trajectory, features, control_scale, null, source)


@functools.partial(jax.jit, static_argnames="dpg_axes")
def edit_program(
    network: EditorNetwork,
    trajectory: Any,
    features: Any,
    prompts: Prompts,
    knobs: Knobs,
    source: Source | None = None,
    *,
    dpg_axes: tuple[int, ...] = (1, 2),
) -> Edited:
    """`edited` as one program."""
    return edited(network, trajectory, features, prompts, knobs, source, dpg_axes=dpg_axes)
