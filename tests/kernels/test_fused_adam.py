import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_adam import Coefficients, coefficients, fused_adam
from tests.aot import needs_aot, needs_ptxas
from tests.oracles import adam as oracle

IMPLEMENTATIONS = ("reference", "xla", "interpret")
HYPER = {"lr": 3e-3, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "scale": 0.25}


def bucket(n, seed=0):
    rng = np.random.default_rng(seed)
    p, m, g = (rng.normal(size=n).astype(np.float32) for _ in range(3))
    return p, 0.1 * m, np.square(g[::-1]) + np.float32(1e-3), g


@functools.cache
def jitted(implementation, mode, emit, bias_correction=True):
    settings = {"mode": mode, "emit_dtype": emit, "bias_correction": bias_correction}
    return jax.jit(functools.partial(fused_adam, implementation=implementation, **settings))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "mode"), [(0, "adamw"), (1, "adam"), (1024, "adamw"), (2500, "adam")])
@pytest.mark.latest
def test_against_float64(implementation, n, mode):
    arrays = bucket(n)
    p, m, v, cast = jitted(implementation, mode, "bfloat16")(*arrays, count=6, **HYPER)
    wanted = oracle.step(*arrays, t=7, mode=mode, **HYPER)
    for got, want in zip((p, m, v), wanted):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)
    assert cast.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast, p.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_correction_or_copy_and_with_a_bfloat16_gradient(implementation):
    p, m, v, g = bucket(130)
    g = jnp.asarray(g, jnp.bfloat16)
    *got, cast = jitted(implementation, "adamw", None, False)(p, m, v, g, count=6, **HYPER)
    assert cast is None
    for mine, want in zip(got, oracle.step(p, m, v, np.asarray(g, np.float64), t=7, bias=False, **HYPER)):
        np.testing.assert_allclose(mine, want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("mode", ["adamw", "adam"])
def test_xla_rounds_every_operation(mode):
    arrays = bucket(5000)
    scalars = coefficients(count=6, mode=mode, bias_correction=True, **HYPER)
    wanted = oracle.strict(*arrays, np.asarray(scalars), mode=mode)
    whole = jitted("xla", mode, None)(*arrays, count=6, **HYPER)
    parts = [jitted("xla", mode, None)(*(x[a:b] for x in arrays), count=6, **HYPER) for a, b in ((0, 7), (7, 5000))]
    for i, want in enumerate(wanted):
        np.testing.assert_array_equal(whole[i], want)
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), want)


def test_scalars_have_the_same_bits_wherever_they_are_computed():
    rng = np.random.default_rng(0)
    counts, b1, b2 = rng.integers(0, 20000, 200), rng.uniform(size=200), 1 - 10 ** rng.uniform(-4, -1, size=200)
    counts[:50] = np.arange(50)
    settings = {"eps": 1e-8, "weight_decay": 0.1, "scale": 0.5, "mode": "adamw", "bias_correction": True}

    def scalars(count, b1, b2):
        return jnp.stack(coefficients(count=count, lr=jnp.float32(1e-3), b1=b1, b2=b2, **settings))

    def among_others(x, count, b1, b2):
        made = scalars(count, b1, b2)
        return made, x * made[7] + made[8]

    args = (counts.astype(np.int32), b1.astype(np.float32), b2.astype(np.float32))
    together = np.asarray(jax.jit(jax.vmap(scalars))(*args))
    alone, among = jax.jit(scalars), jax.jit(among_others)
    for i, one in enumerate(zip(*args)):
        np.testing.assert_array_equal(alone(*one), together[i])
        np.testing.assert_array_equal(among(np.ones(64, np.float32), *one)[0], together[i])
    exact = 1 / np.sqrt(1 - args[2].astype(np.float64) ** (counts + 1))
    np.testing.assert_allclose(together[:, Coefficients._fields.index("root")], exact, rtol=2e-4)
    np.testing.assert_array_equal(jax.jit(lambda: scalars(6, 0.8, 0.95))(), scalars(6, 0.8, 0.95))


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_schedule_compiles_nothing_anew(implementation):
    step = jitted(implementation, "adamw", None)
    before = step._cache_size()
    for count in range(3):
        step(*bucket(16), count=count, **(HYPER | {"lr": 1e-3 * (count + 1)}))
    assert step._cache_size() == before + 1


