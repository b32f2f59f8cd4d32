"""Disaggregated engines whose workers live in this process, some of which can be told to die."""

import contextlib
import dataclasses
import time

import numpy as np
import pytest

from jaxlab.inference import (
    DisaggregatedEngine,
    Engine,
    EngineConfig,
    FailedOutput,
    KVTransferError,
    RequestFailed,
    SamplingParams,
    WorkerLost,
    dispatch,
)
from jaxlab.inference.crew import Crew, LocalWorker
from jaxlab.inference.roles import DecodeWorker, PrefillWorker
from jaxlab.inference.tcp_transfer import TcpTransfer
from jaxlab.inference.transfer import BACKENDS, InprocTransfer
from tests.inference.test_crew import Silent

CONFIG = EngineConfig(17, page_size=4, max_running=4, prefill_chunk=16, batch_buckets=(4,), kv_dtype="float32")
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
PROMPTS = [[1, 2, 3], [70, 80, 90, 100, 110], [5], list(range(20, 45)), [9, 8, 7, 6]]
MIXED = [
    GREEDY,
    SamplingParams(max_tokens=9, temperature=0.8, top_k=40, seed=3, logprobs=2),
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=12, temperature=1.2, seed=2**40 + 1),
    SamplingParams(max_tokens=0),
]


@pytest.fixture(scope="module")
def expected(model, params, tokenizer):
    """What the engine that does both draws."""
    engine = Engine(model, params, CONFIG, tokenizer=tokenizer)
    return engine.generate(PROMPTS, MIXED)


@pytest.fixture(scope="module")
def greedy(model, params):
    return [output.token_ids for output in Engine(model, params, CONFIG).generate(PROMPTS, GREEDY)]


def without_ids(outputs):
    return [dataclasses.replace(output, request_id=0, logprobs=[], top_logprobs=[]) for output in outputs]


