"""Worker processes behind a server: a packed model, an agent's episode, clients that leave, deaths, and a soak."""

import concurrent.futures
import dataclasses
import functools
import os
import signal
import threading

import jax
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")

import httpx

from benchmarks.voltanallm_soak import ANSWERED, LEFT, SoakConfig, soak, workers
from jaxlab.eaglet import OpenAIExecutor, rollout
from jaxlab.eaglet.envs.grid_quest import GridQuestEnv
from jaxlab.inference import Engine, EngineConfig, SamplingParams
from jaxlab.models.decoder import Decoder, MoESpec, init_params
from jaxlab.puzzlemoe import PackedExperts, PuzzleConfig, collect_expert_stats, compress_moe, save_packed
from jaxlab.voltanallm import Clocks, Limits, ServeConfig, launch, served
from tests.inference.multiprocess_cases import CONFIG
from tests.voltanallm.servers import MODEL, ask, chat_tokenizer, until
from tests.voltanallm.tables import decode_table, prefill_table

SIZES = EngineConfig(
    33, page_size=16, max_running=8, prefill_chunk=32, batch_buckets=(8,), kv_dtype="float32", prefix_cache=False
)
PROMPTS = [[1, 2, 3], [70, 80, 90, 100, 110], list(range(20, 90)), [9, 8, 7, 6]]
LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed PuzzleMoE folder with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("packed") / "model"
    changes = {"moe": MoESpec(4, 2, 24), "num_hidden_layers": 1, "max_position_embeddings": 1024}
    model = Decoder(dataclasses.replace(CONFIG, model_type="qwen3_moe", **changes))
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(model, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 2, 32)).astype(np.int32)
    packed = compress_moe(model, params, collect_expert_stats(model, params, tokens), PuzzleConfig(ratio=0.5))
    save_packed(path, *packed)
    chat_tokenizer(path)
    return path


def is_packed(leaf):
    return isinstance(leaf, PackedExperts)


@pytest.fixture(scope="module")
def own(folder):
    """An engine in this process."""
    engine = Engine.from_pretrained(folder, SIZES)
    assert any(map(is_packed, jax.tree.leaves(engine.params, is_leaf=is_packed)))
    return engine


@pytest.fixture(scope="module")
def served_workers(folder, tmp_path_factory):
    """Two prefill and two decode workers with simulated clocks behind a server: engine, its loop, address."""
    tables = tmp_path_factory.mktemp("tables")
    decode_table().to_csv(tables / "decode.csv")
    prefill_table().to_csv(tables / "prefill.csv")
    settings = ServeConfig(
        str(folder), SIZES, num_prefill=2, num_decode=2, policy="state_space", warm=False,
        clocks=Clocks("simulated", controller="ecofreq", tables=tables),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # for workers that are started again
        with launch(settings) as launched:
            app = launched.app(MODEL, limits=Limits(requests=LIMIT), warm=False)
            with served(app) as url:
                yield launched.engine, app.state.engine_loop, url
    assert not workers()


@pytest.fixture
def client(served_workers):
    with httpx.Client(base_url=served_workers[2], timeout=120, trust_env=False) as client:
        yield client


def slots(served_workers):
    """What each worker holds: (pages that are free, bytes that wait to be fetched)."""
    engine, loop, _ = served_workers

    def look():
        engine.workers()
        return [(each.stats.free_pages, each.stats.held_bytes) for each in engine._crew.slots.values() if each.stats]

    return loop.call(look).result(60)


def at_rest(served_workers):
    return not served_workers[1].under_way and slots(served_workers) == [(SIZES.num_pages - 1, 0)] * 4


@pytest.fixture(autouse=True)
def nothing_leaks(served_workers):
    yield
    until(functools.partial(at_rest, served_workers), 120)


def all_at_once(client, bodies):
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(client, **body), bodies))


def texts(own, prompts, max_tokens):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=(own.tokenizer.eos_token_id,))
    return [output.text for output in own.generate(prompts, sampling)]


