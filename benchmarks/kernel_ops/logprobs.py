"""Log-probabilities of tokens without their logits (SFPO)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sfpo_kernel
from benchmarks.kernel_ops.op import Op
from pallas_kernels.logprob_entropy import logprob_entropy
from tests.oracles import logprob_entropy as logprob_oracle


def _logprobs(hidden, head, targets, *, implementation=None):
    return jnp.stack(logprob_entropy(hidden, head, targets, implementation=implementation))


def _logprobs_exact(hidden, head, targets, cotangent):
    *gradients, _ = logprob_oracle.gradients(hidden, head, targets, 1.0, *cotangent)
    return np.stack(logprob_oracle.logprob_entropy(hidden, head, targets, 1.0)), *gradients


def _logprobs_gpu_shapes():
    args = sfpo_kernel.abstract(jnp.bfloat16)
    return *args, jax.ShapeDtypeStruct((3, sfpo_kernel.ROWS), jnp.float32)


OPS = (
    Op(
        name="logprob_entropy",
        what="Log-probabilities of tokens, entropy and log-sum-exp (SFPO), the logits never stored.",
        function=_logprobs,
        implementations=("xla", "reference"),
        peer="reference",
        gpu_implementations=("triton", "xla", "reference"),
        arrays=functools.partial(sfpo_kernel.arrays, shape=(2048, 64, 4096)),
        shape="2048 tokens of 64 features, 4096 words",
        oracle=_logprobs_exact,
        differentiate=(0, 1),
        gpu_shapes=_logprobs_gpu_shapes,
        gpu_shape="1024 tokens of 576 features, 49152 words, bfloat16",
        notes="Both gradients are plain products of a stored part of the logits' gradient, of 16 MiB at most.",
    ),
)
