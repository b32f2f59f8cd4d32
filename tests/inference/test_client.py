"""The HTTP client against a real server on this machine that misbehaves on request."""

import asyncio
import datetime
import email.utils
import http.server
import json
import threading
import time

import pytest

pytest.importorskip("httpx", reason="the extra 'agents' is not installed")

from jaxlab.inference import AsyncClient, Client, EndpointError

CHAT = [{"role": "user", "content": "Hi"}]


def answer(*texts, **more):
    choices = [{"index": k, "message": {"content": text}, "finish_reason": "stop"} for k, text in enumerate(texts)]
    return {"choices": choices[::-1], "usage": {"completion_tokens": 3}, **more}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.path, body, self.headers.get("Authorization"), time.monotonic()))
            act = server.script.pop(0) if server.script else server.always
            server.active += 1
            server.most = max(server.most, server.active)
        try:
            act(self, body)
        finally:
            with server.lock:
                server.active -= 1

    def do_GET(self):
        self.send(200, {"data": [{"id": "a"}, {"id": "b"}]})

    def send(self, status, value, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, *events, end=True):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            if callable(event):
                event()
                continue
            self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        if end:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def drop(self):
        self.close_connection = True
        self.connection.close()

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError, OSError):
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there; this machine is not reached through it
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.seen, server.script, server.active, server.most = threading.Lock(), [], [], 0, 0
    server.always = lambda handler, body: handler.send(200, answer("Hello"))
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server):
    with Client(server.url, model="m", api_key="secret", backoff_s=0.01, max_retries=2) as client:
        yield client


def reply(status, value=b"", **headers):
    return lambda handler, body: handler.send(status, value, **headers)


def delta(text=None, finish=None, **more):
    return {
        "choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish, **more}]
    }


@pytest.mark.latest
def test_chat(server, client):
    server.script = [reply(200, answer("one", "two"))]
    got = client.chat(CHAT, max_tokens=4, temperature=0.5, stop=None)
    assert [choice.text for choice in got.choices] == ["one", "two"]
    assert (got.text, got.choices[0].finish_reason, got.usage["completion_tokens"]) == ("one", "stop", 3)
    path, body, key, _ = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "m", "messages": CHAT, "max_tokens": 4, "temperature": 0.5}
    assert client.models() == ["a", "b"]


def test_log_probabilities_of_both_kinds(server, client):
    content = [{"token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Hi", "logprob": -0.5}]}]
    chat = {"choices": [{"message": {"content": "Hi"}, "logprobs": {"content": content}}]}
    lists = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {"b": -1.5}]}
    server.script = [reply(200, chat), reply(200, {"choices": [{"text": "ab", "logprobs": lists}]})]
    (token,) = client.chat(CHAT, logprobs=True).choices[0].logprobs
    assert (token.token, token.logprob, token.top) == ("Hi", -0.5, {"Hi": -0.5})
    first, second = client.complete("x", model="other", logprobs=1).choices[0].logprobs
    assert first.logprob != first.logprob
    assert (second.logprob, second.top) == (-1.5, {"b": -1.5})
    assert server.seen[1][:2] == ("/v1/completions", {"model": "other", "prompt": "x", "logprobs": 1})


@pytest.mark.parametrize("trouble", [reply(429), reply(503, b"busy"), lambda handler, body: handler.drop()])
def test_trouble_that_passes_is_waited_out(server, client, trouble):
    server.script = [trouble, trouble]
    assert client.chat(CHAT).text == "Hello"
    assert len(server.seen) == 3


def test_retry_after_is_kept_to(server, client):
    server.script = [reply(429, Retry_After="0.3")]
    client.chat(CHAT)
    assert server.seen[1][3] - server.seen[0][3] >= 0.3
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    server.script = [reply(429, Retry_After=email.utils.format_datetime(soon, usegmt=True))]
    with pytest.raises(EndpointError, match=r"HTTP 429.*asks to wait 3[56]\d\d.*the limit is 30 s") as caught:
        client.chat(CHAT)
    assert caught.value.attempts == 1


def test_what_stays_wrong_is_told(server, client):
    server.always = reply(500, {"error": {"message": "out of memory"}})
    with pytest.raises(EndpointError, match=r"chat/completions: HTTP 500: out of memory \(attempt 3\)") as caught:
        client.chat(CHAT)
    assert (caught.value.status, caught.value.attempts, len(server.seen)) == (500, 3, 3)
    server.always = reply(400, b"no such model")
    with pytest.raises(EndpointError, match="HTTP 400: no such model") as caught:
        client.chat(CHAT)
    assert caught.value.attempts == 1
    for nonsense in (reply(200, b"<html>"), reply(200, {"object": "x"}), reply(200, {"choices": []})):
        server.always = nonsense
        with pytest.raises(EndpointError, match="expected"):
            client.chat(CHAT)


