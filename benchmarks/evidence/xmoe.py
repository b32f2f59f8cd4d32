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
    """The tables; later ones use what earlier ones have compiled, where one process makes all."""
    yield from _traffic()
    yield from _overlap()
    yield from _headline()
    yield from _paper_sizes()
    yield from _most()
    yield from _fewest()


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


def _fewest() -> Iterator[Item]:
    title = f"The fewest of {DEVICES} GPUs that train a size, nothing recomputed, and GiB on one of them"
    for size in ("small", "medium", "large", "super"):
        for system in SYSTEMS:
            yield Item(
                name=f"fewest, {size}, {system}",
                table=title,
                settings={**_settings(system, size, 0, "none"), "devices": DEVICES},
                run=lambda system=system, size=size: _fewest_row(system, size),
            )


def _most() -> Iterator[Item]:
    title = "The largest network of Super's shape on 1024 GPUs, nothing recomputed, by its number of layers"
    for system in SYSTEMS:
        yield Item(
            name=f"most, {system}",
            table=title,
            settings=_settings(system, "super", 1024, "none"),
            run=lambda system=system: _most_row(system),
        )


_LAYER = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "ffn_size": 2048, "activation": "silu"}
_TOKENS, _NODES, _PER_NODE = 1024, 4, 8
_TRAFFIC: dict[str, dict[str, Any]] = {
    "padded": {"dispatch": "padded", "drop_policy": "probs"},
    "pft": {"dispatch": "pft", "recv_buffer_factor": 1.5},
    "rbd, random pilots": {"dispatch": "rbd", "recv_buffer_factor": 1.5},
    "rbd, rail": {"dispatch": "rbd", "pilot": "rail", "recv_buffer_factor": 1.5},
}


def _traffic() -> Iterator[Item]:
    title = (
        "Rows that one device of 4 x 8 H100 sends in one direction, MiB: room in the compiled program's exchanges, and "
        "what uniform routing sends (E 256, k 8, H 7168, 1024 tokens a device; counts beside them included)"
    )
    for name, fields in _TRAFFIC.items():
        yield Item(
            name=f"traffic, {name}",
            table=title,
            settings={**_LAYER, **fields, "tokens": _TOKENS, "nodes": _NODES, "per_node": _PER_NODE},
            run=lambda name=name, fields=fields: _traffic_row(name, fields),
            seeds=(0,),
        )


_SMALL = {"num_experts": 64, "top_k": 6, "hidden_size": 2048, "ffn_size": 1408, "num_shared_experts": 2}
_SCHEDULERS = {"as it is": {}, "latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def _overlap() -> Iterator[Item]:
    title = (
        "Exchanges of rows in a layer's scheduled program, 2 x 8 H100, and what runs between their start and their end"
    )
    for dispatch in ("pft", "rbd"):
        for scheduler, options in _SCHEDULERS.items():
            yield Item(
                name=f"overlap, {dispatch}, {scheduler}",
                table=title,
                settings={**_SMALL, "dispatch": dispatch, "options": options},
                run=lambda dispatch=dispatch, scheduler=scheduler: _overlap_row(dispatch, scheduler),
            )


def _settings(system: str, size: str, devices: int, remat: str) -> dict[str, Any]:
    """All that decides an outcome: the configs' content and how the survey lays them out."""
    import dataclasses

    from jaxlab import core
    from jaxlab.xmoe import trainable

    sizes = trainable.SIZES if size == "all" else (size,)
    return {
        "configs": {name: core.find_config(f"configs/xmoe/{name}.yaml").read_text() for name in sizes},
        "system": dataclasses.asdict(trainable.SYSTEMS[system]),
        "devices": devices,
        "remat": remat,
        "recv_buffer_factor": trainable.RECV_BUFFER_FACTOR,
    }


def _traffic_row(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from jaxlab.xmoe import MoEConfig, Topology, dispatch_volume, uniform_redundancy_rate
    from jaxlab.xmoe.traffic import bound, layer_plan

    cfg = MoEConfig(**_LAYER, **fields, expert_axes=("node", "expert"))
    room = bound(layer_plan(cfg, _TOKENS, {"node": _NODES, "expert": _PER_NODE}))
    devices, k = _NODES * _PER_NODE, cfg.top_k
    choices = np.argsort(np.random.default_rng(0).random((devices, _TOKENS, cfg.num_experts)), axis=-1)[..., :k]
    sent = dispatch_volume(choices, cfg, Topology(devices, _PER_NODE))[cfg.dispatch]
    row, abroad = cfg.hidden_size * 2, (_NODES - 1) / _NODES
    slots = {
        "padded": sent.inter_rows / devices / abroad,  # C places of every expert, used or not
        "pft": _TOKENS * k,
        "rbd": _TOKENS * k * (1 - uniform_redundancy_rate(cfg.num_experts, k, _NODES)),
    }[cfg.dispatch]

    def mib(size: float) -> float:
        return round(size / 2**20, 1)

    return {
        "dispatch": name,
        "exchanges that cross nodes, room": mib(room.across / 2),
        "really to other nodes": mib(sent.inter_bytes / devices),
        "closed form": mib(slots * abroad * row),
        "exchanges inside nodes, room": mib(room.inside / 2),
        "really inside nodes": mib(sent.intra_bytes / devices),
    }


def _overlap_row(dispatch: str, scheduler: str) -> dict[str, Any]:
    from jaxlab.xmoe import MoEConfig
    from jaxlab.xmoe.traffic import layer_plan, windows

    cfg = MoEConfig(**_SMALL, dispatch=dispatch, expert_axes=("node", "expert"), recv_buffer_factor=1.5)
    found = windows(layer_plan(cfg, 2048, {"node": 2, "expert": 8}, options=_SCHEDULERS[scheduler]).hlo)
    names = [name for window in found for name in window.meanwhile]
    shared = [name for name in names if "GatedMLP" in name and "dot_general" in name]
    return {
        "dispatch": dispatch,
        "scheduler": scheduler,
        "exchanges": len(found),
        "asynchronous": sum(not window.synchronous for window in found),
        "computations meanwhile": len(names),
        "shared expert's matrix products among them": len(shared),
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


def _fewest_row(system: str, size: str) -> dict[str, Any]:
    from jaxlab.xmoe import trainable

    row: dict[str, Any] = {"size": size, "system": trainable.SYSTEMS[system].title}
    for gpu, found in trainable.fewest(system, size, DEVICES, gpus=tuple(GPUS)).items():
        row[f"GPUs, {GPUS[gpu]}"] = "none" if found is None else found.devices
        row[f"TP, {GPUS[gpu]}"] = None if found is None else found.tensor
        row[f"GiB, {GPUS[gpu]}"] = None if found is None else _gib(found.total)
    return row


def _most_row(system: str) -> dict[str, Any]:
    from jaxlab.xmoe import trainable

    found = trainable.best(system, "super", 1024)
    row: dict[str, Any] = {"system": trainable.SYSTEMS[system].title, "TP": found.tensor}
    for gpu, memory in GPUS.items():
        layers = trainable.most_layers(found, gpu=gpu)
        row[f"layers, {memory}"] = layers
        row[f"parameters, B, {memory}"] = round(trainable.parameters("super", layers) / 1e9, 1) if layers else 0.0
    return row
