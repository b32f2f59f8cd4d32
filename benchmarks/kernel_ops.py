"""The kernels as docs/kernels.md shows them: inputs for this CPU and for GPUs, oracles, peers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels as shapes
from benchmarks import megafold_fusions as fusions
from pallas_kernels.evo_attention import evo_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.fused_adam import fused_adam
from pallas_kernels.grad_stats import grad_stats
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.packed_moe_matmul import packed_moe_matmul
from pallas_kernels.token_combine import token_combine
from pallas_kernels.token_gather import token_gather
from pallas_kernels.transition import transition
from pallas_kernels.triangle_multiplication import triangle_multiplication
from tests.oracles import adam as adam_oracle
from tests.oracles import attention as attention_oracle
from tests.oracles import evo_attention as evo_oracle
from tests.oracles import grouped_matmul as grouped_oracle
from tests.oracles import layernorm_fusions as fusions_oracle
from tests.oracles import packed_moe_matmul as packed_oracle
from tests.oracles import token_rows as rows_oracle
from tests.oracles.triangle_multiplication import Triangle


@dataclasses.dataclass(frozen=True)
class Op:
    """A kernel and the inputs on which it is shown.

    Attributes:
      name: of the op.
      what: one sentence.
      function: (*args, implementation=...) -> array, or arrays where it has no gradient.
      implementations: names that run on a CPU.
      peer: the one to which times are compared.
      gpu_implementations: names compiled for GPUs.
      arrays: CPU inputs, float32.
      shape: those in words.
      oracle: (*args, cotangent) -> value and gradients, float64; without gradients (*args) -> values.
      differentiate: positions of the arguments with gradients; none for an op that has no gradient.
      gpu_shapes: arguments and, last, the cotangent (if there are gradients) of the programs compiled for GPUs.
      gpu_shape: those in words.
      notes: what else a reader should know.
    """

    name: str
    what: str
    function: Callable[..., Any]
    implementations: tuple[str, ...]
    peer: str
    gpu_implementations: tuple[str, ...]
    arrays: Callable[[], tuple[jax.Array, ...]]
    shape: str
    oracle: Callable[..., Sequence[np.ndarray]]
    differentiate: tuple[int, ...]
    gpu_shapes: Callable[[], tuple[jax.ShapeDtypeStruct, ...]]
    gpu_shape: str
    notes: str = ""


def _grouped(lhs, rhs, sizes, cotangent):
    return (
        grouped_oracle.grouped_matmul(lhs, rhs, sizes),
        *grouped_oracle.gradients(lhs, rhs, sizes, cotangent),
    )


def _attention(q, k, v, cotangent):
    return (attention_oracle.attention(q, k, v), *attention_oracle.attention_gradients(q, k, v, cotangent))


def _attention_arrays():
    rng = np.random.default_rng(0)
    shapes_ = ((1, 256, 4, 32), (1, 256, 2, 32), (1, 256, 2, 32))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes_)


def _attention_gpu_shapes():
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return array((1, 8192, 16, 128)), array((1, 8192, 4, 128)), array((1, 8192, 4, 128)), array((1, 8192, 16, 128))


def _evo(q, k, v, bias, *, implementation=None):
    return evo_attention(q, k, v, None, bias, implementation=implementation)


def _evo_exact(q, k, v, bias, cotangent):
    dq, dk, dv, _, d_bias = evo_oracle.gradients(q, k, v, None, bias, cotangent)
    return evo_oracle.evo_attention(q, k, v, None, bias)[0], dq, dk, dv, d_bias


def _evo_shapes(length, dim, dtype):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    q = array((1, length, length, 4, dim))
    return q, q, q, array((1, 1, 4, length, length)), q


def _evo_arrays():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in _evo_shapes(64, 32, jnp.float32)[:4])


_TRIANGLE = ("ln_in", "w_proj", "w_gate", "ln_out", "w_out", "w_out_gate")


def _triangle(z, *weights, implementation=None):
    return triangle_multiplication(z, **_triangle_weights(weights), implementation=implementation)


def _triangle_weights(leaves):
    (scale_in, offset_in, w_proj, w_gate, scale_out, offset_out, w_out, w_out_gate) = leaves
    return dict(zip(_TRIANGLE, ((scale_in, offset_in), w_proj, w_gate, (scale_out, offset_out), w_out, w_out_gate)))


def _triangle_exact(z, *rest):
    *weights, cotangent = rest
    made = Triangle(z, None, **_triangle_weights(weights), direction="outgoing")
    gradients = made.gradients(cotangent)
    return made.out, *(leaf for name in ("z", *_TRIANGLE) for leaf in jax.tree.leaves(gradients[name]))


def _triangle_shapes(n, c, f, dtype):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    pairs, weights = jax.ShapeDtypeStruct((1, n, n, c), dtype), ((c,), (c,), (c, 2 * f), (c, 2 * f), (f,), (f,))
    return pairs, *map(array, (*weights, (f, c), (c, c))), pairs


def _triangle_arrays():
    rng = np.random.default_rng(0)
    given = _triangle_shapes(96, 64, 64, jnp.float32)[:-1]
    return tuple(jnp.asarray(rng.normal(size=x.shape) / max(1, x.shape[0] ** 0.5), x.dtype) for x in given)


def _packed(x, words, sizes, slots, members, cotangent):
    experts = packed_oracle.matrices(words, None, slots, members)
    return packed_oracle.product(x, experts, sizes), packed_oracle.gradient(experts, sizes, cotangent)


def _packed_arrays():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 512)), jnp.float32)
    # Any signs and masks, magnitudes below 2.
    words = jnp.asarray((rng.integers(0, 2**16, (4, 512, 512)) & ~0x0800).astype(np.uint16))
    sizes, (slots, members) = rng.multinomial(256, np.full(8, 1 / 8)), np.divmod(np.arange(8), 2)
    return x, words, *(jnp.asarray(array, jnp.int32) for array in (sizes, slots, members))


def _packed_gpu_shapes():
    array, half = jax.ShapeDtypeStruct, jnp.bfloat16
    places = [array((8,), jnp.int32)] * 3
    return array((4096, 512), half), array((4, 512, 256), jnp.uint16), *places, array((4096, 256), half)


def _coded(x, codes, scales, sizes, slots, members, *, implementation=None):
    return packed_moe_matmul(x, codes, sizes, slots, members, scales=scales, implementation=implementation)


def _of_codes(bits, x, codes, scales, sizes, slots, members, cotangent):
    experts = np.stack([packed_oracle.codes(codes[s], scales[s], p, bits) for s, p in zip(slots, members)])
    return packed_oracle.product(x, experts, sizes), packed_oracle.gradient(experts, sizes, cotangent)


def _code_arrays(bits):
    rng = np.random.default_rng(0)
    x, _, *places = _packed_arrays()
    codes = jnp.asarray(rng.integers(0, 256, (4, 512 * bits // 8, 512), np.uint8))
    return x, codes, jnp.asarray(rng.uniform(1, 2, (4, 4, 512)), jnp.bfloat16), *places


def _code_gpu_shapes(bits):
    x, _, *rest = _packed_gpu_shapes()
    array = jax.ShapeDtypeStruct
    return x, array((4, 512 * bits // 8, 256), jnp.uint8), array((4, 4, 256), jnp.bfloat16), *rest


def _op_of_codes(bits: int) -> Op:
    return Op(
        name=f"packed_moe_matmul, {bits} bits",
        what=f"The same of quantised pairs, {bits} bits a position and a scale for 128 inputs.",
        function=_coded,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton",),
        arrays=functools.partial(_code_arrays, bits),
        shape="256 rows, 8 experts of uneven load in 4 slots, 512 x 512 matrices",
        oracle=functools.partial(_of_codes, bits),
        differentiate=(0,),
        gpu_shapes=functools.partial(_code_gpu_shapes, bits),
        gpu_shape="4096 rows, 8 experts in 4 slots, 512 x 256 matrices, bfloat16 rows",
    )


def _adam(p, m, v, g, *, implementation=None):
    hyper = {"count": 9, "lr": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    return fused_adam(p, m, v, g, **hyper, implementation=implementation)[:3]  # the copy is p, rounded


def _adam_values(p, m, v, g):
    return adam_oracle.step(p, m, v, g, t=10, lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def _adam_arrays():
    rng = np.random.default_rng(0)
    p, m, v, g = (jnp.asarray(rng.normal(size=1 << 20), jnp.float32) for _ in range(4))
    return p, 0.1 * m, jnp.square(v), g


def _adam_gpu_shapes():
    return (*[jax.ShapeDtypeStruct((1 << 24,), jnp.float32)] * 3, jax.ShapeDtypeStruct((1 << 24,), jnp.bfloat16))


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


def _linear(x, scale, offset, w, cotangent):
    *gradients, _ = fusions_oracle.layernorm_linear_gradients(x, scale, offset, w, np.zeros(w.shape[1]), cotangent)
    return fusions_oracle.layernorm_linear(x, scale, offset, w, np.zeros(w.shape[1])), *gradients


def _transition(*args):
    return fusions_oracle.transition(*args[:-1]), *fusions_oracle.transition_gradients(*args)


def _fusion_arrays(op, *sizes):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in fusions.shapes(op, *sizes)[:-1]]
    return (*arrays[:3], *(w / np.sqrt(w.shape[0]) for w in arrays[3:]))


def _fusion_gpu_shapes(op, *sizes):
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in fusions.shapes(op, *sizes))


_PARTIAL_SUMS = "The temporaries of the gradients are two numbers a row and the partial sums of the weights' gradients."


def _op_of_fusion(
    name: str,
    what: str,
    function: Callable[..., Any],
    oracle: Callable[..., Sequence[np.ndarray]],
    sizes: tuple[int, ...],
    shape: str,
    gpu_sizes: tuple[int, ...],
    gpu_shape: str,
    notes: str = "",
) -> Op:
    return Op(
        name=name,
        what=what,
        function=function,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "reference"),
        arrays=functools.partial(_fusion_arrays, function, *sizes),
        shape=shape,
        oracle=oracle,
        differentiate=tuple(range(4 if function is layernorm_linear else 5)),
        gpu_shapes=functools.partial(_fusion_gpu_shapes, function, *gpu_sizes),
        gpu_shape=gpu_shape,
        notes=notes,
    )


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
    Op(
        name="flash_attention",
        what="Attention without the matrix of weights, causal, grouped heads.",
        function=flash_attention,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=_attention_arrays,
        shape="1 row of 256 tokens, 4 heads over 2 of keys and values, 32 wide, causal",
        oracle=_attention,
        differentiate=(0, 1, 2),
        gpu_shapes=_attention_gpu_shapes,
        gpu_shape="1 row of 8192 tokens, 16 heads over 4, 128 wide, causal, bfloat16",
    ),
    Op(
        name="evo_attention",
        what="Attention whose rows share an additive pair bias that takes a gradient (MegaFold).",
        function=_evo,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=_evo_arrays,
        shape="64 rows of 64 residues, 4 heads, 32 wide",
        oracle=_evo_exact,
        differentiate=(0, 1, 2, 3),
        gpu_shapes=functools.partial(_evo_shapes, 384, 32, jnp.bfloat16),
        gpu_shape="384 rows of 384 residues, 4 heads, 32 wide, bfloat16",
        notes=(
            "For comparison: tokamax (0.0.12, same shape, H100, JAX 0.10.2) takes 439 MiB for output and gradients "
            "with its Triton kernels, 2023 MiB with its chunked XLA form."
        ),
    ),
    Op(
        name="triangle_multiplication",
        what="Triangle multiplication of a pair representation (MegaFold): normalisations, gates and products.",
        function=_triangle,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=_triangle_arrays,
        shape="96 x 96 pairs of 64 channels, 64 hidden, outgoing",
        oracle=_triangle_exact,
        differentiate=tuple(range(9)),
        gpu_shapes=functools.partial(_triangle_shapes, 384, 128, 128, jnp.bfloat16),
        gpu_shape="384 x 384 pairs of 128 channels, 128 hidden, outgoing, bfloat16",
        notes="A channel-major array of the hidden channels takes 36 MiB; the gradients hold four of them at most.",
    ),
    Op(
        name="packed_moe_matmul",
        what="Rows times the bit-packed matrix of their expert (PuzzleMoE), decoded on the way.",
        function=packed_moe_matmul,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton",),
        arrays=_packed_arrays,
        shape="256 rows, 8 experts of uneven load in 4 slots, 512 x 512 matrices",
        oracle=_packed,
        differentiate=(0,),
        gpu_shapes=_packed_gpu_shapes,
        gpu_shape="4096 rows, 8 experts in 4 slots, 512 x 256 matrices, bfloat16 rows",
    ),
    *map(_op_of_codes, (8, 6)),
    Op(
        name="fused_adam",
        what="One AdamW step on a flat bucket (SuperOffload): parameters, moments and a bfloat16 copy in one pass.",
        function=_adam,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=_adam_arrays,
        shape="1048576 parameters",
        oracle=_adam_values,
        differentiate=(),
        gpu_shapes=_adam_gpu_shapes,
        gpu_shape="16777216 parameters (64 MiB of float32), bfloat16 gradients",
        notes="`xla` rounds every product before it is added, so that its bits are those of the C++ host step.",
    ),
    Op(
        name="grad_stats",
        what="Sum of squares and finiteness of a gradient bucket (SuperOffload), in a fixed order.",
        function=grad_stats,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=lambda: _adam_arrays()[:1],
        shape="1048576 elements",
        oracle=lambda g: (np.sum(np.square(g)), np.isfinite(g).all()),
        differentiate=(),
        gpu_shapes=lambda: _adam_gpu_shapes()[:1],
        gpu_shape="16777216 float32 elements",
    ),
    _op_of_fusion(
        "layernorm_linear",
        "LayerNorm and the product after it (MegaFold), the normalised rows never stored.",
        layernorm_linear,
        _linear,
        (16384, 128, 16),
        "16384 rows of 128 channels to 16",
        fusions.LINEAR,
        "147456 rows (384 x 384 pairs) of 128 channels to 16, bfloat16",
        notes=_PARTIAL_SUMS,
    ),
    _op_of_fusion(
        "layernorm_linear, long rows",
        "The same of rows that no core holds whole.",
        layernorm_linear,
        _linear,
        (1024, 768, 512),
        "1024 rows of 768 channels to 512",
        (18432, 768, 1536),
        "18432 rows (48 samples of 384 tokens) of 768 channels to 1536, bfloat16",
    ),
    _op_of_fusion(
        "transition",
        "AlphaFold 3's transition (MegaFold): LayerNorm, SwiGLU and the way back, no hidden layer stored.",
        transition,
        _transition,
        (4096, 128, 512),
        "4096 rows of 128 channels, 512 hidden units",
        (147456, 128, 512),
        "147456 rows (384 x 384 pairs) of 128 channels, 512 hidden units, bfloat16",
        notes=_PARTIAL_SUMS,
    ),
    _op_of_fusion(
        "transition, long rows",
        "The same of rows that no core holds whole: by chunks, with the kernels of `layernorm_linear`.",
        transition,
        _transition,
        (512, 768, 1536),
        "512 rows of 768 channels, 1536 hidden units",
        (18432, 768, 1536),
        "18432 rows (48 samples of 384 tokens) of 768 channels, 1536 hidden units, bfloat16",
    ),
)
