"""flash_attention against a float64 oracle: values, every gradient, masks, dtypes, memory, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab.core import plan
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import xla as xla_form
from tests.aot import needs_aot
from tests.oracles.attention import attention, attention_gradients


def _segments(batch, length, seed=0):
    """Runs of ids with padding at the end of the first row."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    ids[0, length - length // 4 :] = 0
    return ids


CASES = {
    "causal": {"T": 37},
    "one-token": {"T": 1},
    "full": {"T": 24, "S": 40, "causal": False},
    "grouped": {"T": 130, "H": 4, "Hkv": 2},
    "one-kv-head": {"T": 20, "H": 3, "Hkv": 1, "D": 6},
    "window": {"T": 150, "window": 17, "H": 2},
    "window-of-one": {"T": 9, "window": 1},
    "scale": {"T": 16, "scale": 0.3},
    "segments": {"T": 48, "segments": True, "H": 4, "Hkv": 2},
    "segments-window": {"T": 40, "segments": True, "window": 5},
    "cross-segments": {"T": 12, "S": 20, "causal": False, "segments": True},
    "positions": {"T": 10, "S": 30, "positions": True, "H": 4, "Hkv": 2},
    "positions-window": {"T": 10, "S": 30, "positions": True, "window": 6},
}


def _case(name, dtype=np.float32):
    c = {
        "S": None,
        "B": 2,
        "H": 2,
        "Hkv": 2,
        "D": 8,
        "causal": True,
        "window": None,
        "scale": None,
        "segments": False,
        "positions": False,
    }
    c |= CASES[name]
    keys = c["S"] or c["T"]
    rng = np.random.default_rng(1)
    shapes = [
        (c["B"], c["T"], c["H"], c["D"]),
        *[(c["B"], keys, c["Hkv"], c["D"])] * 2,
        (c["B"], c["T"], c["H"], c["D"]),
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    rules = {key: c[key] for key in ("causal", "window", "scale")}
    if c["segments"]:
        rules["segment_ids"] = _segments(c["B"], c["T"])
        rules["kv_segment_ids"] = _segments(c["B"], keys, 1) if c["S"] else None
    if c["positions"]:
        positions = rng.integers(0, keys, (c["B"], c["T"])).astype(np.int32)
        positions[:, -2:] = -1
        rules["q_positions"] = positions
    oracle = dict(rules)
    oracle["q_segments"], oracle["kv_segments"] = oracle.pop("segment_ids", None), oracle.pop("kv_segment_ids", None)
    return arrays, rules, oracle


@functools.partial(jax.jit, static_argnames=("causal", "window", "scale", "implementation"))
def _run(q, k, v, d_out, **rules):
    out, pull = jax.vjp(lambda *qkv: flash_attention(*qkv, **rules), q, k, v)
    return out, *pull(d_out)


def _compare(name, implementation, dtype=np.float32, tolerance=2e-6):
    arrays, rules, oracle = _case(name, dtype)
    results = _run(*arrays, **rules, implementation=implementation)
    exact = [np.asarray(x, np.float64) for x in arrays]
    expected = attention(*exact[:3], **oracle), *attention_gradients(*exact, **oracle)
    for what, got, want in zip(("out", "dq", "dk", "dv"), results, expected):
        assert got.dtype == arrays[0].dtype
        error = np.max(np.abs(np.asarray(got, np.float64) - want)) / max(1.0, np.max(np.abs(want)))
        assert error < tolerance, (name, what, error)
    return results


@pytest.mark.parametrize("name", ["full", "grouped", "segments-window", "positions-window"])
def test_reference(name):
    _compare(name, "reference")


@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name, monkeypatch):
    """Tiles of 16, so that every case has several of them."""
    monkeypatch.setattr(xla_form, "_TILE", 16)
    _run.clear_cache()
    _compare(name, "xla")


@pytest.mark.latest
@pytest.mark.parametrize("name", ["grouped", "segments"])
def test_as_shipped(name):
    _run.clear_cache()
    _compare(name, None)


@pytest.mark.parametrize("name", ["grouped", "segments"])
def test_bfloat16(name):
    _compare(name, None, jnp.bfloat16, tolerance=2e-2)


