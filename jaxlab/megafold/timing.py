"""Forward and backward pass of the fused operations beside plain JAX, on the device at hand."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.megafold.config import AF3Config
from pallas_kernels.evo_attention import evo_attention
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.transition import transition
from pallas_kernels.triangle_multiplication import triangle_multiplication


def operations(config: AF3Config, tokens: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> (function of `implementation` and arrays, arrays), with the widths of the pair representation."""
    c, heads, width, hidden = config.c_z, config.pair_heads, config.pair_head_dim, config.transition_factor * config.c_z
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    z, ones, zeros = normal(1, tokens, tokens, c), jnp.ones(c), jnp.zeros(c)
    q, k, v = (normal(1, tokens, tokens, heads, width) for _ in range(3))
    bias, w_bias = normal(1, 1, heads, tokens, tokens), normal(c, 4 * heads)
    w_in, w_out = normal(c, 2 * hidden), normal(hidden, c)
    w_proj, w_gate, w_back, w_out_gate = normal(c, 2 * c), normal(c, 2 * c), normal(c, c), normal(c, c)
    return {
        "evo_attention": (
            lambda how, q, k, v, bias: evo_attention(q, k, v, pair_bias=bias, implementation=how),
            (q, k, v, bias),
        ),
        "layernorm_linear": (
            lambda how, z, scale, offset, w: layernorm_linear(z, scale, offset, w, implementation=how),
            (z, ones, zeros, w_bias),
        ),
        "transition": (
            lambda how, z, scale, offset, w_in, w_out: transition(z, scale, offset, w_in, w_out, implementation=how),
            (z, ones, zeros, w_in, w_out),
        ),
        "triangle_multiplication": (
            lambda how, z, norm, w_proj, w_gate, w_out, w_out_gate: triangle_multiplication(
                z,
                ln_in=norm,
                w_proj=w_proj,
                w_gate=w_gate,
                ln_out=norm,
                w_out=w_out,
                w_out_gate=w_out_gate,
                implementation=how,
            ),
            (z, (ones, zeros), w_proj, w_gate, w_back, w_out_gate),
        ),
    }


def compared(config: AF3Config, tokens: int, repeats: int = 3) -> Iterator[tuple[str, float, float, float, float]]:
    """For each operation: ms and temporary MiB of our default, then of plain JAX; medians of calls in turn."""
    for name, (operation, arrays) in operations(config, tokens).items():
        programs = [_compiled(functools.partial(operation, how), arrays) for how in (None, "reference")]
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(repeats + 1):
            for program, taken in zip(programs, times):
                started = time.perf_counter()
                jax.block_until_ready(program(arrays))
                if turn:
                    taken.append(1e3 * (time.perf_counter() - started))
        ours, plain = (program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs)
        yield name, statistics.median(times[0]), ours, statistics.median(times[1]), plain


def _compiled(operation: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """The gradients of all arrays."""
    return jax.jit(jax.grad(lambda arrays: jnp.sum(operation(*arrays) ** 2))).lower(arrays).compile()
