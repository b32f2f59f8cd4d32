"""Networks to the folders of a diffusers checkpoint, as `load_diffusers` and `clip_text` read them."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from jaxlab import core
from jaxlab.models import load
from jaxlab.models.sd import clip_text, load_diffusers
from jaxlab.models.sd.clip_text import CLIPTextEncoder

_CLASSES = {
    "UNet2DCondition": "UNet2DConditionModel",
    "ControlNet": "ControlNetModel",
    "AutoencoderKL": "AutoencoderKL",
}


def save_network(
    directory: str | os.PathLike[str], module: nn.Module, params: PyTree, *, dtype: str = "float32"
) -> None:
    """Writes `config.json` and the weights, under diffusers' names or, of a text encoder, transformers'.

    Args:
        directory: of the network, made if it is not there.
        module: one of `jaxlab.models.sd`.
        params: its parameters.
        dtype: of the stored numbers.

    Raises:
        KeyError: a parameter that the module does not have, or none that it has.
    """
    from safetensors.numpy import save

    directory, config = Path(directory), dataclasses.asdict(module.config)  # pyrefly: ignore[missing-attribute]
    if isinstance(module, CLIPTextEncoder):
        stem, leaves = "model", clip_text._table(module.config, "text_model.")
        config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config}
    else:
        stem, leaves = load_diffusers.STEM, load_diffusers.table(module, _NOTHING)
        config = {"_class_name": _CLASSES[type(module).__name__], **config}
    flat = load.flatten(nn.meta.unbox(params))
    if set(flat) != {leaf.path for leaf in leaves}:
        raise KeyError(f"params: not those of the module: {sorted(set(flat) ^ {leaf.path for leaf in leaves})[:10]}")
    tensors = {
        part.name: np.ascontiguousarray(leaf.theirs(np.asarray(flat[leaf.path])[part.index]), dtype)
        for leaf in leaves
        for part in leaf.parts
    }
    core.replace_file(directory / f"{stem}.safetensors", save(tensors, metadata={"format": "pt"}))
    core.replace_file(directory / "config.json", json.dumps(config, indent=1) + "\n")


class _Nothing(load.Tensors):
    """A file without tensors: everything then has its present name and layout."""

    where = "nothing"

    def __init__(self):
        self._entries = {}


_NOTHING = _Nothing()
