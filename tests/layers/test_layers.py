"""Layers against float64 numpy, rotary scalings against numbers of the papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxlab.layers import Linear, RMSNorm, apply_rope, rope_frequencies, rope_tables
from jaxlab.layers.linear import few_rows
from jaxlab.layers.sharding import constrain

RNG = np.random.default_rng(0)


def test_rms_norm_is_float32_inside():
    x = RNG.normal(size=(3, 16)) * 300
    norm = RMSNorm(1e-6)
    params = {"params": {"scale": jnp.asarray(RNG.normal(size=16), jnp.float32)}}
    want = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * np.asarray(params["params"]["scale"])
    np.testing.assert_allclose(norm.apply(params, jnp.asarray(x, jnp.float32)), want, rtol=1e-5)
    half = norm.apply(params, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=2e-2, atol=1e-2)


def test_linear_over_several_axes():
    x = jnp.asarray(RNG.normal(size=(2, 3, 4, 5)), jnp.float32)
    linear = Linear((6, 7), ("heads", "head_dim", "embed", None), in_axes=2, use_bias=True)
    variables = linear.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].names == ("heads", "head_dim", "embed", None)
    assert variables["params"]["bias"].names == ("embed", None)
    params = nn.meta.unbox(variables)
    want = np.einsum("abcd,cdef->abef", x, params["params"]["kernel"]) + params["params"]["bias"]
    np.testing.assert_allclose(linear.apply(params, x), want, atol=1e-5)
    wide = Linear((6,), (None, None), dtype="bfloat16", out_dtype="float32")
    assert wide.apply(wide.init(jax.random.key(0), x), x).dtype == jnp.float32


def test_rope_turns_pairs():
    """Half-split: dimension i turns with i + half, by position * theta^(-i / half); inner products see differences."""
    frequencies, magnitude = rope_frequencies(8, 100.0)
    np.testing.assert_allclose(frequencies, 100.0 ** (-np.arange(4) / 4), rtol=1e-6)
    assert magnitude == 1.0
    positions = jnp.asarray([[0, 3, 11]])
    cos, sin = rope_tables(positions, frequencies)
    x = RNG.normal(size=(1, 3, 2, 8)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.asarray(positions)[..., None] * frequencies)[:, :, None]
    want = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), cos, sin), want, atol=1e-5)
    # Dimensions beyond the tables pass (partial rotation).
    np.testing.assert_array_equal(apply_rope(jnp.asarray(x), cos[..., :2], sin[..., :2])[..., 4:], x[..., 4:])


def test_rope_scalings():
    plain, _ = rope_frequencies(64, 10000.0)
    linear, _ = rope_frequencies(64, 10000.0, "linear", factor=4.0)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)

    settings = {"factor": 8.0, "original_max_position_embeddings": 8192}
    llama3, magnitude = rope_frequencies(64, 5e5, "llama3", **settings)
    plain = 5e5 ** (-np.arange(32) / 32)
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(llama3[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(llama3[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    smooth = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(llama3[between], plain[between] * (smooth + (1 - smooth) / 8), rtol=1e-6)
    assert between.any()
    assert magnitude == 1.0

    settings = {"factor": 4.0, "original_max_position_embeddings": 4096}
    yarn, magnitude = rope_frequencies(64, 10000.0, "yarn", **settings)
    plain = 10000.0 ** (-np.arange(32) / 32)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)
    turns = 4096 * plain / (2 * math.pi)
    np.testing.assert_allclose(yarn[turns > 64], plain[turns > 64], rtol=1e-6)
    np.testing.assert_allclose(yarn[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert (np.diff(yarn) < 0).all()
    assert rope_frequencies(64, 1e4, "yarn", mscale=0.7, mscale_all_dim=0.7, **settings)[1] == 1.0
    assert rope_frequencies(64, 1e4, "yarn", attention_factor=1.3, **settings)[1] == 1.3
    with pytest.raises(NotImplementedError, match="'dynamic'"):
        rope_frequencies(64, 1e4, "dynamic")
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        rope_frequencies(64, 1e4, "yarn", factor=2.0)


def test_rope_sections():
    frequencies, _ = rope_frequencies(8)
    positions = jnp.asarray(RNG.integers(0, 9, (3, 2, 5)))
    cos, sin = rope_tables(positions, frequencies, sections=(2, 1, 1))
    for axis, rows in ((0, slice(0, 2)), (1, slice(2, 3)), (2, slice(3, 4))):
        own = rope_tables(positions[axis], frequencies)
        np.testing.assert_allclose(cos[..., rows], own[0][..., rows], rtol=1e-6)
        np.testing.assert_allclose(sin[..., rows], own[1][..., rows], rtol=1e-6)
    with pytest.raises(ValueError, match="rope sections"):
        rope_tables(positions, frequencies, sections=(2, 2, 1))


def test_constrain_follows_the_mesh():
    x = jnp.zeros((4, 6, 2))
    assert constrain(x, ("batch", "sequence", None)) is x
    mesh = jax.make_mesh((2, 2), ("fsdp", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[:4])  # fmt: skip
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, ("batch", "sequence", None)))(x)
    assert y.sharding.spec == PartitionSpec("fsdp", "sequence")


def test_a_row_alone_is_the_row_in_a_batch():
    x = jax.random.normal(jax.random.key(0), (3, 24))
    kernel_t = jax.random.normal(jax.random.key(1), (10, 24))
    together, alone = (jax.jit(few_rows, static_argnums=2)(rows, kernel_t, "float32") for rows in (x, x[1:2]))
    np.testing.assert_array_equal(alone, together[1:2])
    np.testing.assert_allclose(together, x @ kernel_t.T, rtol=1e-5, atol=1e-5)
