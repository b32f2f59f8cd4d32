"""flash_attention against a float64 oracle: values, every gradient, masks, dtypes, memory, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlab.core import plan
from pallas_kernels.flash_attention import flash_attention, triton, triton_backward
from pallas_kernels.flash_attention import xla as xla_form
from pallas_kernels.flash_attention.triton_tiles import Problem, Tiles
from tests.aot import needs_aot, needs_ptxas
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
    "one-kv-head": {"T": 20, "H": 3, "Hkv": 1, "D": 6, "scale": 0.3},
    "window": {"T": 150, "window": 17, "H": 2},
    "window-of-one": {"T": 9, "window": 1},
    "segments": {"T": 48, "segments": True, "H": 4, "Hkv": 2},
    "segments-window": {"T": 40, "segments": True, "window": 5},
    "cross-segments": {"T": 12, "S": 20, "causal": False, "segments": True},
    "positions": {"T": 10, "S": 30, "positions": True, "H": 4, "Hkv": 2},
    "positions-window": {"T": 10, "S": 30, "positions": True, "window": 6},
    "full-window": {"T": 40, "S": 32, "causal": False, "window": 9},
    "whole-tiles": {"T": 48, "D": 16, "Hkv": 1},
    "decode": {"T": 1, "S": 40, "positions": True, "H": 3, "Hkv": 1},
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


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that every case has several of them."""
    monkeypatch.setattr(xla_form, "_TILE", 16)
    for module, name in ((triton, "_TILES"), (triton_backward, "_ROWS_TILES"), (triton_backward, "_KEYS_TILES")):
        monkeypatch.setattr(module, name, Tiles(16, 16))
    _run.clear_cache()
    yield
    _run.clear_cache()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name):
    _compare(name, "xla")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("causal", "window-of-one", "positions")])
def test_interpreted_kernels(name):
    _compare(name, "interpret")


FORMS = [("grouped", None), ("segments", None), ("segments", "interpret")]


@pytest.mark.latest
@pytest.mark.parametrize(("name", "implementation"), FORMS)
def test_as_shipped(name, implementation):
    _compare(name, implementation)


@pytest.mark.parametrize(("name", "implementation"), FORMS)
def test_bfloat16(name, implementation):
    _compare(name, implementation, jnp.bfloat16, tolerance=2e-2)


def test_interpreted_kernels_with_64_bit_types():
    with jax.enable_x64(True):
        _compare("positions-window", "interpret")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_padding_is_inert(implementation):
    """Rows of segment 0 give zeros, take no gradient and give none, with a large key in the padding."""
    (q, k, v, d_out), rules, _ = _case("segments")
    rules["implementation"] = implementation
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


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0)])
def test_nothing_to_see(queries, keys):
    q, k = jnp.ones((1, queries, 2, 8)), jnp.ones((1, keys, 1, 8))
    out, dq, dk, dv = _run(q, k, k, q, causal=False)
    assert (out.shape, dq.shape, dk.shape, dv.shape) == (q.shape, q.shape, k.shape, k.shape)
    assert not any(np.asarray(x).any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_vmap_and_remat(implementation):
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(2, 1, 12, heads, 4)), jnp.float32) for heads in (2, 1))
    ids = jnp.asarray(_segments(2, 12))[:, None]

    @jax.checkpoint
    def loss(q, k, ids):
        return (flash_attention(q, k, k, segment_ids=ids, implementation=implementation) ** 2).sum()

    each = jax.value_and_grad(loss, (0, 1))
    batched = jax.jit(jax.vmap(each))(q, k, ids)
    for i in range(2):
        own, single = jax.tree.map(lambda x, i=i: x[i], batched), jax.jit(each)(q[i], k[i], ids[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, single)


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


def test_what_the_kernels_refuse():
    q = jnp.ones((8, 4, 1, 257))
    with pytest.raises(NotImplementedError, match="heads of up to 256, got 257"):
        flash_attention(q, q, q, implementation="interpret")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        flash_attention(*[jnp.ones((1, 4, 1, 8), jnp.float64)] * 3, implementation="interpret")
    with pytest.raises(NotImplementedError, match=r"flash_attention.*'triton'.*'cpu'.*xla"):
        flash_attention(*[q[..., :8]] * 3, implementation="triton")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda q: flash_attention(q, q, q, implementation="interpret"),
        mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="check_vma"):
        sharded(q[..., :8])


@pytest.mark.parametrize("field", [{"rows": 48}, {"columns": 8}, {"warps": 3}, {"stages": 0}])
def test_impossible_tiles(field):
    with pytest.raises(ValueError, match=f"Tiles.{next(iter(field))} must be"):
        Tiles(**{"rows": 64, "columns": 64, **field})


def _visible(problem, ids, batch):
    """[T, S]: who sees whom in a row of the batch."""
    q_ids, k_ids, positions = (None if x is None else np.asarray(x[batch]) for x in ids)
    place = (np.arange(problem.queries) if positions is None else positions)[:, None]
    index = np.arange(problem.keys)
    sees = np.ones((problem.queries, problem.keys), bool)
    if problem.causal:
        sees &= index <= place
    if problem.window is not None:
        sees &= index > place - problem.window
    if q_ids is not None:
        sees &= (q_ids[:, None] == k_ids) & (q_ids[:, None] != 0)
    return sees


@pytest.mark.parametrize("name", ["full", "grouped", "one-kv-head", "window", "full-window", "segments",
                                  "segments-window", "positions", "positions-window"])  # fmt: skip