def test_nobody_there():
    with (
        Client("http://127.0.0.1:9/v1", model="m", max_retries=1, backoff_s=0.0) as client,
        pytest.raises(EndpointError, match=r"Connect.*\(attempt 2\)") as caught,
    ):
        client.chat(CHAT)
    assert caught.value.status is None


def test_an_answer_that_does_not_come(server):
    server.always = lambda handler, body: time.sleep(0.6)
    with (
        Client(server.url, model="m", timeout_s=0.15, max_retries=1, backoff_s=0.0) as client,
        pytest.raises(EndpointError, match=r"within the time limit|ReadTimeout"),
    ):
        client.chat(CHAT)
    assert len(server.seen) == 2


def test_streams(server, client):
    token = {"content": [{"token": "He", "logprob": -1.0}]}
    server.script = [
        reply(503),
        lambda handler, body: handler.stream(
            delta(), delta("He", logprobs=token), delta("llo"), delta(finish="length")
        ),
        lambda handler, body: handler.stream({"choices": [{"text": "x", "index": 1}]}),
    ]
    pieces = list(client.stream_chat(CHAT, logprobs=True))
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert pieces[-1].finish_reason == "length"
    assert pieces[1].logprobs[0].logprob == -1.0
    assert server.seen[-1][1]["stream"] is True
    assert [(piece.text, piece.index) for piece in client.stream_complete("p")] == [("x", 1)]


def test_a_stream_is_not_begun_again(server):
    stalled = threading.Event()
    ends = {
        "ended before its last piece": lambda handler, body: handler.stream(delta("Hel"), end=False),
        "time limit": lambda handler, body: handler.stream(delta("Hel"), lambda: stalled.wait(2)),
        "the stream broke: full": lambda handler, body: handler.stream(delta("Hel"), {"error": {"message": "full"}}),
        "expected a piece": lambda handler, body: handler.stream(delta("Hel"), "{"),
    }
    with Client(server.url, model="m", stall_s=0.2, max_retries=2, backoff_s=0.0) as client:
        for message, act in ends.items():
            server.script, server.seen = [act], []
            with pytest.raises(EndpointError, match=message) as caught:
                list(client.stream_chat(CHAT))
            assert (caught.value.partial, len(server.seen)) == ("Hel", 1)
        stalled.set()
        server.script = [lambda handler, body: handler.stream(end=False)]  # broken before anything came: tried again
        server.always = lambda handler, body: handler.stream(delta("whole"))
        assert "".join(piece.text for piece in client.stream_chat(CHAT)) == "whole"


def test_a_stream_left_early_frees_its_turn(server):
    server.always = lambda handler, body: (
        handler.stream(delta("a"), delta("b")) if body.get("stream") else handler.send(200, answer("next"))
    )
    with Client(server.url, model="m", concurrency=1, max_retries=0) as client:
        pieces = client.stream_chat(CHAT)
        assert next(pieces).text == "a"
        pieces.close()
        assert client.chat(CHAT).text == "next"


def test_no_more_at_once_than_allowed(server):
    def slow(handler, body):
        time.sleep(0.05)
        handler.send(200, answer(body["messages"][0]["content"]))

    async def ask():
        async with AsyncClient(server.url, model="m", concurrency=3) as client:
            asked = (client.chat([{"role": "user", "content": str(k)}]) for k in range(9))
            return [got.text for got in await asyncio.gather(*asked)]

    server.always = slow
    assert asyncio.run(ask()) == [str(k) for k in range(9)]
    assert server.most == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url: expected an http"),
        ({"timeout_s": 0}, "timeout_s: expected more than 0"),
        ({"max_retries": -1}, "max_retries: expected at least 0"),
        ({"concurrency": 0}, "concurrency: expected at least 1"),
    ],
)
def test_bad_inputs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Client(**{"base_url": "http://127.0.0.1:9", **arguments})


def test_no_model_and_closed(server):
    client = Client(server.url)
    with pytest.raises(ValueError, match="model: expected a name"):
        client.chat(CHAT)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.chat(CHAT, model="m")
