"""What can be trained on so many GPUs of so much memory: whole training steps compiled ahead of time, never run.

Every system trains the same network on the same machine, one sequence a data-parallel rank, with the same dropping,
moments split over the data ranks (ZeRO-1) and experts spread as far as they go; each may choose its tensor parallelism.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.core.plan import Plan, Target
    from jaxlab.models.decoder import DecoderConfig
    from jaxlab.training import TrainConfig

SIZES = ("small", "medium", "large", "super")
NODE = 8
"""GPUs of a node."""
TENSOR = (1, 2, 4, 8)
"""Tensor-parallel ranks that a system may choose from; they stay inside a node."""
RECV_BUFFER_FACTOR = 1.5
"""Room for received rows, over S * k, of what has no bound of its own (ours; what does not fit is counted at run time):
dropless dispatch, and RBD's rows inside a node. With dropping no expert gets more than the capacity factor's 1.25."""


_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_backend_optimization_level": 0}
"""Where no device can be tried, XLA's own Triton generator fails for some of these matrix products; they are cuBLAS's.
Only buffers are read here, so the kernels' code need not be optimised."""


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train a mixture of experts.

    Attributes:
      title: what it stands for.
      dispatch: of `MoEPolicy`.
      drops: experts take capacity_factor 1.25, as the systems' scripts have it; else every slot is computed.
      bounded: received rows have room for `RECV_BUFFER_FACTOR`, not for the worst case.
      shards_sequence: the tensor-parallel ranks split the tokens of the sparse layers (SSMB).
      slices_experts: they split the experts' inner width (DeepSpeed-TED).
    """

    title: str
    dispatch: str
    drops: bool = True
    bounded: bool = False
    shards_sequence: bool = False
    slices_experts: bool = False


SYSTEMS = {
    "rbd": System("X-MoE, RBD and SSMB", "rbd", bounded=True, shards_sequence=True),
    "pft": System("X-MoE, PFT and SSMB", "pft", shards_sequence=True),
    "pft-dropless": System("X-MoE, PFT and SSMB, dropless", "pft", drops=False, bounded=True, shards_sequence=True),
    "padded": System("DeepSpeed-MoE", "padded"),
    "ted": System("DeepSpeed-TED", "padded", slices_experts=True),
    "tutel": System("Tutel", "tutel"),
    "megablocks": System("MegaBlocks", "megablocks", drops=False, bounded=True),
}
"""Ours, and what it is compared with, each as `jaxlab.xmoe` builds it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One training step on one device.

    Attributes:
      system: a key of `SYSTEMS`.
      size: a key of `SIZES`.
      layers: of the network.
      parameters: of the network, embeddings and all.
      devices: GPUs.
      mesh: axis sizes.
      tensor: tensor-parallel ranks.
      expert_parallel: devices that share one copy of the experts.
      remat: of `DecoderConfig`.
      bytes: of one device, by kind; "gradients" alone are estimated where `compiled` is False.
      compiled: False: parameters, moments and gradients alone exceed the memory, so nothing was compiled.
      seconds: that compiling took.
    """

    system: str
    size: str
    layers: int
    parameters: int
    devices: int
    mesh: dict[str, int]
    tensor: int
    expert_parallel: int
    remat: str
    bytes: dict[str, int]
    compiled: bool
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of one device; a lower bound where nothing was compiled."""
        return self.bytes["total"]

    def fits(self, gpu: str) -> bool:
        """Whether a device of a preset of `jaxlab.core.plan` holds it."""
        return self.compiled and self.total <= usable(gpu)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return dataclasses.asdict(self)


def known_size(name: str) -> str:
    """The name, if it is in `SIZES`."""
    return _known(name, SIZES, "size")


def known_system(name: str) -> str:
    """The name, if it is in `SYSTEMS`."""
    return _known(name, SYSTEMS, "system")


def _known(name: str, names: Any, what: str) -> str:
    if name not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}, got {name!r}")
    return name


def usable(gpu: str) -> int:
    """Bytes of a preset's device that a program may take.

    Raises:
      ValueError: unknown preset.
    """
    from jaxlab.core.plan import GPUS
    from jaxlab.core.plan.targets import FITS_FACTOR

    if gpu not in GPUS:
        raise ValueError(f"gpu: got {gpu!r}, expected one of {', '.join(GPUS)}")
    return int(FITS_FACTOR * GPUS[gpu].memory_bytes)