def test_tiles_that_nobody_sees_are_skipped(name):
    """The loops run from the first to the last tile that somebody sees; where they take no mask, everybody does."""
    (q, k, *_), rules, _ = _case(name)
    segments, kv_segments, positions = (
        rules.pop(key, None) for key in ("segment_ids", "kv_segment_ids", "q_positions")
    )
    ids = segments, segments if kv_segments is None else kv_segments, positions
    ids = tuple(None if x is None else jnp.asarray(x) for x in ids)
    problem = Problem.of(q, k, **(rules | {"scale": 1.0}), tiles=Tiles(16, 16))
    token = np.arange(problem.row_tiles * 16) // problem.group
    column = np.arange(problem.key_tiles * 16)

    def tiles(sees, rows_past, keys_past):
        """[row tiles, key tiles, 16, 16], with what there is past the ends."""
        sees = np.pad(sees, ((0, 1), (0, 0)), constant_values=rows_past)
        sees = np.pad(sees, ((0, 0), (0, 1)), constant_values=keys_past)
        whole = sees[np.minimum(token, problem.queries)][:, np.minimum(column, problem.keys)]
        return whole.reshape(problem.row_tiles, 16, -1, 16).swapaxes(1, 2)

    for batch in range(q.shape[0]):
        sees = _visible(problem, ids, batch)
        some = tiles(sees, False, False).any((2, 3))
        # Queries past the end have no gradient, and keys past it are not stored: only a softmax must not see those.
        by_rows = some, tiles(sees, True, False).all((2, 3)), problem.key_steps, problem.seen_tiles(ids, axis=1)
        by_keys = some.T, tiles(sees, True, True).all((2, 3)).T, problem.row_steps, problem.seen_tiles(ids, axis=2)
        for some, every, steps, seen in (by_rows, by_keys):
            for tile, wanted in enumerate(map(np.flatnonzero, some)):
                found = []
                for low, high, masked in steps(jnp.int32(tile), jnp.int32(batch), seen):
                    found += range(int(low), int(high))
                    assert masked or every[tile, int(low) : int(high)].all()
                assert found == (list(range(wanted[0], wanted[-1] + 1)) if wanted.size else [])


def _gradients(q, k, v, d_out):
    return jax.vjp(flash_attention, q, k, v)[1](d_out)


def _shapes(length, heads, kv_heads, dim, dtype=jnp.bfloat16):
    q, k = (jax.ShapeDtypeStruct((1, length, count, dim), dtype) for count in (heads, kv_heads))
    return q, k, k, q


@needs_aot
@needs_ptxas
@pytest.mark.latest
@pytest.mark.parametrize(("dim", "limits"), [(64, (128, 128, 224)), (128, (192, 144, 240))])
def test_compiled_for_h100(dim, limits):
    *args, d_out = _shapes(8192, 16, 4, dim)
    target = plan.target("h100")
    forward = plan.compile(flash_attention, *args, target=target, labels=["input"] * 3)
    backward = plan.compile(_gradients, *args, d_out, target=target, labels=["input"] * 4)
    a_row = 4 * 16 * 8192  # one float32 for each query: log-sum-exp, delta
    assert forward.bytes["temporaries"] <= a_row + 2**10
    assert backward.bytes["temporaries"] <= forward.bytes["outputs"] + 2 * a_row + 2**10
    assert [kernel.name for kernel in forward.kernels] == ["flash_attention"]
    kernels = {kernel.name: kernel for kernel in backward.kernels}
    assert list(kernels) == ["flash_attention", "flash_attention_dkv", "flash_attention_dq"]
    registers = (kernels[name].registers for name in ("flash_attention", "flash_attention_dq", "flash_attention_dkv"))
    assert all(used <= limit for used, limit in zip(registers, limits))
    for kernel in kernels.values():
        assert kernel.spill_bytes == 0
        assert any(name.startswith("wgmma") for name in kernel.ptx_instructions), kernel.name
        assert any(name.startswith("cp.async.cg") for name in kernel.ptx_instructions), kernel.name
        assert not any(name.startswith(("atom", "red")) for name in kernel.ptx_instructions), kernel.name


@needs_aot
@needs_ptxas
def test_a_million_tokens_compiled_for_h100():
    """Arrays beyond 4 GiB are addressed in 64 bits; what is stored for the gradients is one number a query and head."""
    made = plan.compile(_gradients, *_shapes(2**20, 24, 8, 128), target=plan.target("h100"), labels=["input"] * 4)
    out, a_row = 2**20 * 24 * 128 * 2, 2**20 * 24 * 4
    assert made.bytes["temporaries"] <= out + 2 * a_row + 2**10
    assert all(kernel.spill_bytes == 0 for kernel in made.kernels)


@needs_aot
@needs_ptxas
def test_segments_compiled_for_a100():
    """Ranges of tiles are found outside the kernels, without an array of tiles by tiles."""
    *args, d_out = _shapes(8192, 16, 4, 64)
    ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def gradients(q, k, v, ids, d_out):
        return jax.vjp(lambda *qkv: flash_attention(*qkv, segment_ids=ids), q, k, v)[1](d_out)

    made = plan.compile(gradients, *args, ids, d_out, target=plan.target("a100"), labels=["input"] * 5)
    assert made.bytes["temporaries"] <= 8192 * 16 * 64 * 2 + 2 * 4 * 16 * 8192 + 2**14
    assert len(made.kernels) == 3
    assert all(kernel.tensor_core and kernel.spill_bytes == 0 for kernel in made.kernels)
