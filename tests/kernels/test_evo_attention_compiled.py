"""evo_attention as compiled: temporaries on a CPU, lowered for GPUs, and what an H100 would run."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlab.core import plan
from pallas_kernels.evo_attention import evo_attention
from tests.aot import needs_aot, needs_ptxas

KERNELS = ["evo_attention", "evo_attention_dbias", "evo_attention_dkv", "evo_attention_dq"]


def _naive(q, k, v, mask, bias):
    logits = jnp.einsum("bsihd,bsjhd->bshij", q, k) * q.shape[-1] ** -0.5 + bias
    return jnp.einsum("bshij,bsjhd->bsihd", jax.nn.softmax(logits), v)


def _jax_nn(q, k, v, mask, bias):
    batch, rows, length, heads, dim = q.shape
    q, k, v = (x.reshape(-1, length, heads, dim) for x in (q, k, v))
    bias = jnp.broadcast_to(bias, (batch, rows, heads, length, length)).reshape(-1, heads, length, length)
    return jax.nn.dot_product_attention(q, k, v, bias=bias).reshape(batch, rows, length, heads, dim)


def _gradients(attend):
    """The program of the tables: output and four gradients (the mask's too, if it is of floats)."""

    def run(q, k, v, mask, bias, d_out):
        if mask is None or mask.dtype == bool:
            out, pull = jax.vjp(lambda q, k, v, bias: attend(q, k, v, mask, bias), q, k, v, bias)
        else:
            out, pull = jax.vjp(attend, q, k, v, mask, bias)
        return out, *pull(d_out)

    return run


def _shapes(shape, dtype=jnp.bfloat16, *, mask=None, bias_dtype=None):
    batch, rows, length, heads, _ = shape
    q = jax.ShapeDtypeStruct(shape, dtype)
    bias = jax.ShapeDtypeStruct((batch, 1, heads, length, length), bias_dtype or dtype)
    mask = None if mask is None else jax.ShapeDtypeStruct((batch, rows, 1, 1, length), mask)
    return q, q, q, mask, bias, q


def test_temporaries_on_a_cpu():
    """The bars of MegaFold's specification, section 8, at 256 residues; far below them, in fact."""

    def temporaries(attend, length):
        made = jax.jit(_gradients(attend)).lower(*_shapes((1, length, length, 4, 32), jnp.float32)).compile()
        return made.memory_analysis().temp_size_in_bytes

    own = temporaries(evo_attention, 256)
    assert own <= 0.05 * temporaries(_naive, 256)
    assert own <= 0.05 * temporaries(_jax_nn, 256)
    a_number_a_row = 4 * 4 * 384 * 384
    assert temporaries(evo_attention, 384) <= 2 * a_number_a_row + 24 * 2**20


@pytest.mark.latest
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowered_for_gpus_without_one(platform):
    """Also where the kernels are asked for by name."""
    for implementation in (None, "triton"):
        attend = functools.partial(evo_attention, implementation=implementation)
        shapes = _shapes((2, 3, 23, 2, 24), mask=jnp.dtype(bool), bias_dtype=jnp.float32)
        lowered = jax.jit(_gradients(attend)).trace(*shapes).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        assert sorted(set(re.findall(r"\bevo_attention\w*", text)) & set(KERNELS)) == KERNELS


def _compile(shapes):
    return plan.compile(_gradients(evo_attention), *shapes, target=plan.target("h100"), labels=["input"] * len(shapes))


# Registers of the kernels in the order of `KERNELS`: more would mean fewer programs at one time.
LIMITS = {
    (1, 384, 384, 4, 16): (128, 168, 128, 128),
    (1, 384, 384, 4, 32): (128, 168, 128, 128),
    (1, 48, 384, 16, 48): (128, 168, 168, 168),
    (1, 384, 384, 4, 128): (168, 255, 255, 255),
}


@needs_aot
@needs_ptxas
@pytest.mark.latest
@pytest.mark.parametrize("shape", LIMITS)
def test_compiled_for_h100(shape):
    made = _compile(_shapes(shape))
    assert made.bytes["temporaries"] <= 24 * 2**20
    assert [kernel.name for kernel in made.kernels] == KERNELS
    for kernel, limit in zip(made.kernels, LIMITS[shape]):
        assert kernel.registers <= limit, kernel.name
        assert kernel.spill_bytes == 0
        assert any(name.startswith("wgmma") for name in kernel.ptx_instructions), kernel.name
        assert any(name.startswith("cp.async.cg") for name in kernel.ptx_instructions), kernel.name
        assert not any(name.startswith(("atom", "red.")) for name in kernel.ptx_instructions), kernel.name


@needs_aot
@needs_ptxas
def test_two_numbers_a_row_are_all_that_is_kept():
    """Of the triangle attention of 2048 residues: log-sum-exp and delta; nothing of the order of the logits."""
    made = _compile(_shapes((1, 2048, 2048, 4, 32)))
    assert made.bytes["temporaries"] <= 2 * 4 * 4 * 2048 * 2048 + 2**20


@needs_aot
@needs_ptxas
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 190, 190, 4, 24), {"mask": jnp.dtype(bool), "bias_dtype": jnp.float32}),
        ((1, 341, 341, 4, 32), {"mask": jnp.dtype(jnp.float32), "dtype": jnp.float32}),
        ((1, 3072, 3072, 4, 64), {}),  # arrays beyond 4 GiB are addressed in 64 bits
        ((1, 1, 384, 16, 24), {"mask": jnp.dtype(bool)}),
    ],
)
def test_awkward_shapes_compiled_for_h100(shape, options):
    made = _compile(_shapes(shape, **options))
    single = shape[1] == 1
    assert [kernel.name for kernel in made.kernels] == [name for name in KERNELS if not (single and "dbias" in name)]
    assert all(kernel.tensor_core and kernel.spill_bytes == 0 for kernel in made.kernels)
