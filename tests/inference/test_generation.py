import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import count_compilations
from jaxlab.inference import (
    SamplingArrays,
    SamplingParams,
    decode_params,
    decode_step,
    generate,
    prefill,
    sample,
    stream,
)
from jaxlab.inference.layout import is_decode_form
from jaxlab.inference.text import RowText
from jaxlab.models.decoder import KVCache
from tests.oracles.sampling import log_softmax

PROMPTS = [[1, 2, 3], [70, 80, 90, 100, 110], [5]]
GREEDY = SamplingParams(max_tokens=6, temperature=0)
SAMPLED = SamplingParams(max_tokens=6, temperature=1.5, top_p=0.95)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def forward(model):
    """Logits of the cacheless forward, one compilation for all lengths up to 32."""
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)

    def logits(params, ids):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(params, padded))[0, : len(ids)]

    return logits


@pytest.mark.latest
def test_greedy_is_the_argmax_of_the_cacheless_forward(model, params, forward):
    out = generate(model, params, PROMPTS, GREEDY)
    assert out.tokens.shape == (3, 6)
    assert out.tokens.dtype == np.int32
    assert out.finish_reason == ("length",) * 3
    assert out.text is None
    for row, prompt in enumerate(PROMPTS):
        ids = [*prompt, *out.tokens[row].tolist()]
        logits = forward(params, ids)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1), out.tokens[row])
        direct = log_softmax(logits)[np.arange(6), np.asarray(out.tokens[row])]
        np.testing.assert_allclose(out.logps[row], direct, atol=2e-5)


def test_logps_are_of_the_scaled_untruncated_distribution(model, params, forward):
    out = generate(model, params, PROMPTS, SAMPLED, rng=KEY)
    for row, prompt in enumerate(PROMPTS):
        logits = forward(params, [*prompt, *out.tokens[row].tolist()])[len(prompt) - 1 : -1]
        direct = log_softmax(logits, 1.5)[np.arange(6), np.asarray(out.tokens[row])]
        np.testing.assert_allclose(out.logps[row], direct, atol=2e-5)


def test_rows_do_not_depend_on_their_mates(model, params):
    together = generate(model, params, PROMPTS, SAMPLED, rng=KEY)
    # Another batch size, prompt length and cache length, each in another bucket.
    others = generate(model, params, [PROMPTS[0], list(range(20))], SAMPLED, rng=KEY)
    np.testing.assert_array_equal(together.tokens[0], others.tokens[0])
    swapped = generate(model, params, [*PROMPTS[:2], [9, 9], [4]], SAMPLED, rng=KEY)
    np.testing.assert_array_equal(together.tokens[:2], swapped.tokens[:2])
    assert not np.array_equal(together.tokens[2], swapped.tokens[2])


def test_samples_of_a_prompt_are_adjacent_and_differ(model, params):
    out = generate(model, params, PROMPTS[:2], SAMPLED, n=2, rng=KEY)
    # Row r draws with fold_in(rng, r): the prompts repeated by hand give the same rows.
    by_hand = generate(model, params, [p for p in PROMPTS[:2] for _ in range(2)], SAMPLED, rng=KEY)
    np.testing.assert_array_equal(out.tokens, by_hand.tokens)
    assert not np.array_equal(out.tokens[0], out.tokens[1])


