"""Compiles a function for a target and reads off what it would take there; nothing is executed."""

import math
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import pxla
from jax._src.sharding_impls import UNSPECIFIED
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core.plan import hlo as hlo_text
from jaxlab.core.plan import ptx
from jaxlab.core.plan.hlo import Collective
from jaxlab.core.plan.ptx import Kernel
from jaxlab.core.plan.table import render, size_text
from jaxlab.core.plan.targets import Target
from jaxlab.core.plan.targets import target as make_target
from pallas_kernels import compat

KINDS = ("parameters", "optimizer", "input", "cache")


@dataclass(frozen=True)
class Plan:
    """What one device of `target` would hold, exchange and run.

    `bytes` has a key for each label used, "host" (arguments in pinned host memory), "outputs" (those that reuse no
    donated argument), "temporaries" and "total" (device memory only), and "constants" where the program embeds a MiB or
    more of them. `notes` says what the numbers leave out.
    """

    target: Target
    bytes: dict[str, int]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    hlo: str = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the total stays within the target's share of its memory."""
        return self.bytes["total"] <= self.target.memory_factor * self.target.memory_bytes

    def table(self) -> str:
        """The plan as text for a terminal: the verdict, bytes, communication by mesh axis, kernels, notes."""
        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data, without the HLO."""
        return {
            "target": {
                "gpu": self.target.gpu,
                "topology": self.target.topology,
                "mesh": dict(self.target.mesh.shape),
                "device_kind": self.target.device_kind,
                "memory_bytes": self.target.memory_bytes,
                "memory_factor": self.target.memory_factor,
            },
            "fits": self.fits,
            "bytes": dict(self.bytes),
            "collectives": [{**asdict(item), "axes": list(item.axes)} for item in self.collectives],
            "kernels": [asdict(item) for item in self.kernels],
            "notes": list(self.notes),
            "jax": jax.__version__,
        }


def compile(
    fn: Callable[..., Any],
    *args: Any,
    target: Target,
    labels: Sequence[Any],
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    read_kernels: bool = True,
) -> Plan:
    """Compiles `fn` for `target` and reports bytes, collectives and kernels. Never executes.

    Args:
      fn: a function, or one already jitted, whose own donation and shardings then hold if none is given here.
      *args: pytrees of `ShapeDtypeStruct` with shardings over `target.mesh`; without a sharding: replicated. Arrays
        stand for their shapes.
      target: from `target(...)`.
      labels: the kind of each argument, "parameters", "optimizer", "input" or "cache"; for an argument of mixed kinds
        (a train state) a tree of kinds that is a prefix of it. Static arguments may be left out.
      donate_argnums: arguments whose memory outputs may reuse.
      static_argnums: arguments that are constants of the program.
      options: further options of XLA's compiler, by the names of its flags.
      read_kernels: whether the plan lists kernels; assembling them takes longer than compiling a small program.

    Raises:
      ValueError: labels that are unknown or do not match the arguments, or a sharding outside `target.mesh`.
    """
    static = _positions(static_argnums, len(args))
    args = tuple(
        arg if i in static else jax.tree.map(lambda leaf: _abstract(leaf, target), arg) for i, arg in enumerate(args)
    )
    kinds = _kinds(labels, args, static)
    plain = not static and not _positions(donate_argnums, len(args))
    jitted: Any = fn
    if not (plain and hasattr(fn, "lower")):
        jitted = jax.jit(fn, donate_argnums=donate_argnums, static_argnums=static_argnums)
    # The mesh is in force: layers that spread over one find it there, as in a training step.
    with compat.tracing_for(mesh=target.mesh):
        lowered = jitted.lower(*args)
    compiled, modules = _compile(lowered, target, dict(options or {}))
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    sizes = _argument_bytes(args, kinds, static)
    sizes["outputs"] = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    sizes["temporaries"] = memory.temp_size_in_bytes
    constants = hlo_text.constant_bytes(text)
    if constants >= 2**20:
        sizes["constants"] = constants
    sizes["total"] = sum(size for kind, size in sizes.items() if kind != "host")
    kernels = ptx.kernels(modules, hlo_text.triton_kernels(text)) if read_kernels else ()
    notes = [target.note] if target.note else []
    to_host = memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    if to_host > 0:
        notes.append(f"Besides its arguments the program leaves {size_text(to_host)} of outputs in host memory.")
    if mosaic := hlo_text.mosaic_calls(text):
        notes.append(f"Calls of Mosaic GPU kernels: {mosaic}. Their PTX is made only at run time, so none is listed.")
    if kernels and ptx.find_ptxas() is None:
        notes.append("Registers and spills need ptxas: package nvidia-cuda-nvcc (extra 'aot'), or a CUDA toolkit.")
    return Plan(target, sizes, hlo_text.collectives(text, target.mesh), kernels, text, tuple(notes))


def kernels_of(fn: Callable[..., Any], *args: Any, gpu: str = "h100") -> tuple[Kernel, ...]:
    """The Pallas-Triton kernels of `fn` compiled for one GPU, with their resources.

    Args:
      fn: a function of arrays.
      *args: pytrees of arrays or `ShapeDtypeStruct`.
      gpu: a preset.
    """
    return compile(fn, *args, target=make_target(gpu), labels=("input",) * len(args)).kernels


def _positions(argnums: int | Sequence[int], count: int) -> frozenset[int]:
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    return frozenset(n % count if count else n for n in numbers)


def _abstract(leaf: Any, target: Target) -> jax.ShapeDtypeStruct:
    """The leaf as a shape over the target's mesh; what has no place yet is replicated."""
    devices = set(target.mesh.devices.flat)
    sharding = getattr(leaf, "sharding", None) if isinstance(leaf, jax.ShapeDtypeStruct) else None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        sharding = NamedSharding(target.mesh, sharding.spec, memory_kind=sharding.memory_kind)
    if sharding is None:
        sharding = NamedSharding(target.mesh, PartitionSpec())
    if not sharding.device_set <= devices:
        raise ValueError(
            f"an argument of shape {leaf.shape} has the sharding {sharding}, expected one over target.mesh "
            f"({dict(target.mesh.shape)} of {target.gpu})"
        )
    shape = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.eval_shape(lambda x: x, leaf)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding, weak_type=shape.weak_type)


