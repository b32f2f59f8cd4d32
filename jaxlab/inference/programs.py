"""The few programs that an engine compiles, and the sizes it compiles them for."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxlab.inference.paged import ArrayLike, PagedKVCache
from jaxlab.inference.params import SamplingArrays
from jaxlab.inference.sampling import sample
from jaxlab.inference.steps import decode_step, prefill

MOST_ALTERNATIVES = 20
"""Largest `SamplingParams.logprobs` of a request, as in the OpenAI API."""

_ROW = 16  # tokens of a chunk that are worth a row of logits
_STEP = 4  # between widths: attention passes over no more of a table than is used

Pool = tuple[Float[Array, "l hkv p page d"], Float[Array, "l hkv p page d"]]


@struct.dataclass
class Draws:
    """How B rows draw their next tokens.

    Attributes:
        seeds: `[B]`; row b draws with `fold_in(fold_in(key(seed), 0), position)`, as `generate` of it alone does.
        sampling: of the rows.
        report: whether any of them wants alternatives.
    """

    seeds: Int[ArrayLike, " b"]
    sampling: SamplingArrays
    report: Bool[ArrayLike, ""]


@struct.dataclass
class Drawn:
    """What B rows drew: ids and log-probabilities, and the likeliest alternatives (zeros unless reported)."""

    ids: Int[Array, " b"]
    logps: Float[Array, " b"]
    top_ids: Int[Array, "b k"]
    top_logps: Float[Array, "b k"]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes of programs.

    Attributes:
        batch: rows of a decode step.
        widths: pages of its table.
        tokens: of a step that reads prompts; it has a row of logits for every 16 of them.
        pages: of its table.
    """

    batch: tuple[int, ...]
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, batch: tuple[int, ...], *, row_pages: int, prefill_tokens: int, page_size: int) -> "Buckets":
        """Sizes for rows of at most `row_pages` pages.

        Args:
            batch: rows of a decode step.
            row_pages: pages of the longest request.
            prefill_tokens: read in one step, at most.
            page_size: tokens in a page.
        """
        most = _power(prefill_tokens)
        tokens = tuple(1 << n for n in range(min(_ROW, most).bit_length() - 1, most.bit_length()))
        # Each chunk may begin and end inside a page.
        pages = max(row_pages, -(-most // page_size) + rows_of(most))
        return cls(batch, _widths(row_pages), tokens, _widths(pages))

    def reading(self, tokens: int, rows: int, pages: int) -> tuple[int, int, int]:
        """Padded tokens, rows of logits and pages for so many."""
        tokens = max(fitting(self.tokens, tokens), fitting(self.tokens, min(rows * _ROW, self.tokens[-1])))
        return tokens, rows_of(tokens), fitting(self.pages, pages)

    def programs(self) -> Iterator[tuple[Any, ...]]:
        """("decode", rows, width), ("read", tokens, rows, pages) and ("draw", rows): all there can be."""
        yield from (("decode", rows, width) for rows in self.batch for width in self.widths)
        yield from (("draw", rows) for rows in sorted({rows_of(tokens) for tokens in self.tokens}))
        yield from (("read", tokens, rows_of(tokens), pages) for tokens in self.tokens for pages in self.pages)


def fitting(sizes: tuple[int, ...], size: int) -> int:
    """The least of ascending `sizes` that is at least `size`."""
    return sizes[bisect.bisect_left(sizes, size)]


def rows_of(tokens: int) -> int:
    """Rows of logits of a step that reads so many tokens."""
    return max(tokens // _ROW, 1)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _widths(most: int) -> tuple[int, ...]:
    width, widths = _power(most), []
    while width >= _STEP or not widths:
        widths.append(width)
        width //= _STEP
    return tuple(reversed(widths))


_STATIC = ("model", "replicated")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="pool")
def decode(
    model: Any,
    params: Any,
    pool: Pool,
    ids: Int[Array, " b"],
    positions: Int[Array, " b"],
    page_table: Int[Array, "b n"],
    draws: Draws,
    *,
    replicated: NamedSharding | None,
) -> tuple[Drawn, Pool]:
    """Computes one token of each row: what it drew, and the pool. Position -1 is no row."""
    cache = PagedKVCache(*pool, page_table)
    keys = _keys(draws, positions + 1)
    found, logps, cache, logits = decode_step(
        model, params, cache, ids, positions, keys, draws.sampling, return_logits=True
    )
    drawn = Drawn(found, logps, *_alternatives(logits, draws))
    return _readable(drawn, replicated), (cache.k, cache.v)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="pool")
def read(
    model: Any,
    params: Any,
    pool: Pool,
    tokens: Int[Array, "1 t"],
    positions: Int[Array, "1 t"],
    page_table: Int[Array, "1 n"],
    packing: Any,
    columns: Int[Array, "1 r"],
    *,
    replicated: NamedSharding | None,
) -> tuple[Float[Array, "r v"], Pool]:
    """Reads packed chunks of prompts: the logits at `columns`, and the pool."""
    cache = PagedKVCache(*pool, page_table, packing)
    logits, cache = prefill(model, params, cache, tokens, positions, columns=columns)
    return _readable(logits[0], replicated), (cache.k, cache.v)


@functools.partial(jax.jit, static_argnames="replicated")
def draw(
    logits: Float[Array, "r v"], positions: Int[Array, " r"], draws: Draws, *, replicated: NamedSharding | None
) -> Drawn:
    """Draws the tokens that come to stand at `positions`."""
    ids, logps = sample(logits, _keys(draws, positions), draws.sampling)
    return _readable(Drawn(ids, logps, *_alternatives(logits, draws)), replicated)


@jax.jit
def take_pages(pool: Pool, pages: Int[Array, " n"]) -> tuple[Any, Any]:
    """Copies pages out: k and v `[L,Hkv,n,page,D]`."""
    return pool[0][:, :, pages], pool[1][:, :, pages]


@functools.partial(jax.jit, donate_argnames="pool")
def put_pages(pool: Pool, pages: Int[Array, " n"], k: Any, v: Any) -> Pool:
    """Writes pages; those numbered P are dropped."""
    keys, values = pool
    keys = keys.at[:, :, pages].set(k.astype(keys.dtype), mode="drop")
    return keys, values.at[:, :, pages].set(v.astype(values.dtype), mode="drop")


def _keys(draws: Draws, positions: Int[Array, " b"]) -> Array:
    def key(seed, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), position)

    return jax.vmap(key)(draws.seeds, positions)


def _alternatives(logits: Float[Array, "b v"], draws: Draws) -> tuple[Array, Array]:
    count = min(MOST_ALTERNATIVES, logits.shape[1])

    def likeliest(_):
        temperature = draws.sampling.temperature
        logps = jax.nn.log_softmax(logits / jnp.where(temperature == 0, 1.0, temperature)[:, None])
        values, ids = jax.lax.top_k(logps, count)
        return ids, values

    def none(_):
        shape = logits.shape[0], count
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return jax.lax.cond(draws.report, likeliest, none, None)


def _readable(tree: Any, replicated: NamedSharding | None) -> Any:
    return tree if replicated is None else jax.lax.with_sharding_constraint(tree, replicated)
