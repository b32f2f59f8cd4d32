"""evo_attention against a float64 oracle: values, every gradient, masks, dtypes, transformations, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.evo_attention import evo_attention
from pallas_kernels.evo_attention.reference import Options
from pallas_kernels.evo_attention.triton_tiles import Problem
from pallas_kernels.flash_attention.triton_tiles import Tiles
from tests.oracles.evo_attention import evo_attention as oracle
from tests.oracles.evo_attention import gradients as oracle_gradients

# Shapes are [B,S,N,H,D]. Tiles are of 16, so that there are several, the last one ragged.
CASES = {
    "rows": {"shape": (2, 3, 23, 2, 8)},
    "whole-tiles": {"shape": (1, 2, 32, 2, 16), "mask": "bool"},
    "many-rows": {"shape": (1, 17, 9, 2, 4), "mask": "bool"},
    "single": {"shape": (2, 1, 23, 3, 24), "mask": "float"},
    "float-mask": {"shape": (1, 3, 20, 2, 6), "mask": "float", "scale": 0.3},
    "shared-mask": {"shape": (2, 3, 20, 1, 8), "mask": "shared"},
    "large-mask": {"shape": (1, 3, 18, 1, 8), "mask": "large"},
    "no-bias": {"shape": (1, 2, 23, 2, 8), "mask": "bool", "bias": False},
    "one": {"shape": (1, 1, 1, 1, 1)},
}


def _case(name, dtype=np.float32, bias_dtype=None):
    """q, k, v, mask, bias, cotangents of output and log-sum-exp, and the scale."""
    case = {"mask": None, "bias": True, "scale": None} | CASES[name]
    batch, rows, length, heads, _ = case["shape"]
    rng = np.random.default_rng(1)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=case["shape"]), dtype) for _ in range(4))
    bias = jnp.asarray(rng.normal(size=(batch, 1, heads, length, length)), bias_dtype or dtype)
    d_lse = jnp.asarray(rng.normal(size=(batch, rows, heads, length)), jnp.float32)
    full = (batch, rows, 1, 1, length)
    mask = {
        None: lambda: None,
        "bool": lambda: jnp.asarray(rng.random(full) > 0.4).at[0, rows - 1].set(False),
        "float": lambda: jnp.asarray(rng.normal(size=full), jnp.float32),
        "shared": lambda: jnp.asarray(rng.normal(size=(1, 1, 1, 1, length)), jnp.float32),
        # As peers mask: a row that is hidden as a whole is the mean of all values.
        "large": lambda: jnp.where(jnp.asarray(rng.random(full) > 0.4).at[0, rows - 1].set(False), 0.0, -1e9),
    }[case["mask"]]()
    return (q, k, v, mask, bias if case["bias"] else None), (d_out, d_lse), case["scale"]


@functools.partial(jax.jit, static_argnames=("static",))
def _run(arrays, cotangents, static):
    static = dict(static)
    if "triton" in static.values() or "interpret" in static.values():
        static |= {"block_q": 16, "block_k": 16}

    def attend(*arrays):
        out, lse = evo_attention(*arrays, return_lse=True, **static)
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    value, pull = jax.vjp(attend, *arrays)
    return *value, *pull(cotangents)


def _expected(arrays, cotangents, scale):
    exact = [None if x is None or x.dtype == bool else np.asarray(x, np.float64) for x in arrays]
    exact[3] = arrays[3] if exact[3] is None else exact[3]
    d_out, d_lse = (np.asarray(x, np.float64) for x in cotangents)
    out, lse = oracle(*exact, scale=scale)
    *rest, d_mask, d_bias = oracle_gradients(*exact, d_out, scale=scale, d_lse=d_lse)
    if arrays[3] is not None and arrays[3].dtype != bool and arrays[3].shape != d_mask.shape:
        d_mask = d_mask.sum((0, 1), keepdims=True)
    hidden = arrays[3] is None or arrays[3].dtype == bool
    return (out, np.where(lse == -np.inf, 0.0, lse), *rest, None if hidden else d_mask, d_bias)


def _compare(name, implementation, dtype=np.float32, tolerances=(5e-6, 5e-5), bias_dtype=None, **more):
    arrays, cotangents, scale = _case(name, dtype, bias_dtype)
    static = tuple({"implementation": implementation, "scale": scale, **more}.items())
    results = _run(arrays, cotangents, static)
    expected = _expected(arrays, cotangents, scale)
    names = ("out", "lse", "dq", "dk", "dv", "d_mask", "d_bias")
    dtypes = (dtype, np.float32, dtype, dtype, dtype, np.float32, bias_dtype or dtype)
    for what, got, want, own in zip(names, results, expected, dtypes, strict=True):
        if want is None or (what == "d_bias" and arrays[4] is None):
            continue
        assert got.dtype == own, what
        tolerance = tolerances[what not in ("out", "lse")]
        error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want), initial=1.0)
        assert error < tolerance, (name, what, error)
    return results


@pytest.mark.parametrize("name", ["large-mask", "many-rows"])
def test_reference(name):
    _compare(name, "reference")


@pytest.mark.parametrize("name", CASES)
def test_xla(name):
    _compare(name, "xla")


@pytest.mark.parametrize("name", ["rows", "whole-tiles", "many-rows", "single", "shared-mask"])
def test_interpreted_kernels(name):
    _compare(name, "interpret")


@pytest.mark.latest
@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_bfloat16_with_float32_bias(implementation):
    """Masked and ragged; the gradient of the bias is float32."""
    tolerances = (2e-2, 2e-2)
    _compare("many-rows", implementation, jnp.bfloat16, tolerances, bias_dtype=jnp.float32)


def test_64_bit_types():
    """Doubles on a CPU; and indices within the kernels stay what they are."""
    with jax.enable_x64(True):
        arrays, cotangents, _ = _case("shared-mask", np.float64)
        arrays = (*arrays[:3], arrays[3].astype(np.float64), arrays[4])
        cotangents = tuple(x.astype(np.float64) for x in cotangents)
        results = _run(arrays, cotangents, (("implementation", None),))
        for got, want in zip(results, _expected(arrays, cotangents, None), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)
        _compare("single", "interpret")


def test_the_reference_in_a_sequence():
    """Then without JAX's own differentiation, but to the same result."""
    own, other = (_compare("float-mask", names) for names in (("reference",), "reference"))
    for a, b in zip(own, other):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_of_rows(chunk):
    """Any number of them at once, divisor or not."""
    _compare("many-rows", "xla", row_chunk=chunk)