@pytest.mark.parametrize(("workers", "transfer"), [(1, "inproc"), *((2, backend) for backend in BACKENDS)])
def test_equals_the_engine_that_does_both(workers, transfer, model, params, tokenizer, expected):
    sizes = {"num_prefill": workers, "num_decode": workers, "transfer": transfer}
    with DisaggregatedEngine.local(model, params, CONFIG, tokenizer=tokenizer, **sizes) as engine:
        outputs = engine.generate(PROMPTS, MIXED)
        assert without_ids(outputs) == without_ids(expected)
        for ours, theirs in zip(outputs, expected):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
            assert [list(own) for own in ours.top_logprobs] == [list(own) for own in theirs.top_logprobs]
        moved = engine.kv_bytes_moved
        token = 2 * 2 * CONFIG.page_size * 2 * 8 * 4  # k and v, layers, tokens of a page, heads, dim, float32
        assert moved >= token * sum(-(-len(prompt) // 4) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3]))
        engine.generate([[1, 2]], SamplingParams(max_tokens=1))
        assert engine.kv_bytes_moved == moved
        assert not engine.has_work
        assert engine.free_pages == CONFIG.num_pages - 1
        assert {status.load for status in engine.workers()} == {status.in_flight for status in engine.workers()} == {0}


def test_stop_strings_and_steps(model, params, tokenizer, expected):
    text = expected[3].text
    sampling = dataclasses.replace(MIXED[3], stop=text[4:6])
    (theirs,) = Engine(model, params, CONFIG, tokenizer=tokenizer).generate([PROMPTS[3]], sampling)
    with DisaggregatedEngine.local(model, params, CONFIG, tokenizer=tokenizer) as engine:
        one = engine.add_request(PROMPTS[3], sampling)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert [token for output in outputs for token in output.new_token_ids] == theirs.token_ids
        assert {output.request_id for output in outputs} == {one}
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]
        assert without_ids(engine.generate([PROMPTS[3]], sampling)) == without_ids([theirs])
        np.testing.assert_allclose(
            engine.prompt_logits(PROMPTS[:2]), Engine(model, params, CONFIG).prompt_logits(PROMPTS[:2]), atol=1e-5
        )


def test_memory_that_runs_out_delays_and_loses_nothing(model, params):
    config = dataclasses.replace(CONFIG, num_reserved_decode_tokens=0)
    sampling = dataclasses.replace(GREEDY, max_tokens=20)
    prompts = [[n, n + 1, n + 2, n + 3] for n in range(8)]
    theirs = Engine(model, params, CONFIG).generate(prompts, sampling)
    with DisaggregatedEngine.local(model, params, config) as engine:
        assert without_ids(engine.generate(prompts, sampling)) == without_ids(theirs)
        assert engine.preemptions > 0
        assert engine.free_pages == CONFIG.num_pages - 1


def until(engine, condition, timeout_s=120.0):
    """Outputs of steps until a condition holds."""
    outputs, deadline = [], time.monotonic() + timeout_s
    while not condition(outputs):
        assert time.monotonic() < deadline, f"not in time; so far {outputs}"
        outputs += engine.step()
    return outputs


def finish(engine):
    return until(engine, lambda _: not engine.has_work)


def tokens_of(outputs, request_id):
    return [token for output in outputs if output.request_id == request_id for token in output.new_token_ids]


def drew(request_id, count):
    return lambda outputs: len(tokens_of(outputs, request_id)) >= count


def stage(engine, request_id):
    journey = engine._dispatcher.journeys.get(request_id)
    return None if journey is None else journey.stage


class Gate(InprocTransfer):
    """A transfer whose receivers wait until it is open."""

    open, error = True, None

    def recv(self, request_id, offer, *, timeout_s):
        deadline = time.monotonic() + 10
        while not self.open and time.monotonic() < deadline:
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        return super().recv(request_id, offer, timeout_s=timeout_s)


class Mortal(LocalWorker):
    """A worker that can be killed."""

    def die(self):
        self._deliver(self, "died", "killed by SIGKILL")

    def close(self):
        """A dead one frees nothing."""


@pytest.fixture
def mortal(model, params, tokenizer):
    """`make(num_prefill, num_decode, restarts) -> (engine, gate)`."""
    with contextlib.ExitStack() as stack:

        def make(num_prefill=1, num_decode=1, restarts=0, max_held_bytes=1 << 30):
            gate = Gate()

            def start(slot, deliver):
                own = Engine(model, params, CONFIG, tokenizer=tokenizer)
                if slot.mode == "decode":
                    return Mortal(lambda emit: DecodeWorker(own, gate, emit), deliver)
                return Mortal(lambda emit: PrefillWorker(own, gate, emit, max_held_bytes=max_held_bytes), deliver)

            crew = Crew({"prefill": num_prefill, "decode": num_decode}, start, restarts=restarts)
            crew.wait()
            return stack.enter_context(DisaggregatedEngine(crew, model, CONFIG, tokenizer=tokenizer)), gate

        yield make


def worker(engine, name):
    return engine._crew.slots[name].worker


@pytest.mark.parametrize("where", ["queued", "moving", "decode"])
def test_abort_frees_everything(where, mortal):
    engine, gate = mortal()
    gate.open = where != "moving"
    kept = engine.add_request(PROMPTS[0], GREEDY)
    one = engine.add_request(PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=60))
    if where != "queued":
        until(engine, lambda _: stage(engine, one) == where)
    assert engine.abort(one)
    assert not engine.abort(one)
    gate.open = True
    outputs = finish(engine)
    assert [output.finish_reason for output in outputs if output.request_id == one][-1] == "abort"
    assert sum(output.finish_reason is not None for output in outputs) == 2
    assert len(tokens_of(outputs, kept)) <= GREEDY.max_tokens
    until(engine, lambda _: engine.free_pages == CONFIG.num_pages - 1 and gate.held_bytes == 0)
    assert not engine.abort(kept)


def test_a_transfer_that_fails_ends_one_request_once(mortal, greedy):
    engine, gate = mortal()
    gate.error = KVTransferError("request 0.0: not here after 1 s")
    one = engine.add_request(PROMPTS[0], GREEDY)
    outputs = finish(engine)
    assert [output.finish_reason for output in outputs] == [None, "abort"]
    assert isinstance(outputs[-1], FailedOutput)
    assert outputs[-1].request_id == one
    assert outputs[-1].error is gate.error or str(outputs[-1].error) == str(gate.error)
    with pytest.raises(RequestFailed, match="not here after 1 s"):
        engine.generate(PROMPTS[:2], GREEDY)
    gate.error = None
    assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY)] == greedy
    assert engine.free_pages == CONFIG.num_pages - 1
    assert gate.held_bytes == 0


