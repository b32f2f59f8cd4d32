import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grad_stats import grad_stats
from tests.aot import needs_aot, needs_ptxas

IMPLEMENTATIONS = ("reference", "xla", "interpret")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", [0, 1, 2048, 10007])
@pytest.mark.latest
def test_against_float64(implementation, n):
    g = jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.bfloat16 if n == 2048 else jnp.float32)
    sum_sq, finite = jax.jit(grad_stats, static_argnames="implementation")(g, implementation=implementation)
    assert (sum_sq.dtype, sum_sq.shape, finite.dtype, finite.shape) == (jnp.float32, (), jnp.bool_, ())
    np.testing.assert_allclose(sum_sq, np.sum(np.square(np.asarray(g, np.float64))), rtol=1e-6)
    assert finite


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_odd_values(implementation):
    stats = jax.jit(lambda g: grad_stats(g, implementation=implementation))
    for value, at in ((np.nan, 0), (np.inf, 9000), (-np.inf, 2500)):
        sum_sq, finite = stats(jnp.zeros(9001).at[at].set(value))
        assert not finite
        assert not np.isfinite(sum_sq)
    sum_sq, finite = stats(jnp.zeros(9001).at[7].set(1e30))
    assert finite  # though its square is not
    assert np.isinf(sum_sq)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("g", "settings", "error", "match"),
    [
        (jnp.ones((2, 2)), {}, ValueError, "g must have rank 1"),
        (jnp.ones(2, int), {}, TypeError, "g must be floating"),
        (jnp.ones(2), {"implementation": "cuda"}, ValueError, "'cuda'.*reference.*xla.*triton"),
        (jnp.ones(2), {"implementation": "triton"}, NotImplementedError, "grad_stats.*'triton'.*'cpu'"),
    ],
)
def test_bad_inputs(g, settings, error, match):
    with pytest.raises(error, match=match):
        grad_stats(g, **settings)


@needs_aot
@needs_ptxas
@pytest.mark.latest
def test_compiled_for_h100():
    from jaxlab.core import plan

    g = jax.ShapeDtypeStruct((1 << 24,), jnp.float32)
    compiled = plan.compile(grad_stats, g, target=plan.target("h100"), labels=["input"])
    assert compiled.bytes["temporaries"] <= 16384  # partial sums
    assert [kernel.name for kernel in compiled.kernels] == ["grad_stats", "grad_stats_total"]
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 64
        assert not any(name.startswith(("atom", "red.")) for name in kernel.ptx_instructions), kernel.name
