import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import ops
from jaxlab.megafold.config import Kernels
from tests.megafold.parameters import quick_jit
from tests.oracles import af3

B, N, C, S, T, H, D = 2, 7, 8, 5, 3, 2, 4


def normal(rng, *shape):
    return rng.normal(size=shape) * (1.0 if len(shape) != 2 else 0.5)


def norm_weights(rng, channels):
    return 1 + 0.3 * rng.normal(size=channels), 0.3 * rng.normal(size=channels)


def attention_weights(rng, channels, pair_channels):
    shapes = dict.fromkeys(("w_q", "w_k", "w_v", "w_gate"), (channels, H * D))
    shapes |= {"w_bias": (pair_channels, H), "w_out": (H * D, channels), "b_q": (H * D,)}
    return {name: normal(rng, *shape) for name, shape in shapes.items()}


def pair_mask(rng):
    mask = rng.random((B, N, N)) > 0.3
    mask[0, 2] = False  # a row, and a column, without valid keys
    mask[1, :, 3] = False
    return mask


def check(op, oracle, given, *, static=None, mask=None, tolerance=5e-6):
    """Forward against the oracle; the gradient of every argument against the oracle's central differences."""
    static, valid = static or {}, None if mask is None else jnp.asarray(mask)
    rng = np.random.default_rng(9)
    expected = oracle(**given, mask=mask, **static)
    cotangent = rng.normal(size=expected.shape)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)

    @quick_jit
    def both(given):
        out, pull = jax.vjp(lambda given: op(**given, mask=valid, **static), given)
        return out, pull(jnp.asarray(cotangent, out.dtype))[0]

    out, grads = both(narrow)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max(), rtol=0)
    for name, grad in grads.items():
        direction = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), given[name])

        def along(part, name=name):
            return cotangent * oracle(**(given | part), mask=mask, **static)

        numeric = af3.derivative(along, {name: given[name]}, {name: direction})
        pairs = list(zip(jax.tree.leaves(grad), jax.tree.leaves(direction)))
        scale = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g, _ in pairs))
        assert abs(sum((np.asarray(g) * d).sum() for g, d in pairs) - numeric) < 1e-4 * scale + 1e-6, name


@pytest.mark.latest
@pytest.mark.parametrize("node", ["starting", "ending"])
def test_triangle_attention(node):
    rng = np.random.default_rng(0)
    given = {"z": normal(rng, B, N, N, C), "ln_in": norm_weights(rng, C), **attention_weights(rng, C, C)}
    check(ops.triangle_attention, af3.triangle_attention, given, static={"node": node}, mask=pair_mask(rng))


def test_ending_node_is_the_starting_node_transposed():
    rng = np.random.default_rng(1)
    z, mask = jnp.asarray(normal(rng, B, N, N, C), jnp.float32), jnp.asarray(pair_mask(rng))
    weights = jax.tree.map(jnp.float32, attention_weights(rng, C, C)) | {"ln_in": None}

    @quick_jit
    def outputs(z, mask):
        starting = ops.triangle_attention(jnp.swapaxes(z, 1, 2), jnp.swapaxes(mask, 1, 2), **weights)
        return ops.triangle_attention(z, mask, **weights, node="ending"), jnp.swapaxes(starting, 1, 2)

    np.testing.assert_allclose(*outputs(z, mask), atol=1e-6)
    no_mask = quick_jit(lambda z: ops.triangle_attention(z, **weights, node="ending"))(z)
    np.testing.assert_allclose(no_mask, outputs(z, jnp.ones_like(mask))[0], atol=1e-6)


def test_attention_pair_bias():
    rng = np.random.default_rng(2)
    given = {"s": normal(rng, B, T, N, C), "z": normal(rng, B, N, N, 6), **attention_weights(rng, C, 6)}
    given |= {"ln_s": norm_weights(rng, C), "ln_z": norm_weights(rng, 6)}
    mask = rng.random((B, N)) > 0.3
    mask[1] = False
    check(ops.attention_pair_bias, af3.attention_pair_bias, given, mask=mask)
    # Without samples, and with what is normalised already.
    plain = {name: jnp.asarray(value, jnp.float32) for name, value in given.items() if not isinstance(value, tuple)}
    op = quick_jit(lambda s: ops.attention_pair_bias(**plain | {"s": s}, mask=jnp.asarray(mask), ln_s=None, ln_z=None))
    np.testing.assert_allclose(op(plain["s"][:, 0]), op(plain["s"])[:, 0], atol=1e-6)


