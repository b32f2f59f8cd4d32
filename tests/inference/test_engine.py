"""The engine beside `generate`: the same tokens whatever runs beside, and pages that come back."""

import dataclasses
import random
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import make_mesh
from jaxlab.inference import Engine, EngineConfig, SamplingParams, generate, programs
from jaxlab.models import save_pretrained
from tests.oracles.sampling import log_softmax

# Eight tokens a page; 19 pages hold four short requests, or one that fills the context of 128.
CONFIG = EngineConfig(
    20,
    page_size=8,
    max_running=4,
    batch_buckets=(4,),
    prefill_chunk=32,
    kv_dtype="float32",
    num_reserved_decode_tokens=4,
)
LENGTHS = (1, 3, 17, 40, 70, 9)
PROMPTS = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in LENGTHS]
GREEDY = SamplingParams(max_tokens=20, temperature=0)
SAMPLED = SamplingParams(max_tokens=20, temperature=1.3, top_k=50, top_p=0.95, seed=3)


def compiled():
    own = programs.decode, programs.read, programs.draw, programs.take_pages, programs.put_pages
    return [program._cache_size() for program in own]


@pytest.fixture(scope="module")
def warm(model, params):
    """Compiles what every engine of these tests needs."""
    engine, before = Engine(model, params, CONFIG), compiled()
    engine.warmup(transfers=True)
    # 4 rows and 4 or 16 pages; 16 or 32 tokens and the same; 1, 2, 4, 8 or 16 pages moved.
    assert engine.compile_count == 2 + 2 * 2 + 2 + 2 * 5
    assert sum(compiled()) - sum(before) <= engine.compile_count  # other tests may have compiled some
    assert engine.free_pages == 19


@pytest.fixture
def make_engine(model, params, warm):
    def make(own=params, **options):
        """An engine in whose pages whatever was not written is NaN."""
        engine = Engine(model, own, CONFIG, **options)
        engine._runner._pool = jax.tree.map(lambda leaf: leaf * jnp.nan, engine._runner._pool)
        return engine

    before = compiled()
    yield make
    assert compiled() == before  # nothing is compiled after the warm-up


@pytest.fixture(scope="module")
def greedy(model, params):
    """What `generate` makes of `PROMPTS`."""
    out = generate(model, params, PROMPTS, GREEDY)
    return [row.tolist() for row in np.asarray(out.tokens)], np.asarray(out.logps)


@pytest.fixture(scope="module")
def alone(model, params):
    """(ids, sampling) -> what `generate` draws of one prompt with the request's seed."""

    def draw(ids, sampling):
        out = generate(model, params, [ids], sampling, rng=jax.random.key(sampling.seed), prompt_length=70)
        return np.asarray(out.tokens)[0, : out.lengths[0]].tolist()

    return draw


@pytest.fixture(scope="module")
def forward(model):
    """Logits of the cacheless forward."""
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)

    def logits(params, ids):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(params, padded))[0, : len(ids)]

    return logits


def drain(engine, into=None):
    """Steps until nothing is left: id -> tokens."""
    tokens = {} if into is None else into
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


@pytest.mark.latest
def test_greedy_tokens_are_those_of_generate(make_engine, greedy):
    engine = make_engine()
    outputs = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == greedy[0]
    np.testing.assert_allclose([output.logprobs for output in outputs], greedy[1], atol=1e-4)
    assert {output.finish_reason for output in outputs} == {"length"}
    assert outputs[0].text is None
    assert engine.free_pages == 19
    assert not engine.has_work


def test_requests_come_at_any_time(make_engine, greedy):
    """Arrivals between steps, prompts in chunks beside decoding, and pages given up for elder requests."""
    engine = make_engine()
    ids, tokens = [], {}
    for prompt in PROMPTS:
        ids.append(engine.add_request(prompt, GREEDY))
        for _ in range(3):
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    drain(engine, tokens)
    assert [tokens[name] for name in ids] == greedy[0]
    assert engine.free_pages == 19


def test_who_gave_way_goes_on_as_before(make_engine, alone):
    engine = make_engine()
    sampling = [dataclasses.replace(SAMPLED, seed=seed, max_tokens=40) for seed in range(4)]
    outputs = engine.generate([PROMPTS[2]] * 4, sampling)
    assert engine.preemptions > 0
    for output, own in zip(outputs, sampling):
        assert output.token_ids == alone(PROMPTS[2], own)
        assert len(output.logprobs) == len(output.top_logprobs) == len(output.token_ids)