def test_a_packed_model(served_workers, own, client):
    bodies = [{"prompt": prompt, "max_tokens": 12} for prompt in PROMPTS]
    answers = all_at_once(client, bodies)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == texts(own, PROMPTS, 12)
    engine = served_workers[0]
    assert engine.kv_bytes_moved > 0
    assert {status.freq for status in engine.workers()} <= set(prefill_table().freqs)


class Own(OpenAIExecutor):
    """Asks the engine in this process rather than a server."""

    engine: Engine

    def act(self, context):
        tokenizer = self.engine.tokenizer
        text = tokenizer.apply_chat_template(self.messages(context), add_generation_prompt=True, tokenize=False)
        (answer,) = texts(self.engine, [tokenizer.encode(text)], self._max_tokens)
        return answer


def test_an_agent_plays_an_episode(served_workers, own):
    env = GridQuestEnv(size=3, n_tasks=1)
    (task,) = env.tasks("seen")
    options = {"instruction": "Act.", "max_tokens": 8}
    ours = Own("http://here", MODEL, **options)
    ours.engine = own
    played = rollout(env, OpenAIExecutor(f"{served_workers[2]}/v1", MODEL, **options), task, max_steps=2)
    assert played.steps == 2
    assert played.actions == rollout(env, ours, task, max_steps=2).actions


def test_a_client_that_leaves_frees_the_pages_of_both_sides(served_workers, client):
    whole = SIZES.num_pages - 1
    # The first token may end inside a character; the prompt's text comes with it.
    body = {"model": MODEL, "prompt": "x" * 60, "echo": True, "max_tokens": 300, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        until(lambda: sum(free < whole for free, _ in slots(served_workers)) == 1)  # the decode worker's
    until(functools.partial(at_rest, served_workers))
    until(lambda: f"jaxlab_free_pages {whole:.1f}" in client.get("/metrics").text)
    for pid in pids(served_workers, "decode"):
        os.kill(pid, signal.SIGSTOP)
    try:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert next(answer.iter_lines())  # the first token is the prefill worker's
            until(lambda: any(held for _, held in slots(served_workers)))
    finally:
        for pid in pids(served_workers, "decode"):
            os.kill(pid, signal.SIGCONT)


def pids(served_workers, mode):
    return [each.worker.pid for each in served_workers[0]._crew.slots.values() if each.mode == mode]


def test_memory_that_runs_out_delays_and_loses_nothing(served_workers, own, client):
    prompts = [[n, n + 1, n + 2] for n in range(1, 11)]
    answers = all_at_once(client, [{"prompt": prompt, "max_tokens": 250} for prompt in prompts])
    assert [answer.status_code for answer in answers] == [200] * 10
    assert [answer.json()["choices"][0]["text"] for answer in answers] == texts(own, prompts, 250)
    assert served_workers[1].call(lambda: served_workers[0].preemptions).result(60) > 0


def test_a_killed_worker_loses_no_request(served_workers, own, client):
    expected = texts(own, PROMPTS * 2, 100)

    def kill():
        until(lambda: sum(free < SIZES.num_pages - 1 for free, _ in slots(served_workers)) >= 2, 60)
        os.kill(pids(served_workers, "decode")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = all_at_once(client, [{"prompt": prompt, "max_tokens": 100} for prompt in PROMPTS * 2])
    killer.join()
    assert [answer.json()["choices"][0]["text"] for answer in answers] == expected


def test_a_soak(served_workers):
    config = SoakConfig(seconds=6.0, burst=3 * LIMIT, kill_s=3.0, tokens=32, prompts=6)
    result = soak(served_workers[2], MODEL, CONFIG.vocab_size, config, functools.partial(at_rest, served_workers))
    assert result.troubles == ()
    assert result.outcomes.keys() <= {ANSWERED, LEFT, "400", "404", "429", "503"}
    assert result.outcomes.keys() >= {ANSWERED, "400"}  # who leaves in time, or comes too many, depends on the machine
    assert result.outcomes[ANSWERED] + result.outcomes[LEFT] + result.refused == result.sent
    assert result.kills == 1  # the longest-lived: a prefill worker
