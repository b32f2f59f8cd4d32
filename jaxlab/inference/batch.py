"""A batch being decoded: checked prompts in bucketed arrays, two compiled programs, results coming to the host."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.inference.layout import decode_params, is_decode_form
from jaxlab.inference.params import SamplingArrays, SamplingParams
from jaxlab.inference.sampling import sample
from jaxlab.inference.shared_prefix import SharedPrefixCache
from jaxlab.inference.steps import next_logits, prefill
from jaxlab.models.decoder import KVCache
from jaxlab.models.decoder.model import abstract_params

LogitProcessor = Callable[[Array, Array, Array], Array]

# Laying the weights out costs the time of some decode steps, and its program compiles longer.
_WORTH_LAYING_OUT = 32


@struct.dataclass
class _State:
    """A batch between two steps. `ids` are drawn and not yet in the cache, where they go to `positions`."""

    cache: Any
    ids: Int[Array, " r"]
    positions: Int[Array, " r"]
    ended: Bool[Array, " r"]
    lengths: Int[Array, " r"]
    tokens: Int[Array, "r n"]
    logps: Float[Array, "r n"]
    step: Int[Array, ""]


@struct.dataclass
class _Rows:
    """What stays the same through a batch; rows that are not `real` fill up.

    A row's key is `fold_in(its key_data, its index)`. `rope_delta` is added to its positions; None where M-RoPE is not
    used.
    """

    prompt: Any
    real: Any
    index: Any
    key_data: Any
    sampling: SamplingArrays
    stop_ids: Any
    rope_delta: Any
    key_impl: Any = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What stands for a prompt's tokens: embeddings with images among them, and where they stand.

    Attributes:
        embeddings: `[T,D]`.
        rope_positions: `[3,T]` M-RoPE positions.
        rope_delta: what is added to a later token's index to give its position.
    """

    embeddings: Any
    rope_positions: Any
    rope_delta: int


_STATIC = ("model", "processor", "replicated")


@functools.partial(
    jax.jit, static_argnames=(*_STATIC, "cache_length", "suffix_length", "samples", "capacity", "by_layer")
)
def _start(
    model,
    params,
    tokens,
    positions,
    embeddings,
    rope_positions,
    rows,
    *,
    cache_length,
    suffix_length,
    samples,
    capacity,
    by_layer,
    processor,
    replicated,
) -> _State:
    """Prefills every prompt once, hands its cache to its rows, and draws their first tokens."""
    cache = KVCache.create(model.config, tokens.shape[0], cache_length)
    if rope_positions is not None:
        rope_positions = rope_positions.swapaxes(0, 1)
    logits, cache = prefill(
        model, params, cache, tokens, positions, embeddings=embeddings, rope_positions=rope_positions
    )
    last = jnp.max(positions, axis=1)
    if samples > 1:
        if suffix_length is None:
            cache = cache.take(rows.prompt)
        else:
            cache = SharedPrefixCache.create(model.config, cache, last + 1, samples, suffix_length)
        logits, last = logits[rows.prompt], last[rows.prompt]
    if by_layer:
        cache = cache.split()
    count = rows.index.shape[0]
    state = _State(
        cache=cache,
        ids=jnp.zeros(count, jnp.int32),
        positions=last,
        ended=~rows.real,
        lengths=jnp.zeros(count, jnp.int32),
        tokens=jnp.zeros((count, capacity), jnp.int32),
        logps=jnp.zeros((count, capacity), jnp.float32),
        step=jnp.int32(0),
    )
    return _readable(_drawn(state, logits, rows, processor), replicated)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _continue(model, params, state, rows, until, stopped, *, processor, replicated) -> _State:
    """Decodes up to step `until`, or until every row has ended; `stopped` rows end first."""

    def running(state):
        return (state.step < until) & ~jnp.all(state.ended)

    def step(state):
        positions, rope_positions = jnp.maximum(state.positions, 0), None
        if rows.rope_delta is not None:
            rope_positions = jnp.broadcast_to(positions + rows.rope_delta, (3, *positions.shape))[..., None]
        logits, cache = next_logits(model, params, state.cache, state.ids, positions, rope_positions)
        return _drawn(dataclasses.replace(state, cache=cache), logits, rows, processor)

    state = dataclasses.replace(state, ended=state.ended | stopped)
    return _readable(jax.lax.while_loop(running, step, state), replicated)


def _drawn(state: _State, logits: Array, rows: _Rows, processor: LogitProcessor | None) -> _State:
    """The state after one draw; rows that have ended stay as they are."""
    if processor is not None:
        logits = processor(logits, state.tokens, state.lengths)
    rng = jax.random.wrap_key_data(rows.key_data, impl=rows.key_impl)
    row_keys = jax.vmap(jax.random.fold_in)(rng, rows.index)
    keys = jax.vmap(jax.random.fold_in)(row_keys, state.positions + 1)
    ids, logps = sample(logits, keys, rows.sampling)
    live = ~state.ended
    here = live[:, None] & (jnp.arange(state.tokens.shape[1]) == state.step)
    return dataclasses.replace(
        state,
        ids=jnp.where(live, ids, state.ids),
        positions=state.positions + live,
        ended=state.ended | jnp.any(ids[:, None] == rows.stop_ids, axis=1),
        lengths=state.lengths + live,
        tokens=jnp.where(here, ids[:, None], state.tokens),
        logps=jnp.where(here, logps[:, None], state.logps),
        step=state.step + 1,
    )


