"""paged_attention against a float64 oracle, its parts and tiles, poisoned pages, compiled for an H100, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from pallas_kernels.paged_attention import paged_attention, triton
from tests.aot import needs_aot, needs_ptxas
from tests.oracles.paged_attention import attention

# Lengths: nothing, one token, full pages, a page and a bit, the whole table; rows that have different ones.
CASES = {
    "grouped": {"H": 8, "Hkv": 2, "D": 32, "page": 8, "N": 6, "lengths": (0, 1, 16, 41, 48)},
    "group-of-one": {"H": 2, "Hkv": 2, "D": 128, "page": 16, "N": 2, "lengths": (17, 32)},
    "group-of-three": {"H": 6, "Hkv": 2, "D": 64, "page": 16, "N": 3, "lengths": (33, 0, 5), "scale": 0.3},
    "group-of-eight": {"H": 8, "Hkv": 1, "D": 20, "page": 5, "N": 9, "lengths": (44, 45, -1, 26)},
    "many-heads": {"H": 20, "Hkv": 1, "D": 16, "page": 4, "N": 4, "lengths": (13,)},
}
LAYERS = 3


def _case(name, q_dtype=np.float32, dtype=np.float32):
    """Arguments with pages of one layer: tables shuffled, and NaN in every place that no row owns."""
    c = CASES[name]
    rng = np.random.default_rng(0)
    lengths = np.asarray(c["lengths"], np.int32)
    rows, count = len(lengths), len(lengths) * c["N"] + 2
    table = rng.permutation(count)[: rows * c["N"]].reshape(rows, c["N"]).astype(np.int32)
    shape = (c["Hkv"], count, c["page"], c["D"])
    owned = np.zeros((count, c["page"]), bool)
    for row, length in zip(table, lengths):
        token = np.arange(max(length, 0))
        owned[row[token // c["page"]], token % c["page"]] = True
        row[-(-max(length, 0) // c["page"]) :] = rng.choice([-7, 0, 10**6])
    k, v = (np.where(owned[..., None], rng.normal(size=shape), np.nan) for _ in range(2))
    v[:, ~owned] = np.inf
    q = rng.normal(size=(rows, c["H"], c["D"]))
    floats = jnp.asarray(q, q_dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    return (*floats, jnp.asarray(table), jnp.asarray(lengths)), c.get("scale")


def _stacked(args):
    """The same with more layers, of which only the last is fit to be read."""
    q, k, v, table, lengths = args
    k, v = (jnp.stack([jnp.full_like(x, jnp.nan)] * (LAYERS - 1) + [x]) for x in (k, v))
    return q, k, v, table, lengths


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def _run(*args, **rules):
    return paged_attention(*args, **rules)


def _compare(name, implementation, tolerance=2e-6, *, q_dtype=np.float32, dtype=np.float32):
    args, scale = _case(name, q_dtype, dtype)
    got = _run(*args, scale=scale, implementation=implementation)
    assert got.dtype == q_dtype
    error = np.abs(np.asarray(got, np.float64) - attention(*args, scale)).max()
    assert error < tolerance, error


@pytest.mark.latest
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_values(name, implementation):
    _compare(name, implementation)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of heads and of keys, and several parts of a row."""
    for constant, value in (("_ROWS", 16), ("_COLUMNS", {2: 16, 4: 16}), ("_SPLIT", 16)):
        monkeypatch.setattr(triton, constant, value)
    _run.clear_cache()
    yield
    _run.clear_cache()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_interpreted(name):
    _compare(name, "interpret")


