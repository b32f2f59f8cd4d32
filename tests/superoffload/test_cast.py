import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.superoffload import cast_bucket


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_both_sides_give_the_same_bits(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=4000) * 1e3, jnp.float32)
    here, there = (cast_bucket(x, dtype, where=where) for where in ("gpu", "cpu"))
    assert here.dtype == there.dtype == dtype
    np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(here, jax.jit(cast_bucket, static_argnums=1)(x, dtype))
    exact = np.asarray(x).astype(dtype) if dtype != "bfloat16" else np.asarray(x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(here), exact)


def test_rounding_to_nearest_even_and_the_edge_of_float16():
    halves = jnp.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8], jnp.float32)
    np.testing.assert_array_equal(cast_bucket(halves, jnp.bfloat16).astype(jnp.float32), [1, 1 + 2.0**-6, -1])
    edge = cast_bucket(jnp.array([65504.0, 65519.0, 65520.0, -65520.0]), jnp.float16)
    np.testing.assert_array_equal(edge, np.array([65504, 65504, np.inf, -np.inf], np.float16))


def test_where_a_bfloat16_gradient_becomes_float32_cannot_be_seen():
    g = jnp.asarray(np.random.default_rng(1).normal(size=1000), jnp.bfloat16)
    for where in ("gpu", "cpu"):
        wide = cast_bucket(g, jnp.float32, where=where)
        np.testing.assert_array_equal(wide.astype(jnp.bfloat16), g)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "dtype", "where", "error", "match"),
    [
        (jnp.ones(2), jnp.bfloat16, "tpu", ValueError, "where: expected one of.*'tpu'"),
        (jnp.ones(2), jnp.int8, "gpu", TypeError, "dtype must be floating"),
        (jnp.ones(2, int), jnp.float32, "gpu", TypeError, "x must be floating"),
    ],
)
def test_bad_inputs(x, dtype, where, error, match):
    with pytest.raises(error, match=match):
        cast_bucket(x, dtype, where=where)
