"""flash_self_attention against a float64 oracle: values, gradients, heads of SD, compiled for GPUs, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.core import plan
from pallas_kernels.flash_attention import triton as flash_triton
from pallas_kernels.flash_attention import triton_backward as flash_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles
from pallas_kernels.flash_self_attention import flash_self_attention, heads
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import Case, check
from tests.oracles.attention import attention, attention_gradients


def _case(name, queries, keys, count, dim, batch=1):
    def make(rng):
        shapes = ((batch, queries, count, dim), *[(batch, keys, count, dim)] * 2)
        return tuple(rng.normal(size=shape) for shape in shapes), rng.normal(size=shapes[0])

    return Case(name, make, max(queries, keys))


CASES = (
    _case("sd", 16, 16, 2, 40, batch=2),
    _case("ragged", 37, 37, 1, 20),
    _case("words", 33, 7, 2, 16, batch=2),
    _case("one", 1, 1, 1, 8),
)
_check = functools.partial(
    check,
    flash_self_attention,
    oracle=functools.partial(attention, causal=False),
    gradients=functools.partial(attention_gradients, causal=False),
    differentiate=(0, 1, 2),
)


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks of rows, and one that is shorter."""
    monkeypatch.setattr(heads, "_ROWS", 16)


@pytest.mark.latest
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    _check(case, None, jnp.float32)


@pytest.mark.parametrize(("implementation", "dtype"), [("reference", jnp.float32), ("xla", jnp.bfloat16)])
def test_reference_and_bfloat16(implementation, dtype):
    _check(CASES[2], implementation, dtype)


def test_float64():
    with jax.enable_x64(True):
        _check(CASES[2], None, jnp.float64)


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: case.name)
def test_interpreted(case, monkeypatch):
    for module, name in ((flash_triton, "_TILES"), (flash_backward, "_ROWS_TILES"), (flash_backward, "_KEYS_TILES")):
        monkeypatch.setattr(module, name, Tiles(16, 16))
    _check(case, "interpret", jnp.float32)


def test_scale_and_no_keys():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.float32) for _ in range(3))
    got = flash_self_attention(q, k, v, scale=0.7)
    np.testing.assert_allclose(got, attention(q, k, v, causal=False, scale=0.7), atol=1e-6)
    assert not flash_self_attention(q, k[:, :0], v[:, :0]).any()
    assert flash_self_attention(q[:0], k[:0], v[:0]).shape == (0, 5, 2, 8)


def test_over_a_mesh():
    """The rows of a batch divided over devices, as the branches of an edit are, with gradients."""
    mesh = jax.make_mesh((2,), ("view",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 2, 8)), jnp.float32)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q: jnp.sum(attend(q, q, 2 * q) ** 2)))(q)

    spec = P("view")
    sharded = jax.shard_map(flash_self_attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    np.testing.assert_allclose(gradients(sharded), gradients(flash_self_attention), atol=1e-5)


def test_one_head_at_a_time():
    """Of 1024 places and 8 heads, no more than the weights of 512 rows of one head, and slices of it, are held."""
    q = jax.ShapeDtypeStruct((1, 1024, 8, 40), jnp.float32)
    made = jax.jit(flash_self_attention).lower(q, q, q).compile().memory_analysis()
    assert made.temp_size_in_bytes < 1.5 * 512 * 1024 * 4


@needs_aot
@needs_ptxas
@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(("places", "dim"), [(1024, 80), (64, 160)])
def test_compiled_for_the_words_of_a_prompt(gpu, places, dim):
    """Two tiles of keys spilled 18 kB a thread of an A100 at heads of 160; all 77 words in one do not."""
    q, words = (jax.ShapeDtypeStruct((4, length, 8, dim), jnp.bfloat16) for length in (places, 77))
    made = plan.compile(flash_self_attention, q, words, words, target=plan.target(gpu), labels=["input"] * 3)
    assert [(kernel.spill_bytes, kernel.tensor_core) for kernel in made.kernels] == [(0, True)]


def _gradients(q, k, v, d_out):
    return jax.vjp(flash_self_attention, q, k, v)[1](d_out)


@needs_aot
@needs_ptxas
@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(("places", "dim"), [(4096, 40), (1024, 80), (64, 160)])
def test_compiled_for_gpus(gpu, places, dim):
    """The heads of Stable Diffusion are padded in registers: nothing but a number a row is stored beside the output."""
    q = jax.ShapeDtypeStruct((4, places, 8, dim), jnp.bfloat16)
    made = plan.compile(_gradients, *[q] * 4, target=plan.target(gpu), labels=["input"] * 4)
    assert [kernel.name for kernel in made.kernels] == ["flash_attention", "flash_attention_dkv", "flash_attention_dq"]
    assert all(kernel.spill_bytes == 0 and kernel.tensor_core for kernel in made.kernels)
    a_row = 4 * 8 * places * 4  # log-sum-exp, delta
    assert made.bytes["temporaries"] <= 4 * 8 * places * dim * 2 + 2 * a_row + 2**12


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((2, 5, 8), np.float32), ValueError, "q: expected 4 axes"),
        (0, np.zeros((2, 5, 3, 8), np.float32), ValueError, r"k: expected \[2, S, 3, 8\]"),
        (1, np.zeros((1, 5, 2, 8), np.float32), ValueError, "k: expected"),
        (2, np.zeros((2, 4, 2, 8), np.float32), ValueError, "v: expected the shape of k"),
        (2, np.zeros((2, 5, 2, 8), np.float16), TypeError, "v: expected q's dtype"),
        (0, np.zeros((2, 5, 2, 8), np.int32), TypeError, "q: expected q's dtype, floating"),
    ],
)
def test_bad_arguments(place, value, error, said):
    args = [np.zeros((2, 5, 2, 8), np.float32)] * 3
    args[place] = value
    with pytest.raises(error, match=said):
        flash_self_attention(*args)


def test_bad_names():
    q = jnp.zeros((2, 5, 2, 8))
    with pytest.raises(ValueError, match="unknown implementation 'cudnn'"):
        flash_self_attention(q, q, q, implementation="cudnn")
    with pytest.raises(NotImplementedError, match=r"'triton'.*'cpu'"):
        flash_self_attention(q, q, q, implementation=["triton"])