def _readable(state: _State, replicated: NamedSharding | None) -> _State:
    """Replicates what the host reads, so that every process of the mesh holds it."""
    if replicated is None:
        return state
    read = {name: getattr(state, name) for name in ("ended", "lengths", "tokens", "logps", "step")}
    return dataclasses.replace(state, **jax.lax.with_sharding_constraint(read, replicated))


class Batch:
    """Prompts and their rows, decoded by `run`; `tokens`, `logps`, `lengths` and `stopped` are the results so far.

    Args are those of `generate`; everything is checked here. Beside `prompts` of ids may stand what they are `embedded`
    as, one `Embedded` each. With `keys`, one of each prompt, a row draws with `fold_in(key of its prompt, its sample)`
    in place of `fold_in(rng, row)`; `samples` says which n samples of each are drawn, in place of the first n.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        prompts: Sequence[Any],
        sampling: SamplingParams,
        *,
        n: int = 1,
        rng: Array | None = None,
        tokenizer: Any = None,
        mesh: Mesh | None = None,
        processor: LogitProcessor | None = None,
        prompt_length: int | None = None,
        embedded: Sequence[Embedded] | None = None,
        keys: Sequence[Array] | None = None,
        samples: Sequence[int] | None = None,
    ):
        n = _sample_count(n)
        if sampling.temperature > 0 and rng is None and keys is None:
            raise ValueError(f"rng: expected a PRNG key at temperature {sampling.temperature:g}, got None")
        if sampling.stop and tokenizer is None:
            raise TypeError(f"tokenizer: expected one, to look for the stop strings {sampling.stop!r}, got None")
        ids = prompt_ids(prompts, tokenizer, model.config, sampling.max_tokens)
        self.stop_ids = tuple(sorted({*sampling.ending_ids(tokenizer)}))
        self.count = len(ids) * n
        self.steps = sampling.max_tokens
        self.tokens = np.zeros((self.count, self.steps), np.int32)
        self.logps = np.zeros((self.count, self.steps), np.float32)
        self.lengths = np.zeros(self.count, np.int32)
        self.stopped = np.zeros(self.count, bool)
        self._model, self._params, self._mesh = model, params, mesh
        self._static = {"processor": processor, "replicated": mesh and NamedSharding(mesh, PartitionSpec())}
        longest = max(map(len, ids))
        if prompt_length is not None and prompt_length < longest:
            raise ValueError(f"prompt_length: expected at least the longest prompt's {longest}, got {prompt_length}")
        self._arrays(ids, n, rng, sampling, prompt_length or longest, embedded, keys, samples)

    def _arrays(
        self,
        ids: list[np.ndarray],
        n: int,
        rng: Array | None,
        sampling: SamplingParams,
        longest: int,
        embedded: Sequence[Embedded] | None,
        keys: Sequence[Array] | None,
        samples: Sequence[int] | None,
    ) -> None:
        spread = 1 if self._mesh is None else self._mesh.shape.get("data", 1) * self._mesh.shape.get("fsdp", 1)
        shape = (spread * _bucket(-(-len(ids) // spread)), _bucket(longest, 16))
        tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, prompt in enumerate(ids):
            tokens[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = np.arange(len(prompt))
        stop_ids = np.full(_bucket(len(self.stop_ids), 4), -1, np.int32)
        stop_ids[: len(self.stop_ids)] = self.stop_ids
        index = np.arange(shape[0] * n, dtype=np.int32)
        prompt = index // n
        own = np.asarray(range(n) if samples is None else samples, np.int32)
        given = keys or [jax.random.key(0) if rng is None else rng]
        typed = jnp.issubdtype(given[0].dtype, jax.dtypes.prng_key)
        key_data = np.stack([np.asarray(jax.random.key_data(key) if typed else key) for key in given])
        rope_delta = None
        if embedded is not None:
            rope_delta = np.array([own.rope_delta for own in embedded], np.int32)[np.minimum(prompt, len(ids) - 1)]
        self._prompts = tokens, positions, *_padded(embedded, shape)
        self._rows = _Rows(
            prompt=prompt,
            real=index < self.count,
            index=index if keys is None else own[index % n],
            key_data=key_data[np.minimum(prompt, len(given) - 1)],
            sampling=SamplingArrays.stack([sampling] * len(index)),
            stop_ids=stop_ids,
            rope_delta=rope_delta,
            key_impl=str(jax.random.key_impl(given[0])) if typed else None,
        )
        self._capacity = _bucket(self.steps, 16)
        # Over a mesh XLA could not divide the kernel that reads a shared prefix.
        shared = n > 1 and self._mesh is None and self._model.config.windows is None
        self._start_options = {
            "cache_length": shape[1] if shared else _bucket(longest + self.steps, 16),
            "suffix_length": self._capacity if shared else None,
            "samples": n,
            "capacity": self._capacity,
        }

    def run(self, segment: int, stop_row: Callable[[np.ndarray, int], int | None] | None = None) -> Iterator[None]:
        """Decodes all rows, pausing every `segment` steps.

        Args:
            segment: steps between pauses.
            stop_row: (ids of a row so far, how many were seen before) -> how many of them to keep and end with, or
                None to go on.
        """
        if self.steps == 0:
            return
        stored, prompts, rows = self._placed()
        params = decode_params(self._model, stored) if self._capacity >= _WORTH_LAYING_OUT else stored
        by_layer = is_decode_form(params) or not self._model.config.scan
        options = {**self._start_options, "by_layer": by_layer, **self._static}
        with self._in_mesh():
            # A prefill reads the weights once and gains nothing from another layout.
            state = _start(self._model, stored, *prompts, rows, **options)
        cut = np.zeros(len(self._rows.index), bool)
        step = 1
        while True:
            running = self._collect(state, cut, stop_row)
            yield
            if step >= self.steps or not running:
                return
            step = min(step + segment, self.steps)
            with self._in_mesh():
                state = _continue(self._model, params, state, rows, np.int32(step), cut.copy(), **self._static)

    def _collect(self, state: _State, cut: np.ndarray, stop_row: Callable[..., int | None] | None) -> bool:
        """Takes over what is new; whether any row goes on."""
        read = jax.device_get((state.tokens, state.logps, state.lengths, state.ended))
        tokens, logps, lengths, ended = (np.asarray(array)[: self.count] for array in read)
        for row in np.flatnonzero(~cut[: self.count]):
            length = int(lengths[row])
            kept = stop_row(tokens[row, :length], int(self.lengths[row])) if stop_row else None
            cut[row] = kept is not None
            length = length if kept is None else kept
            self.tokens[row, :length], self.logps[row, :length] = tokens[row, :length], logps[row, :length]
            self.lengths[row], self.stopped[row] = length, ended[row] or cut[row]
        return not self.stopped.all()

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _placed(self) -> tuple[Any, Any, Any]:
        if self._mesh is None:
            return self._params, self._prompts, self._rows
        if is_decode_form(self._params):
            raise ValueError("params: expected the stored form with a mesh, got that of decode_params")
        params = jax.device_put(self._params, shardings(abstract_params(self._model), self._mesh, DEFAULT_RULES))
        by_row = shardings(
            jax.tree.map(lambda x: nn.Partitioned(x, ("batch",)), (self._prompts, self._rows.index)), self._mesh
        )
        place = by_row[1]
        rows = dataclasses.replace(
            self._rows,
            prompt=jax.device_put(self._rows.prompt, place),
            real=jax.device_put(self._rows.real, place),
            index=jax.device_put(self._rows.index, place),
            key_data=jax.device_put(self._rows.key_data, place),
            sampling=jax.device_put(self._rows.sampling, place),
        )
        return params, jax.device_put(self._prompts, by_row[0]), rows


def _bucket(size: int, least: int = 1) -> int:
    """The power of two that holds `size`."""
    return 1 << (max(size, least) - 1).bit_length()


def _padded(embedded: Sequence[Embedded] | None, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Embeddings `[P,T,D]` and M-RoPE positions `[P,3,T]` of all prompts, zeros where padded; None without."""
    if embedded is None:
        return None, None
    first = embedded[0].embeddings
    embeddings = np.zeros((*shape, first.shape[1]), first.dtype)
    rope_positions = np.zeros((shape[0], 3, shape[1]), np.int32)
    for row, own in enumerate(embedded):
        length = own.embeddings.shape[0]
        embeddings[row, :length], rope_positions[row, :, :length] = own.embeddings, own.rope_positions
    return embeddings, rope_positions


def _sample_count(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"n: expected an integer, got {n!r}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    return int(n)


def prompt_ids(prompts: Sequence[Any], tokenizer: Any, config: Any, max_tokens: int) -> list[np.ndarray]:
    """Ids of prompts that are texts or ids, checked; see `generate` for the errors."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a sequence of prompts, got the string {prompts[:40]!r}")
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    result = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, str):
            if tokenizer is None:
                raise TypeError(f"tokenizer: expected one, since {name} is a string, got None")
            prompt = tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise ValueError(f"{name}: expected at least one token, got none")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"{name}: expected a string or a list of ids, got {ids.dtype} of shape {ids.shape}")
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: expected ids in [0, {config.vocab_size}), got {int(outside[0])}")
        if ids.size + max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{name}: expected prompt + max_tokens within max_position_embeddings="
                f"{config.max_position_embeddings}, got {ids.size} + {max_tokens}"
            )
        result.append(ids.astype(np.int32))
    return result