def test_the_key_decides(model, params):
    one = generate(model, params, PROMPTS, SAMPLED, rng=KEY)
    np.testing.assert_array_equal(one.tokens, generate(model, params, PROMPTS, SAMPLED, rng=KEY).tokens)
    other = generate(model, params, PROMPTS, SAMPLED, rng=jax.random.key(1))
    assert not np.array_equal(one.tokens, other.tokens)
    raw = generate(model, params, PROMPTS, SAMPLED, rng=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(one.tokens, raw.tokens)


def test_stop_ids_end_a_row(model, params):
    free = generate(model, params, PROMPTS, GREEDY)
    stop = int(free.tokens[0, 2])
    out = generate(model, params, PROMPTS, SamplingParams(max_tokens=6, temperature=0, stop_ids=(stop,)))
    for row in range(3):
        tokens = free.tokens[row].tolist()
        length = tokens.index(stop) + 1 if stop in tokens else 6
        assert out.lengths[row] == length
        assert out.tokens[row].tolist() == tokens[:length] + [0] * (6 - length)
        assert out.mask[row].tolist() == [True] * length + [False] * (6 - length)
        assert out.finish_reason[row] == ("stop" if stop in tokens else "length")
        assert np.all(np.asarray(out.logps[row, length:]) == 0)
    assert out.finish_reason[0] == "stop"


def test_the_tokenizer_ends_rows_and_makes_text(model, params, tokenizer):
    class Ends:
        """The byte tokenizer with another end token."""

        eos_token_id = int(generate(model, params, PROMPTS, GREEDY).tokens[0, 3])
        encode = staticmethod(tokenizer.encode)
        decode = staticmethod(tokenizer.decode)

    out = generate(model, params, PROMPTS, GREEDY, tokenizer=Ends())
    assert out.finish_reason[0] == "stop"
    assert int(out.tokens[0, out.lengths[0] - 1]) == Ends.eos_token_id
    assert out.text[0] == tokenizer.decode(out.tokens[0, : out.lengths[0] - 1].tolist())
    assert out.text[1] == tokenizer.decode(out.tokens[1, : out.lengths[1]].tolist()).removesuffix(
        chr(Ends.eos_token_id) if out.finish_reason[1] == "stop" else ""
    )
    on = generate(model, params, PROMPTS, dataclasses.replace(GREEDY, ignore_eos=True), tokenizer=Ends())
    assert set(on.finish_reason) == {"length"}
    assert np.array_equal(on.tokens, generate(model, params, PROMPTS, GREEDY).tokens)


@pytest.fixture(scope="module")
def texts(model, params, tokenizer):
    """Long ASCII texts, so that stop strings can be cut out of them."""
    return generate(
        model,
        params,
        ["ab", "c"],
        SamplingParams(max_tokens=40),
        rng=KEY,
        tokenizer=tokenizer,
        logit_processor=ascii_only,
    )


def ascii_only(logits, tokens, lengths):
    """Printable characters, and none twice in a row."""
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    logits = jnp.where(jnp.arange(logits.shape[-1]) == last, -jnp.inf, logits)
    return jnp.where((jnp.arange(logits.shape[-1]) >= 32) & (jnp.arange(logits.shape[-1]) < 127), logits, -jnp.inf)


@pytest.mark.parametrize("place", [3, 20])
def test_stop_strings_end_a_row(model, params, tokenizer, texts, place):
    stop = texts.text[0][place : place + 3]
    sampling = SamplingParams(max_tokens=40, stop=("never there", stop))
    out = generate(model, params, ["ab", "c"], sampling, rng=KEY, tokenizer=tokenizer, logit_processor=ascii_only)
    found = texts.text[0].index(stop)
    assert out.text[0] == texts.text[0][:found]
    assert out.lengths[0] == found + 3
    assert out.finish_reason[0] == "stop"
    np.testing.assert_array_equal(out.tokens[0, : found + 3], texts.tokens[0, : found + 3])
    assert np.all(np.asarray(out.tokens[0, found + 3 :]) == 0)
    if stop not in texts.text[1]:
        np.testing.assert_array_equal(out.tokens[1], texts.tokens[1])
        assert out.finish_reason[1] == "length"


def test_stream_gives_the_text_of_generate(model, params, tokenizer):
    sampling = SamplingParams(max_tokens=40, temperature=1.0)
    whole = generate(model, params, ["é!"], sampling, rng=KEY, tokenizer=tokenizer)
    pieces = list(stream(model, params, "é!", sampling, rng=KEY, tokenizer=tokenizer))
    assert "".join(pieces) == whole.text[0]
    assert len(pieces) > 10
    stop = whole.text[0][15:18]
    cut = SamplingParams(max_tokens=40, stop=stop)
    pieces = list(stream(model, params, "é!", cut, rng=KEY, tokenizer=tokenizer))
    assert "".join(pieces) == whole.text[0][: whole.text[0].index(stop)]


def test_text_never_splits_a_character(tokenizer):
    wanted = list("aé€😀b".encode())
    reader = RowText(tokenizer, ("b!",), (257,))
    shown = [reader.settled(np.array(wanted[:count], np.int32)) for count in range(len(wanted) + 1)]
    assert shown == ["", "a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀", "aé€😀"]
    assert reader.final(np.array(wanted, np.int32)) == "aé€😀b"


@pytest.mark.latest
def test_a_known_bucket_compiles_nothing(model, params, tokenizer):
    def run(params, prompts, **sampling):
        return generate(model, params, prompts, SamplingParams(**{"max_tokens": 10, **sampling}), rng=KEY)

    run(params, PROMPTS)
    longest = max(map(len, PROMPTS))
    with pytest.raises(ValueError, match=rf"prompt_length: expected at least the longest prompt's {longest}, got 1"):
        generate(model, params, PROMPTS, SamplingParams(max_tokens=4, temperature=0), prompt_length=1)
    roomy = SamplingParams(max_tokens=4)
    short = generate(model, params, [[1], [2], [3]], roomy, rng=KEY, prompt_length=20)
    other = jax.tree.map(lambda leaf: leaf * 0.5, params)
    jax.block_until_ready(other)
    with count_compilations() as compiled:
        run(other, PROMPTS)
        run(params, [[1] * 6, [2], [3, 4]])
        run(params, [[1], [2] * 5, [3, 4], [7]], temperature=0.0)
        run(params, PROMPTS, temperature=0.3, top_k=5, min_p=0.1, stop_ids=(3, 4), max_tokens=9)
        generate(model, params, [[1] * 20, [2], [3]], roomy, rng=KEY, prompt_length=20)
    assert compiled.count == 0
    np.testing.assert_array_equal(short.tokens, generate(model, params, [[1], [2], [3]], roomy, rng=KEY).tokens)


def test_laid_out_weights_give_the_same_tokens(model, params, sparse):
    for network, weights in ((model, params), sparse):
        laid_out = decode_params(network, weights)
        assert is_decode_form(laid_out)
        assert decode_params(network, laid_out) is laid_out
        logits = jax.jit(
            lambda weights, network=network: network.apply({"params": weights}, jnp.asarray([[3, 4, 5]])).logits
        )
        np.testing.assert_allclose(logits(laid_out), logits(weights), atol=1e-4)
    # Long enough that generate lays them out itself; longer than one row of the cache bucket.
    long = generate(model, params, PROMPTS, SamplingParams(max_tokens=32), rng=KEY)
    short = generate(model, params, PROMPTS, SamplingParams(max_tokens=6), rng=KEY)
    np.testing.assert_array_equal(long.tokens[:, :6], short.tokens)


def test_the_pieces_make_the_loop(model, params):
    out = generate(model, params, PROMPTS, SAMPLED, rng=KEY)
    tokens, positions = np.zeros((3, 8), np.int32), np.full((3, 8), -1, np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)], positions[row, : len(prompt)] = prompt, range(len(prompt))
    cache = KVCache.create(model.config, 3, 16)
    logits, cache = prefill(model, params, cache, jnp.asarray(tokens), jnp.asarray(positions))
    sampling = SamplingArrays.stack([SAMPLED] * 3)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))
    last = jnp.asarray([len(prompt) - 1 for prompt in PROMPTS])
    keys = jax.vmap(jax.random.fold_in)
    ids, logps = jax.jit(sample)(logits, keys(row_keys, last + 1), sampling)
    made = [ids]
    for step in range(1, 6):
        ids, logps, cache, logits = decode_step(
            model, params, cache, ids, last + step, keys(row_keys, last + step + 1), sampling, return_logits=True
        )
        made.append(ids)
    np.testing.assert_array_equal(np.stack(made, axis=1), out.tokens)
    np.testing.assert_allclose(logps, out.logps[:, -1], atol=1e-5)
    direct = log_softmax(logits, SAMPLED.temperature)
    np.testing.assert_allclose(logps, direct[np.arange(3), np.asarray(ids)], atol=1e-5)


