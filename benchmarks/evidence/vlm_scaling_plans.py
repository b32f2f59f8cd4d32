"""What samples that share their prompt leave room for: Qwen2.5-VL-7B's sampling compiled for one H100, nothing run."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "vlm-scaling"

SAMPLES = (1, 4, 16, 64, 256)
GPU = "h100"
_OPTIONS = {"xla_backend_optimization_level": 0}  # only buffers are read
_WAYS = {True: "shared", False: "a copy a sample"}


def items() -> Iterator[Item]:
    """Caches by their shapes, the phases compiled, and what fits."""
    for n in SAMPLES:
        yield _item("cache", f"cache of {n}", functools.partial(_cache_row, n), n=n)
    for shared in _WAYS:
        changes = {"shared": shared}
        yield _item("phase", f"decode, {_WAYS[shared]}", functools.partial(_phase_row, **changes), **changes)
    yield _item("phase", "prompt", functools.partial(_phase_row, phase="prompt"), phase="prompt")
    for name in ("n", "questions"):
        for shared in _WAYS:
            run = functools.partial(_most_row, name, shared)
            yield _item("most", f"most {name}, {_WAYS[shared]}", run, shared=shared, varied=name)


def _item(kind: str, name: str, run: Any, varied: str = "", **changes: Any) -> Item:
    from jaxlab.core import to_dict

    config = _config(**changes)
    settings = {"gpu": GPU, "options": _OPTIONS, "varied": varied, "model": _published(), "sizes": to_dict(config)}
    return Item(name=name, table=_title(kind), settings=settings, run=run)


def _title(kind: str) -> str:
    from jaxlab.vlm_scaling.compiled import image_tokens

    config = _config()
    size = (
        f"Qwen2.5-VL-7B in bfloat16, prompts of {image_tokens(config)} image tokens ({config.image_height} x "
        f"{config.image_width} pixels) and {config.text_tokens} of text, {config.max_new_tokens} new tokens"
    )
    return {
        "cache": f"{size}: GB of keys and values of one question by its samples, of the shapes of the caches",
        "phase": (
            f"{size}: GB on one H100 (78.2 of 85.0 usable) by XLA's buffer assignment; decoding is the loop over all "
            f"steps of {config.n} samples of one question, the prompt one image encoded and its question read (nothing "
            "ran)"
        ),
        "most": (
            f"{size}: the most that fits one H100 while decoding, found by compiling that number and the one above it, "
            "and the GB it takes (nothing ran)"
        ),
    }[kind]


def _config(**changes: Any) -> Any:
    from jaxlab import core
    from jaxlab.vlm_scaling.compiled import PlanConfig

    return dataclasses.replace(
        core.load_config(PlanConfig, core.find_config("configs/vlm_scaling/paper.yaml")), **changes
    )


def _published() -> dict[str, Any]:
    """The model's `config.json`."""
    import json

    from jaxlab.core import find_config

    return json.loads(find_config(_config().model).read_text(encoding="utf-8"))


def _cache_row(n: int) -> dict[str, Any]:
    from jaxlab.models.cost import kv_cache_bytes
    from jaxlab.vlm_scaling.compiled import cache_bytes, model_of, prompt_tokens

    config = _config(n=n)
    shared, copied = (cache_bytes(dataclasses.replace(config, shared=way)) for way in _WAYS)
    text = model_of(config.model).config.text
    formula = kv_cache_bytes(text, 1, prompt_tokens(config)) + n * kv_cache_bytes(text, 1, config.max_new_tokens)
    return {
        "samples": n,
        "shared": shared / 1e9,
        "prompt + samples x new tokens": formula / 1e9,
        "a copy a sample": copied / 1e9,
        "times less": copied / shared,
    }


def _phase_row(**changes: Any) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.vlm_scaling.compiled import compile_phase

    config = _config(**changes)
    made = compile_phase(config, target(GPU), options=_OPTIONS, read_kernels=False)
    parts = {name: made.bytes[name] / 1e9 for name in ("parameters", "cache", "temporaries", "total")}
    prompt = "" if config.phase == "prompt" else _WAYS[config.shared]
    return {"phase": config.phase, "keys and values of the prompt": prompt, **parts, "fits": made.fits}


def _most_row(name: str, shared: bool) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.vlm_scaling.compiled import most

    config, over = _config(shared=shared), target(GPU)
    count, taken = most(config, over, name, options=_OPTIONS)
    return {
        "keys and values of the prompt": _WAYS[shared],
        "questions": count if name == "questions" else 1,
        "samples of each": config.n if name == "questions" else count,
        "samples in all": count * config.n if name == "questions" else count,
        "total": taken / 1e9,
        "room": over.memory_factor * over.memory_bytes / 1e9,
    }
