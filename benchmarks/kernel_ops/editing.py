"""What an edit of an image spends its time in beside convolutions (InstantEdit)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import instantedit_kernels as shapes
from benchmarks.kernel_ops.op import Op
from pallas_kernels.attention_with_map import attention_with_map
from pallas_kernels.dpg_ili_update import dpg_ili_update
from pallas_kernels.flash_self_attention import flash_self_attention
from tests.oracles import attention_with_map as map_oracle
from tests.oracles import dpg_ili_update as update_oracle


def _self(q, k, v, *, implementation=None):
    if implementation == "jax":
        return jax.nn.dot_product_attention(q, k, v)
    return flash_self_attention(q, k, v, implementation=implementation)


def _self_exact(q, k, v, d_out):
    no_map = np.zeros((*q.shape[:2], k.shape[1]))
    return map_oracle.attention(q, k, v)[0], *map_oracle.gradients(q, k, v, d_out, no_map)


def _map_exact(q, k, v, cotangents):
    return *map_oracle.attention(q, k, v), *map_oracle.gradients(q, k, v, *cotangents)


def _update_gpu_shapes():
    return jax.eval_shape(functools.partial(shapes.latents, 4, 64))


OPS = (
    Op(
        name="flash_self_attention",
        what="Attention of an image's places to each other (Stable Diffusion): no mask, heads of 40, 80 and 160.",
        function=_self,
        implementations=("xla", "reference", "jax"),
        peer="jax",
        gpu_implementations=("triton", "jax", "xla", "reference"),
        arrays=lambda: shapes.arrays(shapes.self_attention(1, 1024, 80)[:3]),
        shape="1 row of 1024 places, 8 heads, 80 wide",
        oracle=_self_exact,
        differentiate=(0, 1, 2),
        gpu_shapes=functools.partial(shapes.self_attention, 4, 4096, 40, jnp.bfloat16),
        gpu_shape="4 rows of 4096 places, 8 heads, 40 wide, bfloat16",
        notes=(
            "`jax` is `jax.nn.dot_product_attention`. The kernels are those of `flash_attention`, which pad a head in "
            "registers. On a CPU one head at a time meets all its keys, 512 rows at once: nothing is rescaled, and no "
            "array is transposed or padded."
        ),
    ),
    Op(
        name="attention_with_map",
        what="Attention to the words of a prompt, and the head means of its probabilities (InstantEdit).",
        function=attention_with_map,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=lambda: shapes.arrays(shapes.with_map(4, 256, 160)[:3]),
        shape="4 rows of 256 places, 77 words, 8 heads, 160 wide",
        oracle=_map_exact,
        differentiate=(0, 1, 2),
        gpu_shapes=functools.partial(shapes.with_map, 4, 256, 160, jnp.bfloat16),
        gpu_shape="4 rows of 256 places, 77 words, 8 heads, 160 wide, bfloat16",
        notes=(
            "Gradients are those of output and map; those of keys and values come from the kernel of `flash_attention`."
        ),
    ),
    Op(
        name="dpg_ili_update",
        what="Disentangled guidance, two steps of PeRFlow, injection and mask (InstantEdit), one program a channel.",
        function=dpg_ili_update,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla"),
        arrays=lambda: shapes.latents(4, 64),
        shape="4 samples of 64 x 64 places, 4 channels",
        oracle=update_oracle.update,
        differentiate=(),
        gpu_shapes=_update_gpu_shapes,
        gpu_shape="4 samples of 64 x 64 places, 4 channels, float32",
        notes=(
            "`xla` and `triton` take differences of branches before anything is rounded: equal branches give the "
            "inverted latents bit for bit, however a compiler contracts and orders what follows."
        ),
    ),
)
