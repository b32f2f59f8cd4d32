"""Samples of questions with images: encoded and prefilled once a question, its samples drawn together."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlab.core import named_key
from jaxlab.inference.batch import Batch, Embedded, padded
from jaxlab.inference.params import SamplingParams
from jaxlab.models.qwen2_5_vl import image_layout, mrope_index, pad_layout
from jaxlab.models.qwen2_5_vl.positions import host_grid


@dataclasses.dataclass(frozen=True)
class Request:
    """A question.

    Attributes:
        id: names it; its samples depend on it.
        input_ids: `[T]` ids, a placeholder for each token of its images.
        pixel_values: `[n_patches,1176]` its images one after the other, None for text alone.
        image_grid_thw: `[n_images,3]` patches of each along (time, height, width).
    """

    id: str
    input_ids: Any
    pixel_values: Any = None
    image_grid_thw: Any = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was drawn for a request.

    Attributes:
        id: of the request.
        tokens: `[n,max_new]` int32, an ending token included, 0 after it.
        mask: `[n,max_new]` bool, True where a token was drawn.
        logps: `[n,max_new]` float32, of the temperature-scaled, untruncated distribution.
        finish_reason: of each sample, "stop" or "length".
    """

    id: str
    tokens: np.ndarray
    mask: np.ndarray
    logps: np.ndarray
    finish_reason: list[str]


def sample(
    model: Any,
    params: Any,
    requests: Sequence[Request],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    key: Array,
    allow_duplicates: bool = False,
    indices: Sequence[int] | None = None,
) -> list[Samples]:
    """Draws n samples of every request, all in one batch.

    A sample's randomness depends on (key, request id, sample index) only. Images are encoded request by request, in
    programs of sizes rounded up to powers of two, so that they do not depend on batch mates either; requests that share
    one array of pixels share its encoding.

    Args:
        model: a `Qwen25VL`, or a network with its methods.
        params: its parameters.
        requests: the questions.
        n: samples of each; its images and prompt are computed, held and read once.
        temperature: 0 is greedy.
        top_p: of `SamplingParams`.
        top_k: of `SamplingParams`.
        max_new_tokens: at most.
        eos_ids: tokens that end a sample.
        key: PRNG key.
        allow_duplicates: at temperature 0, n > 1 is a warning and gives n equal samples.
        indices: of the samples that are drawn, n of them; None: the first n.

    Raises:
        ValueError: no requests, temperature below 0, top_p outside (0, 1], n > 1 at temperature 0, indices that are not
            n, placeholders or pixel rows that do not fit the grid, a prompt too long.
    """
    if indices is not None and len(indices) != n:
        raise ValueError(f"indices: expected n = {n} of them, got {list(indices)}")
    sampling = SamplingParams(
        max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=tuple(eos_ids)
    )
    if temperature == 0 and n > 1:
        said = f"n: expected 1 at temperature 0, where all samples are equal, got {n}"
        if not allow_duplicates:
            raise ValueError(said)
        warnings.warn(said, stacklevel=2)
    batch = Batch(
        model.text_model(),
        params["language"],
        [np.asarray(request.input_ids) for request in requests],
        sampling,
        n=n,
        embedded=embedded(model, params, requests),
        keys=[named_key(key, request.id) for request in requests],
        samples=indices,
    )
    for _ in batch.run(max(max_new_tokens, 1)):
        pass
    mask = np.arange(batch.steps) < batch.lengths[:, None]
    found = []
    for index, request in enumerate(requests):
        rows = slice(index * n, (index + 1) * n)
        reasons = ["stop" if stopped else "length" for stopped in batch.stopped[rows]]
        found.append(Samples(request.id, batch.tokens[rows], mask[rows], batch.logps[rows], reasons))
    return found


def embedded(model: Any, params: Any, requests: Sequence[Request]) -> list[Embedded]:
    """Requests as the decoder reads them; an array of pixels that several share is encoded once."""
    known: dict[Any, Array] = {}
    return [_embedded(model, params, request, known) for request in requests]


def next_token_logits(model: Any, params: Any, requests: Sequence[Request]) -> np.ndarray:
    """Logits `[R,V]` float32 of the token that follows each prompt: one pass, whose sizes are powers of two.

    Args:
        model: a `Qwen25VL`.
        params: its parameters.
        requests: prompts.

    Raises:
        ValueError: no requests, or images that do not fit their placeholders.
    """
    if not requests:
        raise ValueError("requests: expected at least one, got none")
    rows = embedded(model, params, requests)
    lengths = np.array([len(row.embeddings) for row in rows], np.int32)
    shape = _bucket(len(rows), 1), _bucket(int(lengths.max()))
    last = np.pad(lengths - 1, (0, shape[0] - len(rows)))
    return np.asarray(_last_logits(model.text_model(), params["language"], *padded(rows, shape), last))[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(decoder, params, embeddings, rope_positions, last):
    rope_positions = rope_positions.swapaxes(0, 1)
    out = decoder.apply({"params": params}, None, None, embeddings=embeddings, rope_positions=rope_positions)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return decoder.apply({"params": params}, hidden, method="unembed")


def _embedded(model: Any, params: Any, request: Request, known: dict[Any, Array]) -> Embedded:
    ids = np.asarray(request.input_ids, np.int32)[None]
    positions, delta = mrope_index(ids, request.image_grid_thw, config=model.config)
    padded = np.zeros((1, _bucket(ids.shape[1])), np.int32)
    padded[:, : ids.shape[1]] = ids
    features = None
    if request.pixel_values is not None or request.image_grid_thw is not None:
        tokens = model.check_images(request.pixel_values, request.image_grid_thw)
        name = id(request.pixel_values), np.asarray(request.image_grid_thw).tobytes()
        if name not in known:
            known[name] = _encoded(model, params, request, _bucket(tokens))
        features = known[name]
    embeddings = np.asarray(_embed(model, params, padded, features))[0, : ids.shape[1]]
    return Embedded(embeddings, positions[:, 0], int(delta[0, 0]))


def _encoded(model: Any, params: Any, request: Request, tokens: int) -> Array:
    vision = model.config.vision
    group = vision.spatial_merge_size**2
    layout = image_layout(host_grid(request.image_grid_thw, vision.spatial_merge_size), vision)
    pixels = np.zeros((tokens * group, vision.patch_features), np.float32)
    pixels[: request.pixel_values.shape[0]] = request.pixel_values
    return _encode(model, params, pixels, pad_layout(layout, tokens * group, group))


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, pixels, layout):
    return model.apply({"params": params}, pixels, layout, method="encode_patches")


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, ids, features):
    return model.apply({"params": params}, ids, features, method="embed")


def _bucket(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, `least` at least."""
    return 1 << (max(size, least) - 1).bit_length()
