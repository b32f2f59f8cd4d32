"""InstantEdit from pictures and prompts to pictures (arXiv 2508.06033).

    from jaxlab.instantedit import InstantEditPipeline
    pipeline = InstantEditPipeline.from_pretrained("checkpoint")
    inversion = pipeline.invert(picture)  # 4 network samples, kept for any number of edits
    result = pipeline.edit(inversion, "a photo of a cat", "a photo of a dog", blend_word="dog")

Programs are compiled for a size, a number of steps and a number of target prompts. Weights, prompts and numbers are
traced: another prompt or scale compiles nothing.
"""

import contextlib
import dataclasses
import numbers
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlab.instantedit.align import find_tokens, word_weights
from jaxlab.instantedit.config import Compat, EditConfig, InversionConfig
from jaxlab.instantedit.edges import canny
from jaxlab.instantedit.edit import Edited, Knobs, Prompts, Source, decode_program, edit_program, source_program
from jaxlab.instantedit.image_io import prepare_image, to_uint8
from jaxlab.instantedit.inversion import Inversion, invert_program
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import InverseMode
from jaxlab.instantedit.tokens import PromptTokenizer

_KEPT_PROMPTS, _KEPT_SOURCES = 64, 4
_DEFAULTS = EditConfig()


@dataclasses.dataclass(frozen=True, eq=False)
class EditTrace:
    """What happened on the way.

    Attributes:
      latents: `[N, h, w, C]`, after each step's injection and before its mask.
      guided_first: `[h, w, C]`, the guided prediction of the first step.
      attention: `[L, 2, T, S]`, head means of the first step: layers as they run, down then up; the target prompt, the
        source prompt at the same latents.
    """

    latents: np.ndarray
    guided_first: np.ndarray
    attention: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class EditResult:
    """An edited image.

    Attributes:
      image: uint8 `[H, W, 3]`.
      latents: `[h, w, C]`, those that were decoded.
      masks: bool `[N - 1, h, w]`; `masks[j]` belongs to step j + 1, and one that is empty masked nothing.
      alpha_e: `[S]`, weights of the target prompt's words in the mask.
      timings: seconds by stage: "inversion" and "source" where they were done for this edit, and those of all target
        prompts together, "edit" and "decode".
      trace: where it was asked for.
    """

    image: np.ndarray
    latents: np.ndarray
    masks: np.ndarray
    alpha_e: np.ndarray
    timings: dict[str, float]
    trace: EditTrace | None