def test_a_transfer_that_takes_too_long(model, params, monkeypatch):
    monkeypatch.setattr(TcpTransfer, "_challenge", lambda self, wire: time.sleep(1.0))
    with DisaggregatedEngine.local(model, params, CONFIG, transfer="tcp", transfer_timeout_s=0.2) as engine:
        with pytest.raises(KVTransferError, match=r"from 127\.0\.0\.1:\d+: not here after 0\.2 s"):
            engine.generate(PROMPTS[:1], GREEDY)
        until(engine, lambda _: engine.free_pages == CONFIG.num_pages - 1)
        assert {slot.stats.held_bytes for slot in engine._crew.slots.values()} == {0}


def test_prefill_waits_while_nobody_fetches(mortal, greedy):
    engine, gate = mortal(max_held_bytes=1)
    gate.open = False
    ids = [engine.add_request(PROMPTS[row], GREEDY) for row in (3, 4)]  # the first fills a step
    outputs = until(engine, lambda _: stage(engine, ids[0]) == "moving")
    for _ in range(3):
        outputs += engine.step()
    assert stage(engine, ids[1]) == "prefill"
    gate.open = True
    outputs += finish(engine)
    assert [tokens_of(outputs, request_id) for request_id in ids] == [greedy[3], greedy[4]]


@pytest.mark.parametrize("lived", [True, False])
def test_a_broken_connection_waits_for_news_of_a_death(lived, mortal, greedy, monkeypatch):
    monkeypatch.setattr(dispatch, "_GRACE_S", 0.1 if lived else 30.0)
    engine, gate = mortal(num_prefill=2)
    gate.error = KVTransferError("the peer is lost", peer_lost=True)
    one = engine.add_request(PROMPTS[3], GREEDY)
    first = until(engine, lambda _: stage(engine, one) == "broken")
    gate.error = None
    if not lived:
        engine._dispatcher.journeys[one].prefill.worker.die()
    outputs = first + finish(engine)
    if lived:
        assert isinstance(outputs[-1].error, KVTransferError)
    else:
        assert tokens_of(outputs, one) == greedy[3]
    assert engine.free_pages == CONFIG.num_pages - 1


