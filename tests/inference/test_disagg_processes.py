"""Two prefill and two decode workers in processes of their own, on one model on disk; all tests share them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxlab.inference import DisaggregatedEngine, Engine
from jaxlab.models import save_pretrained
from tests.inference.test_disagg import (
    CONFIG,
    GREEDY,
    MIXED,
    PROMPTS,
    drew,
    finish,
    stage,
    tokens_of,
    until,
    without_ids,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE_BYTES = 2 * 2 * 2 * 4 * 8 * 4  # k and v, layers, heads, tokens, dim, float32
LONG = dataclasses.replace(GREEDY, max_tokens=36)


@pytest.fixture(scope="module")
def folder(model, params, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, model, params, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def routes():
    """Where the next requests go: mode -> worker id."""
    return {}


@pytest.fixture(scope="module")
def engine(folder, routes):
    def route(mode):
        return lambda request_id, tokens, workers: routes.get(mode, min(workers, key=lambda own: own.in_flight).id)

    with DisaggregatedEngine.from_pretrained(
        folder,
        CONFIG,
        num_prefill=2,
        num_decode=2,
        transfer="tcp",
        processes=True,
        route_prefill=route("prefill"),
        route_decode=route("decode"),
        # Also the small programs, for the workers that are started again.
        worker_env=lambda worker_id: {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    ) as engine:
        pids = [slot.worker.pid for slot in engine._crew.slots.values()]
        yield engine
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.fixture(autouse=True)
def nothing_leaks(engine, routes):
    yield
    routes.clear()
    until(engine, lambda _: all(slot.ready for slot in engine._crew.slots.values()))
    idle = {(CONFIG.num_pages - 1, 0)}
    until(
        engine, lambda _: {(own.stats.free_pages, own.stats.held_bytes) for own in engine._crew.slots.values()} == idle
    )
    assert not engine.has_work
    assert {status.in_flight for status in engine.workers()} == {0}


@pytest.fixture(scope="module")
def own(folder):
    """An engine in this process."""
    return Engine.from_pretrained(folder, CONFIG)


@pytest.mark.latest
def test_equals_the_engine_that_does_both(engine, own):
    before = engine.kv_bytes_moved
    outputs, expected = engine.generate(PROMPTS, MIXED), own.generate(PROMPTS, MIXED)
    assert without_ids(outputs) == without_ids(expected)
    for ours, theirs in zip(outputs, expected):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert engine.kv_bytes_moved - before == PAGE_BYTES * sum(-(-len(PROMPTS[row]) // 4) for row in (0, 1, 3))
    np.testing.assert_allclose(engine.prompt_logits(PROMPTS[:1]), own.prompt_logits(PROMPTS[:1]), atol=1e-5)
    with pytest.raises(ValueError, match="expected at least one token"):
        engine.prompt_logits([[]])


def test_abort(engine):
    ids = [engine.add_request(prompt, LONG) for prompt in PROMPTS[:3]]
    outputs = until(engine, drew(ids[0], 1))
    for request_id in ids:
        assert engine.abort(request_id)
    assert sorted(output.request_id for output in outputs + finish(engine) if output.finish_reason == "abort") == ids


def test_pace(engine, routes):
    """A slow clock on one worker: its steps take longer, those of the other do not, and the front waits for neither."""

    def step_s(worker_id):
        routes["decode"] = worker_id
        one = engine.add_request(PROMPTS[0], GREEDY)
        engine.drain_metrics(worker_id)
        slowest = 0.0
        while stage(engine, one) is not None:
            started = time.monotonic()
            engine.step()
            slowest = max(slowest, time.monotonic() - started)
        times = [metrics.timestamp for metrics in engine.drain_metrics(worker_id)]
        assert len(times) == GREEDY.max_tokens - 1
        return float(min(np.diff(times))), slowest

    plain, _ = step_s("decode-1")
    engine.set_pace("decode-0", 30.0)
    paced, slowest = step_s("decode-0")
    engine.set_pace("decode-0", 1.0)
    assert paced > 5 * plain
    assert slowest < 0.5


def test_a_killed_decode_worker(engine, own, routes):
    theirs = own.generate(PROMPTS, LONG)
    expected = [output.token_ids for output in theirs]
    routes["decode"] = "decode-0"
    engine.set_pace("decode-0", 10.0)
    ids = [engine.add_request(prompt, LONG) for prompt in PROMPTS]
    outputs = until(engine, drew(ids[0], 5))
    os.kill(engine._crew.slots["decode-0"].worker.pid, signal.SIGKILL)
    routes["decode"] = "decode-1"
    outputs += finish(engine)
    assert [tokens_of(outputs, request_id) for request_id in ids] == expected
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
    assert [ends[request_id] for request_id in ids] == [output.finish_reason for output in theirs]
    until(engine, lambda _: engine._crew.slots["decode-0"].ready)  # it is started again, and works
    engine.set_pace("decode-0", 1.0)
    routes["decode"] = "decode-0"
    assert [output.token_ids for output in engine.generate(PROMPTS, LONG)] == expected


def test_a_killed_prefill_worker(engine, own, routes):
    expected = [output.token_ids for output in own.generate(PROMPTS, GREEDY)]
    routes["prefill"] = "prefill-0"
    os.kill(engine._crew.slots["prefill-0"].worker.pid, signal.SIGSTOP)
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    assert engine.step() == []
    os.kill(engine._crew.slots["prefill-0"].worker.pid, signal.SIGKILL)
    routes["prefill"] = "prefill-1"
    outputs = finish(engine)
    assert [tokens_of(outputs, request_id) for request_id in ids] == expected


_PARENT = """
import sys, time
from jaxlab.inference.serving import EngineConfig
from jaxlab.inference.worker import WorkerProcess, WorkerSettings
settings = WorkerSettings(sys.argv[1], EngineConfig(17), "float32", "tcp", bytes(32), "127.0.0.1", 5.0, False)
def tell(worker, event, *arguments):
    if event == "ready":
        print(worker.pid, flush=True)
worker = WorkerProcess("prefill", settings, tell)
time.sleep(600)
"""


def test_no_orphans(folder):
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(5)
