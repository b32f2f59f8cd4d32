import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.rl import aggregate, kl_penalty, policy_loss
from jaxlab.rl.config import AGGREGATIONS
from jaxlab.rl.losses import policy_terms
from tests.oracles import policy_objective as oracle

B, T = 4, 5


def case(dtype=np.float32):
    random = np.random.default_rng(3)
    old = -random.exponential(1.0, (B, T))
    mask = np.arange(T) < np.array([5, 2, 0, 3])[:, None]
    return {
        "logp": (old + 0.5 * random.standard_normal((B, T))).astype(dtype),
        "old": old.astype(dtype),
        "advantages": np.array([1.2, -0.7, 0.4, -1.1], dtype),
        "mask": mask.astype(dtype),
        "ref_logp": (old + 0.3 * random.standard_normal((B, T))).astype(dtype),
    }


OPTIONS = [
    {},
    {"epsilon": 0.1, "epsilon_high": 0.28, "dual_clip": 1.3, "aggregation": "seq-mean-token-mean"},
    {"beta": 0.3, "kl": "k3", "aggregation": "seq-mean-token-sum-norm", "max_length": 8},
    {"beta": 0.3, "kl": "k2", "aggregation": "seq-mean-token-sum"},
    {"beta": 0.3, "kl": "k1"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_gradient_and_metrics_against_float64(options):
    with jax.enable_x64(True):
        inputs = case(dtype=np.float64)
        logp, ref = inputs.pop("logp"), inputs.pop("ref_logp")
        ours = {**options, "ref_logp": ref} if "beta" in options else options
        theirs = {"kl_kind" if name == "kl" else name: value for name, value in ours.items()}

        def loss(logp):
            return policy_loss(logp, inputs["old"], inputs["advantages"], inputs["mask"], **ours)

        (got, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logp)
        want, numbers = oracle.policy_loss(logp, **inputs, **theirs)
        assert got.dtype == jnp.float64
        assert numbers["clip_fraction_low"] > 0
        assert numbers["clip_fraction_high"] > 0
        assert np.any((np.exp(logp - inputs["old"]) > 1.3) & (inputs["advantages"] < 0)[:, None] & (inputs["mask"] > 0))
        np.testing.assert_allclose(got, want, rtol=1e-12)
        for name, value in numbers.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)
        differences = oracle.gradient(lambda x: oracle.policy_loss(x, **inputs, **theirs)[0], logp)
        np.testing.assert_allclose(grad, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.latest
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregation(mode):
    inputs = case()
    got = aggregate(inputs["logp"], inputs["mask"], mode, max_length=7)
    np.testing.assert_allclose(got, oracle.aggregate(inputs["logp"], inputs["mask"], mode, 7), rtol=1e-6)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, aggregate(inputs["logp"], inputs["mask"].astype(bool), mode, max_length=7))
    without = np.array([0, 1, 3])  # the fully masked row leaves numerator and denominator
    np.testing.assert_allclose(
        got, aggregate(inputs["logp"][without], inputs["mask"][without], mode, max_length=7), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_penalty(kind):
    logp = np.array([[-1.0, -2.0, -30.0, -1.0, -1.0]], np.float32)
    ref = np.array([[-1.0, -1.5, -1.0, -40.0, -1.0001]], np.float32)
    want = [[oracle.kl(float(a), float(b), kind) for a, b in zip(logp[0], ref[0])]]
    np.testing.assert_allclose(kl_penalty(logp, ref, kind), want, rtol=2e-3)  # k3 of 1e-4 is a difference of 1e-8


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_at_ratio_one_the_loss_is_the_mean_advantage_and_the_gradient_is_not_zero(mode):
    """Spec, section 9: min() ties at ratio 1, where the gradient of a token must be -A / n, also with epsilon 0."""
    inputs = case()
    advantages = np.array([1.0, -1.0, 1.0, 0.5], np.float32)
    lengths = inputs["mask"].sum(axis=1)
    weight = {
        "token-mean": np.full(B, 1 / 10),
        "seq-mean-token-mean": 1 / (3 * np.maximum(lengths, 1)),
        "seq-mean-token-sum-norm": np.full(B, 1 / (3 * 8)),
        "seq-mean-token-sum": np.full(B, 1 / 3),
    }[mode]
    for epsilon in (0.2, 0.0):

        def loss(logp, epsilon=epsilon):
            return policy_loss(logp, logp, advantages, inputs["mask"], aggregation=mode, max_length=8, epsilon=epsilon)[
                0
            ]

        grad = jax.grad(loss)(inputs["logp"])
        np.testing.assert_allclose(grad, -(advantages * weight)[:, None] * inputs["mask"], rtol=1e-6)


def test_what_is_masked_never_matters():
    inputs = case()
    off = inputs["mask"] == 0
    spoiled = {name: np.where(off, np.nan, value) for name, value in inputs.items() if value.ndim == 2}
    spoiled["logp"] = np.where(off, -np.inf, inputs["logp"])
    tokens = np.where(off, np.nan, inputs["advantages"][:, None])

    def loss(logp, values, advantages):
        return policy_loss(
            logp, values["old"], advantages, inputs["mask"], ref_logp=values["ref_logp"], beta=0.2, dual_clip=3.0
        )

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (want, metrics), grad = value_and_grad(inputs["logp"], inputs, inputs["advantages"])
    (got, spoiled_metrics), spoiled_grad = value_and_grad(spoiled["logp"], spoiled, tokens)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(spoiled_grad, grad)
    assert not np.any(grad * off)
    for name, value in metrics.items():
        np.testing.assert_array_equal(spoiled_metrics[name], value)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_all_masked_is_zero(mode):
    nothing = np.full((B, T), np.nan, np.float32)

    def loss(logp):
        return policy_loss(logp, nothing, np.ones(B, np.float32), np.zeros((B, T)), aggregation=mode, max_length=3)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(nothing))
    assert float(value) == 0
    assert not np.any(grad)
    assert not any(float(metric) for metric in metrics.values())


def test_far_ratios_stay_finite():
    old = np.array([[-1.0, -200.0]], np.float32)
    logp = np.array([[-200.0, -1.0]], np.float32)
    loss = functools.partial(policy_loss, old_logp=old, advantages=-np.ones(1, np.float32), mask=np.ones((1, 2)))
    (value, _), grad = jax.value_and_grad(lambda x: loss(x), has_aux=True)(logp)
    np.testing.assert_allclose(value, (0.8 + np.exp(20)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(grad, 0)


def test_gradients_flow_through_the_policy_alone():
    inputs = case()

    def loss(old, advantages, ref):
        return policy_loss(inputs["logp"], old, advantages, inputs["mask"], ref_logp=ref, beta=1.0)[0]

    for grad in jax.grad(loss, (0, 1, 2))(inputs["old"], inputs["advantages"], inputs["ref_logp"]):
        assert not np.any(grad)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_terms_of_pieces_add_up(mode):
    """Also with entropies and weights of the tokens, which only the terms take."""
    inputs = case()
    random = np.random.default_rng(3)
    extra = {name: random.random((B, T)).astype(np.float32) for name in ("entropy", "weights")}

    def terms(rows):
        return policy_terms(
            *(inputs[name][rows] for name in ("logp", "old", "advantages", "mask")),
            **{name: value[rows] for name, value in extra.items()},
            entropy_coef=0.1,
            aggregation=mode,
            max_length=T,
            ref_logp=inputs["ref_logp"][rows],
            beta=0.2,
        )

    loss, metrics = jax.tree.map(lambda a, b: a + b, terms(slice(0, 1)), terms(slice(1, B)))
    names = {"mask", "logp", "old", "advantages", "ref_logp"}
    want, numbers = oracle.policy_loss(
        **{name: inputs[name] for name in names},
        **extra,
        entropy_coef=0.1,
        aggregation=mode,
        max_length=T,
        beta=0.2,
    )
    np.testing.assert_allclose(loss.value, want, rtol=1e-5)
    for name, value in numbers.items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, atol=1e-6)
    for name, value in (
        ("entropy", extra["entropy"]),
        ("kl", np.vectorize(oracle.kl)(inputs["logp"], inputs["ref_logp"], "k3")),
    ):
        want = oracle.aggregate(value, inputs["mask"], "token-mean")
        np.testing.assert_allclose(metrics[name].value, want, rtol=1e-5)


def test_rows_on_several_devices_are_one_batch():
    """Two devices, whose rows have 7 and 3 tokens: the loss is not the mean of theirs."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    inputs = [case()[name] for name in ("logp", "old", "advantages", "mask")]

    def loss(logp, *rest):
        return policy_loss(logp, *rest, aggregation="seq-mean-token-mean")[0]

    function = jax.jit(jax.value_and_grad(loss))
    value, grad = function(*jax.device_put(inputs, rows))
    want, want_grad = function(*inputs)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6)
    halves = [loss(*(x[part] for x in inputs)) for part in (slice(0, 2), slice(2, 4))]
    assert abs(np.mean(halves) - want) > 1e-3


def test_bfloat16_gives_float32():
    inputs = {name: jnp.asarray(value, jnp.bfloat16) for name, value in case().items()}
    loss, metrics = policy_loss(*(inputs[name] for name in ("logp", "old", "advantages", "mask")))
    assert {loss.dtype, *(metric.dtype for metric in metrics.values())} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 1.0}, r"epsilon: expected a value in \[0, 1\), got 1.0"),
        ({"epsilon": -0.1}, "epsilon: .* got -0.1"),
        ({"epsilon_high": -1.0}, "epsilon_high: .* got -1"),
        ({"dual_clip": 1.0}, "dual_clip: expected a value > 1, got 1.0"),
        ({"aggregation": "mean"}, "aggregation: expected one of token-mean, seq-mean-token-mean, .* got 'mean'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "max_length: expected at least 1 .* got None"),
        ({"beta": -1.0}, "beta: .* got -1"),
        ({"beta": 0.1}, "ref_logp: .* beta=0.1, got None"),
        ({"beta": 0.1, "kl": "k4", "ref_logp": np.zeros((B, T))}, "kind: expected one of k1, k2, k3, got 'k4'"),
        ({"ref_logp": np.zeros((B, 1))}, r"ref_logp: expected the shape of logp, \(4, 5\), got \(4, 1\)"),
        ({"logp": np.zeros(T)}, r"logp: expected shape \[B, T\], got \(5,\)"),
        ({"old_logp": np.zeros((1, T))}, r"old_logp: expected the shape of logp, \(4, 5\), got \(1, 5\)"),
        ({"mask": np.zeros((B, 1))}, r"mask: expected the shape of logp, \(4, 5\), got \(4, 1\)"),
        ({"advantages": np.zeros(T)}, r"advantages: expected shape \(4,\) or \(4, 5\), got \(5,\)"),
        ({"advantages": np.zeros((B, 1))}, r"advantages: expected shape \(4,\) or \(4, 5\), got \(4, 1\)"),
    ],
)
def test_bad_inputs(unchecked, change, message):
    arguments = {name: np.zeros((B, T)) for name in ("logp", "old_logp", "advantages", "mask")}
    with pytest.raises(ValueError, match=message):
        policy_loss(**(arguments | change))


def test_bad_inputs_of_the_parts(unchecked):
    with pytest.raises(ValueError, match="mode: expected one of token-mean"):
        aggregate(np.zeros((B, T)), np.zeros((B, T)), "sum")
    with pytest.raises(ValueError, match="mask: expected the shape of values"):
        aggregate(np.zeros((B, T)), np.zeros((B, 1)), "token-mean")
    with pytest.raises(ValueError, match=r"max_length: .* got 0"):
        aggregate(np.zeros((B, T)), np.zeros((B, T)), "seq-mean-token-sum-norm", max_length=0)
    with pytest.raises(ValueError, match="ref_logp: expected the shape of logp"):
        kl_penalty(np.zeros((B, T)), np.zeros((B, 1)))
    with pytest.raises(ValueError, match=r"entropy: expected an array with entropy_coef=0\.1"):
        policy_terms(*[np.zeros((B, T))] * 4, entropy_coef=0.1)
