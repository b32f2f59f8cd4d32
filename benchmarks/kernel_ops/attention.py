"""Attention, causal or with a pair bias (MegaFold)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_ops.op import Op
from pallas_kernels.evo_attention import evo_attention
from pallas_kernels.flash_attention import flash_attention
from tests.oracles import attention as attention_oracle
from tests.oracles import evo_attention as evo_oracle


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


OPS = (
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
)
