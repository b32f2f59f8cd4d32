"""The serving engine: requests come and go at every step, keys and values lie in pages."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.inference import programs
from jaxlab.inference.batch import prompt_ids
from jaxlab.inference.layout import decode_params
from jaxlab.inference.paged import BlockAllocator, KVPages, Packing, PagedKVCache
from jaxlab.inference.params import SamplingArrays, SamplingParams
from jaxlab.inference.programs import Buckets, Drawn, Draws, fitting
from jaxlab.inference.scheduler import Chunk, Request, Scheduler
from jaxlab.inference.serving import EngineConfig, IterationMetrics, RequestOutput, StepOutput
from jaxlab.inference.text import RowText
from jaxlab.models.decoder.model import abstract_params

_NO_REQUEST = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class _Own:
    """What the engine keeps with a request."""

    sampling: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    reader: RowText | None
    finish_reason: str | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Rows:
    """The batch as it lies on the device after a step, so that the next sends only what changed."""

    requests: list[Request]
    pages: list[int]
    preemptions: int
    ids: Any
    positions: Any
    page_table: Any
    draws: Draws


class Engine:
    """Serves one decoder, step by step. Not thread-safe: one thread owns it.

    A request's tokens do not depend on its batch mates beyond the rounding of sums, and one with a seed draws what
    `generate([prompt], rng=jax.random.key(seed))` draws.

    Example:
        engine = Engine(model, params, EngineConfig(num_pages=256, kv_dtype="float32"))
        outputs = engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=16, temperature=0.0))

    Args:
        model: a `Decoder`.
        params: its parameters.
        config: sizes.
        tokenizer: gives `text`, looks for stop strings, and adds its `eos_token_id` to the stop ids.
        mesh: spreads parameters by `DEFAULT_RULES`, and heads, of the pages too, over its "tensor" axis.

    Raises:
        ValueError: key and value heads that the "tensor" axis does not divide.
    """

    def __init__(
        self, model: Any, params: Any, config: EngineConfig, *, tokenizer: Any = None, mesh: Mesh | None = None
    ):
        own = model.config
        shards = 1 if mesh is None else mesh.shape.get("tensor", 1)
        if own.num_key_value_heads % shards:
            raise ValueError(
                f"mesh: expected a tensor axis that divides {own.num_key_value_heads} key and value heads, got {shards}"
            )
        self.model, self.config, self.tokenizer, self.mesh = model, config, tokenizer, mesh
        if mesh is None:
            leaf = jax.tree.leaves(params)[0]
            device = next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0]
            self._place = pool_place = SingleDeviceSharding(device)
            self._static = {"replicated": None}
        else:
            self._place = NamedSharding(mesh, PartitionSpec())
            pool_place = NamedSharding(mesh, PartitionSpec(None, "tensor") if shards > 1 else PartitionSpec())
            self._static = {"replicated": self._place}
        self._params = self._placed(params)
        empty = PagedKVCache.create(
            own, config.num_pages, config.page_size, np.zeros((1, 1), np.int32), config.kv_dtype
        )
        self._pool = jax.device_put((empty.k, empty.v), pool_place)
        self._allocator = BlockAllocator(config.num_pages)
        buckets = config.batch_buckets
        assert buckets is not None  # the configuration fills it in
        row_pages = min(-(-own.max_position_embeddings // config.page_size), config.num_pages - 1)
        self._buckets = Buckets.of(
            buckets,
            row_pages=row_pages,
            prefill_tokens=config.prefill_chunk,
            page_size=config.page_size,
        )
        self._scheduler = Scheduler(
            self._allocator,
            page_size=config.page_size,
            max_running=min(config.max_running, buckets[-1]),
            prefill_tokens=config.prefill_chunk,
            prefill_rows=programs.rows_of(self._buckets.tokens[-1]),
            prefill_pages=self._buckets.pages[-1],
            reserved_tokens=config.num_reserved_decode_tokens,
            prefix_cache=config.prefix_cache,
        )
        self._stop_ids: tuple[int, ...] = ()
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._stop_ids = (int(tokenizer.eos_token_id),)
        self._requests: dict[int, Request] = {}
        self._finished: list[StepOutput] = []
        self._aborted: list[StepOutput] = []
        self._ids = itertools.count()
        self._seeds = itertools.count(int.from_bytes(os.urandom(4), "little"))
        self._compiled: set[tuple[Any, ...]] = set()
        self._rows: _Rows | None = None
        self._metrics = IterationMetrics(time.monotonic(), 0, 0, 0, 0)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], config: EngineConfig, *, dtype: str = "float32", mesh: Mesh | None = None
    ) -> "Engine":
        """An engine for a model in local files, with its tokenizer if there is one; see `load_pretrained`."""
        from jaxlab.models import load_pretrained, load_tokenizer

        model, params = load_pretrained(source, dtype=dtype, mesh=mesh)
        try:
            tokenizer = load_tokenizer(source)
        except FileNotFoundError:
            tokenizer = None
        return cls(model, params, config, tokenizer=tokenizer, mesh=mesh)

    @property
    def params(self) -> Any:
        """The parameters in use. New ones of the same shapes take their place between two steps and compile nothing.

        Prompts that are shared are forgotten; what runs keeps the keys and values that the old ones made.
        """
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        placed = self._placed(params)
        if jax.tree.map(_signature, placed) != jax.tree.map(_signature, self._params):
            raise ValueError("params: expected the names, shapes and dtypes of the parameters in use, got others")
        self._params = placed
        self._allocator.forget()

    @property
    def has_work(self) -> bool:
        """Whether a request lives, or ended without its end having been told."""
        return bool(self._requests or self._finished)

    @property
    def free_pages(self) -> int:
        """Pages that no request holds; `num_pages - 1` when idle."""
        return self._allocator.num_free

    @property
    def preemptions(self) -> int:
        """How often a request gave up its pages to be computed again."""
        return self._scheduler.preemptions

    @property
    def compile_count(self) -> int:
        """Programs used so far; each was compiled once."""
        return len(self._compiled)

    def metrics(self) -> IterationMetrics:
        """Of the latest step."""
        return self._metrics

    def add_request(self, ids: Sequence[int], sampling: SamplingParams) -> int:
        """Lets a request wait for the next step.

        Args:
            ids: the prompt (or a text, with a tokenizer).
            sampling: how it is drawn; without a seed it gets one of its own.

        Returns:
            Its id.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, prompt + max_tokens over
                max_position_embeddings, more `logprobs` than 20, or a request larger than the whole pool.
            TypeError: stop strings without a tokenizer, or a prompt that is no list of ids.
        """
        return self._add(self._checked(ids, sampling), sampling).id

    def step(self) -> list[StepOutput]:
        """Reads waiting prompts and draws one token of every running request; reports what each was given."""
        outputs = [*self._finished, *self._aborted]
        self._finished, self._aborted = [], []
        return outputs + self._advance() if self._requests else outputs

    def abort(self, request_id: int) -> bool:
        """Ends a request and frees its pages; the next step reports it. False if there is no such request any more."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.remove(request)
        request.extra.finish_reason = "abort"
        self._aborted.append(StepOutput(request_id, [], "abort"))
        return True

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Serves prompts to their ends, beside whatever else runs.

        Args:
            prompts: lists of ids.
            sampling: for all of them, or one each.

        Returns:
            Outputs in the order of the prompts.

        Raises:
            ValueError: as `add_request` (then none was added), or another number of sampling parameters.
            TypeError: as `add_request`.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"sampling: expected one for each of {len(prompts)} prompts, got {len(each)}")
        checked = [self._checked(ids, own) for ids, own in zip(prompts, each)]
        requests = [self._add(ids, own) for ids, own in zip(checked, each)]
        mine = {request.id for request in requests}
        others = []
        try:
            while any(request.extra.finish_reason is None for request in requests):
                others += self._advance()
        finally:
            for request in requests:
                self.abort(request.id)
            self._finished = [output for output in (*self._finished, *others) if output.request_id not in mine]
            self._aborted = [output for output in self._aborted if output.request_id not in mine]
        return [self._output(request) for request in requests]

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits `[n,V]` float32 at the last token of each prompt, read chunk by chunk into pages that are freed again.

        Raises:
            ValueError: as `add_request`.
            MemoryError: too few pages are free.
        """
        rows = []
        for ids in [self._checked(prompt, SamplingParams(max_tokens=0)) for prompt in prompts]:
            request = Request(-1, ids, len(ids), 0)
            request.pages = self._allocator.alloc(self._scheduler.pages_for(len(ids)))
            size, logits = self.config.prefill_chunk, None
            for start in range(0, len(ids), size):
                logits = self._read([Chunk(request, start, min(start + size, len(ids)))])
            rows.append(np.asarray(logits)[0])
            self._allocator.free(request.pages)
        return np.stack(rows)

    def warmup(self) -> None:
        """Compiles every program that a step can need."""
        for kind, *sizes in self._buckets.programs():
            if kind == "decode":
                rows, width = sizes
                nothing, table = np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
                ids, positions, table = self._put((nothing, nothing - 1, table))
                self._decode_rows(ids, positions, table, self._draws([], rows))
            elif kind == "read":
                self._read_packed(*_empty_packing(*sizes))
            else:
                vocabulary = self.model.config.vocab_size
                self._draw(self._put(np.zeros((sizes[0], vocabulary), np.float32)), np.zeros(sizes[0], np.int32), [])

    def take(self, request_id: int) -> KVPages:
        """Takes a request out, once its first token is drawn, to go on in another engine; its pages are freed.

        Raises:
            KeyError: no such request.
            ValueError: it has drawn nothing yet, or was preempted and is being read again.
        """
        request = self._requests[request_id]
        if not request.runs or request.pending != 1 or len(request.tokens) == request.prompt_length:
            raise ValueError(f"request {request_id}: expected one that decodes, got one whose prompt is being read")
        count = len(request.pages)
        index = np.zeros(fitting(self._powers(), count), np.int32)
        index[:count] = request.pages
        self._compiled.add(("take", len(index)))
        with self._in_mesh():
            k, v = programs.take_pages(self._pool, self._put(index))
        own = request.extra
        pages = KVPages(
            prompt=request.tokens[: request.prompt_length],
            generated=request.tokens[request.prompt_length :],
            logprobs=own.logprobs,
            top_logprobs=own.top_logprobs,
            seed=own.seed,
            arrival=request.arrival,
            k=k,
            v=v,
        )
        self._scheduler.remove(request)
        del self._requests[request_id]
        return pages

    def give(self, ids: Sequence[int], sampling: SamplingParams, pages: KVPages) -> int:
        """Takes in a request that another engine has read; it decodes from the next step on.

        Args:
            ids: its prompt.
            sampling: as it was added there.
            pages: of `take`.

        Returns:
            Its id here.

        Raises:
            MemoryError: no room for it yet; it can be given later.
            ValueError: as `add_request`, or pages of another model or page size.
        """
        tokens = self._checked(ids, sampling)
        count = self._scheduler.pages_for(pages.tokens)
        layers, heads, _, size, dim = self._pool[0].shape
        for name, array in (("k", pages.k), ("v", pages.v)):
            if (
                array.ndim != 5
                or (*array.shape[:2], *array.shape[3:]) != (layers, heads, size, dim)
                or array.shape[2] < count
            ):
                raise ValueError(
                    f"pages.{name}: expected [{layers}, {heads}, {count}, {size}, {dim}], got {tuple(array.shape)}"
                )
        own = self._own(sampling, pages.seed)
        own.logprobs, own.top_logprobs = list(pages.logprobs), list(pages.top_logprobs)
        request = Request(
            next(self._ids), [*tokens, *pages.generated], len(tokens), sampling.max_tokens, pages.arrival, extra=own
        )
        request.computed = pages.tokens
        self._scheduler.insert(request)
        index = np.full(fitting(self._powers(), count), self.config.num_pages, np.int32)
        index[:count] = request.pages
        self._compiled.add(("give", len(index)))
        with self._in_mesh():
            self._pool = programs.put_pages(self._pool, self._put(index), *self._put(_fit(pages, len(index))))
        self._requests[request.id] = request
        return request.id

    def _placed(self, params: Any) -> Any:
        if self.mesh is None:
            return decode_params(self.model, jax.device_put(params, self._place))
        return jax.device_put(params, shardings(abstract_params(self.model), self.mesh, DEFAULT_RULES))

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, self._place)

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _powers(self) -> tuple[int, ...]:
        return tuple(1 << n for n in range(self._buckets.widths[-1].bit_length()))

    def _checked(self, ids: Any, sampling: SamplingParams) -> list[int]:
        if sampling.stop and self.tokenizer is None:
            raise TypeError(f"tokenizer: expected one, to look for the stop strings {sampling.stop!r}, got None")
        if sampling.logprobs > programs.MOST_ALTERNATIVES:
            raise ValueError(f"logprobs: expected at most {programs.MOST_ALTERNATIVES}, got {sampling.logprobs}")
        tokens = prompt_ids([ids], self.tokenizer, self.model.config, sampling.max_tokens)[0].tolist()
        needed = self._scheduler.pages_for(len(tokens) + max(sampling.max_tokens - 1, 0))
        if needed > self.config.num_pages - 1:
            raise ValueError(
                f"prompt + max_tokens: expected at most the pool's {self.config.num_pages - 1} pages of "
                f"{self.config.page_size} tokens, got {len(tokens)} + {sampling.max_tokens}, {needed} pages"
            )
        return tokens

    def _own(self, sampling: SamplingParams, seed: int) -> _Own:
        stop_ids = (*sampling.stop_ids, *self._stop_ids)
        reader = None if self.tokenizer is None else RowText(self.tokenizer, sampling.stop, stop_ids)
        return _Own(sampling, seed, frozenset(stop_ids), reader)

    def _add(self, tokens: list[int], sampling: SamplingParams) -> Request:
        seed = next(self._seeds) if sampling.seed is None else sampling.seed
        own = self._own(sampling, seed)
        request = Request(next(self._ids), tokens, len(tokens), sampling.max_tokens, time.monotonic(), extra=own)
        if sampling.max_tokens == 0:
            own.finish_reason = "length"
            self._finished.append(StepOutput(request.id, [], "length"))
            return request
        self._requests[request.id] = request
        self._scheduler.add(request)
        return request

    def _advance(self) -> list[StepOutput]:
        """One step of what lives."""
        plan = self._scheduler.schedule()
        self._metrics = self._measured(plan.chunks, plan.decoded)
        first = drawn = None
        if plan.chunks:  # before the decoding, which may read pages that these fill
            logits = self._read(plan.chunks)
            read = [chunk.request for chunk in plan.chunks]
            if any(not request.pending for request in read):
                first = self._draw_rows(logits, read)
        if plan.decoded:
            drawn = self._decode(plan.decoded)
        self._scheduler.finished_computing(plan.decoded)
        first, drawn = jax.device_get((first, drawn))
        outputs = []
        if first is not None:
            outputs += self._accept([chunk.request for chunk in plan.chunks], first)
        if drawn is not None:
            outputs += self._accept(plan.decoded, drawn)
        return outputs

    def _measured(self, chunks: list[Chunk], decoded: list[Request]) -> IterationMetrics:
        now = time.monotonic()
        if decoded:
            running, tokens = len(decoded), sum(len(request.tokens) - 1 for request in decoded)
        else:
            running, tokens = len(chunks), sum(chunk.stop - chunk.start for chunk in chunks)
        waiting = self._scheduler.waiting
        waits = tuple(now - request.arrival for request in waiting)
        return IterationMetrics(now, running, len(self._requests), tokens, len(waiting), waits)

    def _accept(self, requests: Iterable[Request], drawn: Drawn) -> list[StepOutput]:
        """Appends what rows drew, where it was wanted, and ends requests."""
        outputs = []
        for row, (request, token, logp) in enumerate(zip(requests, drawn.ids.tolist(), drawn.logps.tolist())):
            if request.pending:
                continue  # a chunk that is not the prompt's last
            own: _Own = request.extra
            top = {}
            if own.sampling.logprobs:
                count = own.sampling.logprobs
                top = dict(zip(drawn.top_ids[row, :count].tolist(), drawn.top_logps[row, :count].tolist()))
            request.tokens.append(token)
            own.logprobs.append(logp)
            own.top_logprobs.append(top)
            reason = self._reason(request, own, token)
            if reason is not None:
                own.finish_reason = reason
                self._scheduler.remove(request)
                del self._requests[request.id]
            outputs.append(StepOutput(request.id, [token], reason, [logp], [top]))
        return outputs

    def _reason(self, request: Request, own: _Own, token: int) -> str | None:
        if token in own.stop_ids:
            return "stop"
        count = len(request.tokens) - request.prompt_length
        if own.reader is not None and own.sampling.stop:
            ids = np.array(request.tokens[request.prompt_length :])
            if own.reader.completed(ids, count - 1) is not None:
                return "stop"
        return "length" if count == request.max_tokens else None

    def _output(self, request: Request) -> RequestOutput:
        own, ids = request.extra, request.tokens[request.prompt_length :]
        text = None if own.reader is None else own.reader.final(np.array(ids, np.int32))
        return RequestOutput(request.id, ids, own.finish_reason, text, own.logprobs, own.top_logprobs)

    def _draws(self, requests: Sequence[Request], rows: int) -> Draws:
        owns = [request.extra for request in requests]
        seeds = np.zeros(rows, np.int32)
        # `jax.random.key` takes the lower 32 bits.
        seeds[: len(owns)] = [(own.seed + 2**31) % 2**32 - 2**31 for own in owns]
        sampling = SamplingArrays.stack([own.sampling for own in owns] + [_NO_REQUEST] * (rows - len(owns)))
        report = any(own.sampling.logprobs for own in owns)
        return self._put(Draws(seeds, sampling, np.array(report)))

    def _read(self, chunks: list[Chunk]) -> Any:
        """Reads chunks side by side; logits `[R,V]` at the last token of each."""
        size, pages_for = self.config.page_size, self._scheduler.pages_for
        sizes = self._buckets.reading(
            sum(chunk.stop - chunk.start for chunk in chunks),
            len(chunks),
            sum(pages_for(chunk.stop) for chunk in chunks),
        )
        tokens, positions, table, packing, columns = arrays = _empty_packing(*sizes)
        column = page = 0
        for row, chunk in enumerate(chunks):
            count, pages = chunk.stop - chunk.start, pages_for(chunk.stop)
            here, there = slice(column, column + count), slice(page, page + pages)
            tokens[0, here] = chunk.request.tokens[chunk.start : chunk.stop]
            positions[0, here] = np.arange(chunk.start, chunk.stop)
            packing.slots[0, here] = positions[0, here] + page * size
            packing.segments[0, here] = row + 1
            table[0, there] = chunk.request.pages[:pages]
            packing.page_segments[0, there] = row + 1
            packing.page_lengths[0, there] = np.minimum(chunk.stop - np.arange(pages) * size, size)
            columns[0, row] = column + count - 1
            column, page = column + count, page + pages
        return self._read_packed(*arrays)

    def _read_packed(self, tokens: Any, positions: Any, table: Any, packing: Packing, columns: Any) -> Any:
        self._compiled.add(("read", tokens.shape[1], columns.shape[1], table.shape[1]))
        arrays = self._put((tokens, positions, table, packing, columns))
        with self._in_mesh():
            logits, self._pool = programs.read(self.model, self._params, self._pool, *arrays, **self._static)
        return logits

    def _draw_rows(self, logits: Any, requests: list[Request]) -> Drawn:
        positions = np.zeros(logits.shape[0], np.int32)
        positions[: len(requests)] = [request.computed for request in requests]
        return self._draw(logits, positions, requests)

    def _draw(self, logits: Any, positions: np.ndarray, requests: list[Request]) -> Drawn:
        self._compiled.add(("draw", len(positions)))
        draws = self._draws(requests, len(positions))
        with self._in_mesh():
            return programs.draw(logits, self._put(positions), draws, **self._static)

    def _decode(self, requests: list[Request]) -> Drawn:
        """Decodes one token of each request, sending what differs from the step before."""
        last, count = self._rows, len(requests)
        pages, preemptions = [len(request.pages) for request in requests], self._scheduler.preemptions
        if last is not None and (last.requests != requests or last.preemptions != preemptions):
            last = None
        if last is not None and last.pages == pages:
            table = last.page_table
        else:
            rows = fitting(self._buckets.batch, count)
            table = np.zeros((rows, fitting(self._buckets.widths, max(pages))), np.int32)
            for row, request in enumerate(requests):
                table[row, : pages[row]] = request.pages
            table = self._put(table)
        if last is not None:
            ids, positions, draws = last.ids, last.positions, last.draws
        else:
            ids, positions = np.zeros(len(table), np.int32), np.full(len(table), -1, np.int32)
            ids[:count] = [request.tokens[-1] for request in requests]
            positions[:count] = [request.computed - 1 for request in requests]
            ids, positions = self._put((ids, positions))
            draws = self._draws(requests, len(table))
        drawn, positions = self._decode_rows(ids, positions, table, draws)
        self._rows = _Rows(requests, pages, preemptions, drawn.ids, positions, table, draws)
        return drawn

    def _decode_rows(self, ids: Any, positions: Any, table: Any, draws: Draws) -> tuple[Drawn, Any]:
        self._compiled.add(("decode", *table.shape))
        with self._in_mesh():
            drawn, positions, self._pool = programs.decode(
                self.model, self._params, self._pool, ids, positions, table, draws, **self._static
            )
        return drawn, positions


def _signature(leaf: Any) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


def _empty_packing(
    tokens: int, rows: int, pages: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Packing, np.ndarray]:
    """Tokens, positions, page table, packing and columns of a step that reads nothing."""

    def zeros(size: int) -> np.ndarray:
        return np.zeros((1, size), np.int32)

    packing = Packing(zeros(tokens) - 1, zeros(tokens), zeros(pages), zeros(pages))
    return zeros(tokens), zeros(tokens) - 1, zeros(pages), packing, zeros(rows)


def _fit(pages: KVPages, count: int) -> tuple[Any, Any]:
    """K and v of exactly `count` pages."""

    def fit(array):
        if array.shape[2] == count:
            return array
        padded = np.zeros((*array.shape[:2], count, *array.shape[3:]), array.dtype)
        padded[:, :, : array.shape[2]] = array[:, :, :count]
        return padded

    return fit(pages.k), fit(pages.v)
