import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlab.inference import SamplingArrays, SamplingParams, sample
from tests.oracles.sampling import log_softmax, truncated

DRAWS = 2048
VOCABULARY = 1000
jitted = jax.jit(sample)


def draw(logits, many):
    """`len(many)` rows of parameters over rows of logits, each drawn DRAWS times in one call."""
    rows = len(many)
    sampling = SamplingArrays.stack([one for one in many for _ in range(DRAWS)])
    keys = jax.random.split(jax.random.key(7), rows * DRAWS)
    ids, logps = jitted(jnp.repeat(jnp.asarray(logits, jnp.float32), DRAWS, axis=0), keys, sampling)
    return np.asarray(ids).reshape(rows, DRAWS), np.asarray(logps).reshape(rows, DRAWS)


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.7, "min_p": 0.1, "temperature": 1.3},
    {"temperature": 0.0, "top_k": 3},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 1000},
]


@pytest.mark.latest
def test_draws_follow_the_truncated_distribution():
    logits = np.random.default_rng(0).normal(size=(len(CASES), 24)) * 1.5
    ids, logps = draw(logits, [SamplingParams(**case) for case in CASES])
    for row, case in enumerate(CASES):
        expected = truncated(logits[row], **case)
        counts = np.bincount(ids[row], minlength=24)
        assert counts[expected == 0].sum() == 0, case
        kept = expected > 0
        if kept.sum() > 1:
            # Rare tokens are pooled, as the chi-square test wants expected counts of at least five.
            order = np.argsort(-expected[kept])
            common = np.maximum(np.sum(expected[kept] * DRAWS >= 5), 1)
            observed, wanted = counts[kept][order], expected[kept][order] * DRAWS
            observed = np.append(observed[:common], observed[common:].sum())
            wanted = np.append(wanted[:common], wanted[common:].sum())
            observed, wanted = observed[wanted > 0], wanted[wanted > 0]
            assert stats.chisquare(observed, wanted).pvalue > 1e-4, case
        direct = log_softmax(logits[row], case.get("temperature", 1.0))
        np.testing.assert_allclose(logps[row], direct[ids[row]], atol=1e-5)


def support(logits, keys_seed=0, **case):
    """Tokens that a row can draw, seen through many draws of a flat enough distribution."""
    padded = np.full(VOCABULARY, -np.inf, np.float32)
    padded[: len(logits)] = logits
    rows = jnp.asarray(np.broadcast_to(padded, (DRAWS, VOCABULARY)))
    keys = jax.random.split(jax.random.key(keys_seed), DRAWS)
    ids, _ = jitted(rows, keys, SamplingArrays.stack([SamplingParams(**case)] * DRAWS))
    return set(np.asarray(ids).tolist())


def test_equal_logits_are_kept_by_lower_id():
    logits = np.zeros(12)
    logits[[3, 8]] = 1.0
    assert support(logits, top_k=1) == {3}
    assert support(logits, top_k=4) == {3, 8, 0, 1}
    assert support(np.zeros(700), top_k=300) == set(range(300))  # more than the candidates: searched
    assert support(np.zeros(700), top_p=0.5) == set(range(350))


@pytest.mark.parametrize(
    "case", [{"top_k": 400}, {"top_p": 0.9}, {"top_k": 600, "top_p": 0.8}, {"top_k": 300, "min_p": 0.5}]
)
def test_wide_truncation_is_exact(case):
    # Nearly flat, so that the 256 likeliest tokens settle nothing.
    logits = np.random.default_rng(1).normal(size=1000) * 0.3
    expected = truncated(logits.astype(np.float32), **case)
    kept = set()
    for seed in range(4):
        kept |= support(logits, keys_seed=seed, **case)
    allowed = set(np.flatnonzero(expected).tolist())
    assert kept <= allowed
    assert len(kept) > 0.97 * len(allowed)


def test_a_row_does_not_depend_on_its_mates():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(6, 1000)) * [[0.2], [1], [3], [0.1], [2], [1]], jnp.float32)
    many = [
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(temperature=0),
        SamplingParams(top_k=700),
        SamplingParams(),
        SamplingParams(min_p=0.1),
    ]
    keys = jax.random.split(jax.random.key(0), 6)
    ids, logps = jitted(logits, keys, SamplingArrays.stack(many))
    for row in range(6):
        one, logp = jitted(logits[row : row + 1], keys[row : row + 1], SamplingArrays.stack(many[row : row + 1]))
        assert one[0] == ids[row]
        assert abs(logp[0] - logps[row]) < 1e-5


def test_forbidden_tokens_are_never_drawn():
    logits = np.full(300, -np.inf)
    logits[[5, 299]] = 0.0
    assert support(logits) == {5, 299}
    assert support(logits, top_k=50) == {5, 299}
    assert support(logits, top_p=0.4) == {5}


def test_raw_keys_draw_as_typed_ones():
    logits = jax.random.normal(jax.random.key(1), (4, 50))
    keys = jax.random.split(jax.random.key(0), 4)
    sampling = SamplingArrays.stack([SamplingParams()] * 4)
    np.testing.assert_array_equal(
        jitted(logits, keys, sampling)[0], jitted(logits, jax.random.key_data(keys), sampling)[0]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("max_tokens", -1),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop_ids", (-3,)),
    ],
)
def test_bad_values_are_refused_when_made(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "hot"), ("top_k", 2.5), ("stop", (3,)), ("max_tokens", None)]
)
def test_wrong_types_are_refused_when_made(unchecked, field, value):
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_params_are_values():
    assert SamplingParams(stop="end", stop_ids=[3, 4]) == SamplingParams(stop=("end",), stop_ids=(3, 4))
    assert hash(SamplingParams(stop="end")) == hash(SamplingParams(stop=("end",)))
    arrays = SamplingArrays.stack([SamplingParams(top_k=3), SamplingParams(temperature=0)])
    np.testing.assert_array_equal(arrays.top_k, [3, 0])
    np.testing.assert_array_equal(arrays.temperature, [1, 0])
    assert arrays.top_p.dtype == np.float32
    assert arrays.top_k.dtype == np.int32