def layout(system: str, experts: int, devices: int, tensor: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """The mesh of a system on so many GPUs, and the axes its experts lie over.

    Experts go over as many devices as there are, at most one each. Under SSMB the tensor-parallel ranks hold experts of
    their own; otherwise they hold the same ones (or slices of them).

    Raises:
      ValueError: numbers that do not divide.
    """
    if tensor not in TENSOR or devices % tensor:
        raise ValueError(f"tensor must be one of {TENSOR} and divide the {devices} devices, got {tensor}")
    if devices > NODE and devices % NODE:
        raise ValueError(f"devices must be at most {NODE} or a multiple of it, got {devices}")
    inner = tensor if SYSTEMS[system].shards_sequence else 1
    ranks = math.gcd(experts, devices // tensor * inner) // inner  # tokens of so many ranks share the experts
    in_node = min(NODE, devices) // tensor
    mesh = {"data": devices // tensor // ranks, "node": max(1, ranks // in_node), "expert": min(ranks, in_node)}
    axes = [axis for axis in ("node", "expert") if mesh[axis] > 1] or ["expert"]
    mesh = {axis: size for axis, size in mesh.items() if size > 1 or axis in axes}
    if tensor > 1:
        mesh["tensor"] = tensor
        axes += ["tensor"] * SYSTEMS[system].shards_sequence
    return mesh, tuple(axes)


def training_config(
    system: str, size: str, devices: int, tensor: int = 1, *, remat: str = "none", layers: int | None = None
) -> "TrainConfig":
    """The training step of `configs/xmoe/<size>.yaml` as a system would lay it out on so many GPUs.

    One sequence a data-parallel rank and step; `mesh` and `moe` are the system's.
    """
    from jaxlab import core
    from jaxlab.training import TrainConfig

    config = core.load_config(TrainConfig, core.find_config(f"configs/xmoe/{known_size(size)}.yaml"))
    how = SYSTEMS[known_system(system)]
    assert config.model.moe is not None
    mesh, axes = layout(system, config.model.moe.num_experts, devices, tensor)
    model = dataclasses.replace(
        config.model, remat=remat, num_hidden_layers=config.model.num_hidden_layers if layers is None else layers
    )
    policy = dataclasses.replace(
        config.moe,
        dispatch=how.dispatch,
        expert_axes=axes,
        tp_axis="tensor" if tensor > 1 and (how.shards_sequence or how.slices_experts) else None,
        drop_policy="probs" if how.drops else "none",
        recv_buffer_factor=RECV_BUFFER_FACTOR if how.bounded else None,
        node_size=1 if axes == ("node",) else NODE,
    )
    return dataclasses.replace(
        config, model=model, moe=policy, mesh=mesh, batch_size=devices // tensor, accumulate=1, shard_optimizer=True
    )


def compile_step(
    system: str, size: str, devices: int, tensor: int = 1, *, gpu: str = "mi250x", **options: Any
) -> "Plan":
    """The plan of a system's training step; `options` are those of `training_config`."""
    from jaxlab import training

    config = training_config(system, size, devices, tensor, **options)
    return training.plan(config, _target(gpu, devices, tuple(config.mesh.items())), options=_OPTIONS)


@functools.lru_cache(maxsize=4)
def _target(gpu: str, devices: int, mesh: tuple[tuple[str, int], ...]) -> "Target":
    from jaxlab.core.plan import target

    return target(gpu, f"1x{max(1, devices // NODE)}x{min(devices, NODE)}", dict(mesh))


def outcome(
    system: str,
    size: str,
    devices: int,
    tensor: int = 1,
    *,
    gpu: str = "mi250x",
    remat: str = "none",
    layers: int | None = None,
) -> Outcome:
    """Compiles a system's training step, unless its states alone exceed the memory of both 64 and 80 GB devices.

    The two presets differ in their memory alone, so one compilation, for 64 GB, answers for both.
    """
    return _outcome(system, size, devices, tensor, "mi250x" if gpu == "h100" else gpu, remat, layers)


@functools.cache
def _outcome(system: str, size: str, devices: int, tensor: int, gpu: str, remat: str, layers: int | None) -> Outcome:
    from jaxlab import training

    config = training_config(system, size, devices, tensor, remat=remat, layers=layers)
    over = _target(gpu, devices, tuple(config.mesh.items()))
    states = _states(config, over)
    started = time.perf_counter()
    compiled = sum(states.values()) <= max(usable("h100"), usable(gpu))
    sizes = (
        training.plan(config, over, options=_OPTIONS).bytes if compiled else {**states, "total": sum(states.values())}
    )
    return Outcome(
        system=system,
        size=size,
        layers=config.model.num_hidden_layers,
        parameters=_parameter_count(config.model),
        devices=devices,
        mesh=dict(config.mesh),
        tensor=tensor,
        expert_parallel=math.prod(config.mesh[axis] for axis in config.moe.expert_axes),
        remat=remat,
        bytes=dict(sizes),
        compiled=compiled,
        seconds=time.perf_counter() - started,
    )


def best(system: str, size: str, devices: int, *, gpu: str = "mi250x", **options: Any) -> Outcome:
    """A system's step with the tensor parallelism that suits it: the least that fits `gpu`, or that needs least.

    Which ones are worth compiling is estimated (`estimate`): first the least that leaves a tenth of the memory free,
    then the one that needs least.
    """
    guess = {ranks: estimate(system, size, devices, ranks, **options) for ranks in _tensors(size, devices)}
    roomy = [ranks for ranks, total in guess.items() if total <= 0.9 * usable(gpu)]
    tried = []
    for tensor in dict.fromkeys((*roomy[:1], min(guess, key=lambda ranks: guess[ranks]))):
        tried.append(outcome(system, size, devices, tensor, gpu=gpu, **options))
        if tried[-1].fits(gpu):
            break
    return min(tried, key=lambda each: (not each.compiled, each.total))


def estimate(
    system: str, size: str, devices: int, tensor: int, *, remat: str = "none", layers: int | None = None
) -> int:
    """Bytes of one device from shapes: states, what the backward pass keeps of every layer, two layers' working set.

    Only decides what is compiled; leaves out what XLA adds.
    """
    import jax.numpy as jnp

    from jaxlab.xmoe.memory import activation_memory

    config = training_config(system, size, devices, tensor, remat=remat, layers=layers)
    states = _states(config, _target("mi250x", devices, tuple(config.mesh.items())))
    how, item = SYSTEMS[system], jnp.dtype(config.model.dtype).itemsize
    mode = "ted" if how.slices_experts else how.dispatch if how.dispatch in ("padded", "tutel") else "pft"
    cfg = dataclasses.replace(config.moe.layer_config(config.model), drop_policy="probs")
    ranks = math.prod(config.mesh[axis] for axis in config.moe.expert_axes)
    routed = activation_memory(cfg, 1, config.length, tensor, ranks, config.model.dtype, mode, ssmb=how.shards_sequence)
    tokens = config.length * config.model.hidden_size * item
    layer = routed["total"] + tokens * (4 + 6 / tensor)
    kept = tokens if remat == "block" else layer
    return int(sum(states.values()) + config.model.num_hidden_layers * kept + 2 * layer)


def most_layers(found: Outcome, *, gpu: str = "mi250x") -> int:
    """How many layers of `found`'s shape and layout fit `gpu`; 0: not even two.

    Layers are scanned, so bytes grow by the same amount with each: a line through `found` and one more compilation.
    """
    few = max(2, found.layers // 4)
    less = outcome(found.system, found.size, found.devices, found.tensor, gpu=gpu, remat=found.remat, layers=few)
    if not found.compiled or not less.compiled:
        return 0
    slope = (found.total - less.total) / (found.layers - few)
    layers = found.layers + math.floor((usable(gpu) - found.total) / slope)
    return layers if layers >= 2 else 0


def parameters(size: str, layers: int) -> int:
    """Of a network of a size's shape with so many layers."""
    few, more = (_parameter_count(training_config("padded", size, NODE, layers=count).model) for count in (2, 3))
    return few + (layers - 2) * (more - few)


def fewest(
    system: str, size: str, devices: Sequence[int], *, gpus: Sequence[str] = ("mi250x", "h100"), remat: str = "none"
) -> dict[str, Outcome | None]:
    """The step on the fewest of `devices` that a system trains a size on, for each kind of GPU; None: on none of them.

    Laid out for the GPU with the least memory. Steps whose estimate is half as much again as the most memory are not
    compiled.
    """
    smallest, largest = min(gpus, key=usable), max(gpus, key=usable)
    found: dict[str, Outcome | None] = dict.fromkeys(gpus)
    for count in sorted(devices):
        guess = min(estimate(system, size, count, ranks, remat=remat) for ranks in _tensors(size, count))
        if guess > 1.5 * usable(largest):
            continue
        made = best(system, size, count, gpu=smallest, remat=remat)
        for gpu in gpus:
            if found[gpu] is None and made.fits(gpu):
                found[gpu] = made
        if all(found.values()):
            break
    return found


def survey(
    sizes: Sequence[str], systems: Sequence[str], devices: Sequence[int], *, gpu: str = "mi250x", remat: str = "none"
) -> Iterator[Outcome]:
    """`best` of every combination, one after the other as they are done."""
    for count, system, size in itertools.product(devices, systems, sizes):
        yield best(system, size, count, gpu=gpu, remat=remat)


_KINDS = ("parameters", "optimizer", "temporaries")


def line(found: Outcome, gpu: str, most: int | None = None, *, header: bool = False) -> str:
    """An outcome as a row of a text table, in GiB."""
    kinds = "".join(f"{found.bytes[kind] / 2**30:>13.2f}" if kind in found.bytes else f"{'-':>13}" for kind in _KINDS)
    fits = "yes" if found.fits(gpu) else "no" if found.compiled else "no: states"
    told = (
        ""
        if most is None
        else f"  at most {most} layers, {parameters(found.size, most) / 1e9:.1f} B"
        if most
        else "  none"
    )
    row = (
        f"{found.system:14}{found.size:8}{found.devices:>6}{found.tensor:>4}{found.expert_parallel:>5}{kinds}"
        f"{found.total / 2**30:>9.2f}  {fits:10}{found.seconds:>5.0f} s{told}"
    )
    if not header:
        return row
    titles = f"{'':14}{'':8}{'GPUs':>6}{'TP':>4}{'EP':>5}" + "".join(f"{kind:>13}" for kind in _KINDS)
    limit = f"GiB on one {gpu} of which {usable(gpu) / 2**30:.1f} can be used; {found.remat} recomputed"
    return f"{limit}\n{titles}{'total':>9}  fits\n{row}"


def verdict(found: Sequence[Outcome], gpu: str) -> str:
    """The largest of the sizes that each system trains on each number of GPUs."""
    lines = []
    for system, devices in dict.fromkeys((each.system, each.devices) for each in found):
        fitting = [e for e in found if (e.system, e.devices) == (system, devices) and e.fits(gpu)]
        largest = max(fitting, key=lambda each: each.parameters, default=None)
        told = "none" if largest is None else f"{largest.size} ({largest.parameters / 1e9:.1f} B parameters)"
        lines.append(f"{SYSTEMS[system].title} on {devices} {gpu}: {told}")
    return "\n".join(lines)


def _states(config: "TrainConfig", over: "Target") -> dict[str, int]:
    """Bytes of one device's parameters, moments and gradients (the part it updates)."""
    import jax
    from flax import linen as nn

    from jaxlab.training.sharding import gradient_shardings, params_shardings

    names = _names(config.model, config.moe.tp_axis in config.moe.expert_axes)
    params = nn.meta.unbox(names)

    def held(places: Any) -> int:
        sizes = jax.tree.map(
            lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, params, places
        )
        return sum(jax.tree.leaves(sizes))

    updated = held(gradient_shardings(params, over.mesh, names))
    whole = held(params_shardings(params, over.mesh, names))
    return {"parameters": whole, "optimizer": 2 * updated, "gradients": updated}


@functools.cache
def _names(model: "DecoderConfig", shards_sequence: bool) -> Any:
    """The parameters' shapes with their logical axis names, which of the layout only SSMB decides."""
    from jaxlab.models.decoder import Decoder, MoEPolicy, abstract_params

    how = MoEPolicy(expert_axes=("tensor",), tp_axis="tensor") if shards_sequence else MoEPolicy()
    return abstract_params(Decoder(model, mlp=how))


def _parameter_count(model: "DecoderConfig") -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(_names(model, False)))


def _tensors(size: str, devices: int) -> tuple[int, ...]:
    config = training_config("padded", size, devices)
    return tuple(ranks for ranks in TENSOR if config.model.num_attention_heads % ranks == 0 and ranks <= devices)
