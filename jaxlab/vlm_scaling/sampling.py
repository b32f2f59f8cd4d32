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
from jaxlab.inference.batch import Batch, Embedded
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.shared_prefix import SharedPrefixCache
from jaxlab.inference.steps import prefill
from jaxlab.models.decoder import KVCache
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
    read = _read(model, params, requests)
    embeddings = np.asarray(_embed(model, params, read.tokens, read.features, read.rows))
    return [
        Embedded(embeddings[row, :length], read.rope_positions[:, row, :length], delta)
        for row, (length, delta) in enumerate(zip(read.lengths, read.deltas))
    ]


def next_token_logits(model: Any, params: Any, requests: Sequence[Request]) -> np.ndarray:
    """Logits `[R,V]` float32 of the token that follows each prompt.

    Prompts with the same images are read together, what they begin with in common once. Sizes are powers of two.

    Args:
        model: a `Qwen25VL`.
        params: its parameters.
        requests: prompts.

    Raises:
        ValueError: no requests, or images that do not fit their placeholders.
    """
    if not requests:
        raise ValueError("requests: expected at least one, got none")
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(_pictures(request), []).append(place)
    found = {
        place: logits
        for places in groups.values()
        for place, logits in zip(places, _next_logits(model, params, [requests[place] for place in places]))
    }
    return np.stack([found[place] for place in range(len(requests))])


def _next_logits(model: Any, params: Any, requests: Sequence[Request]) -> np.ndarray:
    """Of prompts with the same images."""
    ids = [np.asarray(request.input_ids).tolist() for request in requests]
    columns = list(zip(*ids))[:-1]  # one token at least is a row's own
    common = next((place for place, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    images = {token for own in ids for token in own[common:]} & {model.config.image_token_id}
    read = _read(model, params, requests)
    last = np.zeros(read.tokens.shape[0], np.int32)
    last[: len(requests)] = np.array(read.lengths) - 1
    if len(requests) == 1 or common < 1 or images or model.config.text.windows is not None:
        out = _last_logits(model, params, read.tokens, read.features, read.rows, read.rope_positions, last)
        return np.asarray(out)[: len(requests)]
    room = _bucket(common)
    prefix = (
        np.pad(read.tokens[:1, :common], ((0, 0), (0, room - common))),
        np.pad(read.rows[:1, :common], ((0, 0), (0, room - common))),
        np.pad(read.rope_positions[:, :1, :common], ((0, 0), (0, 0), (0, room - common))),
    )
    length = _bucket(max(read.lengths) - common)
    tokens, slots = np.zeros((len(last), length), np.int32), np.full((len(last), length), -1, np.int32)
    rope_positions = np.zeros((3, *tokens.shape), np.int32)
    for row, whole in enumerate(read.lengths):
        own = whole - common
        tokens[row, :own] = read.tokens[row, common:whole]
        slots[row, :own] = np.arange(common, whole)
        rope_positions[:, row, :own] = read.rope_positions[:, row, common:whole]
    suffix = tokens, slots, rope_positions
    out = _shared_logits(model, params, prefix, np.int32(common), read.features, suffix, np.maximum(last - common, 0))
    return np.asarray(out)[: len(requests)]


@dataclasses.dataclass(frozen=True)
class _Read:
    """Requests as R rows of T tokens, both rounded up to powers of two.

    `rows` tells which of the features `[F,D]` stands at a placeholder; `lengths` and `deltas` are the requests'.
    """

    tokens: Any
    rows: Any
    rope_positions: Any
    features: Any
    lengths: tuple[int, ...]
    deltas: tuple[int, ...]


def _read(model: Any, params: Any, requests: Sequence[Request]) -> _Read:
    if not requests:
        raise ValueError("requests: expected at least one, got none")
    config, ids = model.config, [np.asarray(request.input_ids, np.int32) for request in requests]
    shape = _bucket(len(ids), 1), _bucket(max(map(len, ids)))
    tokens, rows = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    rope_positions, deltas = np.zeros((3, *shape), np.int32), []
    known: dict[Any, int] = {}
    features: list[Any] = []
    for row, (own, request) in enumerate(zip(ids, requests)):
        positions, delta = mrope_index(own[None], request.image_grid_thw, config=config)
        tokens[row, : len(own)], rope_positions[:, row, : len(own)] = own, positions[:, 0]
        deltas.append(int(delta[0, 0]))
        if request.pixel_values is None and request.image_grid_thw is None:
            continue
        count = model.check_images(request.pixel_values, request.image_grid_thw)
        name = _pictures(request)
        if name not in known:
            known[name] = sum(part.shape[0] for part in features)
            features.append(_encoded(model, params, request, _bucket(count)))
        rows[row, : len(own)][own == config.image_token_id] = known[name] + np.arange(count)
    joined = features[0] if len(features) == 1 else None
    if len(features) > 1:
        joined = np.concatenate([np.asarray(part) for part in features])
        joined = np.pad(joined, ((0, _bucket(len(joined)) - len(joined)), (0, 0)))
    return _Read(tokens, rows, rope_positions, joined, tuple(map(len, ids)), tuple(deltas))


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, tokens, features, rows):
    return model.apply({"params": params}, tokens, features, rows, method="embed")


def _pictures(request: Request) -> Any:
    """What two requests share that have the same images."""
    if request.pixel_values is None:
        return None
    return id(request.pixel_values), np.asarray(request.image_grid_thw).tobytes()


@functools.partial(jax.jit, static_argnums=0)
def _shared_logits(model, params, prefix, common, features, suffix, last):
    tokens, rows, rope_positions = prefix
    embeddings = model.apply({"params": params}, tokens, features, rows, method="embed")
    decoder, language = model.text_model(), {"params": params["language"]}
    columns = jnp.arange(tokens.shape[1])[None]
    _, cache = prefill(
        decoder,
        params["language"],
        KVCache.create(decoder.config, *tokens.shape),
        None,
        jnp.where(columns < common, columns, -1),
        embeddings=embeddings,
        rope_positions=rope_positions,
    )
    tokens, slots, rope_positions = suffix
    cache = SharedPrefixCache.create(decoder.config, cache, common[None], *tokens.shape)
    out = decoder.apply(language, tokens, slots, cache=cache, rope_positions=rope_positions)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return decoder.apply(language, hidden, method="unembed")


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(model, params, tokens, features, rows, rope_positions, last):
    embeddings = model.apply({"params": params}, tokens, features, rows, method="embed")
    decoder, language = model.text_model(), {"params": params["language"]}
    out = decoder.apply(language, None, None, embeddings=embeddings, rope_positions=rope_positions)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return decoder.apply(language, hidden, method="unembed")


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


def _bucket(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, `least` at least."""
    return 1 << (max(size, least) - 1).bit_length()
