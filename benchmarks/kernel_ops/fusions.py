"""LayerNorm and what follows it (MegaFold)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import megafold_fusions as fusions
from benchmarks.kernel_ops.op import Op
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.transition import transition
from tests.oracles import layernorm_fusions as fusions_oracle


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