def test_chunks_of_heads(monkeypatch):
    """Where the logits of one row are too many for a chunk, its heads are divided."""
    from pallas_kernels.evo_attention import xla

    monkeypatch.setattr(xla, "_BYTES", 4 * 23 * 23 * 2)
    _run.clear_cache()
    _compare("single", "xla")
    _compare("rows", "xla")
    _run.clear_cache()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_rows_without_valid_keys(implementation):
    """They give zeros, take no gradient and give none, whatever lies there; masked keys have no part in the others."""
    (q, k, v, mask, bias), cotangents, _ = _case("many-rows")
    static = (("implementation", implementation),)
    base = _run((q, k, v, mask, bias), cotangents, static)
    hidden = ~jnp.swapaxes(mask, 2, 4)[..., 0, :, None]
    k, v = jnp.where(hidden, 1e4, k), jnp.where(hidden, -1e4, v)
    out, _, dq, dk, dv, _, d_bias = _run((q, k, v, mask, bias), cotangents, static)
    assert not any(np.asarray(x[0, -1]).any() for x in (out, dq, dk, dv))
    assert not any(np.asarray(jnp.where(hidden, x, 0)).any() for x in (dk, dv))
    np.testing.assert_allclose(out, base[0], atol=1e-6)
    np.testing.assert_allclose(d_bias, base[-1], atol=1e-5)
    _, lse = evo_attention(q, k, v, mask, bias, return_lse=True, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(lse[0, -1]), -np.inf)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_same_bits_every_time(implementation):
    """No order of summation is left to chance."""
    arrays, cotangents, _ = _case("many-rows")
    first, second = (_run(arrays, cotangents, (("implementation", implementation),)) for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_only_gradients_that_are_wanted():
    """The sum for the bias is a kernel of its own: not run for a constant bias, nor for a single row."""

    def kernels(name, wanted):
        (q, k, v, mask, bias), *_ = _case(name)

        def loss(q, mask, bias):
            return jnp.sum(evo_attention(q, k, v, mask, bias, implementation="interpret"))

        text = str(jax.make_jaxpr(jax.grad(loss, argnums=wanted))(q, mask, bias))
        return text.count("name=evo_attention_dbias"), text.count("name=evo_attention_d")

    assert kernels("float-mask", (0, 1, 2)) == (1, 3)
    assert kernels("float-mask", (0, 1)) == (0, 2)
    assert kernels("single", (0, 1, 2)) == (0, 2)


@pytest.mark.parametrize(
    ("length", "tile"), [(384, 128), (320, 64), (341, 128), (190, 64), (48, 64), (23, 32), (3, 16)]
)
def test_tiles_that_fit(length, tile):
    """Large ones, unless that would mean an eighth more work."""
    q = jnp.zeros((1, 1, length, 1, 24), jnp.bfloat16)
    problem = Problem.of(q, Options(1.0), {(2, 32): Tiles(128, 128)})
    assert (problem.tiles.rows, problem.tiles.columns) == (tile, tile)
    named = Problem.of(q, Options(1.0, block_q=32, block_k=16), {(2, 32): Tiles(128, 128)})
    assert (named.tiles.rows, named.tiles.columns) == (32, 16)


@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 4), (1, 0, 3, 2, 4), (1, 2, 3, 0, 4)])
def test_empty(shape):
    q, bias = jnp.ones(shape), jnp.ones((shape[0], 1, shape[3], 3, 3))
    (out, lse), pull = jax.vjp(lambda q, bias: evo_attention(q, q, q, None, bias, return_lse=True), q, bias)
    dq, d_bias = pull((out, lse))
    assert (out.shape, lse.shape, dq.shape) == (q.shape, (*shape[:2], shape[3], 3), q.shape)
    assert not np.asarray(d_bias).any()


