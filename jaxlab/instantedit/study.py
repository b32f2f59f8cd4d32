"""Every method on the emoji task: edits whose true outcome was never trained on, at equal samples of one network.

editor = load_editor()
cases = emoji_cases(emoji.load(), 240)
evaluation = evaluate(cases, editors(editor.network, editor.tokenizer, cases), seeds=(0, 1, 2))
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jaxlab.instantedit.align import word_weights
from jaxlab.instantedit.baselines import METHODS, count_samples, steps_within
from jaxlab.instantedit.baselines.flow import EditProblem
from jaxlab.instantedit.edit import Knobs, Prompts, edited
from jaxlab.instantedit.emoji import Emoji, Pair, balanced
from jaxlab.instantedit.evaluation import EditCase, Editor
from jaxlab.instantedit.guidance import dpg
from jaxlab.instantedit.inversion import inverted
from jaxlab.instantedit.network import Control, EditorNetwork
from jaxlab.instantedit.scheduler import PeRFlowSchedule
from jaxlab.instantedit.small_editor import edges_of, to_images, to_latents
from jaxlab.instantedit.tokens import PromptTokenizer

_CHANGED = 8  # of 255: a pixel that differs by less between source and target is background
_BATCH = 48


@dataclasses.dataclass(frozen=True)
class Setting:
    """How InstantEdit edits.

    Attributes:
      num_steps: N.
      cfg: weight of ordinary guidance.
      dpg: weight of disentangled guidance.
      mask: whether attention masks the edit.
      control: scale of the ControlNet's residuals; 0: without it.
      injection: whether the way down is held to the inversion (ILI).
    """

    num_steps: int = 4
    cfg: float = 1.1
    dpg: float = 3.0
    mask: bool = True
    control: float = 0.4
    injection: bool = True


BASE = Setting()
SETTINGS: Mapping[str, Setting] = {
    "InstantEdit": BASE,
    "without ILI": dataclasses.replace(BASE, injection=False),
    "without DPG": dataclasses.replace(BASE, dpg=0.0),
    "without mask": dataclasses.replace(BASE, mask=False),
    "without ControlNet": dataclasses.replace(BASE, control=0.0),
    **{f"w_dpg {weight}": dataclasses.replace(BASE, dpg=float(weight)) for weight in (1, 2, 4, 5)},
    **{f"{steps} steps": dataclasses.replace(BASE, num_steps=steps) for steps in (8, 16)},
}
"""InstantEdit, and what each part of it is worth."""

BUDGET = 24
"""Samples of the network that a baseline may take: those of InstantEdit's official code, where ours takes 19."""

DRAWING = ("virtual_inversion", "sdedit", "flow_edit")
"""Methods whose result depends on the seed."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of edits.

    Attributes:
      z0: `[B,h,w,C]` latents of the sources.
      edges: `[B,H,W]` bool.
      prompts: null, source and target states, and the words of the mask.
    """

    z0: Any
    edges: Any
    prompts: Prompts


jax.tree_util.register_dataclass(Inputs, ["z0", "edges", "prompts"], [])

Method = Callable[[EditorNetwork, Inputs, Array], Array]
"""From network, batch and key to edited latents."""


def emoji_cases(emoji: Emoji, count: int, *, seed: int = 0) -> list[EditCase]:
    """Held-out pairs as cases, evenly of their families; the mask is where the true target differs."""
    return cases_of(
        balanced(emoji.held_out, count, seed=seed), lambda pair: (emoji.image(pair.source), emoji.image(pair.target))
    )


def cases_of(pairs: Sequence[Pair], pictures: Callable[[Pair], tuple[np.ndarray, np.ndarray]]) -> list[EditCase]:
    """Pairs with their pictures as cases."""
    cases = []
    for pair in pairs:
        source, target = pictures(pair)
        changed = np.abs(source.astype(int) - target.astype(int)).max(axis=-1) >= _CHANGED
        name = re.sub(r"\W+", "-", f"{pair.family} {pair.source} to {pair.word}")
        cases.append(EditCase(name, source, pair.source, pair.target, pair.word, changed, target, pair.family))
    return cases


