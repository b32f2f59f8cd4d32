import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.puzzlemoe import dequantize_pair, dual_mask_merge, quantize_pair, reconstruct


def merged(shape, seed=0):
    rng = np.random.default_rng(seed)
    w_i, w_j = (0.02 * rng.normal(size=shape) * (rng.uniform(size=shape) > 0.05) for _ in range(2))
    return dual_mask_merge(jnp.asarray(w_i, jnp.bfloat16), jnp.asarray(w_j, jnp.bfloat16))


@pytest.mark.parametrize(("shape", "bits", "group"), [((256, 40), 3, 128), ((37, 11), 4, 16)])
def test_error_is_half_a_step(shape, bits, group):
    pair = merged(shape)
    q = quantize_pair(pair, bits=bits, group_size=group)
    mag = np.asarray(pair.mag, float)
    step = np.empty(shape)
    for start in range(0, shape[0], group):
        step[start : start + group] = mag[start : start + group].max(0) / (2**bits - 1)
    for pos, mask in enumerate((pair.mask_i, pair.mask_j)):
        got = np.asarray(dequantize_pair(q, pos), float)
        want = np.asarray(reconstruct(pair, pos), float)
        assert dequantize_pair(q, pos).dtype == jnp.bfloat16
        # Half a step, and the roundings of scale and product to bfloat16.
        assert (np.abs(got - want) <= step * (0.5 + 2.0**bits / 256) + np.abs(want) / 128).all()
        assert (got[~np.asarray(mask)] == 0).all()
        assert (got * want >= 0).all()


@pytest.mark.latest
def test_bits_per_weight():
    """(2 signs + 1.6 mask + 3 + 16/128) / 2 = 3.3625 bits for each of the pair's weights."""
    q = quantize_pair(merged((1280, 64)))
    assert 8 * q.nbytes / (2 * 1280 * 64) == pytest.approx(3.3625)
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))


def test_exact_levels_come_back():
    """Magnitudes that are levels lose nothing: masks, signs and order of the bits."""
    rng = np.random.default_rng(1)
    level = rng.integers(0, 8, (16, 8))
    level[0] = 7
    pair = merged((16, 8)).replace(mag=jnp.asarray(level / 64, jnp.bfloat16))
    q = quantize_pair(pair)
    for pos in (0, 1):
        np.testing.assert_array_equal(dequantize_pair(q, pos), reconstruct(pair, pos))


def test_axis_is_the_input_axis():
    pair = merged((16, 8))
    turned = quantize_pair(jax.tree.map(jnp.transpose, pair), group_size=8, axis=-1)
    straight = quantize_pair(pair, group_size=8)
    np.testing.assert_array_equal(dequantize_pair(turned, 1).T, dequantize_pair(straight, 1))


def test_positions_that_nobody_uses_are_zero():
    pair = merged((16, 8))
    unused = pair.replace(mask_i=pair.mask_i.at[0].set(False), mask_j=pair.mask_j.at[0].set(False))
    q = quantize_pair(unused)
    for pos in (0, 1):
        assert not dequantize_pair(q, pos)[0].any()
    nothing = quantize_pair(pair.replace(mag=jnp.zeros_like(pair.mag)))
    assert not dequantize_pair(nothing, 0).any()


def test_under_jit_and_vmap():
    pairs = [merged((16, 8), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    got = jax.jit(jax.vmap(lambda pair, pos: dequantize_pair(quantize_pair(pair), pos)))(stacked, jnp.array([0, 1, 0]))
    for p, (pair, pos) in enumerate(zip(pairs, (0, 1, 0))):
        np.testing.assert_array_equal(got[p], dequantize_pair(quantize_pair(pair), pos))


def test_wrong_arguments():
    pair = merged((8, 8))
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits must be in 1..8, got {bits}"):
            quantize_pair(pair, bits=bits)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        quantize_pair(pair, group_size=0)
    with pytest.raises(ValueError, match="axis 2"):
        quantize_pair(pair, axis=2)
    with pytest.raises(ValueError, match="pos must be 0 or 1, got 2"):
        dequantize_pair(quantize_pair(pair), 2)