def test_nothing_to_generate(model, params, tokenizer):
    out = generate(model, params, ["a"], SamplingParams(max_tokens=0, temperature=0), n=2, tokenizer=tokenizer)
    assert out.tokens.shape == (2, 0)
    assert out.finish_reason == ("length",) * 2
    assert out.text == ("", "")
    assert list(stream(model, params, "a", SamplingParams(max_tokens=0, temperature=0), tokenizer=tokenizer)) == []


@pytest.mark.parametrize(
    ("error", "match", "prompts", "changes"),
    [
        (ValueError, r"prompts\[1\].*at least one token", [[1], []], {}),
        (ValueError, "prompts.*got none", [], {}),
        (ValueError, r"\[0, 258\), got 258", [[258]], {}),
        (ValueError, r"\[0, 258\), got -1", [[3, -1]], {}),
        (ValueError, "max_position_embeddings=128, got 123", [[1] * 123], {}),
        (ValueError, "n: expected at least 1, got 0", [[1]], {"n": 0}),
        (ValueError, "rng", [[1]], {"sampling": SamplingParams(max_tokens=2)}),
        (TypeError, "tokenizer", ["text"], {}),
        (TypeError, "tokenizer.*stop", [[1]], {"sampling": SamplingParams(temperature=0, max_tokens=2, stop=("x",))}),
        (TypeError, "prompts", "text", {}),
        (TypeError, r"prompts\[0\]", [[1.5]], {}),
    ],
)
def test_bad_calls(unchecked, model, params, error, match, prompts, changes):
    with pytest.raises(error, match=match):
        generate(model, params, prompts, **{"sampling": GREEDY, **changes})


def test_a_bad_stream_fails_at_the_call(unchecked, model, params, tokenizer):
    with pytest.raises(ValueError, match="at least one token"):
        stream(model, params, "", GREEDY, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="tokenizer"):
        stream(model, params, "a", GREEDY, tokenizer=None)
