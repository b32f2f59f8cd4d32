"""Prefill and decode on workers of their own, behind the methods of one engine.

Prefill/decode disaggregation (DistServe, Zhong et al., OSDI 2024; Splitwise, Patel et al., ISCA 2024): a prompt is read
by a prefill worker, which draws the first token; its keys and values move to a decode worker, which draws the others.
So either kind has batches, and with VoltanaLLM clocks, of its own.
"""

import dataclasses
import itertools
import math
import os
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from jaxlab.inference.admission import checked_ids
from jaxlab.inference.crew import Crew, LocalWorker, Slot, WorkerStatus
from jaxlab.inference.dispatch import Dispatcher, FailedOutput, Journey, Route, at_random, fewest_requests
from jaxlab.inference.engine import Engine
from jaxlab.inference.layout import decode_params
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.roles import DecodeWorker, DrawnTokens, PrefillWorker, WorkerStats
from jaxlab.inference.serving import EngineConfig, IterationMetrics, RequestOutput, StepOutput
from jaxlab.inference.text import RowText
from jaxlab.inference.transfer import BACKENDS, open_transfer
from jaxlab.inference.worker import WorkerProcess, WorkerSettings


@dataclasses.dataclass(frozen=True)
class _Served:
    """What is known here of a model that worker processes hold."""

    config: Any


