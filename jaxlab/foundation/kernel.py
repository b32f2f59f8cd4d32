"""The grouped matmul beside its alternatives: time and temporary bytes here, temporaries and registers on an H100."""

import dataclasses
import statistics
import time
from typing import Any

from jaxlab import core


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes; the defaults are one mixture-of-experts layer of X-MoE's small shape.

    Attributes:
      tokens: S.
      top_k: experts a token goes to; S * top_k rows in all.
      experts: E, the groups.
      width: K, columns of the rows.
      ffn: N, columns of the result.
      repeats: timed calls of each implementation, in turn.
      gpu: what the second table compiles for; none: no second table.
      gpu_shape: (M, K, N, G) of the second table.
    """

    tokens: int = 1024
    top_k: int = 6
    experts: int = 64
    width: int = 128
    ffn: int = 88
    repeats: int = 7
    gpu: str | None = "h100"
    gpu_shape: tuple[int, int, int, int] = (4096, 512, 256, 8)


_NAMES = {"xla": "ours (xla)", "ragged_dot": "lax.ragged_dot", "reference": "reference"}


def run(config: KernelConfig) -> core.Report:
    """Times the implementations in turn on this CPU, and compiles the kernels for a GPU if the compiler is there."""
    import jax
    import numpy as np

    from pallas_kernels.grouped_matmul import grouped_matmul

    rows = config.tokens * config.top_k
    random = np.random.default_rng(0)
    sizes = random.multinomial(rows, random.dirichlet(np.full(config.experts, 2.0))).astype(np.int32)
    lhs = jax.numpy.asarray(random.standard_normal((rows, config.width)), jax.numpy.float32)
    shape = (config.experts, config.width, config.ffn)
    rhs = jax.numpy.asarray(random.standard_normal(shape) / config.width**0.5, jax.numpy.float32)
    exact = np.concatenate(
        [
            np.asarray(part, np.float64) @ np.asarray(weight, np.float64)
            for part, weight in zip(np.split(np.asarray(lhs), np.cumsum(sizes)[:-1]), rhs)
        ]
    )

    compiled: dict[str, Any] = {}
    for name in _NAMES:
        function = jax.jit(lambda *args, name=name: grouped_matmul(*args, implementation=name))
        compiled[name] = function.lower(lhs, rhs, sizes).compile()
    times: dict[str, list[float]] = {name: [] for name in compiled}
    error = {}
    for turn in range(config.repeats + 1):
        for name, function in compiled.items():
            started = time.perf_counter()
            out = jax.block_until_ready(function(lhs, rhs, sizes))
            if turn:
                times[name].append(time.perf_counter() - started)
            else:
                error[name] = float(np.abs(np.asarray(out) - exact).max())
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    mib = {name: function.memory_analysis().temp_size_in_bytes / 2**20 for name, function in compiled.items()}
    table = [(_NAMES[name], ms[name], mib[name], error[name]) for name in compiled]
    gpu_tables, gpu_metrics, notes = _on_gpu(config)
    return core.Report(
        system="foundation",
        title="The grouped matmul, heart of every mixture of experts",
        metrics={
            "times_faster_than_ragged_dot": ms["ragged_dot"] / ms["xla"],
            "ms": ms["xla"],
            "temporary_mib": mib["xla"],
            "ragged_dot_temporary_mib": mib["ragged_dot"],
            **gpu_metrics,
        },
        tables=(
            (
                f"Forward on this CPU, f32: {rows} rows x {config.width} by {config.experts} matrices of "
                f"{config.width} x {config.ffn}; median of {config.repeats}, taken in turn",
                ("implementation", "ms", "temporaries, MiB", "largest error"),
                table,
            ),
            *gpu_tables,
        ),
        plots=(
            ("Time, milliseconds", _bars(ms, "ms")),
            ("Temporary memory, MiB", _bars(mib, "MiB")),
        ),
        notes=("Errors are against NumPy in float64.", *notes),
    )


def _on_gpu(config: KernelConfig) -> tuple[tuple[Any, ...], dict[str, float], tuple[str, ...]]:
    """The same op compiled for a GPU that is not here, forward and both gradients; empty without the compiler."""
    import jax
    import jax.numpy as jnp

    from jaxlab.core import plan
    from pallas_kernels.grouped_matmul import grouped_matmul

    if config.gpu is None:
        return (), {}, ()
    try:
        target = plan.target(config.gpu)
    except core.MissingExtra as missing:
        return (), {}, (f"Not compiled for {config.gpu}: {missing}",)
    m, k, n, g = config.gpu_shape
    lhs = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    rhs = jax.ShapeDtypeStruct((g, k, n), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((g,), jnp.int32)
    cotangent = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
    rows, temporaries = [], {}
    for name in ("triton", "ragged_dot"):

        def forward(lhs, rhs, sizes, name=name):
            return grouped_matmul(lhs, rhs, sizes, implementation=name)

        def gradients(lhs, rhs, sizes, cotangent, forward=forward):
            return jax.vjp(lambda lhs, rhs: forward(lhs, rhs, sizes), lhs, rhs)[1](cotangent)

        for what, function, args in (
            ("forward", forward, (lhs, rhs, sizes)),
            ("both gradients", gradients, (lhs, rhs, sizes, cotangent)),
        ):
            made = plan.compile(function, *args, target=target, labels=("input",) * len(args))
            temporaries[name, what] = made.bytes["temporaries"] / 2**20
            registers = ", ".join(str(kernel.registers) for kernel in made.kernels if kernel.registers is not None)
            spills = sum(kernel.spill_bytes or 0 for kernel in made.kernels) if registers else None
            cores = any(kernel.tensor_core for kernel in made.kernels) if made.kernels else None
            rows.append((name, what, temporaries[name, what], registers or None, spills, cores))
    title = f"Compiled for {config.gpu.upper()}, bf16, M={m} K={k} N={n} G={g}: nothing of it ran"
    columns = ("implementation", "pass", "temporaries, MiB", "registers a kernel", "spills, bytes", "tensor cores")
    metrics = {f"{config.gpu}_temporary_mib": temporaries["triton", "forward"]}
    metrics[f"{config.gpu}_ragged_dot_temporary_mib"] = temporaries["ragged_dot", "forward"]
    return ((title, columns, rows),), metrics, ()


def _bars(values: dict[str, float], unit: str) -> Any:
    from jaxlab.core.figures import BLUE, GREY, figure

    drawn, axes = figure(6.4, 2.6)
    names = list(values)[::-1]
    colours = [BLUE if name == "xla" else GREY for name in names]
    bars = axes.barh([_NAMES[name] for name in names], [values[name] for name in names], color=colours, height=0.6)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(unit)
    return drawn
