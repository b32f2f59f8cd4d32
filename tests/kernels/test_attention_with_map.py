"""attention_with_map against a float64 oracle: output, map and gradients of both, compiled for GPUs, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from pallas_kernels.attention_with_map import attention_with_map, triton, triton_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles
from pallas_kernels.flash_self_attention import heads
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import tolerance
from tests.oracles.attention_with_map import attention, gradients

# Rows, queries, keys, heads, head size.
CASES = {
    "sd": (2, 16, 77, 2, 40),
    "ragged": (1, 37, 9, 3, 20),
    "full-block": (1, 5, 128, 1, 16),
    "one": (1, 1, 1, 1, 8),
}


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _arrays(name, dtype=jnp.float32):
    batch, queries, keys, count, dim = CASES[name]
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, count, dim), *[(batch, keys, count, dim)] * 2, (batch, queries, count, dim))
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    # A map's cotangent as large beside the probabilities as the output's is beside the output.
    return q, k, v, d_out, jnp.asarray(keys * rng.normal(size=(batch, queries, keys)), _wide(dtype))


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def _all(q, k, v, d_out, d_map, **rules):
    made, pullback = jax.vjp(functools.partial(attention_with_map, **rules), q, k, v)
    return *made, *pullback((d_out, d_map))


def _compare(name, implementation, dtype=jnp.float32, scale=None):
    args = _arrays(name, dtype)
    got = _all(*args, scale=scale, implementation=implementation)
    exact = [np.asarray(x, np.float64) for x in args]
    want = (*attention(*exact[:3], scale), *gradients(*exact, scale))
    bound = tolerance(dtype, max(CASES[name][1:3]))
    for title, a, b in zip(("output", "map", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == (_wide(dtype) if title == "map" else dtype), title
        assert np.abs(np.asarray(a, np.float64) - b).max() <= bound * max(1e-3, np.abs(b).max()), title


@pytest.fixture
def _fresh():
    _all.clear_cache()
    yield
    _all.clear_cache()


@pytest.fixture
def short_chunks(monkeypatch, _fresh):
    """Several chunks of rows, and one that is shorter."""
    monkeypatch.setattr(heads, "_ROWS", 16)


@pytest.fixture
def small_tiles(monkeypatch, _fresh):
    """Several tiles of rows; of keys, too, where they are not held at once."""
    monkeypatch.setattr(triton, "_TILES", Tiles(16, 128))
    monkeypatch.setattr(triton_backward, "_ROWS_TILES", Tiles(16, 128))
    monkeypatch.setattr(triton_backward, "_KEYS_TILES", Tiles(16, 16))


@pytest.mark.latest
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    _compare(name, None)


@pytest.mark.parametrize(("implementation", "dtype"), [("reference", jnp.float32), ("xla", jnp.bfloat16)])
def test_reference_and_bfloat16(implementation, dtype):
    _compare("ragged", implementation, dtype, scale=0.3)


def test_float64():
    with jax.enable_x64(True):
        _compare("ragged", None, jnp.float64)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["ragged", "full-block"])
def test_interpreted(name):
    _compare(name, "interpret")


def test_the_map_is_a_mean_of_distributions():
    q, k, v, *_ = _arrays("sd")
    _, probabilities = attention_with_map(q, k, v)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    empty, none = attention_with_map(q, k[:, :0], v[:, :0])
    assert not empty.any()
    assert none.shape == (2, 16, 0)


def test_over_a_mesh():
    """The rows of a batch divided over devices, as the branches of an edit are, with gradients."""
    mesh = jax.make_mesh((2,), ("view",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    args, spec = _arrays("sd"), P("view")
    sharded = jax.shard_map(_all, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec)
    for got, want in zip(jax.jit(sharded)(*args), _all(*args)):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_probabilities_of_all_heads_are_never_made():
    q, k = (jax.ShapeDtypeStruct((4, length, 8, 160), jnp.float32) for length in (256, 77))
    d_map = jax.ShapeDtypeStruct((4, 256, 77), jnp.float32)

    def gradients(q, k, v, *cotangents):
        return jax.vjp(attention_with_map, q, k, v)[1](cotangents)

    for program, args in ((attention_with_map, (q, k, k)), (gradients, (q, k, k, q, d_map))):
        made = jax.jit(program).lower(*args).compile().memory_analysis()
        assert made.temp_size_in_bytes < 4 * 8 * 256 * 77 * 4 / 2, program


@needs_aot
@needs_ptxas
@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize("dim", [40, 160])
def test_compiled_for_gpus(gpu, dim):
    """The layers of Stable Diffusion whose maps are kept: gradients store two numbers a row and head, nothing else."""
    q, k = (jax.ShapeDtypeStruct((4, length, 8, dim), jnp.bfloat16) for length in (256, 77))
    d_map = jax.ShapeDtypeStruct((4, 256, 77), jnp.float32)
    made = plan.compile(_all, q, k, k, q, d_map, target=plan.target(gpu), labels=["input"] * 5)
    names = ["attention_with_map", "attention_with_map_dq", "flash_attention_dkv"]
    assert [kernel.name for kernel in made.kernels] == names
    assert all(kernel.spill_bytes == 0 and kernel.tensor_core for kernel in made.kernels)
    assert made.bytes["temporaries"] <= 2 * 4 * 8 * 256 * 4 + 2**10


def test_what_the_kernels_refuse():
    k = jnp.zeros((1, 129, 1, 16))
    with pytest.raises(NotImplementedError, match="up to 128 keys, got 129"):
        attention_with_map(k, k, k, implementation="interpret")
    q = jnp.zeros((1, 2, 1, 160))
    with pytest.raises(NotImplementedError, match="float32 heads of up to 128, got 160"):
        jax.grad(lambda q: attention_with_map(q, q, q, implementation="interpret")[0].sum())(q)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((2, 5, 8), np.float32), ValueError, "q: expected 4 axes"),
        (1, np.zeros((2, 5, 3, 8), np.float32), ValueError, r"k: expected \[2, S, 2, 8\]"),
        (2, np.zeros((2, 4, 2, 8), np.float32), ValueError, "v: expected the shape of k"),
        (1, np.zeros((2, 5, 2, 8), np.float16), TypeError, "k: expected q's dtype"),
    ],
)
def test_bad_arguments(place, value, error, said):
    args = [np.zeros((2, 5, 2, 8), np.float32)] * 3
    args[place] = value
    with pytest.raises(error, match=said):
        attention_with_map(*args)
    with pytest.raises(ValueError, match="unknown implementation 'cudnn'"):
        attention_with_map(*args, implementation="cudnn")
