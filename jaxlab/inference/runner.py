"""What an engine has on its devices: parameters, the pool of pages, and the batch between two steps."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.inference import programs
from jaxlab.inference.layout import decode_params
from jaxlab.inference.paged import Packing, PagedKVCache
from jaxlab.inference.params import SamplingArrays, SamplingParams
from jaxlab.inference.programs import Buckets, Drawn, Draws, fitting
from jaxlab.inference.scheduler import Chunk, Request
from jaxlab.inference.serving import EngineConfig
from jaxlab.models.decoder.model import abstract_params

_NO_REQUEST = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class _Rows:
    """The batch after a step: what the next can use again."""

    requests: list[Request]
    epoch: int
    pages: list[int]
    page_table: np.ndarray
    draws: Draws


class Runner:
    """Runs what a scheduler has planned. How a request draws is `request.extra`'s `sampling` and `seed`.

    Args:
        model: a `Decoder`.
        params: its parameters.
        config: sizes.
        mesh: as in `Engine`.

    Attributes:
        buckets: sizes that programs are compiled for.
        compiled: of the programs used so far, kind and sizes.
    """

    def __init__(self, model: Any, params: Any, config: EngineConfig, mesh: Mesh | None):
        own = model.config
        shards = 1 if mesh is None else mesh.shape.get("tensor", 1)
        if own.num_key_value_heads % shards:
            raise ValueError(
                f"mesh: expected a tensor axis that divides {own.num_key_value_heads} key and value heads, got {shards}"
            )
        self._model, self._mesh, self._size = model, mesh, config.page_size
        if mesh is None:
            leaf = jax.tree.leaves(params)[0]
            device = next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0]
            self._place = pool_place = SingleDeviceSharding(device)
        else:
            self._place = NamedSharding(mesh, PartitionSpec())
            pool_place = NamedSharding(mesh, PartitionSpec(None, "tensor") if shards > 1 else PartitionSpec())
        self._replicated = None if mesh is None else self._place
        self._params = self._placed(params)
        table = np.zeros((1, 1), np.int32)
        empty = PagedKVCache.create(own, config.num_pages, config.page_size, table, config.kv_dtype)
        self._pool = jax.device_put((empty.k, empty.v), pool_place)
        self._rows: _Rows | None = None
        rows = config.batch_buckets
        assert rows is not None  # the configuration fills it in
        self.buckets = Buckets.of(
            rows,
            row_pages=min(-(-own.max_position_embeddings // config.page_size), config.num_pages - 1),
            prefill_tokens=config.prefill_chunk,
            page_size=config.page_size,
        )
        self.compiled: set[tuple[Any, ...]] = set()

    @property
    def params(self) -> Any:
        """Laid out for decoding, placed; others of the same shapes can take their place."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        placed = self._placed(params)
        if jax.tree.map(_signature, placed) != jax.tree.map(_signature, self._params):
            raise ValueError("params: expected the names, shapes and dtypes of the parameters in use, got others")
        self._params = placed

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """Layers, key and value heads, tokens and head size of a page."""
        layers, heads, _, size, dim = self._pool[0].shape
        return layers, heads, size, dim

    def warmup(self, transfers: bool) -> None:
        """Compiles every program that a step can need, and with `transfers` those of `take` and `give`."""
        for kind, *sizes in self.buckets.programs():
            if kind == "decode":
                rows, width = sizes
                nothing, table = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
                self._decode(nothing, nothing - 1, table, self._draws([], rows))
            elif kind == "read":
                self._read(*_empty_packing(*sizes))
            else:
                logits = np.zeros((sizes[0], self._model.config.vocab_size), np.float32)
                self._draw(self._put(logits), np.zeros(sizes[0], np.int32), [])
        if transfers:
            for count in self._page_counts():
                pages = self.take([0] * count)
                self.give([self._pool[0].shape[2]] * count, *pages)

    def read(self, chunks: Sequence[Chunk]) -> jax.Array:
        """Reads chunks side by side; logits `[R,V]`, at the last token of each in the first rows."""
        starts = np.cumsum([0] + [-(-chunk.stop // self._size) for chunk in chunks])
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        tokens, positions, table, packing, columns = arrays = _empty_packing(
            *self.buckets.reading(total, len(chunks), int(starts[-1]))
        )
        column = 0
        for row, (chunk, page, end) in enumerate(zip(chunks, starts, starts[1:])):
            here, there = slice(column, column + chunk.stop - chunk.start), slice(page, end)
            tokens[0, here] = chunk.request.tokens[chunk.start : chunk.stop]
            positions[0, here] = np.arange(chunk.start, chunk.stop)
            packing.slots[0, here] = positions[0, here] + page * self._size
            packing.segments[0, here] = packing.page_segments[0, there] = row + 1
            packing.page_lengths[0, there] = np.minimum(
                chunk.stop - np.arange(0, (end - page) * self._size, self._size), self._size
            )
            table[0, there] = chunk.request.pages[: end - page]
            column = here.stop
            columns[0, row] = column - 1
        return self._read(*arrays)

    def draw(self, logits: jax.Array, requests: Sequence[Request]) -> Drawn:
        """The next token of each request, whose logits are the first rows."""
        positions = np.zeros(logits.shape[0], np.int32)
        positions[: len(requests)] = [request.computed for request in requests]
        return self._draw(logits, positions, requests)

    def decode(self, requests: list[Request], epoch: int) -> Drawn:
        """Computes the last token of each request and draws the next.

        How rows draw stays on the device while they are the same. Ids, positions and table are sent at every step:
        that costs less than keeping them there, as one row or another gets a page at most steps.

        Args:
            requests: that were planned.
            epoch: changes whenever a request may have lost its pages since.
        """
        last, count = self._rows, len(requests)
        pages = [len(request.pages) for request in requests]
        sizes = fitting(self.buckets.batch, count), fitting(self.buckets.widths, max(pages))
        if last is not None and last.requests == requests and last.epoch == epoch:
            draws, known = last.draws, last.pages
        else:
            last, draws, known = None, self._draws(requests, sizes[0]), [0] * count
        if last is not None and last.page_table.shape == sizes:
            table = last.page_table
        else:
            table, known = np.zeros(sizes, np.int32), [0] * count
        for row, (old, new) in enumerate(zip(known, pages)):
            if old < new:
                table[row, old:new] = requests[row].pages[old:new]
        ids, positions = np.zeros(sizes[0], np.int32), np.full(sizes[0], -1, np.int32)
        ids[:count] = [request.tokens[-1] for request in requests]
        positions[:count] = [request.computed - 1 for request in requests]
        self._rows = _Rows(requests, epoch, pages, table, draws)
        return self._decode(ids, positions, table, draws)

    def take(self, pages: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Copies of pages: k and v `[L,Hkv,n,page,D]`, n rounded up."""
        index = np.zeros(fitting(self._page_counts(), len(pages)), np.int32)
        index[: len(pages)] = pages
        self.compiled.add(("take", len(index)))
        with self._in_mesh():
            return programs.take_pages(self._pool, self._put(index))

    def give(self, pages: Sequence[int], k: Any, v: Any) -> None:
        """Writes pages, from arrays of as many or more."""
        index = np.full(fitting(self._page_counts(), len(pages)), self._pool[0].shape[2], np.int32)
        index[: len(pages)] = pages
        self.compiled.add(("give", len(index)))
        k, v = self._put((_fit(k, len(index)), _fit(v, len(index))))
        with self._in_mesh():
            self._pool = programs.put_pages(self._pool, self._put(index), k, v)

    def _placed(self, params: Any) -> Any:
        if self._mesh is None:
            return decode_params(self._model, jax.device_put(params, self._place))
        return jax.device_put(params, shardings(abstract_params(self._model), self._mesh, DEFAULT_RULES))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._place)

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _page_counts(self) -> tuple[int, ...]:
        return tuple(1 << n for n in range(self.buckets.widths[-1].bit_length()))

    def _draws(self, requests: Sequence[Request], rows: int) -> Draws:
        owns = [request.extra for request in requests]
        seeds = np.zeros(rows, np.int32)
        # `jax.random.key` takes the lower 32 bits.
        seeds[: len(owns)] = [(own.seed + 2**31) % 2**32 - 2**31 for own in owns]
        sampling = SamplingArrays.stack([own.sampling for own in owns] + [_NO_REQUEST] * (rows - len(owns)))
        report = any(own.sampling.logprobs for own in owns)
        return self._put(Draws(seeds, sampling, np.array(report)))

    def _read(self, tokens: Any, positions: Any, table: Any, packing: Packing, columns: Any) -> jax.Array:
        self.compiled.add(("read", tokens.shape[1], columns.shape[1], table.shape[1]))
        arrays = tokens, positions, table, packing, columns
        with self._in_mesh():
            logits, self._pool = programs.read(
                self._model, self._params, self._pool, *arrays, replicated=self._replicated
            )
        return logits

    def _draw(self, logits: jax.Array, positions: np.ndarray, requests: Sequence[Request]) -> Drawn:
        self.compiled.add(("draw", len(positions)))
        draws = self._draws(requests, len(positions))
        with self._in_mesh():
            return programs.draw(logits, positions, draws, replicated=self._replicated)

    def _decode(self, ids: np.ndarray, positions: np.ndarray, table: np.ndarray, draws: Draws) -> Drawn:
        self.compiled.add(("decode", *table.shape))
        with self._in_mesh():
            drawn, self._pool = programs.decode(
                self._model, self._params, self._pool, ids, positions, table, draws, replicated=self._replicated
            )
        return drawn


def _signature(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


def _empty_packing(tokens: int, rows: int, pages: int) -> tuple[Any, Any, Any, Packing, Any]:
    """Tokens, positions, page table, packing and columns of a step that reads nothing."""

    def zeros(size: int) -> np.ndarray:
        return np.zeros((1, size), np.int32)

    packing = Packing(zeros(tokens) - 1, zeros(tokens), zeros(pages), zeros(pages))
    return zeros(tokens), zeros(tokens) - 1, zeros(pages), packing, zeros(rows)


def _fit(pages: Any, count: int) -> Any:
    """Exactly `count` pages of an array."""
    if pages.shape[2] == count:
        return pages
    fitted = np.zeros((*pages.shape[:2], count, *pages.shape[3:]), pages.dtype)
    kept = min(count, pages.shape[2])
    fitted[:, :, :kept] = pages[:, :, :kept]
    return fitted
