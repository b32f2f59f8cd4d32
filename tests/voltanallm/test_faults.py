"""A server whose engine breaks, whose clients misbehave, and which is told to end: nothing hangs, all are told."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.inference import StepOutput
from jaxlab.voltanallm import Limits, create_app, serve, served
from jaxlab.voltanallm.engine_loop import EngineLoop, Unavailable
from tests.voltanallm.servers import MODEL, SIZES, Slowed, ask, events, live, until

LONG = {"prompt": [7], "max_tokens": 100}


class Broken:
    """An engine whose step does what it is told; all else is a real one's."""

    def __init__(self, engine, step):
        self._engine, self.step = engine, step

    def __getattr__(self, name):
        return getattr(self._engine, name)


def abandoned(engine):
    """Ends what a broken engine left behind."""
    for request in list(engine._requests):
        engine.abort(request)
    engine.step()


@pytest.fixture
def raises(engine):
    """A step that raises once `arm` is set."""
    arm = threading.Event()

    def step():
        if arm.is_set():
            raise MemoryError("no memory is left")
        time.sleep(0.01)
        return engine.step()

    yield Broken(engine, step), arm
    abandoned(engine)


def together(count, function):
    """Results of so many calls on threads of their own."""
    results = [None] * count

    def run(index):
        results[index] = function(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def test_an_engine_that_fails_is_told_to_all_once(raises, caplog):
    engine, arm = raises
    with live(engine) as (app, client):
        threads, results = together(6, lambda index: ask(client, stream=index % 2 == 0, **LONG))
        until(lambda: app.state.engine_loop.under_way == 6)
        ask(client)
        arm.set()
        for thread in threads:
            thread.join(30)
        for index, got in enumerate(results):
            if index % 2:
                assert got.status_code == 503
                error = got.json()["error"]
            else:
                assert got.status_code == 200
                error = events(got)[-1]["error"]
            assert "the engine failed (MemoryError)" in error["message"]
            assert error["type"] == "server_error"
        assert client.get("/health").status_code == 503
        assert ask(client).status_code == 503
        assert "MemoryError" in client.get("/dashboard/data").json()["trouble"]
        assert 'outcome="failed"} 6' in client.get("/metrics").text
    assert app.state.engine_loop.under_way == 0
    assert [record.message for record in caplog.records] == ["the engine failed"]


def test_a_lost_request_is_told_once(engine, free_pages):
    lost = threading.Event()

    def step():
        outputs = engine.step()
        if lost.is_set() and outputs:
            lost.clear()
            engine.abort(outputs[0].request_id)
            return [StepOutput(outputs[0].request_id, [], "abort"), *outputs[1:]]
        return outputs

    with live(Broken(engine, step)) as (_, client):
        lost.set()
        got = ask(client, **LONG)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "engine_unavailable")
        assert ask(client).status_code == 200


def test_as_many_as_are_let_in(engine, free_pages):
    with live(Slowed(engine), limits=Limits(requests=3)) as (app, client):
        threads, results = together(3, lambda index: ask(client, **LONG))
        until(lambda: app.state.engine_loop.under_way == 3)
        got = ask(client)
        assert (got.status_code, got.headers["retry-after"]) == (429, "1")
        assert got.json()["error"]["code"] == "overloaded"
        for thread in threads:
            thread.join(30)
        assert [result.status_code for result in results] == [200] * 3
        assert ask(client, n=4).status_code == 429
        assert ask(client, n=3).status_code == 200


def test_answers_have_a_time_limit(raises):
    engine, _ = raises
    with live(engine, limits=Limits(answer_s=0.05)) as (_, client):
        got = ask(client, **LONG)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "timeout")
        assert events(ask(client, stream=True, **LONG))[-1]["error"]["code"] == "timeout"
        until(lambda: engine.free_pages == SIZES.num_pages - 1)