def instant_edit(setting: Setting) -> Method:
    """InstantEdit, or what is left of it, for a batch of images."""

    def method(network: EditorNetwork, inputs: Inputs, key: Array) -> Array:
        del key
        prompts, controlled = inputs.prompts, setting.control > 0 and network.controlnet is not None
        features = network.hint(inputs.edges) if controlled else None
        scale = jnp.float32(setting.control)
        way = inverted(network, inputs.z0, prompts.null, features, scale, num_steps=setting.num_steps, mode="exact")
        if not setting.mask:
            prompts = prompts.replace(word_weights=jnp.zeros_like(prompts.word_weights))
        numbers = (jnp.float32(setting.cfg), jnp.float32(setting.dpg), jnp.float32(0.4), scale, jnp.bool_(True))
        result = edited(network, way, features, prompts, Knobs(*numbers))
        if setting.injection:
            return result.latents
        return _without_injection(network, way, features, prompts, setting, result.masks)

    return method


def _without_injection(
    network: EditorNetwork,
    way: Float[Array, "n b h w c"],
    features: Any,
    prompts: Prompts,
    setting: Setting,
    masks: Bool[Array, "m b h w"],
) -> Float[Array, "b h w c"]:
    """The way down by guided steps alone, masked as InstantEdit's."""
    times = network.schedule.timesteps(setting.num_steps).astype(np.float32)
    batch = way.shape[1]
    control = None if features is None else Control(jnp.tile(features, (3, 1, 1, 1)), jnp.float32(setting.control))
    null = jnp.broadcast_to(prompts.null, prompts.target.shape)
    text = network.text(jnp.concatenate([null, prompts.target, prompts.source]))
    z = way[-1]
    for i, (t, low) in enumerate(zip(times, np.append(times[1:], np.float32(0)))):
        eps = network.eps(jnp.tile(z, (3, 1, 1, 1)), t, text, control=control)
        eps_null, eps_tgt, eps_src = (eps[k * batch : (k + 1) * batch] for k in range(3))
        guided = dpg(eps_null, eps_tgt, eps_src, w_cfg=setting.cfg, w_dpg=setting.dpg)
        z = network.schedule.step(guided, t, low, z)
        if i:
            mask = masks[i - 1] | ~jnp.any(masks[i - 1], axis=(1, 2), keepdims=True)
            z = jnp.where(mask[..., None], z, way[-2 - i])
    return z


def baseline(name: str, num_steps: int, *, cfg: float, control: float = 0.0) -> Method:
    """One of `baselines.METHODS`."""

    def method(network: EditorNetwork, inputs: Inputs, key: Array) -> Array:
        prompts, edges = inputs.prompts, None
        if control > 0 and network.controlnet is not None:
            edges = Control(network.hint(inputs.edges), jnp.float32(control))
        problem = EditProblem(inputs.z0, prompts.null, prompts.source, prompts.target, cfg, edges, key)
        return METHODS[name](network, problem, num_steps=num_steps)

    return method


def samples(setting: Setting) -> int:
    """Samples of the network that InstantEdit takes at a setting: N up, N + 1 of the source, 3 N - 2 more."""
    return 5 * setting.num_steps - 1


def methods(schedule: PeRFlowSchedule) -> dict[str, Method]:
    """InstantEdit at every setting, and every baseline with as many steps as its samples allow.

    The baselines run with InstantEdit's weight of ordinary guidance, and with the sum of both its weights.

    Args:
      schedule: of the network.
    """
    found = {name: instant_edit(setting) for name, setting in SETTINGS.items()}
    for name, method in METHODS.items():
        steps = steps_within(method, schedule, BUDGET)
        for cfg in (BASE.cfg, BASE.cfg + BASE.dpg):
            found[f"{name} cfg {cfg:g}"] = baseline(name, steps, cfg=cfg, control=BASE.control)
    return found


