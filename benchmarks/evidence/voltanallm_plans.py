"""Llama 3.1 8B in the engine, compiled for A100s and H100s: what the pages leave room for. Nothing ran."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "voltanallm"

GPUS = ("a100", "h100")
DEVICES = (1, 2)
"""Along the tensor axis: key and value heads, and with them the pages, are divided among them."""
PHASES = ("decode", "prefill")
_OPTIONS = {"xla_backend_optimization_level": 0}  # where only buffers are read


def items() -> Iterator[Item]:
    """The config's step, and the largest one that fits, of each phase, GPU and number of devices."""
    from jaxlab.core import to_dict

    for varied, run in (("kernels", _step_row), ("most", _most_row)):
        for gpu in GPUS:
            for devices in DEVICES:
                for phase in PHASES:
                    config = _config(phase=phase)
                    yield Item(
                        name=f"{varied}, {phase}, {devices} {gpu}",
                        table=_title(varied),
                        settings={"gpu": gpu, "devices": devices, "varied": varied, **to_dict(config)},
                        run=functools.partial(run, gpu, devices, config),
                    )


def _config(**changes: Any) -> Any:
    from jaxlab import core
    from jaxlab.voltanallm.compiled import PlanConfig

    config = core.load_config(PlanConfig, core.find_config("configs/voltanallm/paper.yaml"))
    return dataclasses.replace(config, **changes)


def _title(varied: str) -> str:
    config = _config()
    model = (
        f"Llama 3.1 8B in bfloat16, requests of {config.context} tokens in pages of {config.page_size}, one step of "
        f"decoding or of {config.prefill_tokens} prompt tokens; of one device of the tensor axis, by XLA's buffer "
        "assignment (nothing ran)"
    )
    if varied == "kernels":
        return f"{model}: GB of {config.batch} requests, registers and spilled bytes a thread of kernels by ptxas"
    return f"{model}: the most requests whose pages fit, found by compiling that number and the one above it"


def _target(gpu: str, devices: int) -> Any:
    from jaxlab.core.plan import target

    return target(gpu, f"1x1x{devices}", {"tensor": devices})


def _step_row(gpu: str, devices: int, config: Any) -> dict[str, Any]:
    from jaxlab.voltanallm.compiled import compile_phase

    made = compile_phase(config, _target(gpu, devices))
    kernels = {kernel.name: kernel for kernel in made.kernels}
    return {
        "GPU": gpu,
        "devices": devices,
        "phase": config.phase,
        **{name: made.bytes[name] / 1e9 for name in ("parameters", "cache", "temporaries", "total")},
        "fits": made.fits,
        "exchanged, MB": sum(each.bytes * each.count for each in made.collectives) / 1e6,
        "kernels": ", ".join(f"{each.name} ({each.registers}, {each.spill_bytes})" for each in kernels.values()),
    }


def _most_row(gpu: str, devices: int, config: Any) -> dict[str, Any]:
    from jaxlab.core.plan import search
    from jaxlab.models.cost import kv_cache_bytes
    from jaxlab.voltanallm.compiled import compile_phase

    target = _target(gpu, devices)
    total: dict[int, int] = {}

    def compiled(batch: int) -> int:
        made = compile_phase(dataclasses.replace(config, batch=batch), target, options=_OPTIONS, read_kernels=False)
        total[batch] = made.bytes["total"]
        return total[batch]

    limit = math.floor(target.memory_factor * target.memory_bytes)
    request = kv_cache_bytes(config.model, 1, config.context, "bfloat16") // devices
    batch = search(compiled, limit=limit, start=request, least=request)
    most = dataclasses.replace(config, batch=max(1, batch))
    return {
        "GPU": gpu,
        "devices": devices,
        "phase": config.phase,
        "requests": batch,
        "pages": most.pages if batch else 0,
        "tokens": batch * config.context,
        "pages, GB": batch * request / 1e9,
        "total, GB": total.get(batch, 0) / 1e9,
        "room, GB": limit / 1e9,
    }