def test_large_and_slow_bodies_and_headers(engine):
    limits = Limits(body_bytes=2000, body_s=0.2, header_s=0.2, header_bytes=2000)
    with live(engine, limits=limits) as (_, client):
        got = ask(client, [1] * 1000)
        assert (got.status_code, got.json()["error"]["code"]) == (413, "too_large")
        got = client.post("/v1/completions", content=iter([b"[" * 900] * 9))  # its size is not told
        assert got.status_code == 413

        def sent(*parts, wait_s=0.0):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(wait_s)
                start, data = time.monotonic(), b""
                with contextlib.suppress(ConnectionResetError):
                    while part := connection.recv(4096):
                        data += part
                return data, time.monotonic() - start

        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        data, _ = sent(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 300_000 + b"\r\n\r\n")
        assert b"200 OK" not in data
        data, _ = sent(head + b"\r\n{")
        assert data.startswith(b"HTTP/1.1 408")
        for parts in ((), (head,), (b"GET", b" /hea", b"lth"), (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /")):
            data, took = sent(*parts, wait_s=0.05)
            assert data.count(b"HTTP/1.1 200") == (len(parts) == 2 and b"\r\n\r\n" in parts[0])
            assert took < 3
        assert client.get("/health").status_code == 200


def ended_while_two_are_answered(engine, drain_s):
    """Answers, one whole and one streamed, of a server that is told to end meanwhile."""
    app = create_app(engine, model_name=MODEL, warm=False)
    with httpx.Client(timeout=60, trust_env=False) as client:
        with served(app, drain_s=drain_s) as url:
            client.base_url = url
            threads, results = together(2, lambda index: ask(client, stream=bool(index), **LONG))
            until(lambda: app.state.engine_loop.under_way == 2)
        for thread in threads:
            thread.join(30)
    assert engine.free_pages == SIZES.num_pages - 1
    return results


def test_the_end_waits_for_answers(raises):
    whole, streamed = ended_while_two_are_answered(raises[0], 20)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert events(streamed)[-1] == "[DONE]"


def test_the_end_does_not_wait_for_ever(raises):
    whole, streamed = ended_while_two_are_answered(raises[0], 0.05)
    assert whole.status_code == 503
    last = streamed.json() if streamed.status_code == 503 else events(streamed)[-1]
    for error in (whole.json()["error"], last["error"]):
        assert "shutting down" in error["message"]


def answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_serve_ends_cleanly(engine, free_pages):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    results = []

    def use():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            until(lambda: answers(client), 60)
            body = {"model": MODEL, "temperature": 0, "stream": True, **LONG}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                results.append(next(lines))
                os.kill(os.getpid(), signal.SIGINT)
                results.extend(lines)

    thread = threading.Thread(target=use)
    thread.start()
    serve(create_app(Slowed(engine), model_name=MODEL, warm=False), port=port, log_level="critical")
    thread.join(30)
    assert results[-2:] == ["data: [DONE]", ""]


def test_an_engine_that_cannot_start(engine):
    broken = Broken(engine, engine.step)
    broken.warmup = lambda: 1 / 0
    with pytest.raises(RuntimeError, match="did not start"), served(create_app(broken, model_name=MODEL)):
        pass
    with pytest.raises(RuntimeError, match="the engine failed"):
        serve(create_app(broken, model_name=MODEL))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        again = served(create_app(engine, model_name=MODEL), port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"), again:
            pass


def test_a_client_that_does_not_read_is_left():
    from jaxlab.voltanallm.streams import event_stream

    ended = []

    async def more():
        while True:
            yield b"data: {}\n\n"

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def respond():
        response = event_stream(b"data: {}\n\n", more(), lambda: ended.append(True), stall_s=0.05)
        await asyncio.wait_for(response({"type": "http"}, receive, send), 10)

    asyncio.run(respond())
    assert ended == [True]


def test_a_closed_loop_refuses(engine):
    loop = EngineLoop(engine, warm=False)
    loop.start()
    loop.close()

    async def late():
        with pytest.raises(Unavailable, match="shutting down"):
            await loop.submit([([1], None)])

    asyncio.run(late())
    with pytest.raises(Unavailable):
        loop.call(lambda: None).result(5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/control/freq")
FIELDS = ("prompt", "messages", "max_tokens", "n", "stop", "seed", "temperature", "top_p", "stream", "logprobs", "echo")
BODIES = st.fixed_dictionaries({"model": st.just(MODEL) | JSON}, optional=dict.fromkeys(FIELDS, JSON))


def test_nonsense_is_never_the_servers_fault(engine, tokenizer):
    asked = []

    @settings(max_examples=60, deadline=None)
    @given(BODIES | JSON, st.sampled_from(PATHS), st.binary(max_size=4))
    def collect(body, path, noise):
        data = json.dumps(body).encode()
        asked.extend((path, content) for content in (data, data[: len(data) // 2] + noise))

    collect()  # before there are threads, whose use of `random` Hypothesis would take for the strategies' own
    with live(engine, tokenizer=tokenizer) as (_, client):
        for path, content in asked:
            got = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert got.status_code in (200, 400, 404), (content, got.text)
            assert ("error" in got.text) == (got.status_code != 200), (content, got.text)
