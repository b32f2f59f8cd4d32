import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import count_compilations
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.training import (
    LossOutput,
    OptimizerConfig,
    TrainState,
    cross_entropy,
    lm_loss,
    make_train_step,
    optimizer,
    perplexity,
)
from jaxlab.training.loss import router_loss, router_metrics
from tests.oracles import language_model
from tests.training import toys


@pytest.fixture(scope="module")
def model():
    return Decoder(toys.MODEL)


@pytest.fixture(scope="module")
def params(model):
    return init_params(model, jax.random.key(0))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_against_float64(chunks, dtype):
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.standard_normal((2, 6, 5)), dtype)
    head = jnp.asarray(random.standard_normal((5, 11)), dtype)
    targets, weights = random.integers(0, 11, (2, 6)), random.random((2, 6)).astype(np.float32)

    def scaled(hidden, head):
        total, hits = cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(weights), chunks)
        return 0.5 * total, (total, hits)

    grad = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))
    (_, (total, hits)), (d_hidden, d_head) = grad(hidden, head)
    want = language_model.cross_entropy(hidden, head, targets, weights)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(hits, want[1], rtol=1e-5)
    np.testing.assert_allclose(d_hidden.astype(jnp.float32), 0.5 * want[2], atol=tolerance)
    np.testing.assert_allclose(d_head.astype(jnp.float32), 0.5 * want[3], atol=2 * tolerance)
    plain = cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(weights), chunks)
    np.testing.assert_allclose(plain[0], total, rtol=1e-6)


def test_chunks_keep_the_logits_small():
    """Peak temporaries of value and gradient with eight chunks against one: V = 4096."""
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((2, 512, 16), jnp.float32), ((16, 4096), jnp.float32))]
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 512), jnp.float32)

    def temporaries(chunks):
        def f(hidden, head, targets, weights):
            return cross_entropy(hidden, head, targets, weights, chunks)[0]

        return jax.jit(jax.grad(f, (0, 1))).lower(*shapes, ids, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 4


def test_lm_loss_is_the_mean_over_weights(model, params):
    batch = toys.batch()
    out = jax.jit(lm_loss(model))(params, batch, jax.random.key(0))
    logits = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids).logits
    logps = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logps, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.total, -(picked * batch.weights).sum(), rtol=1e-5)
    assert float(out.weight) == batch.weights.sum()
    np.testing.assert_allclose(
        perplexity(model, params, [batch, toys.batch(1)]),
        np.exp(
            sum(float(lm_loss(model)(params, toys.batch(s), None).total) for s in (0, 1))
            / (batch.weights.sum() + toys.batch(1).weights.sum())
        ),
        rtol=1e-5,
    )


def test_router_loss_sums_what_layers_report():
    aux = {"blocks_0": {"aux_loss": jnp.array([1.0, 2.0]), "z_loss": jnp.array([10.0, 20.0]), "rows": jnp.arange(4)}}
    np.testing.assert_allclose(router_loss(aux, 0.01, 0.001), 0.06, rtol=1e-6)
    assert float(router_loss({}, 0.01, 0.001)) == 0


def test_router_metrics_over_all_sparse_layers():
    aux = {
        "blocks_0": {"aux_loss": jnp.array([1.0, 2.0]), "tokens_per_expert": jnp.array([[4, 0], [3, 1]])},
        "blocks_2": {
            "aux_loss": jnp.array([6.0]),
            "tokens_per_expert": jnp.array([[2, 2]]),
            "dropped_recv": 3 * jnp.ones(1),
        },
    }
    got = {name: float(value) for name, value in router_metrics(aux).items()}
    assert got == {
        "aux_loss": 3.0,
        "expert_load_max": (2 + 1.5 + 1) / 3,
        "expert_load_min": 0.0,
        "dropped_recv": 3.0,
    }
    assert router_metrics({}) == {}


@pytest.mark.latest
def test_accumulation_equals_one_big_batch(model, params):
    tx = optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3))
    states, losses = [], []
    for accumulate in (1, 2, 4):
        step = make_train_step(lm_loss(model), tx, accumulate=accumulate)
        state = TrainState.create(jax.tree.map(jnp.array, params), tx, jax.random.key(1))
        for seed in range(2):
            state, metrics = step(state, toys.batch(seed))
        states.append(state)
        losses.append(metrics)
    assert int(states[0].step) == 2
    for state, metrics in zip(states[1:], losses[1:]):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), states[0].params, state.params)
        for name in ("loss", "grad_norm", "weight", "accuracy"):
            np.testing.assert_allclose(metrics[name], losses[0][name], rtol=1e-5)


def test_a_loss_of_ones_own():
    """Least squares by sums, with a metric; the key differs from step to step; one compilation."""

    def loss(params, batch, rng):
        error = batch["x"] @ params["w"] - batch["y"]
        return LossOutput(jnp.sum(error**2), jnp.float32(error.size), {"draw": error.size * jax.random.uniform(rng)})

    random = np.random.default_rng(0)
    x = random.standard_normal((16, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.array([1.0, -2.0, 3.0], np.float32)}
    tx = optax.sgd(0.1)
    state = TrainState.create({"w": jnp.zeros(3)}, tx, jax.random.key(0))
    step = make_train_step(loss, tx)
    draws = []
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(batch["y"] ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(2 * x.T @ batch["y"] / 16), rtol=1e-5)
    with count_compilations() as compiled:
        for _ in range(60):
            state, metrics = step(state, batch)
            draws.append(float(metrics["draw"]))
    assert compiled.count == 0
    assert len(set(draws)) == 60
    np.testing.assert_allclose(state.params["w"], [1.0, -2.0, 3.0], atol=1e-2)


def test_a_batch_without_targets_changes_nothing(model, params):
    tx = optax.sgd(1.0)
    state = TrainState.create(jax.tree.map(jnp.array, params), tx, jax.random.key(1))
    empty = toys.batch().replace(weights=np.zeros((8, 12), np.float32))
    state, metrics = make_train_step(lm_loss(model), tx)(state, empty)
    assert float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_bad_inputs(model, params):
    tx = optax.sgd(1.0)
    with pytest.raises(ValueError, match="accumulate"):
        make_train_step(lm_loss(model), tx, accumulate=0)
    with pytest.raises(ValueError, match=r"accumulate.*8 rows, got 3"):
        make_train_step(lm_loss(model), tx, accumulate=3)(
            TrainState.create(params, tx, jax.random.key(0)), toys.batch()
        )
    with pytest.raises(ValueError, match="at least one token"):
        perplexity(model, params, [])
