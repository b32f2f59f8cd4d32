"""The server on a live port, asked by OpenAI's own client and by one that misbehaves; answers are the engine's."""

import asyncio
import itertools
import math
import socket

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")
pytest.importorskip("openai", reason="OpenAI's client is not installed")

import httpx
import openai

from jaxlab.inference import SamplingParams
from tests.voltanallm.servers import MODEL, SIZES, Slowed, ask, events, live, until

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi é"}]}]
CHAT_TEXT = "[system]Be brief.[user]Hi é[assistant]"


def drawn(engine, ids, **sampling):
    """What the engine itself draws; a server asks it on another thread, so only before or after it does."""
    return engine.generate([list(ids)], SamplingParams(**{"temperature": 0.0, "stop_ids": (257,)} | sampling))[0]


def on_engine(app, engine, *requests, **sampling):
    """The same while a server runs: on its engine's thread."""
    return app.state.engine_loop.call(lambda: [drawn(engine, ids, **sampling) for ids in requests]).result(60)


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.latest
def test_completions_are_the_engines(server, engine, official, tokenizer):
    app = server[0]
    one, two = on_engine(app, engine, b"The sky", b"A", max_tokens=12)
    got = official.completions.create(model=MODEL, prompt=["The sky", "A"], max_tokens=12, temperature=0, logprobs=2)
    assert [choice.text for choice in got.choices] == [tokenizer.decode(own.token_ids) for own in (one, two)]
    assert [choice.finish_reason for choice in got.choices] == [one.finish_reason, two.finish_reason]
    assert got.usage.prompt_tokens == 8
    assert got.usage.completion_tokens == len(one.token_ids) + len(two.token_ids)
    np.testing.assert_allclose(got.choices[0].logprobs.token_logprobs, one.logprobs, atol=1e-5)
    assert len(got.choices[0].logprobs.tokens) == len(one.token_ids)
    assert all(len(top) == 2 for top in got.choices[0].logprobs.top_logprobs)
    ids = official.completions.create(model=MODEL, prompt=list(b"The sky"), max_tokens=12, temperature=0, echo=True)
    assert ids.choices[0].text == "The sky" + got.choices[0].text
    many = official.completions.create(model=MODEL, prompt=[[65], [66, 67]], max_tokens=2, n=2, seed=5)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    for index, choice in enumerate(many.choices):
        (own,) = on_engine(app, engine, ([65], [66, 67])[index // 2], max_tokens=2, temperature=1.0, seed=5 + index % 2)
        assert choice.text == tokenizer.decode(own.token_ids)


def test_a_stream_is_the_whole_in_pieces(server, engine, official, tokenizer):
    arguments = {"model": MODEL, "prompt": "Once", "max_tokens": 40, "temperature": 0, "logprobs": 1}
    whole = official.completions.create(**arguments)
    pieces = list(official.completions.create(**arguments, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert joined(piece.choices[0].logprobs.tokens for piece in pieces) == whole.choices[0].logprobs.tokens
    offsets = joined(piece.choices[0].logprobs.text_offset for piece in pieces)
    assert offsets == whole.choices[0].logprobs.text_offset


def test_chat(server, engine, official, tokenizer):
    (own,) = on_engine(server[0], engine, CHAT_TEXT.encode(), max_tokens=10, logprobs=3)
    arguments = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 10, "temperature": 0, "logprobs": True}
    got = official.chat.completions.create(**arguments, top_logprobs=3)
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == tokenizer.decode(own.token_ids)
    assert got.usage.prompt_tokens == len(CHAT_TEXT.encode())
    told = got.choices[0].logprobs.content
    np.testing.assert_allclose([each.logprob for each in told], own.logprobs, atol=1e-5)
    assert [len(each.top_logprobs) for each in told] == [3] * len(told)
    for each, token in zip(told, own.token_ids):
        assert each.token == (chr(token) if token < 128 else f"token_id:{token}")
        assert each.bytes == ([token] if token < 128 else None)

    stream = official.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == got.choices[0].message.content
    assert (pieces[-1].choices, pieces[-1].usage.total_tokens) == ([], got.usage.total_tokens)
    assert all(piece.usage is None for piece in pieces[:-1])


def test_a_chat_may_fill_the_context(client):
    got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, "seed": 1}).json()
    assert got["usage"]["total_tokens"] == 128 or got["choices"][0]["finish_reason"] == "stop"


def test_a_stream_begins_before_it_ends(engine, free_pages):
    body = {"model": MODEL, "prompt": [7], "max_tokens": 100, "temperature": 0, "stream": True}
    with live(Slowed(engine)) as (app, client), client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()  # httpx hangs up when they are forgotten
        assert next(lines).startswith("data: {")
        assert app.state.engine_loop.under_way == 1


def test_stop_strings(server, engine, client, tokenizer, free_pages):
    (own,) = on_engine(server[0], engine, b"Once", max_tokens=40)
    text = tokenizer.decode(own.token_ids)
    stop = text[12:14]
    for stream in (False, True):
        got = client.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "Once", "max_tokens": 40, "temperature": 0, "stop": stop, "stream": stream},
        )
        choices = [event["choices"][0] for event in events(got)[:-1]] if stream else got.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"
    token = own.token_ids[3]
    got = ask(client, list(b"Once"), max_tokens=40, stop_token_ids=[token]).json()
    assert got["usage"]["completion_tokens"] == own.token_ids.index(token) + 1
    assert got["choices"][0]["finish_reason"] == "stop"


