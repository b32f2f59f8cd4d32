import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.inference import SamplingParams, SharedPrefixCache, generate, prefill
from jaxlab.inference.batch import _start
from jaxlab.inference.steps import next_logits
from jaxlab.models.decoder import Cache, KVCache

KEY = jax.random.key(3)


def test_the_cache_gives_the_logits_of_an_ordinary_one(model, params):
    """Samples that share a prompt, several tokens of each at once, then one."""
    tokens = jnp.asarray([[3, 4, 5, 6], [9, 8, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, 3], [0, 1, -1, -1]])
    rows, lengths = jnp.asarray([0, 0, 1, 1]), jnp.asarray([4, 2])
    more = jnp.asarray([[1, 2], [3, 4], [5, 6], [7, 8]])
    places = lengths[rows][:, None] + jnp.asarray([[0, 1], [0, -10], [0, 1], [0, 1]])  # the second writes one only

    @jax.jit
    def run(params):
        _, prefix = prefill(model, params, KVCache.create(model.config, 2, 16), tokens, positions)
        caches = prefix.take(rows), SharedPrefixCache.create(model.config, prefix, lengths, 2, 8)
        assert all(isinstance(cache, Cache) for cache in caches)
        found = []
        for cache in caches:
            out = model.apply({"params": params}, more, jnp.where(places < 0, -1, places), cache=cache)
            last = jnp.asarray([6, 5, 4, 4])
            found.append((out.logits, next_logits(model, params, out.cache, more[:, 0], last)[0]))
        return found

    (pieces, steps), (shared_pieces, shared_steps) = run(params)
    valid = np.asarray(places) >= 0
    np.testing.assert_allclose(np.asarray(shared_pieces)[valid], np.asarray(pieces)[valid], atol=2e-5)
    np.testing.assert_allclose(shared_steps, steps, atol=2e-5)


@pytest.mark.latest
def test_samples_are_those_of_prompts_given_again(model, params):
    prompts = [[1, 2, 3], [70, 80, 90, 100, 110], [5]]
    sampling = SamplingParams(max_tokens=6, temperature=1.5, top_p=0.95)
    together = generate(model, params, prompts, sampling, n=3, rng=KEY)
    apart = generate(model, params, [p for p in prompts for _ in range(3)], sampling, rng=KEY)
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_array_equal(together.lengths, apart.lengths)
    np.testing.assert_allclose(together.logps, apart.logps, atol=1e-4)
    assert together.finish_reason == apart.finish_reason


class _Traced(Exception):
    """Ends a generation once its first program is known."""


def _first_cache(monkeypatch, *args, **options):
    """The cache of a generation as shapes (which the run-time checks do not take): nothing is compiled."""

    def trace(model, *args, **options):
        raise _Traced(jax.eval_shape(functools.partial(_start, model, **options), *args).cache)

    monkeypatch.setattr("jaxlab.inference.batch._start", trace)
    with pytest.raises(_Traced) as found:
        generate(*args, **options)
    return found.value.args[0]


@pytest.mark.usefixtures("unchecked")
def test_the_prompt_is_held_once(model, params, monkeypatch):
    prompts, sampling = [list(range(1, 65))], SamplingParams(max_tokens=16)
    cache = _first_cache(monkeypatch, model, params, prompts, sampling, n=16, rng=KEY)
    held = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves((cache.prefix, cache.suffix)))
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert held <= 1.1 * (64 + 16 * 16) * a_token


@pytest.mark.usefixtures("unchecked")
def test_windows_go_without(model, params, monkeypatch):
    windowed = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(2, 2)))
    cache = _first_cache(monkeypatch, windowed, params, [[1, 2, 3, 4]], SamplingParams(max_tokens=6), n=2, rng=KEY)
    assert isinstance(cache, KVCache)
    with pytest.raises(NotImplementedError, match="sliding windows"):
        SharedPrefixCache.create(windowed.config, KVCache.create(model.config, 1, 4), jnp.asarray([1]), 2, 4)