class InstantEditPipeline:
    """Editing with one network. An object is for one thread."""

    def __init__(self, network: EditorNetwork, tokenizer: PromptTokenizer):
        """Keeps both.

        Args:
          network: with a text encoder.
          tokenizer: of the text encoder.

        Raises:
          ValueError: a network without a text encoder.
        """
        if network.text_encoder is None:
            raise ValueError("network: expected one with a text encoder")
        self._network, self.tokenizer = network, tokenizer
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._sources: weakref.WeakKeyDictionary[Inversion, OrderedDict[Any, Source]] = weakref.WeakKeyDictionary()

    @property
    def network(self) -> EditorNetwork:
        """What it edits with."""
        return self._network

    @classmethod
    def from_pretrained(
        cls, directory: Any, *, controlnet: Any = None, dtype: str = "float32"
    ) -> "InstantEditPipeline":
        """Reads a diffusers folder; nothing is downloaded. See `checkpoint.load_network`.

        Args:
          directory: with `unet/ vae/ text_encoder/ tokenizer/ scheduler/` and, unless it is elsewhere, `controlnet/`.
          controlnet: another folder of the ControlNet.
          dtype: of weights and computation: "float32", "bfloat16" or "float16".
        """
        from jaxlab.instantedit.checkpoint import load_network, load_prompt_tokenizer

        network = load_network(directory, controlnet=controlnet, dtype=dtype)
        return cls(network, load_prompt_tokenizer(directory))

    def invert(
        self,
        image: Any,
        *,
        num_steps: int = 4,
        control_scale: float = 0.4,
        mode: InverseMode = "exact",
        edges: Bool[Array | np.ndarray, "height width"] | None = None,
        seed: int | None = None,
    ) -> Inversion:
        """Carries an image to noise.

        Args:
          image: PIL image of any mode or an array, see `image_io.prepare_image`; floats are in [0, 1].
          num_steps: N; fewer than the windows are raised to their number, with a warning.
          control_scale: of the ControlNet's residuals.
          mode: "exact", or "official" as the paper's code; "official" warns where N is no multiple of the windows.
          edges: bool `[H, W]` in place of Canny's.
          seed: of a draw from the autoencoder's posterior; None takes its mode.

        Raises:
          ValueError: an image or edges that do not fit, a number out of range, or an unknown mode.
        """
        config = InversionConfig(num_steps=num_steps, control_scale=control_scale, mode=mode)
        if seed is not None and not isinstance(seed, numbers.Integral):
            raise ValueError(f"seed: expected a whole number or None, got {seed!r}")
        pixels = prepare_image(image, multiple=_factor(self.network))
        if edges is None:
            edges = canny(to_uint8(pixels), config.canny_low, config.canny_high)
        rng = None if seed is None else jax.random.key(seed)
        z0 = _encode(self.network, jnp.asarray(pixels[None] * 2 - 1), rng)[0]
        _check_edges(edges, pixels.shape[:2])
        return self._inverted(z0, edges, config)

    def invert_latents(
        self,
        z0: Float[Array | np.ndarray, "h w c"],
        edges: Bool[Array | np.ndarray, "height width"],
        *,
        num_steps: int = 4,
        control_scale: float = 0.4,
        mode: InverseMode = "exact",
    ) -> Inversion:
        """Carries scaled latents to noise; arguments and errors otherwise as `invert`.

        Args:
          z0: latents of the autoencoder times its scale.
          edges: of their image, whose sides are the same multiple of the latents'.
          num_steps: as `invert`.
          control_scale: as `invert`.
          mode: as `invert`.
        """
        config = InversionConfig(num_steps=num_steps, control_scale=control_scale, mode=mode)
        z0 = jnp.asarray(z0, jnp.float32)
        if z0.ndim != 3 or 0 in z0.shape:
            raise ValueError(f"z0: expected [h, w, C], got {z0.shape}")
        if not bool(jnp.isfinite(z0).all()):
            raise ValueError("z0: some values are not finite")
        times = _factor(self.network)
        if self.network.vae is None and np.ndim(edges):
            times = max(np.shape(edges)[0] // z0.shape[0], 1)
        _check_edges(edges, (z0.shape[0] * times, z0.shape[1] * times))
        return self._inverted(z0, edges, config)

    def edit(
        self,
        image_or_inversion: Any,
        source_prompt: str,
        target_prompt: str,
        *,
        blend_word: str | None = None,
        num_steps: int | None = None,
        cfg: float = _DEFAULTS.cfg,
        dpg: float = _DEFAULTS.dpg,
        mask_threshold: float = _DEFAULTS.mask_threshold,
        control_scale: float = _DEFAULTS.control_scale,
        seed: int | None = None,
        compat: Compat = "clean",
        return_trace: bool = False,
    ) -> EditResult:
        """Edits an image from what describes it to what shall.

        Equal prompts give the image's latents bit for bit.

        Args:
          image_or_inversion: an image, as `invert` takes it, or what that gave. A further edit of an inversion from the
            same source prompt and control scale takes over what those two decide: 10 samples of 15 at N = 4.
          source_prompt: what the image shows; empty: with a warning, then nothing of it guides.
          target_prompt: what it shall show.
          blend_word: words of the target that the edit is about; the mask is where they look. A word of the source
            stands for what replaces it; one that is in neither is left out, with a warning. None: no mask.
          num_steps: N; None: that of the inversion, 4 for an image.
          cfg: weight of ordinary guidance.
          dpg: weight of disentangled guidance.
          mask_threshold: attention above this part of its maximum belongs to the edit.
          control_scale: of the ControlNet's residuals in this edit, and with an image in its inversion, too.
          seed: as `invert`, with an image.
          compat: "clean", or "official" as the paper's code: its word weights, the latents before the last mask, and
            with an image its inversion.
          return_trace: whether the result has a trace.

        Raises:
          ValueError: what `invert` raises, a number out of range, an empty target prompt, a blend word that the target
            prompt lacks ("official": a warning), or num_steps that are not those of the inversion.
        """
        blend_words = None if blend_word is None else [blend_word]
        return self._edits(
            image_or_inversion,
            source_prompt,
            [target_prompt],
            blend_words,
            num_steps=num_steps,
            cfg=cfg,
            dpg=dpg,
            mask_threshold=mask_threshold,
            control_scale=control_scale,
            seed=seed,
            compat=compat,
            return_trace=return_trace,
        )[0]

    def edit_many(
        self,
        image_or_inversion: Any,
        source_prompt: str,
        target_prompts: Sequence[str],
        *,
        blend_words: Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[EditResult]:
        """Edits one image towards several target prompts in one batch: 5 + 10 P samples for P of them at N = 4.

        Args:
          image_or_inversion: as `edit`.
          source_prompt: as `edit`.
          target_prompts: at least one.
          blend_words: one or None for each target; None: no masks.
          **options: the other keywords of `edit`.

        Raises:
          ValueError: as `edit`; no target prompt; blend_words of another number.
        """
        return self._edits(image_or_inversion, source_prompt, target_prompts, blend_words, **options)

    def _edits(
        self,
        image_or_inversion: Any,
        source_prompt: str,
        target_prompts: Sequence[str],
        blend_words: Sequence[str | None] | None,
        *,
        num_steps: int | None = None,
        cfg: float = _DEFAULTS.cfg,
        dpg: float = _DEFAULTS.dpg,
        mask_threshold: float = _DEFAULTS.mask_threshold,
        control_scale: float = _DEFAULTS.control_scale,
        seed: int | None = None,
        compat: Compat = "clean",
        return_trace: bool = False,
    ) -> list[EditResult]:
        EditConfig(cfg=cfg, dpg=dpg, mask_threshold=mask_threshold, control_scale=control_scale, compat=compat)
        if isinstance(target_prompts, str):
            raise ValueError(f"target_prompts: expected a list of prompts, got {target_prompts!r}")
        targets = list(target_prompts)
        blends: list[str | None] = [None] * len(targets) if blend_words is None else list(blend_words)
        if not targets:
            raise ValueError("target_prompts: expected at least one, got none")
        if len(blends) != len(targets):
            raise ValueError(f"blend_words: expected one for each of {len(targets)} target prompts, got {len(blends)}")
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in targets):
            raise ValueError(f"target_prompt: expected text, got {targets}")
        if not isinstance(source_prompt, str):
            raise ValueError(f"source_prompt: expected text, got {source_prompt!r}")
        if not all(blend is None or isinstance(blend, str) for blend in blends):
            raise ValueError(f"blend_word: expected text or None, got {blends}")
        if not source_prompt.strip():
            warnings.warn("source_prompt: it is empty, so nothing of it guides the edit", stacklevel=2)
        timings: dict[str, float] = {}
        inversion = image_or_inversion
        if isinstance(inversion, Inversion):
            self._check_inversion(inversion, num_steps)
        else:
            with _timed(timings, "inversion"):
                inversion = self.invert(
                    inversion,
                    num_steps=4 if num_steps is None else num_steps,
                    control_scale=control_scale,
                    mode="official" if compat == "official" else "exact",
                    seed=seed,
                )
        ids, prompts = self._prompts(source_prompt, targets, blends, compat)
        trajectory, features = _batch_of_one(inversion)
        numbers = {"cfg": cfg, "dpg": dpg, "threshold": mask_threshold, "control_scale": control_scale}
        numbers = {name: np.float32(value) for name, value in numbers.items()}
        knobs = Knobs(**numbers, masked=np.bool_(compat == "clean"))
        key, kept = (ids, float(control_scale)), self._sources.setdefault(inversion, OrderedDict())
        if key not in kept:
            with _timed(timings, "source"):
                kept[key] = jax.block_until_ready(
                    source_program(
                        self.network, trajectory, features, knobs.control_scale, prompts.null, prompts.source
                    )
                )
        kept.move_to_end(key)
        while len(kept) > _KEPT_SOURCES:
            kept.popitem(last=False)
        with _timed(timings, "edit"):
            result = edit_program(self.network, trajectory, features, prompts, knobs, kept[key])
            result = jax.block_until_ready(result)
        with _timed(timings, "decode"):
            images = np.asarray(decode_program(self.network, result.latents))
        result = jax.tree.map(np.asarray, result)
        weights = np.asarray(prompts.word_weights)
        return [
            EditResult(
                images[row],
                result.latents[row],
                result.masks[:, row],
                weights[row],
                dict(timings),
                _trace(result, row) if return_trace else None,
            )
            for row in range(len(targets))
        ]

    def _inverted(self, z0: Any, edges: Any, config: InversionConfig) -> Inversion:
        schedule = self.network.schedule
        num_steps = len(schedule.timesteps(config.num_steps))
        if config.mode == "official" and num_steps % schedule.num_windows:
            warnings.warn(
                f"num_steps: {num_steps} is no multiple of the {schedule.num_windows} windows, where the official "
                'inversion is inexact; mode="exact" is not',
                stacklevel=3,
            )
        edges = np.asarray(edges)
        trajectory, features = invert_program(
            self.network,
            z0[None],
            None if self.network.controlnet is None else jnp.asarray(edges)[None],
            self._state("")[1],
            np.float32(config.control_scale),
            num_steps=num_steps,
            mode=config.mode,
        )
        features = None if features is None else features[0]
        trajectory = jax.block_until_ready(trajectory)
        return Inversion(trajectory[:, 0], edges, features, num_steps, config.mode, float(config.control_scale))

    def _check_inversion(self, inversion: Inversion, num_steps: int | None) -> None:
        schedule = self.network.schedule
        if inversion.num_steps < schedule.num_windows:
            raise ValueError(
                f"inversion: expected at least {schedule.num_windows} steps, one a window, got {inversion.num_steps}"
            )
        if num_steps is not None and len(schedule.timesteps(num_steps)) != inversion.num_steps:
            raise ValueError(f"num_steps: expected {inversion.num_steps}, those of the inversion, got {num_steps}")
        if self.network.controlnet is not None and inversion.hint_features is None:
            raise ValueError("inversion: expected hint_features, those of this network's ControlNet; it has none")

    def _state(self, prompt: str) -> tuple[tuple[int, ...], Any]:
        """A prompt's ids without padding, and its states `[1, S, D]`."""
        ids = tuple(self.tokenizer.ids(prompt))
        if ids not in self._states:
            self._states[ids] = _text(self.network, self.tokenizer.padded(list(ids))[None])
            if len(self._states) > _KEPT_PROMPTS:
                self._states.popitem(last=False)
        self._states.move_to_end(ids)
        return ids, self._states[ids]

    def _prompts(
        self, source_prompt: str, targets: list[str], blends: list[str | None], compat: Compat
    ) -> tuple[tuple[int, ...], Prompts]:
        """The source's ids, and what the networks read."""
        _, null = self._state("")
        source_ids, source = self._state(source_prompt)
        states, weights, lengths = [], [], []
        for prompt, blend in zip(targets, blends):
            ids, target = self._state(prompt)
            words = self.tokenizer.words(blend) if blend else []
            try:
                weights.append(word_weights(source_ids, ids, words, source[0], target[0], compat=compat))
            except ValueError as error:
                tokens = [self.tokenizer.tokenizer.backend.id_to_token(token) for token in ids[1:-1]]
                raise ValueError(
                    f"blend_word: {blend!r} is not in the target prompt, whose tokens are {', '.join(tokens)}"
                ) from error
            absent = [
                token
                for token, place in zip(words, find_tokens(ids, words))
                if place is None and token not in source_ids
            ]
            if absent and weights[-1].any():
                names = ", ".join(map(self.tokenizer.tokenizer.backend.id_to_token, absent))
                warnings.warn(f"blend_word: {names} of {blend!r} is in neither prompt and left out", stacklevel=4)
            states.append(target)
            lengths.append(len(ids))
        made = Prompts(null, source, jnp.concatenate(states), np.stack(weights), np.array(lengths, np.int32))
        return source_ids, made


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started


_text: Callable[..., Any] = jax.jit(lambda network, ids: network.states(ids))
_encode: Callable[..., Any] = jax.jit(lambda network, image, rng: network.encode(image, rng))


def _batch_of_one(inversion: Inversion) -> tuple[Any, Any]:
    features = inversion.hint_features
    return jnp.asarray(inversion.trajectory)[:, None], None if features is None else jnp.asarray(features)[None]


def _trace(result: Edited, row: int) -> EditTrace:
    return EditTrace(result.steps[:, row], result.guided_first[row], result.attention[:, :, row])


def _factor(network: EditorNetwork) -> int:
    """Pixels for a latent, either side."""
    return 1 if network.vae is None else network.vae.config.factor


def _check_edges(edges: Any, size: tuple[int, ...]) -> None:
    if np.shape(edges) != tuple(size) or np.asarray(edges).dtype != bool:
        raise ValueError(f"edges: expected bool {list(size)}, got {np.asarray(edges).dtype} {list(np.shape(edges))}")
