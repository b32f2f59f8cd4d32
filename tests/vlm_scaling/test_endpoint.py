"""A sampler and a verifier over HTTP, against a small server on this machine."""

import base64
import http.server
import json
import math
import threading

import numpy as np
import pytest

pytest.importorskip("httpx", reason="the extra 'agents' is not installed")

from jaxlab.inference import Client
from jaxlab.vlm_scaling import BestOfN, BudgetForce, Greedy, Majority, Question, Refine, Study, endpoint, verify

PICTURE = np.full((2, 3, 3), 7, np.uint8)
QUESTIONS = [Question(f"q{k}", f"<image>\nWhat is {k}?", "7", (PICTURE,)) for k in range(2)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        data = json.dumps(self.server.answer(body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def completion(text, tokens=5, logprobs=None):
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads, served.seen = True, []
    threading.Thread(target=lambda: served.serve_forever(poll_interval=0.02), daemon=True).start()
    with Client(f"http://127.0.0.1:{served.server_address[1]}/v1", model="m", max_retries=0) as client:
        served.client = client
        yield served
    served.shutdown()
    served.server_close()


def test_samples(server):
    server.answer = lambda body: completion(
        f"\\boxed{{{body['seed'] % 3}}}", logprobs=[{"token": "x", "logprob": p} for p in (-0.5, -1.5)]
    )
    sampler = endpoint.EndpointSampler(
        server.client, temperature=0.7, top_p=0.9, system="Be brief.", instruction="Box it.", logprobs=True
    )
    got = sampler.sample(QUESTIONS[0], [0, 1, 2, 5], seed=4)
    assert (got[0].n_tokens, got[0].logprob) == (5, -1.0)
    seeds = [body["seed"] for body in server.seen]
    assert len(set(seeds)) == 4
    assert sampler.sample(QUESTIONS[0], [5, 0], seed=4) == [got[3], got[0]]
    assert set(seeds) >= {body["seed"] for body in server.seen[4:]}
    body = server.seen[0]
    assert (body["temperature"], body["top_p"], body["logprobs"], body["model"]) == (0.7, 0.9, True, "m")
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    image, text = user["content"]
    assert text == {"type": "text", "text": "What is 0?\n\nBox it."}
    file = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(verify_pixels(file), PICTURE)
    assert sampler.greedy(QUESTIONS[0]).n_tokens == 5
    assert server.seen[-1]["temperature"] == 0
    (ext,) = sampler.extend(QUESTIONS[0], ["<think>So"], seed=1, max_tokens=9, stop="</think>")
    body = server.seen[-1]
    assert ext.text.startswith("\\boxed")
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>So"}
    assert (body["max_tokens"], body["stop"], body["continue_final_message"]) == (9, ["</think>"], True)
    assert body["add_generation_prompt"] is False


def verify_pixels(file):
    pytest.importorskip("PIL.Image", reason="the extra 'images' is not installed")
    from jaxlab.vlm_scaling import images

    return images.pixels(file)


def test_yes_probabilities(server):
    tops = {"image+solution": {"Yes": 0.5, " yes": 0.1, "No": 0.2, "The": 0.2}, "blind+solution": {"The": 1.0}}

    def answer(body):
        mode = "image+solution" if len(body["messages"][0]["content"]) == 2 else "blind+solution"
        top = [{"token": token, "logprob": math.log(p)} for token, p in tops[mode].items()]
        return completion("Yes", logprobs=[{"token": "Yes", "logprob": -1.0, "top_logprobs": top}])

    server.answer = answer
    reader = endpoint.EndpointReader(server.client)
    samples = [verify.Sample("\\boxed{7}"), verify.Sample("\\boxed{8}")]
    for mode, want in (("image+solution", 0.6 / 0.8), ("blind+solution", math.nan)):
        requests = verify.build(QUESTIONS[0], samples, mode=mode)
        assert reader.yes_probabilities(requests, seed=0) == pytest.approx([want] * 2, nan_ok=True)
        assert (server.seen[-1]["max_tokens"], server.seen[-1]["top_logprobs"]) == (1, 20)
    verifier = verify.Verifier(reader)
    assert verifier.verify(QUESTIONS[0], samples, mode="blind+solution", seed=0) == [None, None]
    server.answer = lambda body: completion("Yes")
    assert math.isnan(reader.yes_probabilities(verify.build(QUESTIONS[0], samples[:1]), seed=0)[0])
    with pytest.raises(ValueError, match="no image tokens in a blind mode"):
        reader.texts([verify.Request("<image> a", (), "blind+solution")], seed=0)


def test_a_study_over_http(server, tmp_path):
    def answer(body):
        text = body["messages"][0]["content"][-1]["text"]
        if "Answer with Yes or No" in text:
            return completion("No." if "\\boxed{8}" in text else "Yes.", 2)
        return completion(f"\\boxed{{{7 if body['temperature'] == 0 or body['seed'] % 2 else 8}}}", 6)

    server.answer = answer
    sampler = endpoint.EndpointSampler(server.client)
    verifier = verify.Verifier(endpoint.EndpointReader(server.client), kind="binary_text")
    strategies = [Greedy(), Majority(5), BestOfN(5), Refine(1), BudgetForce(0, 6)]
    options = {"strategies": strategies, "n": 5, "verifier": verifier, "cache": tmp_path / "cache", "n_resamples": 50}
    report = Study(QUESTIONS, sampler, **options).run()
    assert report.accuracy["greedy"] == report.accuracy["best-of@5"] == 1
    assert report.row("majority@5").tokens.generated == 30
    asked = len(server.seen)
    assert Study(QUESTIONS[::-1], sampler, **options).run().table == report.table
    assert len(server.seen) == asked


def test_bad_inputs(server):
    for options, message in (({"temperature": -1.0}, "temperature: expected at least 0"), ({"top_p": 0.0}, "top_p")):
        with pytest.raises(ValueError, match=message):
            endpoint.EndpointSampler(server.client, **options)
    cold = endpoint.EndpointSampler(server.client, temperature=0.0)
    with pytest.raises(ValueError, match="temperature: expected above 0 for several samples"):
        cold.sample(QUESTIONS[0], [0, 1], seed=0)
    server.answer = lambda body: completion("7")
    assert len(cold.sample(QUESTIONS[0], [0], seed=0)) == 1
    twice = endpoint.EndpointSampler(server.client, temperature=0.0, allow_duplicates=True)
    with pytest.warns(RuntimeWarning, match="they will be the same"):
        assert len(twice.sample(QUESTIONS[0], [0, 1], seed=0)) == 2
    for options, message in (({"temperature": -1.0}, "temperature"), ({"yes": ()}, "yes and no")):
        with pytest.raises(ValueError, match=message):
            endpoint.EndpointReader(server.client, **options)
