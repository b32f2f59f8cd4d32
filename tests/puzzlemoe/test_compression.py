import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.core import make_mesh
from jaxlab.puzzlemoe import PuzzleConfig, compress_experts, dual_mask_merge, expert_norms, pack_pair, unpack
from jaxlab.puzzlemoe.compression import _merge_slots, compress_layer, unpack_experts
from tests.puzzlemoe.conftest import N

PAIRS = np.array([[4, 1], [0, 5]], np.int32)  # 2 and 3 stay
MATRICES = ("gate", "up", "down")


@pytest.fixture(scope="module")
def half(layer):
    """Gate, up and down in bfloat16."""
    return [getattr(layer, name).astype(jnp.bfloat16) for name in MATRICES]


def decoded(packed, name, expert):
    slot, pos = int(packed.slot_of[expert]), int(packed.pos_of[expert])
    words, dense = getattr(packed, name), getattr(packed, f"dense_{name}")
    return unpack(words[slot], pos) if slot < len(words) else dense[slot - len(words)]


@pytest.mark.parametrize(("norm", "unmerged"), [("sum", "bf16"), ("tokens", "packed")])
def test_words_and_slots(half, stats, norm, unmerged):
    cfg = PuzzleConfig(norm=norm, unmerged=unmerged, underflow="nearest", tau=0.3)
    packed = compress_experts(*half, stats, PAIRS, cfg)
    assert packed.slot_of.tolist() == [1, 0, 2, 3, 0, 1]
    assert packed.pos_of.tolist() == [0, 1, 0, 0, 0, 1]
    n_in, n_mid = expert_norms(stats, norm)
    for name, w in zip(MATRICES, half):
        norms = n_mid if name == "down" else n_in
        words, dense = getattr(packed, name), getattr(packed, f"dense_{name}")
        assert words.dtype == jnp.uint16
        assert words.shape == ((2 if unmerged == "bf16" else 4), *w.shape[1:])
        for p, (i, j) in enumerate(PAIRS):
            expected = pack_pair(dual_mask_merge(w[i], w[j], norms[i], norms[j], tau=0.3), underflow="nearest")
            np.testing.assert_array_equal(words[p], expected)
        assert (dense is None) == (unmerged == "packed")
        for expert in (2, 3):
            kept = np.asarray(decoded(packed, name, expert), float)
            small = np.abs(np.asarray(w[expert], float)) < 2.0**-15
            np.testing.assert_array_equal(kept[~small], np.asarray(w[expert], float)[~small])
            assert (unmerged == "packed") or (kept == np.asarray(w[expert], float)).all()
    for name, every in zip(MATRICES, unpack_experts(packed)):
        for expert in range(N):
            np.testing.assert_array_equal(every[expert], decoded(packed, name, expert))


def test_all_paired_and_odd_counts(half):
    full = compress_experts(*half, None, np.arange(N).reshape(-1, 2), PuzzleConfig())
    assert full.dense_gate is None
    bytes_ = sum(leaf.nbytes for leaf in (full.gate, full.up, full.down))
    assert bytes_ == sum(w.nbytes for w in half) / 2
    odd = compress_experts(*(w[:5] for w in half), None, np.array([[4, 0], [2, 1]]), PuzzleConfig())
    assert odd.slot_of.tolist() == [0, 1, 1, 2, 0]
    np.testing.assert_array_equal(odd.dense_down[0], half[2][3])


def test_other_dtypes_and_host_arrays(half):
    wide = [np.asarray(w.astype(jnp.float16)) for w in half]
    got = compress_experts(*wide, None, PAIRS, PuzzleConfig())
    want = compress_experts(*(jnp.asarray(w) for w in wide), None, PAIRS, PuzzleConfig())
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.latest
def test_figures(half):
    """Of Gaussians with sigma 0.3, merged by magnitude."""
    packed, report = compress_layer(*half, None, PAIRS, PuzzleConfig())
    for index, (name, w) in enumerate(zip(MATRICES, half)):
        members = [(np.asarray(w[e], float), np.asarray(decoded(packed, name, e), float)) for e in PAIRS.reshape(-1)]
        wrong = sum(((new - old) ** 2).sum() for old, new in members) / sum((old**2).sum() for old, _ in members)
        assert report.rel_mse[index] == pytest.approx(wrong, rel=1e-4)
        used = np.mean([new != 0 for _, new in members])
        assert report.mask_density[index] == pytest.approx(used)
        assert report.sim_fraction[index] == pytest.approx(2 * used - 1)
        raw = np.abs(np.concatenate([old for old, _ in members]))
        assert report.exponent_coverage[index] == pytest.approx(np.mean((raw >= 2.0**-15) & (raw < 2.0**17)))
    assert report.warnings == ()
    assert (report.underflow == 0).all()


