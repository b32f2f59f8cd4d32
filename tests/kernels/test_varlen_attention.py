"""varlen_attention against a float64 oracle: values, gradients, tiles, compiled for an H100, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import plan
from pallas_kernels.varlen_attention import triton, varlen_attention
from tests.aot import needs_aot, needs_ptxas
from tests.kernels.harness import Case, check
from tests.oracles.varlen_attention import attention, gradients


def _case(name, offsets, heads, kv_heads, dim, rows=None):
    rows = rows or offsets[-1]

    def make(rng):
        shapes = ((rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim))
        arrays = (*(rng.normal(size=shape) for shape in shapes), np.asarray(offsets, np.int32))
        return arrays, rng.normal(size=shapes[0])

    return Case(name, make, max(np.diff(offsets)))


CASES = (
    _case("windows", (0, 16, 20, 28, 30), 2, 2, 8),
    _case("one", (0, 21), 3, 1, 6),
    _case("ragged", (2, 7, 7, 40, 40), 4, 2, 16, rows=50),  # rows before and after, empty segments
)


_op = functools.partial(varlen_attention, max_length=33)


_check = functools.partial(check, oracle=attention, gradients=gradients, differentiate=(0, 1, 2))


@pytest.mark.latest
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    _check(_op, case, None, jnp.float32)


@pytest.mark.parametrize(("implementation", "dtype"), [("reference", jnp.float32), ("xla", jnp.bfloat16)])
def test_reference_and_bfloat16(implementation, dtype):
    _check(_op, CASES[2], implementation, dtype)


def test_interpreted(monkeypatch):
    for name in ("_WIDE_TILES", "_WIDE_KEYS_TILES"):  # float32's
        monkeypatch.setattr(triton, name, triton.Tiles(16, 16))
    _check(_op, CASES[2], "interpret", jnp.float32)


def test_nothing_of_the_size_of_all_pairs_is_made():
    """4096 rows in windows of 64: the temporaries are far from rows by rows."""
    q = jax.ShapeDtypeStruct((4096, 2, 32), jnp.float32)
    run = jax.jit(functools.partial(varlen_attention, max_length=64))
    made = run.lower(q, q, q, jax.ShapeDtypeStruct((65,), jnp.int32)).compile().memory_analysis()
    assert made.temp_size_in_bytes < 4096 * 4096


@needs_aot
@needs_ptxas
def test_compiled_for_an_h100():
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, offsets = array((4096, 16, 80)), jax.ShapeDtypeStruct((65,), jnp.int32)

    def run(q, k, v, offsets, d_out):
        return jax.vjp(lambda *qkv: varlen_attention(*qkv, offsets, max_length=64), q, k, v)[1](d_out)

    made = plan.compile(run, q, q, q, offsets, q, target=plan.target("h100"), labels=["input"] * 5)
    assert len(made.kernels) == 3
    assert all(kernel.spill_bytes == 0 and kernel.tensor_core for kernel in made.kernels)
    assert made.bytes["temporaries"] <= 4096 * 16 * (80 * 2 + 2 * 4) + 2**16  # output, log-sum-exp, delta


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, np.zeros((30, 16), np.float32), ValueError, "q: expected 3 axes"),
        (0, np.zeros((30, 3, 8), np.float32), ValueError, "divides q's 3"),
        (1, np.zeros((29, 2, 8), np.float32), ValueError, "k: expected"),
        (2, np.zeros((30, 1, 8), np.float32), ValueError, "v: expected the shape of k"),
        (2, np.zeros((30, 2, 8), np.float16), TypeError, "v: expected q's dtype"),
        (3, np.zeros((2, 2), np.int32), ValueError, "offsets: expected one axis"),
        (3, np.zeros(2, np.float32), TypeError, "offsets: expected integers"),
    ],
)
def test_bad_arguments(place, value, error, said):
    args = [np.zeros((30, 2, 8), np.float32)] * 3 + [np.array([0, 30], np.int32)]
    args[place] = value
    with pytest.raises(error, match=said):
        varlen_attention(*args, max_length=30)
    if place == 3:
        with pytest.raises(ValueError, match="max_length: expected at least 1"):
            varlen_attention(*args[:3], np.array([0, 30]), max_length=0)
