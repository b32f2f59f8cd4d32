"""Log-probabilities of completions: against the float64 decoder, and those that the sampler wrote down."""

import functools

import jax
import numpy as np
import pytest

from jaxlab.inference import SamplingParams, generate
from jaxlab.rl.logps import TextInputs, text_logps
from tests.oracles import decoder as oracle
from tests.rl import toys

TEMPERATURE, LENGTH = 0.7, 6


@pytest.fixture(scope="module")
def sampled():
    """What the sampler gave, and the same rows as the trainer reads them, padded with an id that is no padding."""
    prompts = [toys.TOKENIZER.encode(row["prompt"]) for row in toys.DATA[:4]]
    draw = functools.partial(generate, toys.MODEL, toys.params(), prompts, n=4, rng=jax.random.key(3))
    often = np.bincount(np.ravel(draw(SamplingParams(LENGTH, TEMPERATURE)).tokens)).argsort()[-3:]
    out = draw(SamplingParams(LENGTH, TEMPERATURE, stop_ids=often.tolist()))
    lengths = np.asarray(out.lengths)
    assert len({*lengths}) > 2  # some end early
    starts = np.repeat([len(prompt) for prompt in prompts], 4).astype(np.int32)
    tokens = np.full((16, max(starts) + LENGTH), 7, np.int32)
    for row, (line, new, length) in enumerate(zip(tokens, np.asarray(out.tokens), lengths)):
        line[: starts[row] + length] = [*prompts[row // 4], *new[:length]]
    return out, TextInputs(tokens, starts)


@pytest.mark.latest
def test_equal_the_samplers_and_a_float64_decoder(sampled):
    out, inputs = sampled
    program = jax.jit(functools.partial(text_logps, toys.MODEL, length=LENGTH, temperature=TEMPERATURE))
    got = program(toys.params(), inputs)
    mask = np.asarray(out.mask)
    np.testing.assert_allclose(np.where(mask, got.logp, 0), np.where(mask, out.logps, 0), atol=1e-5)

    logits = oracle.decoder(toys.MODEL.config, toys.params(), inputs.tokens) / TEMPERATURE
    logs = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    for row, start in enumerate(inputs.starts):
        for t in np.flatnonzero(mask[row]):
            there = logs[row, start + t - 1]
            np.testing.assert_allclose(got.logp[row, t], there[inputs.tokens[row, start + t]], atol=1e-5)
            np.testing.assert_allclose(got.entropy[row, t], -np.sum(np.exp(there) * there), atol=1e-4)
    assert np.isfinite(got.logp).all()  # behind the completions too
    assert got.logp.dtype == got.entropy.dtype == np.float32
