"""Products with packed experts (PuzzleMoE)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_ops.op import Op
from pallas_kernels.packed_moe_matmul import packed_moe_matmul
from tests.oracles import packed_moe_matmul as packed_oracle


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


OPS = (
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
)
