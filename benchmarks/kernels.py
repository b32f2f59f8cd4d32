"""The kernels against what JAX offers: time and temporary bytes on this CPU, temporary bytes compiled for an H100."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.core.errors import MissingExtra
from pallas_kernels.grouped_matmul import grouped_matmul

SYSTEM = "foundation"

# X-MoE's shape: 1024 tokens, 6 of 64 experts each. The bars are the foundation's.
M, K, N, G = 1024 * 6, 128, 88, 64
# Bytes that both gradients may take on an H100 at 4096 x 512 x 256, 8 groups; tokamax's Triton kernels take 2.0 MiB.
GRADIENT_BYTES = 2.5 * 2**20
MIB = 2**20


def grouped_inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, matrices, and the group sizes of an untrained router (uneven, none empty)."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(M, rng.dirichlet(np.full(G, 8.0)))
    lhs, rhs = rng.normal(size=(M, K)), rng.normal(size=(G, K, N))
    return jnp.asarray(lhs, jnp.float32), jnp.asarray(rhs, jnp.float32), jnp.asarray(sizes, jnp.int32)


def gpu_shapes() -> tuple[jax.ShapeDtypeStruct, ...]:
    """lhs, rhs, group sizes and cotangent of the programs compiled for GPUs."""
    array, half = jax.ShapeDtypeStruct, jnp.bfloat16
    return array((4096, 512), half), array((8, 512, 256), half), array((8,), jnp.int32), array((4096, 256), half)


def cases(quick: bool) -> Iterator[Case]:
    """Ours against `lax.ragged_dot`, and against one dense product of the same FLOPs, which no grouping can beat."""
    repeats = 3 if quick else 9
    lhs, rhs, sizes = grouped_inputs()

    def dense(lhs, rhs, sizes):
        return lhs @ rhs[0]

    programs = {
        "ours": grouped_matmul,
        "lax.ragged_dot": functools.partial(grouped_matmul, implementation="ragged_dot"),
        "one dense matmul of the same FLOPs": dense,
    }
    for what, wrap in (("forward", jax.jit), ("forward and both gradients", _with_gradients)):
        compiled = {name: wrap(fn).lower(lhs, rhs, sizes).compile() for name, fn in programs.items()}
        run = {name: functools.partial(fn, lhs, rhs, sizes) for name, fn in compiled.items()}
        bytes_ = {name: temporary_bytes(fn) for name, fn in compiled.items()}
        for peer, bar in (("lax.ragged_dot", 12.0), ("one dense matmul of the same FLOPs", None)):
            ours, theirs = interleaved(run["ours"], run[peer], repeats=repeats, warmup=2)
            yield Case(SYSTEM, f"grouped_matmul {what}, CPU", "ms", ours * 1e3, theirs * 1e3, peer, bar)
        peer = "lax.ragged_dot"
        mib = (bytes_["ours"] / MIB, bytes_[peer] / MIB)
        yield Case(SYSTEM, f"grouped_matmul {what}, CPU", "temporary MiB", *mib, peer, 12.0)

    try:
        ours, peer = gpu_temporaries(None), gpu_temporaries("ragged_dot")
    except MissingExtra:
        return
    for what, bar in (("forward", 8.0), ("gradients", peer["gradients"] / GRADIENT_BYTES)):
        mib = (ours[what] / MIB, peer[what] / MIB)
        yield Case(SYSTEM, f"grouped_matmul {what}, H100", "temporary MiB", *mib, "lax.ragged_dot", bar)


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program allocates beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def gpu_temporaries(implementation: str | None, gpu: str = "h100") -> dict[str, int]:
    """Temporary bytes of the forward pass and of both gradients, compiled for a GPU that need not be there.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    product = functools.partial(grouped_matmul, implementation=implementation)

    def gradients(lhs, rhs, sizes, cotangent):
        return jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)[1](cotangent)

    lhs, rhs, sizes, cotangent = gpu_shapes()
    target = plan.target(gpu)
    return {
        "forward": plan.compile(product, lhs, rhs, sizes, target=target, labels=["input"] * 3).bytes["temporaries"],
        "gradients": plan.compile(gradients, lhs, rhs, sizes, cotangent, target=target, labels=["input"] * 4).bytes[
            "temporaries"
        ],
    }


def _with_gradients(product):
    def run(lhs, rhs, sizes):
        value, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
        return value, pullback(value)

    return jax.jit(run)