def _kinds(labels: Sequence[Any], args: tuple[Any, ...], static: frozenset[int]) -> list[Any]:
    labels = list(labels) if not isinstance(labels, str) else [labels]
    if len(labels) == len(args) - len(static) and static:
        dynamic = iter(labels)
        labels = [None if i in static else next(dynamic) for i in range(len(args))]
    if len(labels) != len(args):
        raise ValueError(f"labels: got {len(labels)}, expected one for each of {len(args)} arguments")
    for i, label in enumerate(labels):
        wrong = [kind for kind in jax.tree.leaves(label) if kind not in KINDS] if i not in static else []
        if wrong:
            raise ValueError(f"labels[{i}]: got {wrong[0]!r}, expected one of {', '.join(KINDS)}")
    return labels


def _argument_bytes(args: tuple[Any, ...], kinds: list[Any], static: frozenset[int]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    host = 0

    def add(kind: str, tree: Any) -> None:
        nonlocal host
        sizes.setdefault(kind, 0)
        for leaf in jax.tree.leaves(tree):
            size = _shard_bytes(leaf)
            if leaf.sharding.memory_kind == "pinned_host":
                host += size
            else:
                sizes[kind] += size

    for i, (arg, kind) in enumerate(zip(args, kinds)):
        if i not in static:
            jax.tree.map(add, kind, arg)
    return {**sizes, "host": host}


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    count = math.prod(leaf.sharding.shard_shape(leaf.shape))
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return count * leaf.dtype.itemsize
    narrow = np.dtype(leaf.dtype).name
    bits = 4 if "int4" in narrow or "float4" in narrow else 2 if "int2" in narrow else 8 * leaf.dtype.itemsize
    return -(-count * bits // 8)


def _compile(lowered: Any, target: Target, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The executable, and the PTX modules the compiler made on its way."""
    if target.platform == "cpu":
        return lowered.compile(compiler_options=options or None), []
    with tempfile.TemporaryDirectory() as folder, _lock, _no_cache_writes(), _outputs_as_compiled(target):
        # A program for absent devices cannot be read back from JAX's persistent cache, and XLA writes PTX only when it
        # compiles; the pattern is part of the cache key, so a unique one is never found there.
        options |= {"xla_dump_to": folder, "xla_dump_emitter_re": f"ptx|{uuid.uuid4().hex}"}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            # XLA may fail to tile a matrix product for its own Triton generator where no device can be tried; the
            # products then go to cuBLAS, as they would where they are faster there.
            if _UNTILED not in str(error):
                raise
            compiled = lowered.compile(compiler_options={**options, "xla_gpu_enable_triton_gemm": False})
        return compiled, [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]


_UNTILED = "Couldn't find output tile sizes"


_lock = threading.RLock()


@contextmanager
def _no_cache_writes() -> Iterator[None]:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextmanager
def _outputs_as_compiled(target: Target) -> Iterator[None]:
    """Accepts the outputs' shardings as XLA made them.

    JAX checks them against those asked for. For described devices, which list no memories, it forgets what memory kind
    XLA chose, and would refuse every explicit `out_shardings`.
    """
    name = "_maybe_get_and_check_out_shardings"
    check = getattr(pxla, name)

    def unchecked(executable: Any, asked: Any, devices: Any, *rest: Any) -> Any:
        described = devices[0] == target.mesh.devices.flat[0]
        return check(executable, [UNSPECIFIED] * len(asked) if described else asked, devices, *rest)

    setattr(pxla, name, unchecked)
    try:
        yield
    finally:
        setattr(pxla, name, check)