@pytest.mark.parametrize("where", ["prefill", "moving", "decode"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_death_costs_no_token(where, mode, mortal, greedy):
    """The worker of either kind dies while the request is anywhere; another goes on, and nothing comes twice."""
    engine, gate = mortal(num_prefill=2, num_decode=2)
    gate.open = where != "moving"
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    one = ids[3]  # of two chunks
    outputs = until(engine, lambda _: stage(engine, one) == where)
    if where == "decode":
        outputs += until(engine, lambda more: len(tokens_of(outputs + more, one)) >= 3)
    worker(engine, getattr(engine._dispatcher.journeys[one], mode).id).die()
    gate.open = True
    outputs += finish(engine)
    assert [tokens_of(outputs, request_id) for request_id in ids] == greedy
    assert sorted(output.request_id for output in outputs if output.finish_reason == "length") == ids
    assert engine.free_pages == CONFIG.num_pages - 1
    assert gate.held_bytes == 0
    assert len(engine.workers()) == 3


def test_a_retried_request_finds_its_stop_string_and_end(mortal, expected, model, params, tokenizer):
    """The string begins in a token of the first attempt and ends in the first one of the second."""
    sampling = dataclasses.replace(MIXED[3], stop=expected[3].text[2:4])
    (theirs,) = Engine(model, params, CONFIG, tokenizer=tokenizer).generate([PROMPTS[3]], sampling)
    assert len(theirs.token_ids) > 2
    for kept in range(1, len(theirs.token_ids)):
        engine, _ = mortal(num_decode=2)
        one = engine.add_request(PROMPTS[3], sampling)
        outputs = until(engine, drew(one, kept))
        engine._dispatcher.journeys[one].decode.worker.die()
        outputs += finish(engine)
        assert tokens_of(outputs, one) == theirs.token_ids
        assert outputs[-1].finish_reason == "stop"


def test_a_second_death_fails_the_request(mortal):
    engine, _ = mortal(num_decode=1, restarts=2)
    one = engine.add_request(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=60))
    outputs = []
    for _ in range(2):
        outputs += until(engine, lambda _: stage(engine, one) == "decode")
        worker(engine, "decode-0").die()
        outputs += until(engine, lambda _: stage(engine, one) != "decode")
    outputs += finish(engine)
    assert isinstance(outputs[-1].error, WorkerLost)
    assert "worker decode-0 died (killed by SIGKILL), as the worker that had it before" in str(outputs[-1].error)
    assert engine.generate(PROMPTS[:1], GREEDY)[0].finish_reason == "length"  # the third one works


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(seed, mortal, greedy):
    """Whatever comes, goes and dies when: each request ends once, with the right tokens or the beginning of them."""
    rng = np.random.default_rng(seed)
    engine, gate = mortal(num_prefill=2, num_decode=2, restarts=1000)
    rows, outputs, deaths = {}, [], 0
    for _ in range(60):
        action = rng.choice(["add", "step", "abort", "die", "gate"], p=[0.3, 0.45, 0.1, 0.05, 0.1])
        if action == "add":
            row = int(rng.integers(len(PROMPTS)))
            rows[engine.add_request(PROMPTS[row], GREEDY)] = row
        elif action == "step":
            outputs += engine.step()
        elif action == "abort" and rows:
            engine.abort(int(rng.choice(list(rows))))
        elif action == "die":
            slot = engine._crew.slots[str(rng.choice(list(engine._crew.slots)))]
            if isinstance(slot.worker, Mortal):
                slot.worker.die()
                deaths += 1
        elif action == "gate":
            gate.open = not gate.open
    gate.open = True
    outputs += finish(engine)
    ends = [output for output in outputs if output.finish_reason is not None]
    assert sorted(output.request_id for output in ends) == sorted(rows)
    for end in ends:
        tokens, expected = tokens_of(outputs, end.request_id), greedy[rows[end.request_id]]
        assert tokens == (expected if end.finish_reason == "length" else expected[: len(tokens)])
        assert not isinstance(end, FailedOutput) or deaths >= 2
    until(engine, lambda _: engine.free_pages == CONFIG.num_pages - 1 and gate.held_bytes == 0)
    assert {status.in_flight for status in engine.workers()} == {0}
    assert {status.load for status in engine.workers()} == {0}


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_no_worker_left(mode, mortal):
    engine, gate = mortal()
    gate.open = False
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS[:2]]
    until(engine, lambda _: stage(engine, ids[0]) == "moving")
    worker(engine, f"{mode}-0").die()
    gate.open = True
    outputs = finish(engine)
    failed = [output for output in outputs if isinstance(output, FailedOutput)]
    assert sorted(output.request_id for output in failed) == ids
    assert all(f"no {mode} worker is left" in str(output.error) for output in failed)
    one = engine.add_request(PROMPTS[0], GREEDY)
    assert [(output.request_id, output.finish_reason) for output in finish(engine)] == [(one, "abort")]
    with pytest.raises(WorkerLost, match=f"no {mode} worker is left"):
        engine.generate(PROMPTS[:1], GREEDY)
    if mode == "decode":  # which an output of one token never visits
        assert engine.generate([[1]], SamplingParams(max_tokens=1, temperature=0.0))[0].finish_reason == "length"


def test_requests_wait_for_a_worker_that_is_started(mortal, greedy):
    engine, _ = mortal(restarts=1)
    for name in ("prefill-0", "decode-0"):
        slot = engine._crew.slots[name]
        slot.worker.die()
        make, engine._crew._make = engine._crew._make, lambda slot, deliver: Silent()
        engine.step()
        engine._crew._make = make
        assert not slot.ready
        ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        assert engine.step() == []
        assert engine.metrics().waiting == len(PROMPTS)
        slot.starts_left = 1
        engine._crew._inbox.put((slot, slot.worker, ("died", "exit code 1")))
        outputs = finish(engine)
        assert [tokens_of(outputs, request_id) for request_id in ids] == greedy


def test_prefilled_requests_wait_for_a_decode_worker_that_is_started(mortal, greedy):
    engine, gate = mortal(restarts=1)
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    slot = engine._crew.slots["decode-0"]
    make, engine._crew._make = engine._crew._make, lambda slot, deliver: Silent()
    slot.worker.die()
    outputs = until(engine, lambda _: {stage(engine, request_id) for request_id in ids} == {"offered"})
    assert gate.held_bytes > 0
    engine._crew._make, slot.starts_left = make, 1
    engine._crew._inbox.put((slot, slot.worker, ("died", "exit code 1")))
    outputs += finish(engine)
    assert [tokens_of(outputs, request_id) for request_id in ids] == greedy
    assert gate.held_bytes == 0