class DisaggregatedEngine:
    """An engine whose prompts are read by some workers and whose tokens are drawn by others. One thread owns it.

    It has the methods of `Engine`, and greedy requests get the tokens that an `Engine` draws. Of a worker that dies the
    requests are tried once more on others, from their prompts and the tokens they have been given, so that none is
    given twice. What fails nevertheless ends with a `FailedOutput` in `step`, and `generate` raises its error.

    Example:
        with DisaggregatedEngine.from_pretrained("folder", EngineConfig(256), num_decode=2) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16))

    Args:
        crew: the workers, all of one model and config.
        model: with the `config` of the model they serve.
        config: of each of their engines.
        tokenizer: theirs.
        route_prefill: `(request id, prompt tokens, list of WorkerStatus) -> worker id`; None: at random (the paper).
        route_decode: the same for decode workers, asked when the request comes; None: the one with the fewest requests.
    """

    def __init__(
        self,
        crew: Crew,
        model: Any,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        route_prefill: Route | None = None,
        route_decode: Route | None = None,
    ):
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self._crew = crew
        self._dispatcher = Dispatcher(crew, route_prefill or at_random, route_decode or fewest_requests, self._reader)
        self._ids, self._seeds = itertools.count(), itertools.count(secrets.randbits(31))
        self._close = weakref.finalize(self, crew.close)

    @classmethod
    def local(
        cls,
        model: Any,
        params: Any,
        config: EngineConfig,
        *,
        tokenizer: Any = None,
        num_prefill: int = 1,
        num_decode: int = 1,
        transfer: str = "inproc",
        route_prefill: Route | None = None,
        route_decode: Route | None = None,
        transfer_timeout_s: float = 30.0,
    ) -> "DisaggregatedEngine":
        """Workers in this process, which share weights and take turns in `step`; arguments as `from_pretrained`."""
        counts = _counts(num_prefill, num_decode)
        if transfer not in BACKENDS:
            raise ValueError(f"transfer: expected one of {', '.join(BACKENDS)}, got {transfer!r}")
        token = secrets.token_bytes(32)
        params = decode_params(model, params)  # once for all engines
        shared = open_transfer(transfer) if transfer == "inproc" else None

        def start(slot: Slot, deliver: Callable[..., None]) -> LocalWorker:
            end = shared or open_transfer(transfer, token=token, timeout_s=transfer_timeout_s)
            engine = Engine(model, params, config, tokenizer=tokenizer)
            if slot.mode == "prefill":
                return LocalWorker(lambda emit: PrefillWorker(engine, end, emit), deliver)

            def decode(emit: Callable[..., None]) -> DecodeWorker:
                return DecodeWorker(engine, end, emit, wake=lambda: emit("wake"), timeout_s=transfer_timeout_s)

            return LocalWorker(decode, deliver)

        crew = Crew(counts, start)
        crew.wait()
        return cls(crew, model, config, tokenizer=tokenizer, route_prefill=route_prefill, route_decode=route_decode)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        config: EngineConfig,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        transfer: str = "inproc",
        processes: bool = False,
        dtype: str = "float32",
        route_prefill: Route | None = None,
        route_decode: Route | None = None,
        warmup: bool = False,
        transfer_timeout_s: float = 30.0,
        restarts: int = 3,
        start_timeout_s: float = 300.0,
        heartbeat_timeout_s: float = 30.0,
        host: str = "127.0.0.1",
        worker_env: Callable[[str], Mapping[str, str]] | None = None,
    ) -> "DisaggregatedEngine":
        """Workers for a model in local files; returns when all are ready.

        Args:
            source: see `load_pretrained`; each worker process loads it by itself.
            config: of each worker's engine.
            num_prefill: workers that read prompts.
            num_decode: workers that draw.
            transfer: how keys and values move: "inproc" (in one process), "tcp" or "jax_transfer".
            processes: each worker in a process of its own; otherwise all take turns in `step`, on shared weights.
            dtype: of the weights.
            route_prefill: see the class.
            route_decode: see the class.
            warmup: workers compile everything before they are ready.
            transfer_timeout_s: limit of one transfer.
            restarts: how often each worker process that died is started again.
            start_timeout_s: limit for one to become ready.
            heartbeat_timeout_s: one that is not heard of for so long is killed.
            host: where transfers listen; the default lets nobody in from outside.
            worker_env: `worker id -> environment variables` of its process, such as `CUDA_VISIBLE_DEVICES`.

        Raises:
            ValueError: no worker of a kind, an unknown transfer, or "inproc" between processes.
            NotImplementedError: "jax_transfer" does not work here.
            WorkerLost: a worker process cannot be started.
        """
        from jaxlab.models import load_pretrained, load_tokenizer

        counts = _counts(num_prefill, num_decode)
        try:
            tokenizer = load_tokenizer(source)
        except FileNotFoundError:
            tokenizer = None
        routes = {"route_prefill": route_prefill, "route_decode": route_decode}
        if not processes:
            model, params = load_pretrained(source, dtype=dtype)
            engine = cls.local(
                model,
                params,
                config,
                tokenizer=tokenizer,
                num_prefill=num_prefill,
                num_decode=num_decode,
                transfer=transfer,
                transfer_timeout_s=transfer_timeout_s,
                **routes,
            )
            if warmup:
                engine.warmup()
            return engine
        if transfer not in BACKENDS[1:]:
            raise ValueError(f"transfer: expected one of {', '.join(BACKENDS[1:])} between processes, got {transfer!r}")
        settings = WorkerSettings(
            source=os.path.abspath(source) if os.path.exists(source) else os.fspath(source),
            config=config,
            dtype=dtype,
            transfer=transfer,
            token=secrets.token_bytes(32),
            host=host,
            transfer_timeout_s=transfer_timeout_s,
            warmup=warmup,
        )

        def start(slot: Slot, deliver: Callable[..., None]) -> WorkerProcess:
            return WorkerProcess(slot.mode, settings, deliver, worker_env(slot.id) if worker_env else None)

        crew = Crew(
            counts,
            start,
            restarts=restarts,
            start_timeout_s=start_timeout_s,
            heartbeat_timeout_s=heartbeat_timeout_s,
        )
        crew.wait()
        model = _Served(next(iter(crew.slots.values())).model_config)
        return cls(crew, model, config, tokenizer=tokenizer, **routes)

    def __enter__(self) -> "DisaggregatedEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        """Ends the workers; requests under way are forgotten."""
        self._close()
        self._dispatcher.journeys.clear()

    @property
    def kv_bytes_moved(self) -> int:
        """Bytes of keys and values that decode workers have received."""
        return self._dispatcher.kv_bytes_moved

    @property
    def has_work(self) -> bool:
        """Whether a request lives, or ended without its end having been told."""
        return bool(self._dispatcher.journeys or self._dispatcher.outputs)

    @property
    def free_pages(self) -> int:
        """Pages that no request holds, of the worker that has the fewest; `num_pages - 1` when idle."""
        return min((stats.free_pages for stats in self._stats()), default=0)

    @property
    def preemptions(self) -> int:
        """How often a request gave up its pages to be computed again, on all workers."""
        return sum(stats.preemptions for stats in self._stats())

    @property
    def compile_count(self) -> int:
        """Programs used so far, on all workers."""
        return sum(stats.compile_count for stats in self._stats())

    def metrics(self) -> IterationMetrics:
        """Of all requests, now: running are those that are decoded."""
        journeys = self._dispatcher.journeys.values()
        now = time.monotonic()
        running = [journey for journey in journeys if journey.stage == "decode"]
        waits = tuple(now - journey.arrival for journey in journeys if journey.stage in ("waiting", "prefill"))
        tokens = sum(journey.length - 1 for journey in running)
        return IterationMetrics(now, len(running), len(journeys), tokens, len(waits), waits)

    def workers(self) -> list[WorkerStatus]:
        """Those that work, or are being started."""
        self._dispatcher.absorb(0.0)
        return [slot.status() for slot in self._crew.slots.values() if slot.worker is not None]

    def drain_metrics(self, worker_id: str) -> list[IterationMetrics]:
        """A worker's iterations since the last call, oldest first."""
        slot = self._slot(worker_id)
        self._dispatcher.absorb(0.0)
        metrics = list(slot.metrics)
        slot.metrics.clear()
        return metrics

    def set_pace(self, worker_id: str, factor: float) -> None:
        """Each iteration of a worker takes `factor` (at least 1) times as long from now on: a slower clock."""
        if not (math.isfinite(factor) and factor >= 1):
            raise ValueError(f"factor: expected a number of at least 1, got {factor!r}")
        slot = self._slot(worker_id)
        slot.pace = float(factor)
        slot.order("pace", slot.pace)

    def status_freq(self, worker_id: str, mhz: float) -> None:
        """Says at which clock a worker runs, for its `WorkerStatus`."""
        self._slot(worker_id).freq = mhz

    def warmup(self) -> None:
        """Compiles every program that a step can need, on all workers."""
        self._dispatcher.ask([slot for slot in self._crew.slots.values() if slot.ready], "warmup")

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """As `Engine.prompt_logits`, on a prefill worker."""
        (logits,) = self._dispatcher.ask(self._crew.of("prefill", ready=True)[:1], "prompt_logits", prompts)
        return logits

    def add_request(self, ids: Sequence[int], sampling: SamplingParams) -> int:
        """Sends a request to its workers; arguments, result and errors as `Engine.add_request`.

        Where no worker is left the next step says that it failed.
        """
        return self._add(self._checked(ids, sampling), sampling)

    def step(self) -> list[StepOutput]:
        """Lets workers go on, waits a little for news, and reports what requests were given."""
        if not self._dispatcher.outputs:
            self._dispatcher.absorb()
        outputs, self._dispatcher.outputs = self._dispatcher.outputs, []
        return outputs

    def abort(self, request_id: int) -> bool:
        """Ends a request and frees what it holds anywhere; the next step reports it. False if there is none."""
        journey = self._dispatcher.journeys.get(request_id)
        if journey is None:
            return False
        self._dispatcher.drop(journey)
        self._dispatcher.outputs.append(StepOutput(request_id, [], "abort"))
        return True

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """As `Engine.generate`.

        Raises:
            RequestFailed: one of them failed; the others are aborted.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"sampling: expected one for each of {len(prompts)} prompts, got {len(each)}")
        checked = [self._checked(ids, own) for ids, own in zip(prompts, each)]
        mine = {self._add(ids, own): (own, DrawnTokens()) for ids, own in zip(checked, each)}
        reasons: dict[int, str] = {}
        others: list[StepOutput] = []
        try:
            while len(reasons) < len(mine):
                for output in self.step():
                    if output.request_id not in mine:
                        others.append(output)
                        continue
                    if isinstance(output, FailedOutput) and output.error is not None:
                        raise output.error
                    mine[output.request_id][1].extend(output)
                    if output.finish_reason is not None:
                        reasons[output.request_id] = output.finish_reason
        finally:
            for request_id in mine:
                self.abort(request_id)
            left = [*others, *self._dispatcher.outputs]
            self._dispatcher.outputs = [output for output in left if output.request_id not in mine]
        return [self._output(request_id, reasons[request_id], *own) for request_id, own in mine.items()]

    def _checked(self, ids: Any, sampling: SamplingParams) -> list[int]:
        return checked_ids(ids, sampling, tokenizer=self.tokenizer, model_config=self.model.config, config=self.config)

    def _add(self, tokens: list[int], sampling: SamplingParams) -> int:
        # A retry has to draw the same.
        seed = next(self._seeds) if sampling.seed is None else sampling.seed
        sampling = dataclasses.replace(sampling, seed=seed)
        journey = Journey(next(self._ids), tokens, sampling, time.monotonic())
        if sampling.max_tokens == 0:
            self._dispatcher.outputs.append(StepOutput(journey.id, [], "length"))
        else:
            self._dispatcher.add(journey)
        return journey.id

    def _output(self, request_id: int, reason: str, sampling: SamplingParams, drawn: DrawnTokens) -> RequestOutput:
        reader = self._reader(sampling)
        text = None if reader is None else reader.final(np.array(drawn.ids, np.int32))
        return RequestOutput(request_id, drawn.ids, reason, text, drawn.logprobs, drawn.top_logprobs)

    def _reader(self, sampling: SamplingParams) -> RowText | None:
        if self.tokenizer is None:
            return None
        return RowText(self.tokenizer, sampling.stop, sampling.ending_ids(self.tokenizer))

    def _slot(self, worker_id: str) -> Slot:
        if worker_id not in self._crew.slots:
            raise ValueError(f"worker_id: expected one of {', '.join(self._crew.slots)}, got {worker_id!r}")
        return self._crew.slots[worker_id]

    def _stats(self) -> list[WorkerStats]:
        self._dispatcher.absorb(0.0)
        return [slot.stats for slot in self._crew.slots.values() if slot.stats is not None]


def _counts(num_prefill: int, num_decode: int) -> dict[str, int]:
    for name, count in (("num_prefill", num_prefill), ("num_decode", num_decode)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    return {"prefill": num_prefill, "decode": num_decode}
