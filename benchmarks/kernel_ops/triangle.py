"""Triangle multiplication (MegaFold)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_ops.op import Op
from pallas_kernels.triangle_multiplication import triangle_multiplication
from tests.oracles.triangle_multiplication import Triangle

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


OPS = (
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
)