def test_routes_see_the_workers_and_choose(model, params, greedy):
    seen = []

    def route(request_id, tokens, workers):
        seen.append((request_id, tokens, [(own.id, own.mode, own.in_flight, own.freq) for own in workers]))
        return workers[-1].id

    with DisaggregatedEngine.local(model, params, CONFIG, num_decode=2, route_decode=route) as engine:
        engine.status_freq("decode-1", 1005)
        assert [output.token_ids for output in engine.generate(PROMPTS[:2], GREEDY)] == greedy[:2]
        assert seen == [
            (0, 3, [("decode-0", "decode", 0, 0.0), ("decode-1", "decode", 0, 1005)]),
            (1, 5, [("decode-0", "decode", 0, 0.0), ("decode-1", "decode", 1, 1005)]),
        ]
        assert engine.drain_metrics("decode-0") == []
        metrics = engine.drain_metrics("decode-1")
        assert max(own.running for own in metrics) == 2
        assert engine.drain_metrics("decode-1") == []
    with DisaggregatedEngine.local(model, params, CONFIG, route_prefill=lambda *_: "gpu7") as engine:
        with pytest.raises(ValueError, match="route_prefill: expected one of prefill-0, got 'gpu7'"):
            engine.add_request(PROMPTS[0], GREEDY)
        assert not engine.has_work


def test_prefill_tells_before_it_computes(model, params, monkeypatch):
    """So that a clock can follow the batch that is about to run."""
    with DisaggregatedEngine.local(model, params, CONFIG) as engine:
        own, seen = worker(engine, "prefill-0")._role.engine, []
        read = own._runner.read

        def watched(chunks):
            seen.append(engine.drain_metrics("prefill-0"))
            return read(chunks)

        monkeypatch.setattr(own._runner, "read", watched)
        engine.generate(PROMPTS[:1], GREEDY)
        ((metrics,),) = seen
        assert (metrics.running, metrics.tokens) == (1, len(PROMPTS[0]))
        assert engine.drain_metrics("prefill-0") == []


def test_pace(model, params, monkeypatch):
    """A paced worker's iterations take longer, and nobody waits for it."""
    with DisaggregatedEngine.local(model, params, CONFIG) as engine:
        own = worker(engine, "decode-0")._role.engine
        step = own.step
        monkeypatch.setattr(own, "step", lambda: (time.sleep(0.005), step())[1])
        engine.generate(PROMPTS[:1], GREEDY)
        engine.drain_metrics("decode-0")
        engine.set_pace("decode-0", 20.0)
        one = engine.add_request(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=4))
        until(engine, lambda _: stage(engine, one) == "decode")
        waits = []
        while stage(engine, one) is not None:
            started = time.monotonic()
            engine.step()
            waits.append(time.monotonic() - started)
        assert engine.workers()[1].last_itl_ms >= 100
        times = [metrics.timestamp for metrics in engine.drain_metrics("decode-0")]
        assert min(np.diff(times)) >= 0.09
        assert len(waits) > 9  # a step waits a hundredth of a second at most
        for factor in (0.5, float("nan")):
            with pytest.raises(ValueError, match="factor: expected a number of at least 1"):
                engine.set_pace("decode-0", factor)
        with pytest.raises(ValueError, match="worker_id: expected one of prefill-0, decode-0, got 'x'"):
            engine.set_pace("x", 2.0)


def test_bad_arguments(model, params, tmp_path):
    with pytest.raises(ValueError, match="num_decode: expected at least 1, got 0"):
        DisaggregatedEngine.local(model, params, CONFIG, num_decode=0)
    with pytest.raises(ValueError, match="transfer: expected one of inproc, tcp, jax_transfer, got 'nccl'"):
        DisaggregatedEngine.local(model, params, CONFIG, transfer="nccl")
    with pytest.raises(ValueError, match="transfer: expected one of tcp, jax_transfer between processes, got 'inproc'"):
        DisaggregatedEngine.from_pretrained(tmp_path, CONFIG, processes=True)
    with DisaggregatedEngine.local(model, params, CONFIG) as engine:
        for ids, sampling, message in (
            ([], GREEDY, "expected at least one token"),
            ([1000], GREEDY, r"expected ids in \[0, 258\)"),
            ([1], SamplingParams(max_tokens=128), "max_position_embeddings"),
            ([1] * 10, SamplingParams(max_tokens=56), r"the pool's 16 pages of 4 tokens, got 10 \+ 56"),
            ([1] * 10, SamplingParams(max_tokens=55), None),
        ):
            with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
                engine.abort(engine.add_request(ids, sampling))
        with pytest.raises(TypeError, match="tokenizer"):
            engine.add_request([1], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="sampling: expected one for each of 2 prompts, got 1"):
            engine.generate([[1], [2]], [GREEDY])