@pytest.mark.usefixtures("small_tiles")
def test_interpreted_without_parts(monkeypatch):
    monkeypatch.setattr(triton, "_SPLITS", 1)
    _compare("grouped", "interpret")


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize(
    ("q_dtype", "dtype", "tolerance"),
    [(jnp.bfloat16, jnp.bfloat16, 2e-2), (jnp.float32, jnp.bfloat16, 2e-6), (jnp.bfloat16, jnp.float32, 1e-2)],
)
def test_dtypes(q_dtype, dtype, tolerance, implementation):
    _compare("grouped", implementation, tolerance, q_dtype=q_dtype, dtype=dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_layers(implementation):
    """A layer by number, and all layers in a scan."""
    args, _ = _case("grouped")
    stacked = _stacked(args)
    want = _run(*args, implementation=implementation)
    run = functools.partial(paged_attention, *stacked, implementation=implementation)
    np.testing.assert_allclose(run(layer=LAYERS - 1), want, rtol=1e-6, atol=1e-6)
    scanned = jax.jit(lambda: jax.lax.scan(lambda _, i: (None, run(layer=i)), None, jnp.arange(LAYERS))[1])()
    np.testing.assert_array_equal(scanned[LAYERS - 1], run(layer=LAYERS - 1))
    assert np.isnan(scanned[0, 1:]).all()


def test_heads_over_a_mesh():
    """Heads of q and of the pages divided over devices, as tensor parallelism does."""
    args, _ = _case("grouped")
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    of_q, of_pages, whole = P(None, "tensor"), P("tensor"), P()
    specs = {"in_specs": (of_q, of_pages, of_pages, whole, whole), "out_specs": of_q}
    got = jax.jit(jax.shard_map(paged_attention, mesh=mesh, **specs))(*args)
    np.testing.assert_allclose(got, _run(*args), rtol=1e-6, atol=1e-6)


def test_lengths_past_the_table_count_as_the_whole():
    args, _ = _case("group-of-one")
    longer = (*args[:4], args[4] + jnp.array([0, 100]))
    np.testing.assert_array_equal(_run(*longer), _run(*args))


def test_no_rows():
    args, _ = _case("grouped")
    q, k, v, table, lengths = (x[:0] if i in (0, 3, 4) else x for i, x in enumerate(args))
    assert paged_attention(q, k, v, table, lengths).shape == (0, 8, 32)
    assert not paged_attention(args[0], k, v, args[3][:, :0], args[4]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pages_are_read_in_place(dtype):
    """No layer is copied out, none is converted, and temporaries do not grow with the lengths."""
    layers, rows, heads, dim, page, n = 4, 8, 2, 64, 16, 64
    pages = jax.ShapeDtypeStruct((layers, heads, rows * n, page, dim), dtype)
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((rows, 4, dim), jnp.float32)

    def attend(q, k, v, table, lengths):
        return jax.lax.scan(
            lambda q, layer: (paged_attention(q, k, v, table, lengths, layer=layer), None), q, jnp.arange(layers)
        )[0]

    made = jax.jit(attend).lower(q, pages, pages, numbers((rows, n)), numbers((rows,))).compile()
    assert made.memory_analysis().temp_size_in_bytes < 2**20 * 3  # a layer's keys as float32: 4 MiB


def _gpu_shapes(rows, heads, kv_heads, dim, page, n, dtype, layers=3):
    array, numbers = (functools.partial(jax.ShapeDtypeStruct, dtype=x) for x in (dtype, jnp.int32))
    pages = array((layers, kv_heads, rows * n + 1, page, dim))
    return array((rows, heads, dim)), pages, pages, numbers((rows, n)), numbers((rows,)), numbers(())


def _attend(q, k_pages, v_pages, page_table, lengths, layer):
    return paged_attention(q, k_pages, v_pages, page_table, lengths, layer=layer)


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(
    ("shape", "dtype", "parts"),
    [((16, 32, 8, 128, 16, 128), jnp.bfloat16, 8), ((256, 12, 4, 64, 16, 64), jnp.float32, 1)],
)
def test_compiled_for_an_h100(shape, dtype, parts):
    """One layer's pages are read in place, by tensor cores' kernels; beside the parts of each row nothing is made."""
    args = _gpu_shapes(*shape, dtype)
    made = plan.compile(_attend, *args, target=plan.target("h100"), labels=["input"] * len(args))
    names = ["paged_attention", "paged_attention_merge"]
    assert [kernel.name for kernel in made.kernels] == names[: 1 + (parts > 1)]
    assert all(kernel.spill_bytes == 0 and kernel.registers <= 168 for kernel in made.kernels)
    assert made.kernels[0].tensor_core
    rows, heads, _, dim, *_ = shape
    assert made.bytes["temporaries"] <= (parts * rows * heads * (dim + 2) * 4 if parts > 1 else 0) + 2**12


def test_lowers_for_amd():
    args = _gpu_shapes(4, 8, 2, 64, 16, 64, jnp.bfloat16)
    assert "paged_attention" in jax.jit(_attend).trace(*args).lower(lowering_platforms=("rocm",)).as_text()


def test_no_derivative():
    args, _ = _case("grouped")
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(lambda q: paged_attention(q, *args[1:]).sum())(args[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((5, 32), np.float32), ValueError, "q: expected 3 axes"),
        (0, np.zeros((5, 7, 32), np.float32), ValueError, "divides q's 7"),
        (0, np.zeros((5, 8, 16), np.float32), ValueError, r"k_pages: expected \[Hkv, P, page, 16\] without"),
        (0, np.zeros((5, 8, 32), np.int32), TypeError, "q: expected a floating dtype"),
        (1, np.zeros((3, 2, 32, 8, 32), np.float32), ValueError, "k_pages: expected .* without a layer"),
        (1, np.zeros((2, 32, 8, 32), np.int8), TypeError, "k_pages: expected a floating dtype"),
        (2, np.zeros((2, 31, 8, 32), np.float32), ValueError, "v_pages: expected shape"),
        (2, np.zeros((2, 32, 8, 32), np.float16), TypeError, "v_pages: expected the dtype of k_pages"),
        (3, np.zeros((4, 6), np.int32), ValueError, r"page_table: expected \[5, N\]"),
        (3, np.zeros((5, 6), np.float32), TypeError, "page_table: expected integers"),
        (4, np.zeros((5, 1), np.int32), ValueError, "lengths: expected shape"),
        (4, np.zeros(5, np.float32), TypeError, "lengths: expected integers"),
    ],
)
def test_bad_arguments(place, value, error, said):
    args = list(_case("grouped")[0])
    args[place] = value
    with pytest.raises(error, match=said):
        paged_attention(*args)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("layer", "error", "said"),
    [
        (LAYERS, ValueError, "one of 0..2, got 3"),
        (-1, ValueError, "one of 0..2, got -1"),
        (1.0, TypeError, "layer: expected an integer"),
        (np.zeros(2, np.int32), TypeError, "layer: expected an integer"),
    ],
)
def test_bad_layers(layer, error, said):
    args = _case("grouped")[0]
    with pytest.raises(error, match=said):
        paged_attention(*_stacked(args), layer=layer)
    with pytest.raises(ValueError, match="with a layer"):
        paged_attention(*args, layer=0)