def test_vmap():
    stacked = [jnp.asarray(np.stack(x)) for x in zip(bucket(40, 1), bucket(40, 2))]
    step = jax.jit(lambda *a: fused_adam(*a, count=1, lr=1e-2))
    got = jax.jit(jax.vmap(step))(*stacked)
    for i in range(2):
        for a, b in zip(got, step(*(x[i] for x in stacked))):
            np.testing.assert_array_equal(a[i], b)


X = jnp.ones(4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        ((X, X, X[:3], X), {}, ValueError, r"v must have the shape of p, \(4,\), got \(3,\)"),
        ((X[None], X, X, X), {}, ValueError, "p must have rank 1"),
        ((X.astype(jnp.float16), X, X, X), {}, TypeError, "p must be float32.*float16"),
        ((X, X.astype(jnp.bfloat16), X, X), {}, TypeError, "m must be float32"),
        ((X, X, X, X.astype(int)), {}, TypeError, "g must be floating"),
        ((X, X, X, X), {"b1": 1.0}, ValueError, r"b1: expected a value in \[0, 1\), got 1.0"),
        ((X, X, X, X), {"b2": -0.1}, ValueError, "b2"),
        ((X, X, X, X), {"b2": jnp.float32(1)}, ValueError, "b2"),
        ((X, X, X, X), {"eps": 0.0}, ValueError, "eps: expected a value > 0"),
        ((X, X, X, X), {"lr": -1.0}, ValueError, "lr"),
        ((X, X, X, X), {"lr": float("nan")}, ValueError, "lr"),
        ((X, X, X, X), {"weight_decay": -1.0}, ValueError, "weight_decay"),
        ((X, X, X, X), {"count": -1}, ValueError, "count"),
        ((X, X, X, X), {"mode": "sgd"}, ValueError, "mode.*adamw.*'sgd'"),
        ((X, X, X, X), {"mode": "amsgrad"}, NotImplementedError, "amsgrad"),
        ((X, X, X, X), {"emit_dtype": jnp.int8}, TypeError, "emit_dtype"),
        ((X, X, X, X), {"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        ((X, X, X, X), {"implementation": "triton"}, NotImplementedError, "fused_adam.*'triton'.*'cpu'"),
    ],
)
def test_bad_inputs(args, settings, error, match):
    with pytest.raises(error, match=match):
        fused_adam(*args, **({"count": 0, "lr": 1e-3} | settings))


@needs_aot
@needs_ptxas
@pytest.mark.latest
@pytest.mark.parametrize("gradient", [jnp.bfloat16, jnp.float32])
def test_compiled_for_h100(gradient):
    from jaxlab.core import plan

    n = 1 << 24
    state, array = [jax.ShapeDtypeStruct((n,), jnp.float32)] * 3, jax.ShapeDtypeStruct

    def step(p, m, v, g, count, lr):
        return fused_adam(p, m, v, g, count=count, lr=lr, weight_decay=0.1)

    scalars = (array((), jnp.int32), array((), jnp.float32))
    given = (*state, array((n,), gradient), *scalars)
    target = plan.target("h100")
    compiled = plan.compile(step, *given, target=target, labels=["input"] * 6, donate_argnums=(0, 1, 2))
    assert compiled.bytes["temporaries"] < 256  # the scalars
    assert compiled.bytes["total"] < sum(x.size * x.dtype.itemsize for x in given) + 2 * n + 4096  # and the copy
    (kernel,) = compiled.kernels
    assert kernel.name == "fused_adam"
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 64
