"""Products and rows of expert layers (X-MoE)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels as shapes
from benchmarks.kernel_ops.op import Op
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.token_combine import token_combine
from pallas_kernels.token_gather import token_gather
from tests.oracles import grouped_matmul as grouped_oracle
from tests.oracles import token_rows as rows_oracle


def _grouped(lhs, rhs, sizes, cotangent):
    return (
        grouped_oracle.grouped_matmul(lhs, rhs, sizes),
        *grouped_oracle.gradients(lhs, rhs, sizes, cotangent),
    )


def _swiglu(lhs, rhs, rhs_up, sizes, *, implementation=None):
    return grouped_matmul(lhs, rhs, sizes, rhs_up=rhs_up, act="silu", implementation=implementation)


def _gated(lhs, rhs, rhs_up, sizes, cotangent):
    gradients = grouped_oracle.gated_gradients(lhs, rhs, rhs_up, sizes, "silu", cotangent)
    return grouped_oracle.gated(lhs, rhs, rhs_up, sizes, "silu"), *gradients


def _gated_arrays():
    lhs, rhs, sizes = shapes.grouped_inputs()
    return lhs / np.sqrt(shapes.K), rhs, rhs[::-1], sizes


def _gated_gpu_shapes():
    lhs, rhs, sizes, cotangent = shapes.gpu_shapes()
    return lhs, rhs, rhs, sizes, cotangent


def _gather(x, token_ids, inv, num_valid, cotangent):
    value = rows_oracle.gather(x, token_ids, num_valid)
    return value, rows_oracle.gather_gradient(cotangent, token_ids, num_valid, len(x))


def _gather_arrays():
    rng = np.random.default_rng(0)
    made = rows_oracle.buffer(rng, 1024, 6)
    return (jnp.asarray(rng.normal(size=(1024, 128)), jnp.float32), *map(jnp.asarray, (made.token_ids, made.inv, 6144)))


def _combine(y, weights, inv, slots, num_valid, cotangent):
    value = rows_oracle.combine(y, weights, slots, num_valid)
    return value, *rows_oracle.combine_gradients(y, weights, slots, num_valid, cotangent)


def _combine_arrays():
    rng = np.random.default_rng(0)
    made = rows_oracle.buffer(rng, 1024, 6)
    floats = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6144, 128), (1024, 6)))
    return (*floats, *map(jnp.asarray, (made.inv, made.slots, 6144)))


def _token_gpu_shapes(op):
    tokens, rows = (jax.ShapeDtypeStruct((count, 2048), jnp.bfloat16) for count in (4096, 4096 * 6))
    weights = jax.ShapeDtypeStruct((4096, 6), jnp.float32)
    ids, inv, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4096 * 6,), (4096, 6), ()))
    return (tokens, ids, inv, count, rows) if op is token_gather else (rows, weights, inv, ids, count, tokens)


OPS = (
    Op(
        name="grouped_matmul",
        what="Rows times the matrix of their group: the expert layers of a mixture of experts.",
        function=grouped_matmul,
        implementations=("xla", "reference", "ragged_dot"),
        peer="ragged_dot",
        gpu_implementations=("triton", "ragged_dot"),
        arrays=shapes.grouped_inputs,
        shape=f"{shapes.M} rows, {shapes.G} groups of uneven size, {shapes.K} x {shapes.N} matrices",
        oracle=_grouped,
        differentiate=(0, 1),
        gpu_shapes=shapes.gpu_shapes,
        gpu_shape="4096 rows, 8 groups, 512 x 256 matrices, bfloat16",
        notes=(
            "For comparison: tokamax's Triton kernels (0.0.12, same shape, H100, JAX 0.10.2) use 164 to 166 registers, "
            "take 2.0 MiB of temporaries for both gradients, and do not spill."
        ),
    ),
    Op(
        name="grouped_matmul, gated",
        what="silu(rows times one matrix of their group) * (rows times another): the first half of a gated expert.",
        function=_swiglu,
        implementations=("xla", "reference", "ragged_dot"),
        peer="ragged_dot",
        gpu_implementations=("triton", "ragged_dot"),
        arrays=_gated_arrays,
        shape=f"{shapes.M} rows, {shapes.G} groups of uneven size, two matrices of {shapes.K} x {shapes.N}",
        oracle=_gated,
        differentiate=(0, 1, 2),
        gpu_shapes=_gated_gpu_shapes,
        gpu_shape="4096 rows, 8 groups, two matrices of 512 x 256, bfloat16",
        notes="The forward pass stores the result alone. For gradients both products are kept; theirs replace them.",
    ),
    Op(
        name="token_gather",
        what="Rows of tokens laid out expert after expert (X-MoE); the gradient adds each token's rows, gathered.",
        function=token_gather,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=_gather_arrays,
        shape="1024 tokens of 128 features, 6 experts each",
        oracle=_gather,
        differentiate=(0,),
        gpu_shapes=functools.partial(_token_gpu_shapes, token_gather),
        gpu_shape="4096 tokens of 2048 features, 6 experts each, bfloat16",
    ),
    Op(
        name="token_combine",
        what="The weighted sum of each token's rows (X-MoE); gradients are a gather and a dot product a row.",
        function=token_combine,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=_combine_arrays,
        shape="1024 tokens of 128 features, 6 experts each",
        oracle=_combine,
        differentiate=(0, 1),
        gpu_shapes=functools.partial(_token_gpu_shapes, token_combine),
        gpu_shape="4096 tokens of 2048 features, 6 experts each, bfloat16",
    ),
)