def test_padding_is_inert():
    """Rows of segment 0 give zeros, take no gradient and give none, with a large key in the padding."""
    (q, k, v, d_out), rules, _ = _case("segments")
    padding = rules["segment_ids"] == 0
    k = jnp.where(padding[:, :, None, None], 1e4, k)
    out, dq, dk, dv = (np.asarray(x) for x in _run(q, k, v, d_out, **rules))
    for x in (out, dq, dk, dv):
        assert np.isfinite(x).all()
        assert not x[padding].any()
    kept = {**rules, "segment_ids": rules["segment_ids"][:, :36]}
    alone = _run(q[:, :36], k[:, :36], v[:, :36], d_out[:, :36], **kept)
    np.testing.assert_allclose(alone[0][0], out[0, :36], atol=1e-6)
    np.testing.assert_allclose(alone[2][0], dk[0, :36], atol=1e-6)


def test_memory_is_linear_in_length():
    """Twice the length takes about twice the temporaries, forward and backward, and far less than the logits."""

    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = jax.grad(lambda q, k, v: jnp.sum(flash_attention(q, k, v) ** 2), argnums=(0, 1, 2))
        return jax.jit(loss).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    sizes = {length: temporaries(length) for length in (512, 4096, 8192)}
    assert sizes[4096] < 10 * sizes[512]
    assert sizes[8192] < 2.3 * sizes[4096]
    assert sizes[8192] < 4 * 8192 * 8192 * 4 / 50


@pytest.mark.latest
def test_inside_shard_map():
    """Heads over four devices, as Ulysses runs it, with gradients."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 140, 4, 4)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(_segments(1, 140))
    spec = PartitionSpec(None, None, "tensor")

    def local(q, k, v, ids):
        return flash_attention(q, k, v, segment_ids=ids)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, ids) ** 2), argnums=(0, 1, 2)))(q, k, v)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3 + (PartitionSpec(),), out_specs=spec)
    for got, want in zip(gradients(sharded), gradients(local)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_wrong_arguments(unchecked):
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 5, 2, 8))
    ids = jnp.ones((2, 5), jnp.int32)
    wrong = [
        (ValueError, "q: expected 4 axes", lambda: flash_attention(q[0], k, k)),
        (ValueError, "k: expected", lambda: flash_attention(q, k[..., :4], k)),
        (ValueError, "v: expected the shape of k", lambda: flash_attention(q, k, k[:, :4])),
        (ValueError, "divides q's 4", lambda: flash_attention(q, *[jnp.zeros((2, 5, 3, 8))] * 2)),
        (ValueError, "window: expected at least 1", lambda: flash_attention(q, k, k, window=0)),
        (ValueError, "segment_ids: expected shape", lambda: flash_attention(q, k, k, segment_ids=ids[:, :4])),
        (ValueError, "without segment_ids", lambda: flash_attention(q, k, k, kv_segment_ids=ids)),
        (ValueError, "lengths of q and k differ", lambda: flash_attention(q[:, :4], k, k, segment_ids=ids[:, :4])),
        (ValueError, "without causal", lambda: flash_attention(q, k, k, q_positions=ids, causal=False)),
        (ValueError, "unknown implementation 'cudnn'", lambda: flash_attention(q, k, k, implementation="cudnn")),
        (TypeError, "segment_ids: expected integers", lambda: flash_attention(q, k, k, segment_ids=ids * 1.0)),
        (TypeError, "floating", lambda: flash_attention(q, k, k.astype(jnp.int32))),
        (TypeError, "floating", lambda: flash_attention(q, k.astype(jnp.bfloat16), k)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()


@needs_aot
def test_memory_on_an_h100():
    """Compiled for a GPU that is not here: temporaries grow with the length, far below the bf16 logits."""

    def gradients(q, k, v, d_out):
        return jax.vjp(flash_attention, q, k, v)[1](d_out)

    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
        return plan.compile(gradients, q, kv, kv, q, target=plan.target("h100"), labels=("input",) * 4).bytes

    short, long = temporaries(2048)["temporaries"], temporaries(8192)["temporaries"]
    assert long < 4.4 * short
    assert long < 8 * 8192 * 8192 * 2 / 10
