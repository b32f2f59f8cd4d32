"""Every HTTP endpoint under requests of any shape: the client's fault is 4xx, and the server goes on.

The engine draws what it likes instead of asking a network, so that a request costs nothing; the rest is real.
"""

import contextlib
import json
import re
import socket

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import VALUES, changed, edits, fuzz, json_of, text_of

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")
httpx = pytest.importorskip("httpx")

# Threads of the server draw random numbers of their own while hypothesis draws its.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

KEY = "a-secret-of-this-test"
COMPLETION = {
    **{"model": "toy", "prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 1},
    **{"stop": ["x"], "seed": 1, "logprobs": 1, "stream": False, "stop_token_ids": [5], "min_p": 0.1, "echo": False},
}
CHAT = {
    **{"model": "toy", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 2},
    **{"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2},
}
CLOCK = {"mode": "set", "freq_mhz": 1200, "slo_ms": 50.0, "worker": "0"}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/control/freq": CLOCK}
PATHS = ("/v1/models", "/v1/models/toy", "/v1/models/x", "/health", "/metrics", "/", "/dashboard/data", "/control/freq")


def _stand_in():
    """An engine, scheduler and checks and all, whose network is none."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from jaxlab.inference import Engine
    from jaxlab.inference.programs import Drawn
    from jaxlab.models.decoder import Decoder
    from jaxlab.models.decoder.model import abstract_params
    from tests.voltanallm import servers

    model = Decoder(servers.CONFIG)
    shapes = nn.meta.unbox(abstract_params(model))
    engine = Engine(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), servers.SIZES)

    def drawn(_, requests):
        ids = np.array([65 + 7 * len(request.tokens) % 60 for request in requests], np.int32)
        top = np.arange(20, dtype=np.int32) + np.zeros((len(requests), 1), np.int32)
        return Drawn(*map(jnp.asarray, (ids, -1.0 * ids.astype(np.float32), top, -1.0 * top.astype(np.float32))))

    runner = engine._runner
    runner.read, runner.draw, runner.decode = lambda chunks: None, drawn, lambda requests, epoch: drawn(None, requests)
    return engine


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    from jaxlab.voltanallm.limits import Limits
    from tests.voltanallm import servers

    tokenizer = servers.chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    limits = Limits(body_bytes=100_000)
    with servers.live(_stand_in(), tokenizer=tokenizer, api_key=KEY, limits=limits) as (_, client):
        client.headers["Authorization"] = f"Bearer {KEY}"
        client.timeout = 60.0
        yield client


def raw(host, port, content):
    """What a server answers to these bytes; nothing where it ends the connection."""
    with (
        socket.create_connection((host, port), timeout=20) as peer,
        contextlib.suppress(ConnectionError, BrokenPipeError),
    ):
        peer.sendall(content)
        with contextlib.suppress(OSError):  # it has gone already
            peer.shutdown(socket.SHUT_WR)
        return peer.makefile("rb").read()
    return b""


def answered(client, answer):
    """No fault of the server, told as OpenAI does, without the key; and the next request is answered."""
    assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:300]}"
    assert KEY not in answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text[:300]
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("path", BODIES)
def test_other_values(client, path):
    def check(value):
        body = text_of(value)
        answered(client, client.post(path, content=body, headers={"Content-Type": "application/json"}))

    # Few tokens whatever else is asked for: what a request may cost has tests of its own.
    def few(value):
        return {**value, "max_tokens": 2, "n": 1} if isinstance(value, dict) and "max_tokens" in BODIES[path] else value

    fuzz(json_of(BODIES[path]).map(few), check, examples=60)


@pytest.mark.parametrize("path", BODIES)
def test_changed_bytes(client, path):
    content = text_of(BODIES[path])

    def check(drawn):
        body = changed(content, drawn)
        if len(re.findall(rb'"max_tokens": 2\b', body)) == len(re.findall(rb'"max_tokens": 2\b', content)):
            answered(client, client.post(path, content=body, headers={"Content-Type": "application/json"}))

    fuzz(edits(), check)
    for body in (b"[" * 50_000, b'{"a":' * 20_000, b"", b"\xff\xfe", b"null", b"0", b"1" * 50_000, b"x" * 200_000):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500
        answered(client, answer)


def test_paths_and_queries(client):
    pieces = st.sampled_from(
        ("..", "%2e%2e", "%00", "%ff", "models", "v1", "etc/passwd", "a" * 300, "%F0%9F%98%80", "//")
    )
    path = st.one_of(st.sampled_from(PATHS), st.lists(pieces, max_size=5).map(lambda parts: "/" + "/".join(parts)))
    query = st.sampled_from(
        ("", "?since=nan", "?since=inf", "?since=-1e999", "?since=x", "?since=" + "9" * 400, "?a=%00", "?&&=")
    )
    method = st.sampled_from(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))

    def check(drawn):
        method, path, query = drawn
        answer = client.request(method, str(client.base_url).rstrip("/") + path + query)
        assert "root:" not in answer.text
        if method == "HEAD":
            assert answer.status_code < 500
        else:
            answered(client, answer)

    fuzz(st.tuples(method, path, query), check)


def test_headers(client):
    names = st.sampled_from(
        (
            "Authorization",
            "Content-Type",
            "Content-Length",
            "Transfer-Encoding",
            "Host",
            "Accept",
            "Expect",
            "Cookie",
            "X-A",
        )
    )
    values = st.sampled_from(
        (
            *(
                "",
                "x",
                "Bearer",
                f"Bearer {KEY}x",
                "Basic !!!",
                "Basic eDp5",
                "bearer \xff",
                "application/json; charset=x",
            ),
            *("text/plain", "-1", "9" * 30, "1e3", "chunked", "chunked, chunked", "100-continue", "a" * 2000, "1, 1"),
        )
    )

    def check(drawn):
        """Over a bare socket: a client would not send them."""
        path, headers, body = drawn
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *(f"{n}: {v}" for n, v in headers)]
        content = "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body
        answer = raw(client.base_url.host, client.base_url.port, content)
        status = re.match(rb"HTTP/1\.1 (\d+)", answer)
        assert status is None or int(status[1]) < 500, answer[:300]
        assert KEY.encode() not in answer
        assert client.get("/health").json() == {"status": "ok"}

    body = text_of(COMPLETION)
    drawn = st.tuples(
        st.sampled_from(sorted(BODIES)), st.lists(st.tuples(names, values), max_size=3), st.sampled_from((body, b""))
    )
    fuzz(drawn, check)


def test_bytes_that_are_no_http(client):
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Content-Length: 20", "", ""]
    start = "\r\n".join(lines).encode()

    def check(drawn):
        answer = raw(client.base_url.host, client.base_url.port, changed(start, drawn))
        status = re.match(rb"HTTP/1\.1 (\d+)", answer)
        assert status is None or int(status[1]) < 500, answer[:300]
        assert client.get("/health").json() == {"status": "ok"}

    fuzz(edits(), check)


def test_the_viewer(tmp_path):
    """The server of `jaxlab flexgaussian view`, which answers a fixed set of paths."""
    from jaxlab.flexgaussian.viewer import serve
    from tests.flexgaussian.scenes import random_scene

    (tmp_path / "engine.mjs").write_text("export {}")
    with serve(random_scene(count=8, degree=0), viewer_js=tmp_path / "engine.mjs") as url:
        place = httpx.URL(url)
        start = f"GET /about.json HTTP/1.1\r\nHost: {place.host}:{place.port}\r\nConnection: close\r\n\r\n".encode()

        def ask(content):
            return raw(place.host, place.port, content)

        whole = ask(start)
        assert b"200" in whole.split(b"\r\n")[0]

        def check(drawn):
            answer = ask(changed(start, drawn))
            status = re.match(rb"HTTP/1\.[01] (\d+)", answer)
            # 501 and 505: a method and a version that it does not have.
            assert status is None or int(status[1]) < 500 or int(status[1]) in (501, 505), answer[:300]
            assert b"root:" not in answer

        fuzz(edits(), check)
        for path in (
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/about.json/../../x",
            "/engine.mjs",
        ):
            assert b" 404 " in ask(start.replace(b"/about.json", path.encode())).split(b"\r\n")[0]
        assert ask(start) == whole or b"200" in ask(start)


def test_what_an_endpoint_answers(unchecked):
    """The other side: a server that lies to our client."""
    from jaxlab.inference.endpoint import EndpointError, read_completion, read_pieces

    answer = {
        "choices": [
            {
                **{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
                "logprobs": {
                    "content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "a", "logprob": -1}]}]
                },
            },
            {
                **{"index": 1, "text": "b", "finish_reason": None},
                "logprobs": {"tokens": ["b"], "token_logprobs": [None], "top_logprobs": [{"b": 0.0}]},
            },
        ],
        "usage": {"total_tokens": 3},
    }
    piece = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}

    def whole(other):
        with contextlib.suppress(EndpointError):
            read_completion(other if isinstance(other, dict) else {"choices": other}, "http://x")

    def pieces(other):
        with contextlib.suppress(EndpointError):
            list(read_pieces(json.dumps(other), EndpointError))

    fuzz(json_of(answer), whole, examples=100)
    fuzz(json_of(piece), pieces, examples=60)
    for value in VALUES:
        whole(value)
        pieces(value)
    for text in ("[" * 100_000, "", "{", "null", '"error"'):
        with pytest.raises(EndpointError):
            list(read_pieces(text, EndpointError))


def test_strangers_at_the_transfer_of_keys_and_values():
    """Bytes of any kind at the port where workers fetch keys and values: the port goes on."""
    from jaxlab.inference.tcp_transfer import TcpTransfer

    end = TcpTransfer(b"0123456789abcdef", timeout_s=5.0)
    try:

        def check(drawn):
            answer = raw(*end.address, drawn)
            assert len(answer) <= 16  # its nonce, and nothing to who does not know the secret

        fuzz(st.binary(max_size=100), check)
        assert not end._closed
        assert end._thread.is_alive()
    finally:
        end.close()