def test_outer_product_mean():
    rng = np.random.default_rng(3)
    width = 3
    given = {"m": normal(rng, B, S, N, C), "ln_in": norm_weights(rng, C)}
    given |= {"w_a": normal(rng, C, width), "w_b": normal(rng, C, width)}
    given |= {"w_out": normal(rng, width**2, 6), "b_out": normal(rng, 6)}
    mask = rng.random((B, S, N)) > 0.4
    mask[0, :, 1] = False  # a token that no row has: its pairs are the bias
    for chunk in (None, 3):
        check(functools.partial(ops.outer_product_mean, row_chunk=chunk), af3.outer_product_mean, given, mask=mask)
    narrow = jax.tree.map(jnp.float32, given)
    op = quick_jit(lambda mask: ops.outer_product_mean(**narrow, mask=mask))
    np.testing.assert_allclose(op(None), op(jnp.ones(mask.shape, bool)), atol=1e-6)


def test_pair_weighted_averaging():
    rng = np.random.default_rng(4)
    given = {"m": normal(rng, B, S, N, C), "z": normal(rng, B, N, N, 6), "w_bias": normal(rng, 6, H)}
    given |= {"ln_m": norm_weights(rng, C), "ln_z": norm_weights(rng, 6), "w_v": normal(rng, C, H * D)}
    given |= {"w_gate": normal(rng, C, H * D), "w_out": normal(rng, H * D, C)}
    mask = rng.random((B, N)) > 0.3
    mask[0] = False
    check(ops.pair_weighted_averaging, af3.pair_weighted_averaging, given, mask=mask)


def test_adaptive_layer_norm():
    rng = np.random.default_rng(5)
    given = {"x": normal(rng, B, T, N, C), "s": normal(rng, B, 1, N, 6), "scale_s": norm_weights(rng, 6)[0]}
    given |= {"w_gamma": normal(rng, 6, C), "b_gamma": normal(rng, C), "w_beta": normal(rng, 6, C)}

    def without_mask(function):
        return lambda mask, **kwargs: function(**kwargs)

    check(without_mask(ops.adaptive_layer_norm), without_mask(af3.adaptive_layer_norm), given)


