"""The plan of an 8B-class training step on 64 H100s, laid out in several ways; nothing of it runs."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxlab import core
from jaxlab.training import TrainConfig, plan

if TYPE_CHECKING:
    from jaxlab.core.plan import Plan


_KINDS = ("parameters", "optimizer", "temporaries", "input", "outputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutsConfig(TrainConfig):
    """A training run and the machine it is compiled for; the defaults are ours.

    Attributes:
      gpu: a preset of `jaxlab.core.plan`.
      topology: partitions x hosts x devices a host.
      meshes: the layouts to compare; the first is told in full.
    """

    gpu: str = "h100"
    topology: str = "1x8x8"
    meshes: tuple[dict[str, int], ...] = ({"fsdp": 64}, {"data": 8, "fsdp": 8}, {"fsdp": 8, "tensor": 8})


def run(config: LayoutsConfig) -> core.Report:
    """Compiles the training step once for each layout and tells bytes and communication of one device.

    Raises:
      MissingExtra: the GPU compiler (extra `aot`) is not installed.
    """
    import jax

    from jaxlab.core.plan import target
    from jaxlab.models.decoder import Decoder, abstract_params

    plans = {
        _layout(mesh): plan(config, target(config.gpu, config.topology, mesh))
        for mesh in core.progress(config.meshes, "compiling")
    }
    layout, told = next(iter(plans.items()))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Decoder(config.model))))
    devices = told.target.mesh.size
    collectives = [
        (item.op, ", ".join(item.axes), item.count, item.bytes / 2**20, item.bytes * item.count / 2**30)
        for item in sorted(told.collectives, key=lambda item: -item.bytes * item.count)
        if item.bytes * item.count >= 2**20
    ]
    kinds = [kind for kind in _KINDS if any(made.bytes.get(kind, 0) >= 2**24 for made in plans.values())]
    rows = [
        (name, *(made.bytes.get(kind, 0) / 2**30 for kind in kinds), made.bytes["total"] / 2**30, made.fits)
        for name, made in plans.items()
    ]
    return core.Report(
        system="foundation",
        title=f"A training step of {parameters / 1e9:.1f} B parameters, planned for {devices} {config.gpu.upper()}s",
        metrics={
            "parameters": f"{parameters / 1e9:.2f} B",
            "tokens_a_step": config.batch_size * config.length,
            "layout": layout,
            "one_device_gib": told.bytes["total"] / 2**30,
            "verdict": "fits" if told.fits else "does not fit",
        },
        tables=(
            ("GiB on one device, by layout", ("layout", *kinds, "total", "fits"), rows),
            (
                f"Collectives of one step, {layout}; those below 1 MiB left out",
                ("operation", "over", "times", "MiB each", "GiB in all"),
                collectives,
            ),
        ),
        plots=((f"One {config.gpu.upper()} of {devices}: what it would hold", _stacks(plans, kinds)),),
        notes=(
            f"Compiled ahead of time for {config.gpu} with JAX {jax.__version__}; bytes are XLA's buffer assignment, "
            "collectives are read from the compiled program. Nothing ran, so no time is known.",
            *told.notes,
        ),
    )


def _layout(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def _stacks(plans: "dict[str, Plan]", kinds: list[str]) -> Any:
    from jaxlab.core.figures import COLOURS, RED, figure

    drawn, axes = figure(9.0, 3.6)
    names = list(plans)[::-1]
    left = [0.0] * len(names)
    for kind, colour in zip(kinds, COLOURS):
        sizes = [plans[name].bytes.get(kind, 0) / 2**30 for name in names]
        axes.barh(names, sizes, left=left, color=colour, height=0.55, label=kind)
        left = [start + size for start, size in zip(left, sizes)]
    target = plans[names[0]].target
    limit = target.memory_factor * target.memory_bytes / 2**30
    axes.axvline(limit, color=RED, linestyle="--", linewidth=1.4)
    axes.text(limit, len(names) - 0.5, f"{limit:.0f} GiB usable ", color=RED, fontsize=9, ha="right", va="top")
    for index, total in enumerate(left):
        axes.text(total, index, f" {total:.1f} GiB", va="center", fontsize=9)
    axes.set_xlabel("GiB on one device")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return drawn