def test_starved_experts_go_by_magnitude(half, stats):
    loud = dataclasses.replace(
        stats, sum_sq_in=stats.sum_sq_in.at[4].mul(100), sum_sq_mid=stats.sum_sq_mid.at[4].mul(100)
    )
    starved = dataclasses.replace(loud, tokens=stats.tokens.at[1].set(0))
    with pytest.warns(UserWarning, match=r"experts \[1\] saw fewer than 1 .* pairs \[\[4, 1\]\] are merged by magnit"):
        packed = compress_experts(*half, starved, PAIRS, PuzzleConfig())
    plain = compress_experts(*half, None, PAIRS, PuzzleConfig())
    usual = compress_experts(*half, loud, PAIRS, PuzzleConfig())
    for name in MATRICES:
        words, expected, other = (np.asarray(getattr(p, name)) for p in (packed, plain, usual))
        np.testing.assert_array_equal(words[0], expected[0])
        np.testing.assert_array_equal(words[1], other[1])
        assert (words[0] != other[0]).any()
    _, report = compress_layer(*half, starved, PAIRS, PuzzleConfig(), layer=7)
    assert report.warnings[0].startswith("layer 7: experts [1]")
    # An unmerged expert may see nothing, and by magnitude nobody needs tokens.
    alone = dataclasses.replace(stats, tokens=stats.tokens.at[2].set(0))
    assert compress_layer(*half, alone, PAIRS, PuzzleConfig())[1].warnings == ()
    assert compress_layer(*half, starved, PAIRS, PuzzleConfig(norm="magnitude"))[1].warnings == ()


def test_underflow_warns(half):
    tiny = [w * 2.0**-15 for w in half]
    with pytest.warns(UserWarning, match=r"below 2\^-15"):
        compress_experts(*tiny, None, PAIRS, PuzzleConfig())


def test_weights_that_cannot_be_packed(half):
    gate, up, down = half
    with pytest.raises(
        ValueError, match=r"layer 3: up: weights must be finite, got 2 that are not, by expert \{5: 2\}"
    ):
        compress_layer(gate, up.at[5, 0, :2].set(jnp.nan), down, None, PAIRS, PuzzleConfig(), layer=3)
    with pytest.raises(ValueError, match=r"down: weights must be finite, got 1 .* expert \{3: 1\}"):
        compress_experts(gate, up, down.at[3, 0, 0].set(jnp.inf), None, PAIRS, PuzzleConfig())
    huge = gate.at[4, 0, 0].set(2.0**17).at[3, 0, 0].set(2.0**18)
    with pytest.raises(ValueError, match=r"gate: packed magnitudes must be below 2\^17 .* got 1 .* \{\(1, 4\): 1\}"):
        compress_experts(huge, up, down, None, PAIRS, PuzzleConfig())
    with pytest.raises(ValueError, match=r"got 2 .* \{\(1, 4\): 1, \(3,\): 1\}"):
        compress_experts(huge, up, down, None, PAIRS, PuzzleConfig(unmerged="packed"))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments(half, stats):
    gate, up, down = half
    cfg = PuzzleConfig()
    with pytest.raises(ValueError, match="expected gate and up"):
        compress_experts(gate, up[..., 1:], down, None, PAIRS, cfg)
    with pytest.raises(ValueError, match="expected gate and up"):
        compress_experts(gate, up, gate, None, PAIRS, cfg)
    with pytest.raises(TypeError, match="down must be floating"):
        compress_experts(gate, up, down.astype(jnp.int8), None, PAIRS, cfg)
    with pytest.raises(ValueError, match="pairs"):
        compress_experts(gate, up, down, None, np.array([[0, 6]]), cfg)
    stacked = jax.tree.map(lambda leaf: leaf[None], stats)
    with pytest.raises(ValueError, match="statistics of another model"):
        compress_experts(gate, up, down, stacked, PAIRS, cfg)
    for bad in (-1.0, math.nan):
        wrong = dataclasses.replace(stats, sum_sq_mid=stats.sum_sq_mid.at[2, 1].set(bad))
        with pytest.raises(ValueError, match=r"sum_sq_mid must be finite and not negative, got 1 in experts \[2\]"):
            compress_experts(gate, up, down, wrong, PAIRS, cfg)


def test_sharded_weights(half):
    """Any sharding of rows or columns commutes with packing."""
    mesh = make_mesh({"tensor": 8})
    places = (P(None, None, "tensor"), P(None, None, "tensor"), P(None, "tensor", None))
    sharded = [jax.device_put(w, NamedSharding(mesh, place)) for w, place in zip(half, places)]
    got = compress_experts(*sharded, None, PAIRS, PuzzleConfig())
    assert got.gate.sharding.spec == places[0]
    jax.tree.map(np.testing.assert_array_equal, got, compress_experts(*half, None, PAIRS, PuzzleConfig()))


def test_pairs_stream():
    """Beside weights and words there are a few blocks, no copy of a matrix."""
    shape = (8, 1024, 2048)
    lowered = _merge_slots.lower(
        jax.ShapeDtypeStruct(shape, jnp.uint16),
        jax.ShapeDtypeStruct((4, 2, shape[1]), jnp.float32),
        jax.ShapeDtypeStruct((4, 2), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
        dtype=jnp.dtype(jnp.bfloat16),
        num_pairs=4,
        underflow="clamp",
    )
    one_matrix = math.prod(shape) * 2
    assert lowered.compile().memory_analysis().temp_size_in_bytes < one_matrix / 2