def method_samples(schedule: PeRFlowSchedule, name: str) -> int:
    """Samples of the network that one of `methods` takes an image."""
    if name in SETTINGS:
        return samples(SETTINGS[name])
    method = METHODS[name.partition(" ")[0]]
    return count_samples(method, schedule, num_steps=steps_within(method, schedule, BUDGET))


class Batched:
    """A method as an `Editor` of known cases: they are edited in batches when the first of them is asked for."""

    def __init__(
        self,
        network: EditorNetwork,
        tokenizer: PromptTokenizer,
        cases: Sequence[EditCase],
        method: Method,
        *,
        draws: bool,
    ):
        """Runs nothing yet.

        Args:
          network: what edits.
          tokenizer: of its text encoder.
          cases: all that it will be asked for.
          method: the method.
          draws: whether its result depends on the seed; if not, seeds share one.
        """
        self._network, self._tokenizer, self._cases, self._draws = network, tokenizer, tuple(cases), draws
        self._method = jax.jit(method)
        self._images: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, case: EditCase, seed: int) -> UInt8[np.ndarray, "h w 3"]:
        """The edited picture."""
        seed = seed if self._draws else 0
        if seed not in self._images:
            self._images[seed] = dict(self._edited(seed))
        return self._images[seed][case.id]

    def _edited(self, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        for start in range(0, len(self._cases), _BATCH):
            some = self._cases[start : start + _BATCH]
            padded = [*some, *(some[:1] * (_BATCH - len(some)))] if len(self._cases) > _BATCH else some
            key = jax.random.fold_in(jax.random.key(seed), start)
            latents = self._method(self._network, inputs_of(self._network, self._tokenizer, padded), key)
            yield from zip((case.id for case in some), to_images(latents))


def inputs_of(network: EditorNetwork, tokenizer: PromptTokenizer, cases: Sequence[EditCase]) -> Inputs:
    """A batch of cases."""
    pictures = np.stack([case.source_image() for case in cases])
    ids = {name: [tokenizer.ids(getattr(case, name)) for case in cases] for name in ("source_prompt", "target_prompt")}
    source, target = (_states(network, np.stack([tokenizer.padded(each) for each in rows])) for rows in ids.values())
    null = _states(network, tokenizer.padded(tokenizer.ids(""))[None])
    weights = [
        word_weights(ids["source_prompt"][row], ids["target_prompt"][row], words, source[row], target[row])
        for row, words in enumerate(tokenizer.words(case.blend_word or "") for case in cases)
    ]
    lengths = np.array([len(each) for each in ids["target_prompt"]], np.int32)
    prompts = Prompts(null, source, target, np.stack(weights), lengths)
    return Inputs(to_latents(pictures), edges_of(pictures), prompts)


def editors(
    network: EditorNetwork,
    tokenizer: PromptTokenizer,
    cases: Sequence[EditCase],
    *,
    chosen: Mapping[str, Method] | None = None,
) -> dict[str, Editor]:
    """`methods`, and "copy", which leaves the source as it is, as editors of some cases.

    Args:
      network: what edits.
      tokenizer: of its text encoder.
      cases: all that they will be asked for.
      chosen: methods by name; None: all.
    """
    made: dict[str, Editor] = {"copy": lambda case, seed: case.source_image()}
    for name, method in (methods(network.schedule) if chosen is None else chosen).items():
        draws = name.startswith(DRAWING)
        made[name] = Batched(network, tokenizer, cases, method, draws=draws)
    return made


def _states(network: EditorNetwork, ids: np.ndarray) -> np.ndarray:
    return np.asarray(_jitted_states(network, ids))


_jitted_states = jax.jit(lambda network, ids: network.states(ids))