def test_without_a_tokenizer(engine):
    own = drawn(engine, [1, 2, 3], max_tokens=5, stop_ids=())
    with live(engine) as (_, client):
        text = " ".join(map(str, own.token_ids))
        assert ask(client, max_tokens=5).json()["choices"][0]["text"] == text
        assert ask(client, max_tokens=5, echo=True).json()["choices"][0]["text"] == f"1 2 3 {text}"
        pieces = [event["choices"][0]["text"] for event in events(ask(client, max_tokens=5, stream=True))[:-1]]
        assert "".join(pieces) == text
        for body, param in (({"prompt": "Once"}, "prompt"), ({"prompt": [1], "stop": "a"}, "stop")):
            got = client.post("/v1/completions", json={"model": MODEL, **body})
            assert (got.status_code, got.json()["error"]["param"]) == (400, param)
        got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT})
        assert got.status_code == 400


def test_forty_at_once(server, engine, free_pages, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app, client = server
    stream = np.random.default_rng(0)
    prompts = [stream.integers(1, 256, stream.integers(1, 30)).tolist() for _ in range(40)]
    expected = on_engine(app, engine, *prompts, max_tokens=8)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official:

            async def one(index, prompt):
                asked = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0}
                if index % 2:
                    return (await official.completions.create(**asked)).choices[0].logprobs.token_logprobs
                pieces = [piece async for piece in await official.completions.create(**asked, stream=True)]
                return joined(piece.choices[0].logprobs.token_logprobs for piece in pieces)

            return await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))

    for got, own in zip(asyncio.run(all_of_them()), expected):
        np.testing.assert_allclose(got, own.logprobs, atol=1e-4)


WRONG = [
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [258]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [2**70]}, 400, "prompt"),
    ({"prompt": [1] * 100, "max_tokens": 29}, 400, "prompt"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 10**6}, 400, "n"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"seed": 2**63}, 400, "seed"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logit_bias": {"1": 2}}, 400, "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 3}, 400, "best_of"),
    ({"echo": True, "logprobs": 1}, 400, "echo"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"model": "other"}, 404, "model"),
    ({"model": None}, 400, "model"),
]
WRONG_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
]


def test_bad_requests_are_told_what_is_wrong(client, engine, free_pages):
    for fields, status, param in WRONG:
        got = ask(client, **fields)
        error = got.json().get("error", {})
        assert (got.status_code, error.get("param")) == (status, param), (fields, got.text)
        assert error["message"]
        assert error["type"]
    for fields, param in WRONG_CHATS:
        got = client.post("/v1/chat/completions", json={"model": MODEL, **fields})
        assert (got.status_code, got.json()["error"]["param"]) == (400, param), (fields, got.text)
    for content in (b"", b"{", b"\xff", b"[1]", b"null", b"[" * 10_000, b'{"prompt": "\\ud800"}'):
        got = client.post("/v1/completions", content=content)
        assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error"), content
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/dashboard/data?since=x").status_code == 400


def test_what_changes_nothing_is_let_in(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "best_of": 1, "logit_bias": {}, "n": None}
    more = {"frequency_penalty": 0, "stop": None, "stream": None, "stream_options": None, "suffix": None}
    assert ask(client, **harmless, **more).status_code == 200
    assert ask(client, max_tokens=0).json()["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


def test_official_errors(official):
    with pytest.raises(openai.NotFoundError, match="expected 'toy', got 'other'"):
        official.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(model=MODEL, prompt=[999])
    assert caught.value.param == "prompt"
    assert [model.id for model in official.models.list()] == [MODEL]
    assert official.models.retrieve(MODEL).owned_by == "jaxlab"


def test_api_key(engine):
    with live(engine, api_key="sësame") as (_, client):
        assert client.get("/health").json() == {"status": "ok"}
        for path in ("/", "/metrics", "/v1/models", "/control/freq", "/dashboard/data", "/nothing"):
            got = client.get(path)
            assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/").headers["www-authenticate"].startswith("Basic")
        for value in ("Bearer wrong", "Bearer", "Basic !", "s"):
            assert client.get("/v1/models", headers={"Authorization": value}).status_code == 401
        bearer = {"Authorization": "Bearer sësame".encode()}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        assert client.get("/", auth=httpx.BasicAuth("anyone", "sësame")).status_code == 200


def test_a_client_that_leaves_frees_its_pages(engine, free_pages):
    body = {"model": MODEL, "prompt": [7], "max_tokens": 120, "temperature": 0, "n": 4}
    with live(Slowed(engine)) as (app, client):
        loop = app.state.engine_loop
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_lines())
            assert loop.under_way == 4
        until(lambda: loop.under_way == 0)
        request = client.build_request("POST", "/v1/completions", json=body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request.content)}\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode() + request.content)
            until(lambda: loop.under_way == 4)
        until(lambda: loop.under_way == 0)
        until(lambda: 'outcome="cancelled"} 8' in client.get("/metrics").text)
        assert ask(client).status_code == 200


def test_metrics(client):
    from prometheus_client.parser import text_string_to_metric_families

    ask(client, max_tokens=5)
    got = client.get("/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(got.text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    assert found["jaxlab_requests_total", "length"] >= 1
    assert found["jaxlab_time_to_first_token_seconds_count",] >= 1
    assert found["jaxlab_inter_token_latency_seconds_count",] >= 4
    assert found["jaxlab_free_pages",] == SIZES.num_pages - 1
    assert (found["jaxlab_requests_under_way",], found["jaxlab_requests_waiting",]) == (0, 0)
    assert ("jaxlab_sm_clock_mhz", "both", "engine") not in found
    assert all(math.isfinite(value) for value in found.values())
