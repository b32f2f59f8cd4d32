import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.superoffload import AdamHyper, fused_adamw, host_adamw, scale_by_host_adam
from tests.oracles import adam as oracle

BACKENDS = ("auto", "xla", "ffi", "pallas")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.latest
def test_twenty_steps_against_float64(backend):
    rng = np.random.default_rng(0)
    p, m, v = rng.normal(size=50).astype(np.float32), np.zeros(50, np.float32), np.zeros(50, np.float32)
    exact = (p, m, v)
    hyper = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "scale": 1 / 1024}
    step = jax.jit(fused_adamw, static_argnames=("mode", "emit_dtype", "backend"))
    for count in range(20):
        g, lr = 1024 * rng.normal(size=50).astype(np.float32), 1e-2 / (count + 1)
        p, m, v, cast = step(p, m, v, g, count=count, lr=lr, backend=backend, **hyper)
        exact = oracle.step(*exact, g, t=count + 1, lr=lr, **hyper)
    for got, want in zip((p, m, v), exact):
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-6)  # beta in float32 is off by 1e-8 of one
    assert cast.dtype == jnp.bfloat16


def trees():
    rng = np.random.default_rng(1)
    params = {
        "w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    return params, [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params) for _ in range(4)]


def train(tx, params, grads):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("backend", ["xla", "ffi"])
def test_host_adamw_is_optax_adamw(backend):
    params, grads = trees()
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    mask = {"w": True, "bias": False}
    mine, state = train(host_adamw(schedule, 0.8, 0.95, 1e-6, 0.1, mask, backend=backend), params, grads)
    theirs, _ = train(optax.adamw(schedule, 0.8, 0.95, 1e-6, weight_decay=0.1, mask=mask), params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine, theirs)
    assert int(state[0].count) == 4
    assert not np.allclose(mine["w"], train(host_adamw(schedule, 0.8, 0.95, 1e-6), params, grads)[0]["w"], atol=1e-5)


def test_scale_by_host_adam_is_optax_scale_by_adam():
    params, grads = trees()
    (mine, a), (theirs, b) = (
        train(tx(0.8, 0.95, 1e-6), params, grads) for tx in (scale_by_host_adam, optax.scale_by_adam)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (a.mu, a.nu), (b.mu, b.nu))


def test_hyper_parameters_can_be_injected():
    params, grads = trees()
    tx = optax.inject_hyperparams(host_adamw, static_args=("backend",))(
        lr=optax.linear_schedule(1e-2, 0, 10), backend="xla"
    )
    mine, state = train(tx, params, grads)
    theirs, _ = train(optax.adamw(optax.linear_schedule(1e-2, 0, 10), weight_decay=0), params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine, theirs)
    assert {"lr", "b1", "b2", "eps", "weight_decay"} <= state.hyperparams.keys()


def test_hyper_is_a_tree_of_numbers():
    hyper = AdamHyper(1e-3, weight_decay=0.1, mode="adam")
    assert jax.tree.leaves(hyper) == [1e-3, 0.9, 0.999, 1e-8, 0.1]
    assert jax.tree.map(lambda x: x, hyper) == hyper
    scheduled = AdamHyper(optax.constant_schedule(0.5), b2=0.9)
    assert jax.tree.map(lambda x: x, scheduled) == scheduled
    assert scheduled.at(3)["lr"] == 0.5
    counts = jax.jit(lambda hyper: hyper.at(7)["b2"] * 2)
    counts(hyper), counts(AdamHyper(1.0, weight_decay=0.2, mode="adam"))
    assert counts._cache_size() == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": 1.0, "b1": 1.0}, ValueError, "b1"),
        ({"lr": 1.0, "b2": 1.5}, ValueError, "b2"),
        ({"lr": 1.0, "eps": 0}, ValueError, "eps"),
        ({"lr": 1.0, "weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"lr": 1.0, "mode": "sgd"}, ValueError, "mode"),
        ({"lr": 1.0, "mode": "amsgrad"}, NotImplementedError, "amsgrad"),
    ],
)
def test_bad_hyper_parameters(given, error, match):
    with pytest.raises(error, match=match):
        AdamHyper(**given)
    with pytest.raises(error, match=match):
        fused_adamw(*[jnp.ones(2)] * 4, count=0, backend="ffi", **given)
    if "mode" not in given:
        with pytest.raises(error, match=match):
            host_adamw(**given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", ["xla", "ffi"])
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ([jnp.ones(2, jnp.float16), *[jnp.ones(2)] * 3], {}, TypeError, "p must be float32.*float16"),
        ([*[jnp.ones(2)] * 3, jnp.ones(3)], {}, ValueError, "g must have the shape of p"),
        ([jnp.ones(2)] * 4, {"emit_dtype": jnp.int8}, TypeError, "emit_dtype"),
        ([jnp.ones(2)] * 4, {"count": -1}, ValueError, "count"),
    ],
)
def test_bad_arrays(backend, args, settings, error, match):
    with pytest.raises(error, match=match):
        fused_adamw(*args, **({"count": 0, "lr": 1e-3, "backend": backend} | settings))


def test_unknown_backend_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"backend: expected one of.*'auto', 'xla', 'ffi', 'pallas'.*'numba'"):
        fused_adamw(*[jnp.ones(2)] * 4, count=0, lr=1e-3, backend="numba")
    with pytest.raises(ValueError, match="backend"):
        host_adamw(1e-3, backend="numba")
