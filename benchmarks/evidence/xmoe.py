"""X-MoE at paper scale, by the compiler's word: what can be trained, what is sent where, what overlaps."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEMS = ("rbd", "pft", "padded", "ted", "tutel", "megablocks")
DEVICES = (8, 64, 256, 1024)
GPUS = {"mi250x": "64 GB", "h100": "80 GB"}

# What the paper reports on MI250X, TFLOPS a GPU: on 256, Super on 1024 (spec, section 6).
PAPER = {
    ("rbd", "small"): "44.0", ("rbd", "medium"): "24.2", ("rbd", "large"): "24.1", ("rbd", "super"): "10.2",
    ("padded", "small"): "20.4", ("padded", "medium"): "OOM", ("padded", "large"): "OOM", ("padded", "super"): "OOM",
    ("ted", "small"): "20.4", ("ted", "medium"): "4.7", ("ted", "large"): "OOM", ("ted", "super"): "OOM",
    ("tutel", "small"): "33.0", ("tutel", "medium"): "17.0", ("tutel", "large"): "OOM", ("tutel", "super"): "OOM",
}  # fmt: skip


def items() -> Iterator[Item]:
    """The tables, cheapest questions last: later ones use what earlier ones have compiled."""
    yield from _headline()
    yield from _paper_sizes()
    yield from _largest()


def _headline() -> Iterator[Item]:
    title = (
        "Super's whole training step on 1024 GPUs, GiB on one device (XLA's buffer assignment; 58.9 of 64 GB and 72.8 "
        "of 80 GB can be used)"
    )
    for remat in ("none", "block"):
        for system in SYSTEMS:
            yield Item(
                name=f"super, 1024, {system}, {remat}",
                table=title,
                settings=_settings(system, "super", 1024, remat),
                run=lambda system=system, remat=remat: _by_kind(system, "super", 1024, remat),
            )


def _paper_sizes() -> Iterator[Item]:
    title = "The paper's sizes on the paper's machines, nothing recomputed: GiB on one device beside the paper's result"
    for size, devices in (("small", 256), ("medium", 256), ("large", 256), ("super", 1024)):
        for system in SYSTEMS:
            yield Item(
                name=f"{size}, {devices}, {system}",
                table=title,
                settings=_settings(system, size, devices, "none"),
                run=lambda system=system, size=size, devices=devices: _beside_paper(system, size, devices),
            )


def _largest() -> Iterator[Item]:
    title = "The largest that can be trained, nothing recomputed; most: of the named shape, by its number of layers"
    for devices in DEVICES:
        for system in SYSTEMS:
            yield Item(
                name=f"largest, {devices}, {system}",
                table=title,
                settings=_settings(system, "all", devices, "none"),
                run=lambda system=system, devices=devices: _largest_row(system, devices),
            )


def _settings(system: str, size: str, devices: int, remat: str) -> dict[str, Any]:
    """All that decides an outcome: the configs' content and how the survey lays them out."""
    import dataclasses

    from jaxlab import recipes
    from jaxlab.xmoe import trainable

    sizes = trainable.SIZES if size == "all" else (size,)
    return {
        "configs": {name: recipes.find_config(f"configs/xmoe/{name}.yaml").read_text() for name in sizes},
        "system": dataclasses.asdict(trainable.SYSTEMS[system]),
        "devices": devices,
        "remat": remat,
        "recv_buffer_factor": trainable.RECV_BUFFER_FACTOR,
    }


def _gib(size: int) -> float:
    return round(size / 2**30, 2)


def _by_kind(system: str, size: str, devices: int, remat: str) -> dict[str, Any]:
    from jaxlab.xmoe import trainable

    found = trainable.best(system, size, devices, remat=remat)
    kinds = {kind: _gib(found.bytes[kind]) if kind in found.bytes else None for kind in ("parameters", "optimizer")}
    return {
        "system": trainable.SYSTEMS[system].title,
        "recomputed": remat,
        "TP": found.tensor,
        "EP": found.expert_parallel,
        **kinds,
        "temporaries": _gib(found.bytes["temporaries"]) if found.compiled else None,
        "total": _gib(found.total),
        **{f"fits {memory}": found.fits(gpu) for gpu, memory in GPUS.items()},
    }


def _beside_paper(system: str, size: str, devices: int) -> dict[str, Any]:
    from jaxlab.xmoe import trainable

    found = trainable.best(system, size, devices)
    return {
        "size": size,
        "GPUs": devices,
        "system": trainable.SYSTEMS[system].title,
        "TP": found.tensor,
        "EP": found.expert_parallel,
        "total": _gib(found.total),
        "fits 64 GB": found.fits("mi250x"),
        "paper, TFLOPS": PAPER.get((system, size)),
    }


def _largest_row(system: str, devices: int) -> dict[str, Any]:
    from jaxlab.xmoe import trainable

    found, sizes = trainable.largest(system, devices)
    row: dict[str, Any] = {"GPUs": devices, "system": trainable.SYSTEMS[system].title}
    row |= {f"size, {memory}": sizes[gpu] or "none" for gpu, memory in GPUS.items()}
    row["GiB"] = ", ".join(
        f"{size} {_gib(each.total)}{'' if each.compiled else ' (states)'}" for size, each in found.items()
    )
    for gpu, memory in GPUS.items():
        size = sizes[gpu]
        layers = trainable.most_layers(found[size], gpu=gpu) if size else 0
        row[f"most, {memory}"] = f"{layers} layers, {trainable.parameters(size, layers) / 1e9:.1f} B" if layers else "-"
    return row