def test_sampled_tokens_are_those_of_generate(make_engine, alone):
    engine = make_engine()
    sampling = [SAMPLED, GREEDY, dataclasses.replace(SAMPLED, seed=2**40 + 9), dataclasses.replace(SAMPLED, seed=-5)]
    together = engine.generate([PROMPTS[index] for index in (2, 3, 1, 5)], sampling)
    for index, output, own in zip((2, 3, 1, 5), together, sampling):
        if own.seed is not None and abs(own.seed) < 2**31:
            assert output.token_ids == alone(PROMPTS[index], own)
        assert engine.generate([PROMPTS[index]], own)[0].token_ids == output.token_ids  # with no mates
    free = engine.generate([PROMPTS[1]] * 2, dataclasses.replace(SAMPLED, seed=None))
    assert free[0].token_ids != free[1].token_ids


def test_shared_prefixes_are_read_once(make_engine, greedy):
    engine = make_engine()
    first = engine.generate([PROMPTS[4]], GREEDY)
    assert engine.free_pages == 19
    name = engine.add_request(PROMPTS[4], GREEDY)
    engine.step()
    assert engine.metrics().tokens == 70 - 64  # all but the pages that are full
    assert drain(engine) == {name: first[0].token_ids[1:]}
    assert first[0].token_ids == greedy[0][4]
    # Four of one prompt at once hold its five pages once: 4 * 6 would be more than there are.
    outputs = engine.generate([PROMPTS[3]] * 4, dataclasses.replace(GREEDY, max_tokens=7))
    assert engine.preemptions == 0
    assert {tuple(output.token_ids) for output in outputs} == {tuple(greedy[0][3][:7])}


def test_logprobs_and_logits_are_those_of_the_forward(make_engine, params, forward):
    engine = make_engine()
    sampling = dataclasses.replace(SAMPLED, max_tokens=6, logprobs=3)
    reported, plain = engine.generate([PROMPTS[2]] * 2, [sampling, GREEDY])
    logits = forward(params, PROMPTS[2] + reported.token_ids)[len(PROMPTS[2]) - 1 : -1]
    logps = log_softmax(logits, 1.3)
    np.testing.assert_allclose(reported.logprobs, logps[np.arange(6), reported.token_ids], atol=1e-4)
    for row, top in zip(logps, reported.top_logprobs):
        assert list(top) == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose(list(top.values()), np.sort(row)[:-4:-1], atol=1e-4)
    assert plain.top_logprobs == [{}] * 20
    found = engine.prompt_logits([PROMPTS[4], PROMPTS[0]])
    assert found.dtype == np.float32
    expected = [forward(params, ids)[-1] for ids in (PROMPTS[4], PROMPTS[0])]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert engine.free_pages == 19


def test_requests_end(make_engine, greedy, tokenizer):
    engine = make_engine(tokenizer=tokenizer)
    expected = greedy[0][3]
    place = next(i for i, token in enumerate(expected) if i > 3 and token not in expected[:i] and token < 128)
    text = tokenizer.decode(expected[:place])
    by_id, by_text, nothing, one = engine.generate(
        [PROMPTS[3]] * 4,
        [
            dataclasses.replace(GREEDY, stop_ids=[expected[place]]),
            dataclasses.replace(GREEDY, stop=[chr(expected[place])]),
            dataclasses.replace(GREEDY, max_tokens=0),
            dataclasses.replace(GREEDY, max_tokens=1),
        ],
    )
    for output in (by_id, by_text):
        assert (output.finish_reason, output.token_ids, output.text) == ("stop", expected[: place + 1], text)
    assert (nothing.finish_reason, nothing.token_ids, nothing.text, nothing.logprobs) == ("length", [], "", [])
    assert (one.finish_reason, one.token_ids) == ("length", expected[:1])
    ends = make_engine(tokenizer=types.SimpleNamespace(eos_token_id=expected[place], decode=tokenizer.decode))
    ended, on = ends.generate([PROMPTS[3]] * 2, [GREEDY, dataclasses.replace(GREEDY, ignore_eos=True)])
    assert (ended.finish_reason, ended.token_ids) == ("stop", expected[: place + 1])
    assert (on.finish_reason, on.token_ids) == ("length", expected)
    name = engine.add_request(PROMPTS[0], dataclasses.replace(GREEDY, max_tokens=0))
    assert engine.has_work
    (output,) = engine.step()
    assert (output.request_id, output.new_token_ids, output.finish_reason) == (name, [], "length")
    assert not engine.has_work


