"""MegaFold's fused LayerNorm-linear and transition against the same layers out of Flax's, and out of torch's.

Time and temporary bytes on this CPU in float32, with the value and every gradient asked for; temporaries compiled for
an H100 in bfloat16 (gradients alone). The bars are those of the specification, section 8.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import MIB, temporary_bytes
from jaxlab.core.errors import MissingExtra
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.transition import transition

SYSTEM = "megafold"
PEER = "nn.LayerNorm, nn.Dense"
EPS = 1e-5
# Rows of the pair representation of 384 tokens, 128 channels to 16 heads; of 256 tokens, four times widened.
LINEAR, TRANSITION = (147456, 128, 16), (65536, 128, 512)


def unfused_linear(x: jax.Array, scale: jax.Array, offset: jax.Array, w: jax.Array) -> jax.Array:
    """LN(x) w as Flax's layers."""
    normed = nn.LayerNorm(epsilon=EPS, dtype=x.dtype).apply({"params": {"scale": scale, "bias": offset}}, x)
    dense = nn.Dense(w.shape[1], use_bias=False, dtype=x.dtype)
    return dense.apply({"params": {"kernel": w}}, normed)


def unfused_transition(
    x: jax.Array, scale: jax.Array, offset: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """The transition as Flax's layers."""
    value, gate = jnp.split(unfused_linear(x, scale, offset, w_in), 2, axis=-1)
    dense = nn.Dense(w_out.shape[1], use_bias=False, dtype=x.dtype)
    return dense.apply({"params": {"kernel": w_out}}, nn.silu(gate) * value)


def torch_linear(x: Any, scale: Any, offset: Any, w: Any) -> Any:
    """LN(x) w in torch."""
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, offset, EPS) @ w


def torch_transition(x: Any, scale: Any, offset: Any, w_in: Any, w_out: Any) -> Any:
    """The transition in torch."""
    import torch

    value, gate = torch_linear(x, scale, offset, w_in).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value) @ w_out


def shapes(op: Callable[..., Any], m: int, k: int, n: int) -> tuple[tuple[int, ...], ...]:
    """Of the arguments, and last of the result."""
    if op is layernorm_linear:
        return (m, k), (k,), (k,), (k, n), (m, n)
    return (m, k), (k,), (k,), (k, 2 * n), (n, k), (m, k)


def value_alone(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """(*args, cotangent) -> value."""
    return lambda *args: function(*args[:-1])


def with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(*args, cotangent) -> value and gradients."""

    def run(*args):
        value, pullback = jax.vjp(function, *args[:-1])
        return value, pullback(args[-1])

    return run


def torch_program(function: Callable[..., Any], arrays: list[np.ndarray]) -> Callable[[], Any]:
    """Value and gradients in torch, on as many threads as JAX has."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    *args, cotangent = (torch.from_numpy(a) for a in arrays)
    args = [a.requires_grad_() for a in args]
    return lambda: torch.autograd.grad(function(*args), args, cotangent)


def gpu_temporaries(function: Callable[..., jax.Array], given: tuple[tuple[int, ...], ...]) -> float:
    """Temporary MiB of the gradients in bfloat16, compiled for an H100.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in given]
    program = plan.compile(
        lambda *args: with_gradients(function)(*args)[1],
        *args,
        target=plan.target("h100"),
        labels=["input"] * len(args),
    )
    return program.bytes["temporaries"] / MIB


def cases(quick: bool) -> Iterator[Case]:
    """The cases of `python -m benchmarks megafold_fusions`."""
    ops = (
        ("layernorm_linear", layernorm_linear, unfused_linear, torch_linear, LINEAR, 1 / 0.7, 1 / 1.1),
        ("transition", transition, unfused_transition, torch_transition, TRANSITION, 1 / 0.6, 1 / 1.15),
    )
    repeats = 3 if quick else 9
    for name, op, unfused, in_torch, (m, k, n), memory_bar, time_bar in ops:
        given = shapes(op, m // 16 if quick else m, k, n)
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]) if i in (3, 4) else 1)
                  for i, shape in enumerate(given)]  # fmt: skip
        args = tuple(map(jnp.asarray, arrays))
        title = f"{name} {given[0][0]} x {k} to {n}"
        for what, wrap, bars in (
            ("forward", value_alone, (None, None)),
            ("value and gradients", with_gradients, (memory_bar, time_bar)),
        ):
            compiled = [jax.jit(wrap(f), keep_unused=True).lower(*args).compile() for f in (op, unfused)]
            mib = [temporary_bytes(program) / MIB for program in compiled]
            yield Case(SYSTEM, f"{title}, {what}, CPU", "temporary MiB", *mib, PEER, bars[0])
            ours, theirs = (functools.partial(program, *args) for program in compiled)
            ms = [seconds * 1e3 for seconds in interleaved(ours, theirs, repeats=repeats)]
            yield Case(SYSTEM, f"{title}, {what}, CPU", "ms", *ms, PEER, bars[1])
        with contextlib.suppress(ImportError):
            ms = [seconds * 1e3 for seconds in interleaved(ours, torch_program(in_torch, arrays), repeats=repeats)]
            yield Case(SYSTEM, f"{title}, value and gradients, CPU", "ms", *ms, "torch")
        with contextlib.suppress(MissingExtra):
            mib = [gpu_temporaries(f, shapes(op, m, k, n)) for f in (op, unfused)]
            yield Case(SYSTEM, f"{name} {m} x {k} to {n}, gradients, H100", "temporary MiB", *mib, PEER, memory_bar)
