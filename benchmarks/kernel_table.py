"""`python -m benchmarks.kernel_table [FILE]` writes docs/kernels.md: every kernel, every implementation, the evidence.

Accuracy is measured here against float64 numpy, time here against the op's peer (taken in turn, so only the ratio
counts), and what a GPU would do is read from the compiled program: temporaries from XLA's buffer assignment, registers
and spills from `ptxas`. Without the extra `aot` the GPU tables say so.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels as shapes
from benchmarks import markdown
from benchmarks.harness import interleaved
from benchmarks.kernel_ops import OPS, Op
from jaxlab import _platform
from jaxlab.core.errors import MissingExtra

FILE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
GPUS = ("h100", "a100")
MIB = 2**20


def lines(ops: Sequence[Op] = OPS, kept: Mapping[str, str] | None = None) -> Iterator[str]:
    """The page, line by line; sections that are `kept` are not made anew."""
    yield "# Kernels"
    yield ""
    yield f"Written by `python -m benchmarks.kernel_table` with JAX {jax.__version__}; nothing here is typed by hand."
    yield ""
    yield (
        "`implementation=None` takes the best implementation for the platform for which a program is lowered: the "
        "Triton kernel where an op has one and the platform is CUDA or ROCm, `xla` elsewhere. Errors are the largest "
        "difference from float64 numpy over the root mean square of the result, in float32 on a CPU. Times are ratios "
        "of medians, taken in turn on the same CPU. GPU figures are facts of the compiled program, not measurements: "
        "nothing ran on a GPU."
    )
    for op in ops:
        yield from ("", f"## {op.name}", "")
        yield from _section(op) if op.name not in (kept or {}) else (kept or {})[op.name].splitlines()


def sections(page: str) -> dict[str, str]:
    """Op -> its section of a page, without the heading."""
    parts = [part.partition("\n") for part in page.split("\n## ")[1:]]
    return {name: text.strip("\n") for name, _, text in parts}


def _section(op: Op) -> Iterator[str]:
    yield from (op.what, "", f"On this CPU: {op.shape}.", "")
    head = (
        *("implementation", "error, value", "error, gradients", f"forward, times faster than {op.peer}"),
        *("with gradients", "temporaries, forward", "with gradients"),
    )
    yield from markdown.table(head, _cpu_rows(op))
    yield from ("", f"Compiled for GPUs: {op.gpu_shape}.", "")
    try:
        rows = list(_gpu_rows(op))
    except MissingExtra as missing:
        yield f"Not compiled: {missing}."
    else:
        head = (
            *("GPU", "implementation", "pass", "temporaries", "Pallas kernel", "registers", "spilled bytes"),
            *("tensor cores", "16-byte asynchronous copies"),
        )
        yield from markdown.table(head, rows)
    if op.notes:
        yield from ("", op.notes)


_TENSOR_CORE = ("wgmma", "mma.sync", "tcgen05.mma")


def _cpu_rows(op: Op) -> Iterator[tuple[str, ...]]:
    args = op.arrays()
    exact = [np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x) for x in args]
    if not op.differentiate:
        yield from _rows_without_gradients(op, args, op.oracle(*exact))
        return
    rng, made = np.random.default_rng(1), jax.eval_shape(op.function, *args)
    cotangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), made)
    wanted = op.oracle(*exact, jax.tree.map(lambda x: np.asarray(x, np.float64), cotangent))
    values = len(jax.tree.leaves(made))

    def programs(name):
        forward = functools.partial(op.function, implementation=name)
        compiled = jax.jit(forward).lower(*args).compile()
        both = jax.jit(_with_gradients(forward, op.differentiate)).lower(cotangent, *args).compile()
        return compiled, both

    peer = programs(op.peer)
    for name in op.implementations:
        own = peer if name == op.peer else programs(name)
        got = jax.tree.leaves(own[1](cotangent, *args))
        errors = [_error(a, b) for a, b in zip(got, wanted, strict=True)]
        inputs = (args, (cotangent, *args))
        times = [
            interleaved(functools.partial(mine, *given), functools.partial(theirs, *given), repeats=5, warmup=1)
            for mine, theirs, given in zip(own, peer, inputs)
        ]
        speed = ["1" if name == op.peer else f"{theirs / mine:.3g}" for mine, theirs in times]
        memory = [_mib(shapes.temporary_bytes(program)) for program in own]
        yield (f"`{name}`", f"{max(errors[:values]):.1e}", f"{max(errors[values:]):.1e}", *speed, *memory)


def _rows_without_gradients(
    op: Op, args: Sequence[jax.Array], wanted: Sequence[np.ndarray]
) -> Iterator[tuple[str, ...]]:
    def program(name):
        return jax.jit(functools.partial(op.function, implementation=name)).lower(*args).compile()

    peer = program(op.peer)
    for name in op.implementations:
        own = peer if name == op.peer else program(name)
        error = max(_error(got, want) for got, want in zip(own(*args), wanted, strict=True))
        mine, theirs = interleaved(functools.partial(own, *args), functools.partial(peer, *args))
        speed = "1" if name == op.peer else f"{theirs / mine:.3g}"
        yield (f"`{name}`", f"{error:.1e}", "", speed, "", _mib(shapes.temporary_bytes(own)), "")


def _gpu_rows(op: Op) -> Iterator[tuple[str, ...]]:
    from jaxlab.core import plan

    args = op.gpu_shapes()
    args, cotangents = (args[:-1], args[-1:]) if op.differentiate else (args, ())
    for gpu in GPUS:
        target = plan.target(gpu)
        for name in op.gpu_implementations:
            forward = functools.partial(op.function, implementation=name)

            def gradients(cotangent, *args, forward=forward):
                return _with_gradients(forward, op.differentiate)(cotangent, *args)[1]

            passes = [("forward", forward, args)]
            passes += [("gradients", gradients, (*cotangents, *args))] if op.differentiate else []
            for title, program, given in passes:
                made = plan.compile(program, *given, target=target, labels=["input"] * len(given))
                memory = _mib(made.bytes["temporaries"])
                for kernel in made.kernels or (None,):
                    yield (gpu.upper(), f"`{name}`", title, memory, *_kernel_cells(kernel))


def _kernel_cells(kernel: Any) -> tuple[str, ...]:
    if kernel is None:
        return ("none (XLA)", "", "", "", "")
    used = [name for name in _TENSOR_CORE if any(op.startswith(name) for op in kernel.ptx_instructions)]
    copies = sum(count for op, count in kernel.ptx_instructions.items() if op.startswith("cp.async.cg"))
    numbers = ("?" if value is None else str(value) for value in (kernel.registers, kernel.spill_bytes))
    return (f"`{kernel.name}`", *numbers, ", ".join(f"`{name}`" for name in used) or "no", str(copies))


def _with_gradients(forward: Callable[..., jax.Array], differentiate: tuple[int, ...]) -> Callable[..., Any]:
    def run(cotangent, *args):
        def of(*chosen):
            full = list(args)
            for position, value in zip(differentiate, chosen):
                full[position] = value
            return forward(*full)

        value, pullback = jax.vjp(of, *(args[i] for i in differentiate))
        return value, pullback(cotangent)

    return run


def _error(got: jax.Array, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.sqrt(np.mean(np.square(want))))


def _mib(size: int) -> str:
    return "0" if size == 0 else f"{size / MIB:.3g} MiB"


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--op", action="append", choices=[op.name for op in OPS], help="make this section anew alone")
    options = parser.parse_args(args)
    _platform.prefer_cpu_without_gpu()
    kept = sections(options.file.read_text()) if options.op else {}
    text = "\n".join(lines(kept={name: text for name, text in kept.items() if name not in options.op})) + "\n"
    options.file.write_text(text)
    print(f"{options.file.name}: {len(OPS)} ops")


if __name__ == "__main__":
    main()
