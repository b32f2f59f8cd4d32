"""Where the stored tensors of a Qwen2.5-VL go, under either naming, and its folders."""

import dataclasses
import functools
import math
import os
from collections.abc import Container, Mapping
from typing import Any

from jaxlab.models.decoder.weights import decoder_table
from jaxlab.models.decoder.weights import ignorable as decoder_ignorable
from jaxlab.models.kinds import Kind, override
from jaxlab.models.load import Leaf, Part
from jaxlab.models.qwen2_5_vl.config import Config
from jaxlab.models.qwen2_5_vl.model import Qwen25VL, abstract_params
from jaxlab.models.qwen2_5_vl.vision import block_runs

_PUBLISHED, _NESTED = ("visual.", "model."), ("model.visual.", "model.language_model.")
"""Prefixes of the encoder's and the decoder's names: of published files, and as transformers 5 nests its modules."""


def table(config: Config, stored: Container[str] = ()) -> list[Leaf]:
    """The key table.

    Args:
        config: of the model.
        stored: the names a file holds, which say how it calls them; without, the published names.
    """
    visual, language = _NESTED if f"{_NESTED[0]}patch_embed.proj.weight" in stored else _PUBLISHED
    text = [
        dataclasses.replace(
            leaf,
            path=f"language/{leaf.path}",
            parts=tuple(dataclasses.replace(part, name=_renamed(part.name, language)) for part in leaf.parts),
        )
        for leaf in decoder_table(config.text)
    ]
    return [*_visual(config, visual), *text]


def _renamed(name: str, prefix: str) -> str:
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def ignorable(config: Config, name: str) -> bool:
    """Names that carry nothing: rotary buffers of old files, and the head of a model whose head is the embedding."""
    return name.endswith(".rotary_pos_emb.inv_freq") or decoder_ignorable(config.text, name)


def _visual(config: Config, prefix: str) -> list[Leaf]:
    vision, d = config.vision, config.vision.hidden_size
    f, heads, size = vision.intermediate_size, vision.num_heads, vision.head_dim
    merged, out = d * vision.spatial_merge_size**2, config.text.hidden_size
    filter_shape = (d, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patches = Part(f"{prefix}patch_embed.proj.weight", file_shape=filter_shape)
    leaves = [
        Leaf("patch_embed/kernel", (vision.patch_features, d), (patches,), (d, vision.patch_features), transpose=True)
    ]
    maps = (
        ("attn/qkv", "attn.qkv", (d,), (3 * heads, size)),
        ("attn/o", "attn.proj", (heads, size), (d,)),
        ("mlp/gate", "mlp.gate_proj", (d,), (f,)),
        ("mlp/up", "mlp.up_proj", (d,), (f,)),
        ("mlp/down", "mlp.down_proj", (f,), (d,)),
    )
    first = 0
    for index, (_, layers) in enumerate(block_runs(vision)):
        stack = functools.partial(_stacked, f"{prefix}blocks", f"blocks_{index}", range(first, first + layers))
        leaves += [stack("attn_norm/scale", "norm1.weight", (d,)), stack("mlp_norm/scale", "norm2.weight", (d,))]
        for path, name, inputs, outputs in maps:
            leaves.append(stack(f"{path}/kernel", f"{name}.weight", outputs, inputs))
            leaves.append(stack(f"{path}/bias", f"{name}.bias", outputs))
        first += layers
    leaves.append(Leaf("merger_norm/scale", (d,), (Part(f"{prefix}merger.ln_q.weight"),), (d,)))
    for path, name, width in (("merger_up", "merger.mlp.0", merged), ("merger_down", "merger.mlp.2", out)):
        weight, bias = (Part(f"{prefix}{name}.{kind}") for kind in ("weight", "bias"))
        leaves.append(Leaf(f"{path}/kernel", (merged, width), (weight,), (width, merged), transpose=True))
        leaves.append(Leaf(f"{path}/bias", (width,), (bias,), (width,)))
    return [dataclasses.replace(leaf, path=f"visual/{leaf.path}") for leaf in leaves]


def _stacked(
    prefix: str, block: str, layers: range, path: str, name: str, outputs: tuple[int, ...], inputs: tuple[int, ...] = ()
) -> Leaf:
    """A parameter of some layers: a matrix from `inputs` to `outputs`, or a vector."""
    parts = tuple(Part(f"{prefix}.{layer}.{name}", (layer - layers.start,)) for layer in layers)
    stored = (math.prod(outputs), *([math.prod(inputs)] if inputs else []))
    return Leaf(f"{block}/{path}", (len(layers), *inputs, *outputs), parts, stored, transpose=bool(inputs))


def _override(config: Config, changes: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, text=override(config.text, changes))


KIND = Kind(Config.from_hf, _override, Qwen25VL, table, ignorable, abstract_params)


def load(directory: str | os.PathLike[str], *, dtype: Any = "float32") -> tuple[Qwen25VL, Any]:
    """`jaxlab.models.load_pretrained` of a folder that holds a Qwen2.5-VL.

    Raises:
        ValueError: it holds another model type.
        KeyError: missing or unexpected weights.
    """
    import jax.numpy as jnp

    from jaxlab.models.pretrained import load_pretrained
    from jaxlab.models.sources import find_model

    Config.from_hf(find_model(directory))
    return load_pretrained(directory, dtype=jnp.dtype(dtype).name)


def save(directory: str | os.PathLike[str], model: Qwen25VL, params: Any) -> None:
    """`jaxlab.models.save_pretrained`: safetensors and `config.json`, which transformers reads."""
    from jaxlab.models.pretrained import save_pretrained

    save_pretrained(directory, model, params)