def test_abort(make_engine, greedy):
    engine = make_engine()
    names = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    engine.step()
    assert engine.abort(names[3])  # being read
    assert engine.abort(names[5])  # waiting
    assert not engine.abort(names[5])
    assert not engine.abort(99)
    told = [output for output in engine.step() if output.finish_reason == "abort"]
    assert [output.request_id for output in told] == [names[3], names[5]]
    tokens = drain(engine)
    assert tokens[names[4]] == greedy[0][4][-len(tokens[names[4]]) :]
    name = engine.add_request(PROMPTS[4], GREEDY)
    engine.step()
    engine.abort(name)
    assert not engine.has_work
    assert engine.free_pages == 19
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    # Whoever else runs is told about its tokens after `generate`.
    name = engine.add_request(PROMPTS[1], GREEDY)
    engine.generate([PROMPTS[2]], GREEDY)
    assert drain(engine) == {name: greedy[0][1]}


def test_metrics(make_engine):
    engine = make_engine()
    before = time.monotonic()
    for _ in range(5):
        engine.add_request(PROMPTS[5], GREEDY)
    engine.step()
    found = engine.metrics()
    # The first prompt is read; of the next three, who share its full page, the last token is decoded; one has no place.
    assert (found.running, found.total, found.tokens, found.waiting) == (3, 5, 3 * 8, 1)
    assert before <= found.timestamp <= time.monotonic()
    assert len(found.queue_wait_s) == 1
    assert 0 <= found.queue_wait_s[0] <= found.timestamp - before
    engine.step()
    found = engine.metrics()
    assert (found.running, found.tokens, found.waiting) == (4, 4 * 9, 1)
    drain(engine)
    engine.add_request(PROMPTS[3], GREEDY)
    engine.step()
    assert (engine.metrics().running, engine.metrics().tokens) == (1, 32)  # prompt tokens, where nothing is decoded


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "options", "error", "match"),
    [
        ([], {}, ValueError, "at least one token"),
        ([258], {}, ValueError, r"\[0, 258\)"),
        ([-1], {}, ValueError, r"\[0, 258\)"),
        ([1] * 100, {"max_tokens": 29}, ValueError, "max_position_embeddings=128"),
        ("text", {}, TypeError, "tokenizer"),
        ([1.5], {}, TypeError, "list of ids"),
        ([1], {"stop": "."}, TypeError, "tokenizer"),
        ([1], {"logprobs": 21}, ValueError, "at most 20"),
    ],
)
def test_bad_requests(make_engine, ids, options, error, match):
    engine = make_engine()
    with pytest.raises(error, match=match):
        engine.add_request(ids, SamplingParams(**{"max_tokens": 4, **options}))
    with pytest.raises(error, match=match):
        engine.generate([[1], ids], SamplingParams(**{"max_tokens": 4, **options}))
    assert not engine.has_work


@pytest.mark.usefixtures("unchecked")
def test_more_bad_inputs(model, params, make_engine):
    small = Engine(model, params, dataclasses.replace(CONFIG, num_pages=4))
    small.add_request([1] * 20, SamplingParams(max_tokens=5))  # the last token is never written
    with pytest.raises(ValueError, match="pool's 3 pages of 8 tokens, got 20 \\+ 6"):
        small.add_request([1] * 20, SamplingParams(max_tokens=6))
    engine = make_engine()
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(ValueError, match="tensor axis that divides 2"):
        Engine(model, params, CONFIG, mesh=make_mesh({"tensor": 4}, jax.devices()[:4]))
    for options in (
        {"num_pages": 1}, {"page_size": 0}, {"max_running": 0}, {"prefill_chunk": 0}, {"batch_buckets": ()},
        {"batch_buckets": (4, 2)}, {"batch_buckets": (0, 2)}, {"kv_dtype": "int8"}, {"num_reserved_decode_tokens": -1},
    ):  # fmt: skip
        (name,) = options
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(CONFIG, **options)
    with pytest.raises(TypeError, match="page_size"):
        EngineConfig(8, page_size=1.5)
    assert EngineConfig(8, max_running=20).batch_buckets == (1, 2, 4, 8, 16, 20)


