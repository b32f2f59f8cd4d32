"""Training steps compiled at full scale for machines that are not here: what one device holds and sends."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

CONFIG = "configs/foundation/plan_8b.yaml"

# gpu, topology, mesh, overrides of the config: one row each.
PLANS: tuple[tuple[str, str, dict[str, int], tuple[str, ...]], ...] = (
    ("h100", "1x8x8", {"fsdp": 64}, ()),
    ("h100", "1x8x8", {"data": 8, "fsdp": 8}, ()),
    ("h100", "1x8x8", {"fsdp": 8, "tensor": 8}, ()),
    ("h100", "1x8x8", {"fsdp": 64}, ("model.remat=none",)),
    ("h200", "1x8x8", {"data": 8, "fsdp": 8}, ()),
    ("gh200", "1x16x4", {"fsdp": 64}, ()),
    ("b200", "1x8x8", {"data": 8, "fsdp": 8}, ()),
    ("a100", "1x8x8", {"fsdp": 64}, ()),
    ("mi250x", "1x8x8", {"fsdp": 64}, ()),
    ("h100", "1x128x8", {"data": 16, "fsdp": 64}, ("batch_size=1024",)),
    ("h100", "1x128x8", {"data": 2, "fsdp": 64, "tensor": 8}, ("batch_size=1024",)),
)


def items() -> Iterator[Item]:
    """One row a layout of the 8B training step."""
    from jaxlab import core
    from jaxlab.training import TrainConfig

    for gpu, topology, mesh, overrides in PLANS:
        layout = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        config = core.load_config(TrainConfig, core.find_config(CONFIG), overrides)
        yield Item(
            name=", ".join((gpu, topology, layout, *overrides)),
            table="An 8.0 B-parameter AdamW step, GiB on one device (XLA's buffer assignment; nothing ran)",
            settings={"gpu": gpu, "topology": topology, "mesh": mesh, "config": core.to_dict(config)},
            run=lambda gpu=gpu, topology=topology, mesh=mesh, config=config, overrides=overrides, layout=layout: _plan(
                gpu, topology, mesh, config, overrides, layout
            ),
        )


def pages() -> None:
    """Writes docs/kernels.md."""
    from benchmarks import kernel_table

    kernel_table.main([])


def _plan(gpu: str, topology: str, mesh: dict[str, int], config: Any, overrides: Any, layout: str) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.training import plan

    made = plan(config, target(gpu, topology, mesh))
    gib = {kind: size / 2**30 for kind, size in made.bytes.items()}
    sent = {}
    for item in made.collectives:
        sent[item.op] = sent.get(item.op, 0) + item.bytes * item.count / 2**30
    return {
        "machine": f"{topology} {gpu}",
        "layout": layout,
        "changes": " ".join(overrides),
        "parameters": gib["parameters"],
        "optimizer": gib["optimizer"],
        "temporaries": gib["temporaries"],
        "total": gib["total"],
        "fits": made.fits,
        **({"note": " ".join(made.notes)} if made.notes else {}),
        "collectives, GiB": ", ".join(f"{name} {size:.2f}" for name, size in sorted(sent.items())),
    }