@pytest.mark.parametrize(
    ("length", "n_q", "n_k", "edge"),
    [(21, 4, 12, "mask"), (21, 4, 12, "shift"), (7, 4, 12, "shift"), (9, 2, 5, "mask"), (9, 2, 5, "shift")],
)
def test_local_attention(length, n_q, n_k, edge):
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(3, B, T, length, H, D))
    given = {"q": q, "k": k, "v": v, "bias": rng.normal(size=(B, H, -(-length // n_q), n_q, n_k))}
    mask = rng.random((B, length)) > 0.3
    mask[0, : n_q + 1] = False
    mask[1] = length > 10  # no key at all for some
    static = {"n_q": n_q, "n_k": n_k, "edge": edge}
    check(ops.local_attention, af3.local_attention, given, static=static, mask=mask)
    narrow = {name: jnp.asarray(x[:, 0] if name != "bias" else x, jnp.float32) for name, x in given.items()}
    one = quick_jit(lambda given: ops.local_attention(**given, **static))(narrow | {"bias": None})
    expected = af3.local_attention(q[:, :1], k[:, :1], v[:, :1], None, np.ones_like(mask), **static)
    np.testing.assert_allclose(one, expected[:, 0], atol=2e-6)


@pytest.mark.parametrize("edge", ["mask", "shift"])
def test_atom_windows_at_the_papers_sizes(edge):
    length = 300
    windows = np.asarray(ops.atom_windows(jnp.arange(1, length + 1)[None], axis=1, edge=edge))[0] - 1
    assert windows.shape == (10, 128)
    for block, places in enumerate(windows):
        expected = np.array(af3.window(length, block, 32, 128, edge))
        np.testing.assert_array_equal(places, np.where((expected >= 0) & (expected < length), expected, -1))
    assert windows[4][0] == 32 * 4 - 48
    assert windows[4][-1] == 32 * 4 + 79


def test_relative_position_by_hand():
    # Chains 0 and 1 are copies of one sequence, chain 2 is another; the last two tokens are atoms of one residue.
    asym, entity, sym = [0, 0, 1, 2, 2], [0, 0, 0, 1, 1], [0, 0, 1, 0, 0]
    residue, token = [1, 60, 1, 5, 5], [0, 1, 2, 3, 4]
    ids = [jnp.array(x, jnp.int32) for x in (asym, residue, entity, sym, token)]
    out = np.asarray(ops.relative_position(*ids))
    assert out.shape == (5, 5, 139)
    assert out.dtype == np.float32

    def bits(i, j):
        return list(np.flatnonzero(out[i, j]))

    same = 132  # the bit of the entity; 133 .. 138 are the copies' offsets -2 .. 2 and "other entity"
    assert bits(0, 0) == [32, 66 + 32, same, 133 + 2]
    assert bits(0, 1) == [0, 66 + 65, same, 133 + 2]  # -59 residues, clipped; the tokens are of other residues
    assert bits(1, 0) == [64, 66 + 65, same, 133 + 2]
    assert bits(0, 2) == [65, 66 + 65, same, 133 + 1]  # other chain of the same entity: the copies' offset, -1
    assert bits(2, 0) == [65, 66 + 65, same, 133 + 3]
    assert bits(0, 3) == [65, 66 + 65, 133 + 5]  # another entity, although both are copy 0
    assert bits(3, 4) == [32, 66 + 31, same, 133 + 2]
    assert bits(4, 3) == [32, 66 + 33, same, 133 + 2]


def test_relative_position():
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 3, (5, B, 20)).astype(np.int32)
    ids[[1, 4]] = rng.integers(0, 100, (2, B, 20))
    ids[1, :, 1] = ids[1, :, 0]
    out = ops.relative_position(*map(jnp.asarray, ids), r_max=7, s_max=1)
    expected = np.stack([af3.relative_position(*ids[:, b], r_max=7, s_max=1) for b in range(B)])
    np.testing.assert_array_equal(out, expected)


def test_bfloat16_is_near_float32():
    rng = np.random.default_rng(8)
    weights = jax.tree.map(jnp.float32, attention_weights(rng, C, C) | {"ln_in": norm_weights(rng, C)})
    z = jnp.asarray(normal(rng, B, N, N, C), jnp.bfloat16)
    op = quick_jit(lambda z: ops.triangle_attention(z, **weights))
    assert op(z).dtype == jnp.bfloat16
    np.testing.assert_allclose(op(z).astype(np.float32), op(z.astype(np.float32)), rtol=2e-2, atol=4e-2)


def test_kernels_agree():
    rng = np.random.default_rng(10)
    weights = jax.tree.map(jnp.float32, attention_weights(rng, C, C) | {"ln_in": norm_weights(rng, C)})
    z, mask = jnp.asarray(normal(rng, B, N, N, C), jnp.float32), jnp.asarray(pair_mask(rng))

    @functools.partial(quick_jit, static_argnums=0)
    def op(kernels):
        return ops.triangle_attention(z, mask, **weights, implementation=kernels)

    for kernels in ("xla", Kernels(evo_attention="xla", layernorm_linear="reference")):
        np.testing.assert_allclose(op(kernels), op("reference"), atol=2e-6)


def zeros(*shape):
    return jnp.zeros(shape)


PAIRS = {
    "z": zeros(1, 4, 4, 8),
    "mask": None,
    "ln_in": None,
    **dict.fromkeys(("w_q", "w_k", "w_v", "w_gate", "w_out"), zeros(8, 8)),
    "w_bias": zeros(8, 2),
}
SINGLE = {**PAIRS, "s": zeros(1, 4, 8), "ln_s": None, "ln_z": None}
del SINGLE["ln_in"]
OUTER = {"m": zeros(1, 3, 4, 8), "ln_in": None, "w_a": zeros(8, 2), "w_b": zeros(8, 2), "w_out": zeros(4, 8)}
OUTER |= {"b_out": zeros(8)}
AVERAGE = {"m": zeros(1, 3, 4, 8), "z": zeros(1, 4, 4, 8), "ln_m": None, "ln_z": None, "w_bias": zeros(8, 2)}
AVERAGE |= dict.fromkeys(("w_v", "w_gate", "w_out"), zeros(8, 8))
LOCAL = dict.fromkeys("qkv", zeros(1, 40, 2, 4))
ADAPTIVE = {"x": zeros(1, 4, 8), "s": zeros(1, 4, 6), "scale_s": zeros(6), "b_gamma": zeros(8)}
ADAPTIVE |= dict.fromkeys(("w_gamma", "w_beta"), zeros(6, 8))
IDS = dict.fromkeys(("asym_id", "residue_index", "entity_id", "sym_id", "token_index"), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("op", "good", "bad", "error", "words"),
    [
        (ops.triangle_attention, PAIRS, {"node": "middle"}, ValueError, "node.*starting.*'middle'"),
        (ops.triangle_attention, PAIRS, {"z": zeros(1, 4, 5, 8)}, ValueError, r"z: .*\(1, 4, 5, 8\)"),
        (ops.triangle_attention, PAIRS, {"mask": jnp.ones((1, 4), bool)}, ValueError, r"mask: .*\(1, 4, 4\).*\(1, 4\)"),
        (ops.triangle_attention, PAIRS, {"mask": jnp.ones((1, 4, 4))}, TypeError, "mask: expected booleans.*float32"),
        (ops.triangle_attention, PAIRS, {"w_bias": zeros(8, 3)}, ValueError, r"w_q: .*3 heads.*\(8, 8\)"),
        (ops.triangle_attention, PAIRS, {"w_v": zeros(8, 6)}, ValueError, r"w_v: .*\[8, 8\].*\(8, 6\)"),
        (ops.triangle_attention, PAIRS, {"w_out": zeros(8, 6)}, ValueError, r"w_out: .*\[8, 8\].*\(8, 6\)"),
        (ops.triangle_attention, PAIRS, {"implementation": "cuda"}, ValueError, "evo_attention.*'cuda'"),
        (ops.attention_pair_bias, SINGLE, {"s": zeros(4, 8)}, ValueError, r"s: .*\(4, 8\)"),
        (ops.attention_pair_bias, SINGLE, {"z": zeros(1, 5, 5, 8)}, ValueError, r"z: .*\(1, 5, 5, 8\)"),
        (ops.attention_pair_bias, SINGLE, {"mask": jnp.ones((1, 5), bool)}, ValueError, r"mask: .*\(1, 5\)"),
        (ops.attention_pair_bias, SINGLE, {"w_bias": zeros(6, 2)}, ValueError, r"w_bias: .*\[8, any\].*\(6, 2\)"),
        (ops.outer_product_mean, OUTER, {"m": zeros(3, 4, 8)}, ValueError, r"m: .*\(3, 4, 8\)"),
        (ops.outer_product_mean, OUTER, {"w_b": zeros(8, 3)}, ValueError, r"w_b: .*\[8, 2\].*\(8, 3\)"),
        (ops.outer_product_mean, OUTER, {"w_out": zeros(2, 8)}, ValueError, r"w_out: .*\[4, any\].*\(2, 8\)"),
        (ops.outer_product_mean, OUTER, {"mask": jnp.ones((1, 3, 4), int)}, TypeError, "mask: .*int32"),
        (ops.outer_product_mean, OUTER, {"row_chunk": 0}, ValueError, "row_chunk: .*0"),
        (ops.pair_weighted_averaging, AVERAGE, {"m": zeros(3, 4, 8)}, ValueError, r"m: .*\(3, 4, 8\)"),
        (ops.pair_weighted_averaging, AVERAGE, {"z": zeros(1, 3, 3, 8)}, ValueError, r"z: .*\(1, 3, 3, 8\)"),
        (ops.pair_weighted_averaging, AVERAGE, {"w_bias": zeros(8, 3)}, ValueError, "w_v: .*3 heads"),
        (ops.pair_weighted_averaging, AVERAGE, {"w_gate": zeros(8, 4)}, ValueError, r"w_gate: .*\[8, 8\].*\(8, 4\)"),
        (ops.adaptive_layer_norm, ADAPTIVE, {"w_beta": zeros(6, 7)}, ValueError, r"w_beta: .*\[6, 8\].*\(6, 7\)"),
        (ops.local_attention, LOCAL, {"edge": "wrap"}, ValueError, "edge: .*mask.*'wrap'"),
        (ops.local_attention, LOCAL, {"q": zeros(40, 2, 4)}, ValueError, r"q: .*\(40, 2, 4\)"),
        (ops.local_attention, LOCAL, {"k": zeros(1, 41, 2, 4)}, ValueError, r"k: .*\(1, 40, 2, 4\).*\(1, 41, 2, 4\)"),
        (ops.local_attention, LOCAL, {"bias": zeros(1, 2, 2, 32, 96)}, ValueError, "bias: .*128.*96"),
        (ops.local_attention, LOCAL, {"mask": jnp.ones((1, 41), bool)}, ValueError, r"mask: .*\(1, 40\).*\(1, 41\)"),
        (ops.local_attention, LOCAL, {"n_q": 0}, ValueError, "n_q, n_k: .*0, 128"),
        (ops.local_attention, LOCAL, {"n_k": 16}, ValueError, "n_q, n_k: .*32, 16"),
        (ops.local_attention, dict.fromkeys("qkv", zeros(1, 0, 2, 4)), {}, ValueError, "at least one atom"),
        (ops.relative_position, IDS, {"sym_id": jnp.zeros((1, 5), jnp.int32)}, ValueError, r"sym_id: .*\(1, 5\)"),
        (ops.relative_position, IDS, {"r_max": -1}, ValueError, "r_max, s_max: .*-1"),
    ],
)
def test_bad_inputs(op, good, bad, error, words):
    with pytest.raises(error, match=words):
        op(**good | bad)