def test_new_weights_take_the_place_of_old_ones(model, params, make_engine, greedy, alone):
    engine = make_engine(jax.tree.map(lambda leaf: leaf * 0.7, params))
    before = engine.generate(PROMPTS[2:4], GREEDY)
    engine.params = params
    after = engine.generate(PROMPTS[2:4], GREEDY)
    assert [output.token_ids for output in after] == greedy[0][2:4]
    assert [output.token_ids for output in before] != greedy[0][2:4]
    with pytest.raises(ValueError, match="shapes and dtypes"):
        engine.params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


@pytest.mark.parametrize("host", [True, False])
def test_a_request_goes_on_in_another_engine(make_engine, greedy, alone, host):
    reader, decoder = make_engine(), make_engine()
    sampling = dataclasses.replace(SAMPLED, logprobs=2)
    names = [reader.add_request(PROMPTS[4], sampling), reader.add_request(PROMPTS[5], GREEDY)]
    with pytest.raises(ValueError, match="being read"):
        reader.take(names[0])
    first = {}
    while len(first) < 2:
        first |= {output.request_id: output.new_token_ids for output in reader.step() if output.request_id not in first}
    moved = [reader.take(name) for name in names]
    assert not reader.has_work
    assert reader.free_pages == 19
    assert moved[0].prompt == PROMPTS[4]
    assert moved[0].generated == first[names[0]]
    assert moved[0].tokens == 70
    if host:
        moved = [pages.to_host() for pages in moved]
        assert moved[0].k.shape == (2, 2, 9, 8, 8)
        assert isinstance(moved[0].k, np.ndarray)
    given = [decoder.give(PROMPTS[4], sampling, moved[0]), decoder.give(PROMPTS[5], GREEDY, moved[1])]
    tokens = drain(decoder)
    assert moved[0].generated + tokens[given[0]] == alone(PROMPTS[4], sampling)
    assert moved[1].generated + tokens[given[1]] == greedy[0][5]
    assert decoder.free_pages == 19
    with pytest.raises(KeyError):
        reader.take(names[0])
    cut = dataclasses.replace(moved[0], k=moved[0].k[:, :1])
    with pytest.raises(ValueError, match=r"pages.k: expected \[2, 2, 9, 8, 8\]"):
        decoder.give(PROMPTS[4], sampling, cut)
    decoder.give(PROMPTS[4], sampling, moved[0])
    with pytest.raises(MemoryError):
        decoder.give(PROMPTS[4], sampling, moved[0])
    assert decoder.free_pages == 10


def test_nothing_leaks(make_engine):
    """Random arrivals, ends and aborts; less than a page a request is ever wasted."""
    engine, stream, alive = make_engine(), random.Random(1), set()
    for _ in range(60):
        act = stream.random()
        if act < 0.4:
            ids = [stream.randrange(3)] * stream.randrange(1, 60)
            alive.add(engine.add_request(ids, dataclasses.replace(SAMPLED, max_tokens=stream.randrange(1, 30))))
        elif act < 0.5 and alive:
            assert engine.abort(alive.pop())
        else:
            alive -= {output.request_id for output in engine.step() if output.finish_reason}
        held = engine._scheduler.running
        assert all(len(request.pages) * 8 - request.computed < 8 for request in held)
        assert engine.free_pages == 19 - len({page for request in held for page in request.pages})
    drain(engine)
    assert engine.free_pages == 19


def test_heads_over_a_mesh(model, params, greedy):
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    engine = Engine(model, params, CONFIG, mesh=mesh)
    assert [output.token_ids for output in engine.generate(PROMPTS[2:4], GREEDY)] == greedy[0][2:4]
    keys = engine._runner._pool[0]
    assert keys.sharding.shard_shape(keys.shape) == (2, 1, 20, 8, 8)


def test_from_pretrained(model, params, tokenizer, tmp_path, make_engine, greedy):
    save_pretrained(tmp_path / "with", model, params, tokenizer=tokenizer)
    save_pretrained(tmp_path / "without", model, params)
    engine = Engine.from_pretrained(tmp_path / "with", CONFIG)
    assert engine.tokenizer.encode("a") == [97]
    assert engine.generate([PROMPTS[1]], GREEDY)[0].token_ids == greedy[0][1]
    assert Engine.from_pretrained(tmp_path / "without", CONFIG).tokenizer is None
