"""shared_prefix_attention against a float64 oracle, its tiles and pieces, compiled for an H100, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import plan
from pallas_kernels.shared_prefix_attention import shared_prefix_attention, triton
from tests.aot import needs_aot, needs_ptxas
from tests.oracles.shared_prefix_attention import attention

CASES = {
    "grouped": {"B": 2, "N": 3, "H": 4, "Hkv": 2, "D": 8, "P": 40, "S": 20},
    "one-sample": {"B": 1, "N": 1, "H": 2, "Hkv": 2, "D": 16, "P": 16, "S": 1},
    "many-rows": {"B": 1, "N": 20, "H": 6, "Hkv": 1, "D": 6, "P": 33, "S": 17, "scale": 0.3},
}


def _case(name, dtype=np.float32):
    c = CASES[name]
    rng = np.random.default_rng(0)
    (b, n, h, d), (p, s, hkv) = (c[x] for x in ("B", "N", "H", "D")), (c[x] for x in ("P", "S", "Hkv"))

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    prefix_lengths = rng.integers(1, p + 1, b).astype(np.int32)
    suffix_lengths = rng.integers(0, s + 1, (b, n)).astype(np.int32)
    if b > 1:  # one that sees its suffix only, one that sees nothing
        prefix_lengths[1], suffix_lengths[1, :3] = 0, (s, 0, -1)
    prefix = array(b, p, hkv, d), array(b, p, hkv, d), prefix_lengths
    return (array(b, n, h, d), *prefix, array(b, n, s, hkv, d), array(b, n, s, hkv, d), suffix_lengths), c.get("scale")


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def _run(*args, **rules):
    return shared_prefix_attention(*args, **rules)


def _compare(name, implementation, dtype=np.float32, tolerance=2e-6):
    args, scale = _case(name, dtype)
    got = _run(*args, scale=scale, implementation=implementation)
    assert got.dtype == args[0].dtype
    error = np.abs(np.asarray(got, np.float64) - attention(*args, scale)).max()
    assert error < tolerance, error


@pytest.mark.latest
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_values(name, implementation):
    _compare(name, implementation)


def test_bfloat16():
    _compare("grouped", "xla", jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, monkeypatch):
    # Several tiles of rows and of keys, and several pieces of the prefix.
    for constant, value in (("_ROWS", 16), ("_COLUMNS", 16), ("_PIECE", 16)):
        monkeypatch.setattr(triton, constant, value)
    _run.clear_cache()
    _compare(name, "interpret")
    _run.clear_cache()


def test_the_prefix_is_read_once():
    """No array of N copies of the prefix is ever made, on the CPU or for an H100."""
    b, n, h, hkv, d, p, s = 1, 16, 4, 2, 32, 512, 16
    shapes = ((b, n, h, d), *[(b, p, hkv, d)] * 2, (b,), *[(b, n, s, hkv, d)] * 2, (b, n))
    args = [jax.ShapeDtypeStruct(x, jnp.int32 if len(x) < 3 else jnp.float32) for x in shapes]
    temporaries = jax.jit(shared_prefix_attention).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < n * p * hkv * d * 4 / 2


@needs_aot
@needs_ptxas
def test_compiled_for_an_h100():
    """Of arrays with heads before tokens, as a cache holds them, nothing is copied."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    lengths = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prefix, suffix = array((1, 2, 2048, 128)), array((1, 16, 2, 256, 128))
    args = (array((1, 16, 16, 128)), prefix, prefix, lengths((1,)), suffix, suffix, lengths((1, 16)))

    def attend(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths):
        prefix = (x.swapaxes(1, 2) for x in (prefix_k, prefix_v))
        suffix = (x.swapaxes(2, 3) for x in (suffix_k, suffix_v))
        return shared_prefix_attention(q, *prefix, prefix_lengths, *suffix, suffix_lengths)

    made = plan.compile(attend, *args, target=plan.target("h100"), labels=["input"] * 7)
    assert [kernel.name.rpartition("_")[2] for kernel in made.kernels] == ["prefix", "suffix"]
    assert all(kernel.spill_bytes == 0 and kernel.tensor_core for kernel in made.kernels)
    a_row = 16 * 16 * 4
    assert made.bytes["temporaries"] <= 4 * a_row * (128 + 2) + 2**10  # of each of the four pieces


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((2, 3, 4), np.float32), ValueError, "q: expected 4 axes"),
        (0, np.zeros((2, 3, 3, 8), np.float32), ValueError, "divides q's 3"),
        (1, np.zeros((1, 40, 2, 8), np.float32), ValueError, "prefix_k: expected"),
        (2, np.zeros((2, 41, 2, 8), np.float32), ValueError, "prefix_v: expected shape"),
        (2, np.zeros((2, 40, 2, 8), np.float16), TypeError, "prefix_v: expected q's dtype"),
        (3, np.zeros(2, np.float32), TypeError, "prefix_lengths: expected integers"),
        (4, np.zeros((2, 4, 20, 2, 8), np.float32), ValueError, "suffix_k: expected"),
        (6, np.zeros((2, 4), np.int32), ValueError, "suffix_lengths: expected shape"),
    ],
)
def test_bad_arguments(place, value, error, said):
    args = list(_case("grouped")[0])
    args[place] = value
    with pytest.raises(error, match=said):
        shared_prefix_attention(*args)
