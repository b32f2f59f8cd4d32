"""SuperOffload's host AdamW against torch, DeepSpeed and Optax, and what its cast and its undo log cost.

All take their turns in one process on buckets of the same size; a figure is the best of its rounds, because what these
loops wait for, memory bandwidth, is shared with everything else on the machine. DeepSpeed takes part where it is
installed (it is no extra of this library: it compiles its optimizer itself).
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Case
from jaxlab.superoffload import AdamHyper, SpeculativeState, commit, fused_adamw, speculate

SYSTEM = "superoffload"
HYPER = {"lr": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
_BYTES = 28  # a parameter: reads of p, m, v and g, writes of p, m and v


def fastest(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least seconds of each, called in turn after one round of warm-up."""
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def arrays(n: int) -> tuple[jax.Array, ...]:
    """p, m, v as after some steps, and g."""
    rng = np.random.default_rng(0)
    p, m, v, g = (rng.standard_normal(n, dtype=np.float32) for _ in range(4))
    return tuple(map(jnp.asarray, (0.02 * p, 0.1 * m, np.square(v) + np.float32(0.1), g)))


def ours(n: int, backend: str, emit: Any = None) -> Callable[[], Any]:
    """In place; a copy takes the memory of the one before it."""
    *state, g = arrays(n)
    cast = None if emit is None else jnp.zeros(n, emit)
    step = functools.partial(fused_adamw, backend=backend, emit_dtype=emit, **HYPER)
    jitted = jax.jit(
        lambda p, m, v, cast, g, count: step(p, m, v, g, count=count), donate_argnums=(0, 1, 2, 3), keep_unused=True
    )

    def run():
        nonlocal state, cast
        *state, cast = jitted(*state, cast, g, 100)
        return state

    return run


def speculative(n: int) -> tuple[Callable[[], Any], Callable[[], float]]:
    """A speculation that is committed, residual and in place; and the bytes a parameter of its log."""
    p, m, v, g = arrays(n)
    state, log, hyper = SpeculativeState((p,), (m,), (v,), jnp.int32(100)), None, AdamHyper(**HYPER)

    def run():
        nonlocal state, log
        state, log = speculate(state, (g,), hyper, undo="residual", donate=True, reuse=log)
        state = commit(state)
        return state

    return run, lambda: log.nbytes / n


def optax_step(n: int, *, jitted: bool) -> Callable[[], Any]:
    """`optax.adamw` and `apply_updates`."""
    p, _, _, g = arrays(n)
    tx = optax.adamw(HYPER["lr"], HYPER["b1"], HYPER["b2"], HYPER["eps"], weight_decay=HYPER["weight_decay"])
    state = tx.init(p)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jitted else step

    def run():
        nonlocal p, state
        p, state = step(p, state, g)
        return p

    return run


def torch_step(n: int, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """A torch optimizer on one parameter."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    p, _, _, g = arrays(n)
    parameter = torch.nn.Parameter(torch.from_numpy(np.array(p)))
    parameter.grad = torch.from_numpy(np.array(g))
    return make([parameter]).step


def torch_adamw(**how: bool) -> Callable[[Any], Any]:
    """`torch.optim.AdamW`, fused or foreach."""
    import torch

    settings = {"lr": HYPER["lr"], "betas": (HYPER["b1"], HYPER["b2"]), "weight_decay": HYPER["weight_decay"]}
    return functools.partial(torch.optim.AdamW, **settings, **how)


def deepspeed_adamw() -> Callable[[Any], Any] | None:
    """DeepSpeed's CPUAdam, where it is installed."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    settings = {"lr": HYPER["lr"], "betas": (HYPER["b1"], HYPER["b2"]), "weight_decay": HYPER["weight_decay"]}
    return functools.partial(DeepSpeedCPUAdam, **settings, adamw_mode=True)


def cases(quick: bool) -> Iterator[Case]:
    """The cases of `python -m benchmarks superoffload_adam`."""
    n, rounds = (1 << 22, 8) if quick else (1 << 24, 25)
    size = f"{n / 2**20:.0f}M parameters"
    made = {"ffi": ours(n, "ffi"), "xla": ours(n, "xla"), "ffi, cast": ours(n, "ffi", "bfloat16")}
    made["speculate"], log_bytes = speculative(n)
    made["optax.adamw, jitted"] = optax_step(n, jitted=True)
    with contextlib.suppress(ImportError):
        made["torch AdamW, fused"] = torch_step(n, torch_adamw(fused=True))
    if (deepspeed := deepspeed_adamw()) is not None:
        made["DeepSpeed CPUAdam"] = torch_step(n, deepspeed)
    times = fastest(made, rounds)

    def against(name: str, own: str, peer: str, bar: float) -> Iterator[Case]:
        if peer in times:
            mine, theirs = (n * _BYTES / times[key] / 1e9 for key in (own, peer))
            yield Case(SYSTEM, f"{name}, {size}", "GB/s at 28 B", mine, theirs, peer, bar=bar, higher_is_better=True)

    for peer in ("torch AdamW, fused", "DeepSpeed CPUAdam"):
        yield from against("host AdamW, ffi", "ffi", peer, 0.9)
    yield from against("host AdamW, xla", "xla", "torch AdamW, fused", 0.6)
    yield from against("host AdamW, xla", "xla", "optax.adamw, jitted", 0.9)
    yield from against("bfloat16 copy in the same pass", "ffi, cast", "ffi", 1 / 1.1)
    yield from against("speculation with residual undo, committed", "speculate", "ffi", 1 / 1.25)
    yield Case(SYSTEM, f"residual undo log, {size}", "bytes a parameter", log_bytes(), 12.0, "copies", bar=3.0)

    slow = {"optax.adamw, eager": optax_step(n, jitted=False)}
    if "torch AdamW, fused" in made:
        slow["torch AdamW, foreach"] = torch_step(n, torch_adamw(foreach=True))
    for peer, bar in (("torch AdamW, foreach", 4.0), ("optax.adamw, eager", 20.0)):
        if peer in slow:
            times |= fastest({"ffi": made["ffi"], peer: slow[peer]}, max(3, rounds // 3))
            yield from against("host AdamW, ffi", "ffi", peer, bar)
