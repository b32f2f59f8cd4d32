"""Attention: causal, with a pair bias (MegaFold), within windows, over a shared prompt (VLM scaling), over pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import voltanallm_kernel as paged
from benchmarks.kernel_ops.op import Op
from pallas_kernels.evo_attention import evo_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.shared_prefix_attention import shared_prefix_attention
from pallas_kernels.varlen_attention import varlen_attention
from tests.oracles import attention as attention_oracle
from tests.oracles import evo_attention as evo_oracle
from tests.oracles import paged_attention as paged_oracle
from tests.oracles import shared_prefix_attention as shared_oracle
from tests.oracles import varlen_attention as varlen_oracle


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


def _varlen(q, k, v, offsets, *, implementation=None):
    return varlen_attention(q, k, v, offsets, max_length=64, implementation=implementation)


def _varlen_exact(q, k, v, offsets, cotangent):
    return varlen_oracle.attention(q, k, v, offsets), *varlen_oracle.gradients(q, k, v, offsets, cotangent)


def _varlen_arrays():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1024, 4, 32)), jnp.float32) for _ in range(3))
    return q, k, v, jnp.arange(0, 1025, 64, dtype=jnp.int32)


def _varlen_gpu_shapes():
    q = jax.ShapeDtypeStruct((4096, 16, 80), jnp.bfloat16)
    return q, q, q, jax.ShapeDtypeStruct((65,), jnp.int32), q


def _shared(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, *, implementation=None):
    """Of keys and values with heads before tokens, as a cache holds them."""
    prefix = (x.swapaxes(1, 2) for x in (prefix_k, prefix_v))
    suffix = (x.swapaxes(2, 3) for x in (suffix_k, suffix_v))
    return shared_prefix_attention(q, *prefix, prefix_lengths, *suffix, suffix_lengths, implementation=implementation)


def _shared_exact(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths):
    prefix = (x.swapaxes(1, 2) for x in (prefix_k, prefix_v))
    suffix = (x.swapaxes(2, 3) for x in (suffix_k, suffix_v))
    return (shared_oracle.attention(q, *prefix, prefix_lengths, *suffix, suffix_lengths),)


def _shared_shapes(samples, heads, kv_heads, dim, prefix, suffix, dtype):
    array, lengths = (functools.partial(jax.ShapeDtypeStruct, dtype=x) for x in (dtype, jnp.int32))
    keys, own = array((1, kv_heads, prefix, dim)), array((1, samples, kv_heads, suffix, dim))
    return array((1, samples, heads, dim)), keys, keys, lengths((1,)), own, own, lengths((1, samples))


def _shared_arrays():
    rng = np.random.default_rng(0)
    given = _shared_shapes(16, 4, 2, 32, 512, 64, jnp.float32)
    arrays = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in given]
    arrays[3], arrays[6] = jnp.full((1,), 500), jnp.full((1, 16), 50)
    return tuple(arrays)


def _paged(*args, implementation=None):
    """Of one layer of several."""
    if implementation == "jax":
        return (paged.jax_kernel(*args),)
    return (paged_attention(*args[:5], layer=args[5], implementation=implementation),)


def _paged_exact(q, k_pages, v_pages, page_table, lengths, layer):
    return (paged_oracle.attention(q, k_pages[layer], v_pages[layer], page_table, lengths),)


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
    Op(
        name="varlen_attention",
        what="Attention within runs of rows (Qwen2.5-VL): windows of images, images of a batch.",
        function=_varlen,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=_varlen_arrays,
        shape="16 windows of 64 rows, 4 heads, 32 wide",
        oracle=_varlen_exact,
        differentiate=(0, 1, 2),
        gpu_shapes=_varlen_gpu_shapes,
        gpu_shape="64 windows of up to 64 rows in 4096, 16 heads, 80 wide, bfloat16",
        notes="The kernels are those of `flash_attention`, with tiles of 64 x 64.",
    ),
    Op(
        name="shared_prefix_attention",
        what="One step of decoding of samples that share a prompt, whose keys are read once.",
        function=_shared,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=_shared_arrays,
        shape="16 samples, 4 heads over 2 of keys and values, 32 wide, 500 keys shared, 50 of each",
        oracle=_shared_exact,
        differentiate=(),
        gpu_shapes=functools.partial(_shared_shapes, 16, 16, 2, 128, 2048, 256, jnp.bfloat16),
        gpu_shape="16 samples, 16 heads over 2, 128 wide, 2048 keys shared, 256 of each, bfloat16",
    ),
    Op(
        name="paged_attention",
        what="One step of decoding over a layer of a paged cache (VoltanaLLM's engine).",
        function=_paged,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "jax", "xla", "reference"),
        arrays=functools.partial(paged.arrays, (32, 4, 2, 64, 16, 32, 512)),
        shape="32 rows of 8 to 512 tokens in pages of 16, 4 heads over 2 of keys and values, 64 wide, 4 layers",
        oracle=_paged_exact,
        differentiate=(),
        gpu_shapes=paged.abstract,
        gpu_shape="16 rows of up to 2048 tokens in pages of 16, 32 heads over 8, 128 wide, 4 layers, bfloat16",
        notes=(
            "`jax` is `jax.experimental.pallas.ops.gpu.paged_attention`. It takes the pages of one layer, which have "
            "to be copied out of the cache, divides tables rather than rows among its programs, and keeps what each of "
            "them gives in q's dtype. It does not take q and pages of different dtypes, heads whose size is no power "
            "of two, or tables that its number of programs does not divide. `triton` is what `None` takes."
        ),
    ),
)
