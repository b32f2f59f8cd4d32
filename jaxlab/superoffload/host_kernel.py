"""The host step in C++ (`host_kernel.cc`): compiled on first use by the system's compiler, kept, and called by XLA."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

SOURCE = Path(__file__).with_name("host_kernel.cc")
# Elements that are logged, or left alone, together: kBlock of the source.
BLOCK = 512

# No fast-math: every element must have the same bits in a vector loop and in its tail (section 9 of the specification).
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-DNDEBUG")
_TARGETS = ("jaxlab_adamw_step", "jaxlab_adam_step", "jaxlab_adamw_undo", "jaxlab_adam_undo")
_lock = threading.Lock()
_state: dict[str, RuntimeError | None] = {}


Moments = tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]
"""Parameters, first and second moments of a bucket: p, m and v."""


class Residual(NamedTuple):
    """The undo log of one bucket of n elements, c of which may be exceptions.

    Attributes:
      diff: int8 [3, n], bits of the old p, m, v less those of the algebraic inverse of the new ones.
      index: int32 [c], elements that `diff` does not describe; n past the last.
      values: f32 [3, c], their old p, m, v; anything past the last.
      status: int32 [2], how many exceptions there are, and 1 if there was no room for some.
      done: uint8 [ceil(n / BLOCK)], 0 where a block was left as it was for want of room.
    """

    diff: Int8[Array, "3 n"]
    index: Int[Array, " c"]
    values: Float[Array, "3 c"]
    status: Int[Array, "2"]
    done: UInt8[Array, " b"]


def load() -> None:
    """Compiles the source if that has not been done for this compiler and processor, and registers its functions.

    Raises:
      RuntimeError: there is no C++ compiler, or it fails; the message names `backend="xla"` as the way out.
    """
    with _lock:
        if "error" not in _state:
            try:
                library = ctypes.CDLL(str(_library()))
                for name in _TARGETS:
                    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
                _state["error"] = None
            except (RuntimeError, OSError) as error:
                _state["error"] = RuntimeError(str(error))
    if (error := _state["error"]) is not None:
        raise error


def _library() -> Path:
    """The compiled source: from the cache, named by everything that it depends on."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join((SOURCE.read_text(), *_FLAGS, version, _processor(), jaxlib.__version__))
    target = _cache() / f"host_kernel-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(compiler, made)
            made.replace(target)  # atomic: whoever compiles at the same time makes the same file
    return target


def _compile(compiler: str, target: Path) -> None:
    include = ("-isystem", jax.ffi.include_dir(), "-fPIC", "-shared", str(SOURCE), "-o", str(target))
    for native in (("-march=native",), ("-mcpu=native",), ()):
        done = subprocess.run([compiler, *_FLAGS, *native, *include], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise RuntimeError(
        f"backend 'ffi': {compiler} could not compile {SOURCE.name}; backend='xla' needs no compiler\n"
        + done.stderr[-2000:]
    )


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise RuntimeError(
        f"backend 'ffi' needs a C++ compiler ({named or 'c++, g++ or clang++'}, or $CXX), and there is none; "
        "backend='xla' needs no compiler"
    )


def _processor() -> str:
    """What the compiler takes "native" to be."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}))


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("jaxlab")) / "compiled"


def step(
    old: Moments,
    g: Float[Array, " n"],
    scalars: Float[Array, "12"],
    *,
    decoupled: bool,
    emit: Any = None,
    squares: bool = False,
    capacity: int | None = None,
    stop: bool = False,
    in_place: bool = False,
    threads: int = 0,
) -> tuple[Moments, Array | None, Float[Array, ""] | None, Residual | None]:
    """One step in one pass over memory; `load` must have been called.

    Args:
      old: p, m and v.
      g: gradients.
      scalars: as `undo.scalars` makes them.
      decoupled: AdamW, not L2.
      emit: dtype of the copy of the new parameters, or None.
      squares: also sum the squares of the gradients (before any factor).
      capacity: room for exceptions of a log; None for no log.
      stop: leave a block for whose exceptions there is no room as it was.
      in_place: the new p, m and v take the memory of the old (XLA copies those first that are used again).
      threads: at most so many; 0 for all of XLA's.

    Returns:
      The new p, m and v, then the copy, the sum and the log, or None.
    """
    n = g.shape[0]
    room, blocks = (0, 0) if capacity is None else (capacity, -(-n // BLOCK))
    results = [jax.ShapeDtypeStruct((n,), jnp.float32)] * 3
    results += [
        jax.ShapeDtypeStruct((0,) if emit is None else (n,), jnp.float32 if emit is None else emit),
        jax.ShapeDtypeStruct((int(squares),), jnp.float32),
        jax.ShapeDtypeStruct((3, 0 if capacity is None else n), jnp.int8),
        jax.ShapeDtypeStruct((room,), jnp.int32),
        jax.ShapeDtypeStruct((3, room), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.ShapeDtypeStruct((blocks,), jnp.uint8),
    ]
    call = jax.ffi.ffi_call(
        "jaxlab_adamw_step" if decoupled else "jaxlab_adam_step",
        results,
        vmap_method="sequential",
        input_output_aliases={i: i for i in range(3)} if in_place else None,
    )
    made = call(*old, g.astype(jnp.float32), scalars, threads=np.int64(threads), stop=np.int64(stop))
    new_p, new_m, new_v, cast, sum_sq, *log = made
    return (
        (new_p, new_m, new_v),
        None if emit is None else cast,
        sum_sq[0] if squares else None,
        None if capacity is None else Residual(*log),
    )


def undo(
    new: Moments,
    g: Float[Array, " n"],
    scalars: Float[Array, "12"],
    log: Residual,
    *,
    decoupled: bool,
    in_place: bool = False,
    threads: int = 0,
) -> Moments:
    """The p, m and v before the step that made `log`, bit for bit; arguments as for `step`."""
    call = jax.ffi.ffi_call(
        "jaxlab_adamw_undo" if decoupled else "jaxlab_adam_undo",
        [jax.ShapeDtypeStruct(g.shape, jnp.float32)] * 3,
        vmap_method="sequential",
        input_output_aliases={i: i for i in range(3)} if in_place else None,
    )
    old_p, old_m, old_v = call(*new, g.astype(jnp.float32), scalars, *log, threads=np.int64(threads))
    return old_p, old_m, old_v
