"""The serving engine: requests come and go at every step, keys and values lie in pages."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlab.inference.admission import checked_ids
from jaxlab.inference.paged import BlockAllocator, KVPages
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.programs import Drawn, rows_of
from jaxlab.inference.runner import Runner
from jaxlab.inference.scheduler import Chunk, Request, Scheduler
from jaxlab.inference.serving import EngineConfig, IterationMetrics, RequestOutput, StepOutput
from jaxlab.inference.text import RowText


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

    Attributes:
        on_metrics: is called with the metrics of each step before it computes anything; None: nobody is.

    Raises:
        ValueError: key and value heads that the "tensor" axis does not divide.
    """

    def __init__(
        self, model: Any, params: Any, config: EngineConfig, *, tokenizer: Any = None, mesh: Mesh | None = None
    ):
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self._runner = Runner(model, params, config, mesh)
        self._allocator = BlockAllocator(config.num_pages)
        buckets = self._runner.buckets
        self._scheduler = Scheduler(
            self._allocator,
            page_size=config.page_size,
            max_running=min(config.max_running, buckets.batch[-1]),
            prefill_tokens=config.prefill_chunk,
            prefill_rows=rows_of(buckets.tokens[-1]),
            prefill_pages=buckets.pages[-1],
            reserved_tokens=config.num_reserved_decode_tokens,
            prefix_cache=config.prefix_cache,
        )
        self._requests: dict[int, Request] = {}
        self._finished: list[StepOutput] = []
        self._aborted: list[StepOutput] = []
        self._ids = itertools.count()
        self._seeds = itertools.count(int.from_bytes(os.urandom(4), "little"))
        self._metrics = IterationMetrics(time.monotonic(), 0, 0, 0, 0)
        self.on_metrics: Callable[[IterationMetrics], None] | None = None

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
        """The parameters in use, as `decode_params` lays them out.

        Others of the same shapes can take their place between two steps; nothing is compiled. Shared prefixes are
        forgotten, while what runs goes on with the keys and values that the old parameters made.
        """
        return self._runner.params

    @params.setter
    def params(self, params: Any) -> None:
        self._runner.params = params
        self._scheduler.forget_prefixes()

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
        return len(self._runner.compiled)

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
        checked = [self._checked(prompt, SamplingParams(max_tokens=0)) for prompt in prompts]
        logits = np.zeros((len(checked), self.model.config.vocab_size), np.float32)
        for row, ids in enumerate(checked):
            request, size = Request(-1, ids, len(ids), 0), self.config.prefill_chunk
            request.pages = self._allocator.alloc(self._scheduler.pages_for(len(ids)))
            for start in range(0, len(ids), size):
                last = self._runner.read([Chunk(request, start, min(start + size, len(ids)))])
                logits[row] = last[0]
            self._allocator.free(request.pages)
        return logits

    def warmup(self, *, transfers: bool = False) -> None:
        """Compiles every program that a step can need, and with `transfers` those of `take` and `give`."""
        self._runner.warmup(transfers)

    def take(self, request_id: int) -> KVPages:
        """Takes a request out, once its first token is drawn, to go on in another engine; its pages are freed.

        Raises:
            KeyError: no such request.
            ValueError: it has drawn nothing yet, or was preempted and is being read again.
        """
        request = self._requests[request_id]
        if not request.runs or request.pending != 1 or len(request.tokens) == request.prompt_length:
            raise ValueError(f"request {request_id}: expected one that decodes, got one whose prompt is being read")
        k, v = self._runner.take(request.pages)
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
        layers, heads, size, dim = self._runner.page_shape
        for name, array in (("k", pages.k), ("v", pages.v)):
            held = array.shape[2] if array.ndim == 5 else 0
            if held < count or (*array.shape[:2], *array.shape[3:]) != (layers, heads, size, dim):
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
        self._runner.give(request.pages, pages.k, pages.v)
        self._requests[request.id] = request
        return request.id

    def _checked(self, ids: Any, sampling: SamplingParams) -> list[int]:
        return checked_ids(ids, sampling, tokenizer=self.tokenizer, model_config=self.model.config, config=self.config)

    def _own(self, sampling: SamplingParams, seed: int) -> _Own:
        stop_ids = sampling.ending_ids(self.tokenizer)
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
        if self.on_metrics is not None:
            self.on_metrics(self._metrics)
        drawn = []
        if plan.chunks:  # before the decoding, which may read pages that these fill
            logits = self._runner.read(plan.chunks)
            read = [chunk.request for chunk in plan.chunks]
            if any(not request.pending for request in read):
                drawn.append((read, self._runner.draw(logits, read)))
        if plan.decoded:
            drawn.append((plan.decoded, self._runner.decode(plan.decoded, self._scheduler.preemptions)))
        self._scheduler.finished_computing(plan.decoded)
        return [output for requests, own in drawn for output in self._accept(requests, own)]

    def _measured(self, chunks: list[Chunk], decoded: list[Request]) -> IterationMetrics:
        now = time.monotonic()
        if decoded:
            running, tokens = len(decoded), sum(len(request.tokens) - 1 for request in decoded)
        else:
            running, tokens = len(chunks), sum(chunk.stop - chunk.start for chunk in chunks)
        waiting = self._scheduler.waiting
        waits = tuple(now - request.arrival for request in waiting)
        return IterationMetrics(now, running, len(self._requests), tokens, len(waiting), waits)

    def _accept(self, requests: list[Request], drawn: Drawn) -> list[StepOutput]:
        """Appends what rows drew, where it was wanted, and ends requests."""
        outputs, top_ids, top_logps = [], None, None
        if any(request.extra.sampling.logprobs for request in requests):
            top_ids, top_logps = np.asarray(drawn.top_ids), np.asarray(drawn.top_logps)
        ids, logps = np.asarray(drawn.ids).tolist(), np.asarray(drawn.logps).tolist()
        for row, (request, token, logp) in enumerate(zip(requests, ids, logps)):
            if request.pending:
                continue  # a chunk that is not the prompt's last
            own: _Own = request.extra
            top = {}
            if top_ids is not None and top_logps is not None:
                count = own.sampling.logprobs
                top = dict(zip(top_ids[row, :count].tolist(), top_logps[row, :count].tolist()))
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