def test_vmap_and_remat():
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(2, 1, 3, 6, 2, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(2, 1, 1, 2, 6, 6)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, 3, 1, 1, 6)) > 0.3)

    def gradients(implementation):
        @jax.checkpoint
        def loss(q, bias, mask):
            return (evo_attention(q, q, q, mask, bias, implementation=implementation) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))

    batched = [jax.jit(jax.vmap(gradients(name)))(q, bias, mask) for name in (None, "interpret")]
    each = jax.jit(gradients(None))
    singles = [each(q[i], bias[i], mask[i]) for i in range(2)]
    for found in batched:
        wanted = jax.tree.map(lambda *x: jnp.stack(x), *singles)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.latest
def test_inside_shard_map():
    """Rows over four devices under one bias, whose gradient is summed over them."""
    mesh = jax.make_mesh((4,), ("pair",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 8, 8, 2, 4)), jnp.float32) for _ in range(3))
    bias = jnp.asarray(rng.normal(size=(1, 1, 2, 8, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((1, 1, 1, 1, 8)) > 0.3)
    rows = PartitionSpec(None, "pair")

    def local(q, k, v, mask, bias):
        return evo_attention(q, k, v, mask, bias)

    def gradients(attend):
        loss = jax.grad(lambda q, k, v, bias: jnp.sum(attend(q, k, v, mask, bias) ** 2), argnums=(0, 1, 2, 3))
        return jax.jit(loss)(q, k, v, bias)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows, PartitionSpec(), PartitionSpec()), out_specs=rows
    )
    for got, want in zip(gradients(sharded), gradients(local)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_wrong_arguments(unchecked):
    q, bias = jnp.zeros((2, 3, 5, 4, 8)), jnp.zeros((2, 1, 4, 5, 5))
    mask, ids = jnp.ones((2, 3, 1, 1, 5), bool), jnp.ones((2, 3, 1, 1, 5), jnp.int32)
    half = q.astype(jnp.bfloat16)
    wrong = [
        (ValueError, r"q: expected 5 axes.*\(3, 5, 4, 8\)", lambda: evo_attention(q[0], q[0], q[0])),
        (ValueError, "k: expected the shape of q", lambda: evo_attention(q, q[:, :, :4], q)),
        (ValueError, "v: expected the shape of q", lambda: evo_attention(q, q, q[..., :4])),
        (ValueError, "length and a head_dim of at least 1", lambda: evo_attention(*[q[:, :, :0]] * 3)),
        (ValueError, "length and a head_dim of at least 1", lambda: evo_attention(*[q[..., :0]] * 3)),
        (ValueError, r"pair_bias: .*\(2, 3, 4, 5, 5\)", lambda: evo_attention(q, q, q, None, jnp.repeat(bias, 3, 1))),
        (ValueError, r"pair_bias: .*\(2, 4, 5, 5\)", lambda: evo_attention(q, q, q, None, bias[:, 0])),
        (ValueError, "pair_bias: expected shape", lambda: evo_attention(q, q, q, None, bias[:1])),
        (ValueError, "mask: expected a shape", lambda: evo_attention(q, q, q, mask[:, :2])),
        (ValueError, "mask: expected a shape", lambda: evo_attention(q, q, q, mask[:, :, 0])),
        (ValueError, "mask: expected a shape", lambda: evo_attention(q, q, q, jnp.repeat(mask, 5, 3))),
        (ValueError, "unknown implementation 'cudnn'", lambda: evo_attention(q, q, q, implementation="cudnn")),
        (ValueError, "block_q: expected a power of two", lambda: evo_attention(q, q, q, block_q=48)),
        (ValueError, "block_k: expected a power of two", lambda: evo_attention(q, q, q, block_k=8)),
        (ValueError, "row_chunk: expected at least 1", lambda: evo_attention(q, q, q, row_chunk=0)),
        (TypeError, "mask: expected booleans.*int32", lambda: evo_attention(q, q, q, ids)),
        (TypeError, "pair_bias: expected a floating", lambda: evo_attention(q, q, q, None, bias.astype(int))),
        (TypeError, "k: expected q's dtype", lambda: evo_attention(q, half, q)),
        (TypeError, "v: expected q's dtype", lambda: evo_attention(q, q, half)),
        (TypeError, "q: expected q's dtype, floating", lambda: evo_attention(*[q.astype(int)] * 3)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


def test_what_the_kernels_refuse():
    q = jnp.ones((8, 1, 4, 1, 129))
    with pytest.raises(NotImplementedError, match="heads of up to 128, got 129"):
        evo_attention(q, q, q, implementation="interpret")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        evo_attention(*[jnp.ones((1, 1, 4, 1, 8), jnp.float64)] * 3, implementation="interpret")
    with pytest.raises(NotImplementedError, match=r"evo_attention.*'triton'.*'cpu'.*xla"):
        evo_attention(*[q[..., :8]] * 3, implementation="triton")
