"""CLIP (Radford et al. 2021, arXiv:2103.00020): images and prompts as vectors of one space.

Example:
    from jaxlab.models.clip import load_clip, preprocess_image
    model, params = load_clip("clip-vit-large-patch14")
    pixels = preprocess_image(image, size=model.vision.image_size)[None]
    images = model.apply({"params": params}, pixels, method="encode_images")  # [B,P], of length 1
    texts = model.apply({"params": params}, ids, method="encode_texts")
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.errors import require
from jaxlab.core.untrusted import read_object
from jaxlab.layers import Linear
from jaxlab.models.load import Leaf, Part, check, fill, nest, open_tensors
from jaxlab.models.sd.clip_text import CLIPTextConfig, CLIPTextEncoder
from jaxlab.models.sd.clip_text import _table as text_table
from jaxlab.models.vit import VisionTransformer, ViTConfig, vit_table

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_OLD_END = 2  # files before transformers 4.31 call the end token so, whatever it is


class CLIP(nn.Module):
    """Both towers and their projections, float32.

    Attributes:
        vision: of the image tower.
        text: of the text tower.
        projection_dim: P, size of the vectors.
        end: id of the token that ends a prompt, whose state is the prompt's; 2: the highest id of a prompt.
    """

    vision: ViTConfig
    text: CLIPTextConfig
    projection_dim: int
    end: int

    def setup(self):
        """Makes the submodules."""
        self.vision_model = VisionTransformer(self.vision)
        self.text_model = CLIPTextEncoder(self.text)
        self.visual_projection = Linear((self.projection_dim,), ("embed", None))
        self.text_projection = Linear((self.projection_dim,), ("embed", None))

    def __call__(
        self, pixels: Float[Array | np.ndarray, "b h w 3"], ids: Int[Array | np.ndarray, "b t"]
    ) -> Float[Array, " b"]:
        """The cosine of each image and its prompt."""
        return jnp.sum(self.encode_images(pixels) * self.encode_texts(ids), axis=-1)

    def encode_images(self, pixels: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b p"]:
        """Vectors of length 1 of images as `preprocess_image` gives them."""
        return _unit(self.visual_projection(self.vision_model(pixels).tokens[:, 0]))

    def encode_texts(self, ids: Int[Array | np.ndarray, "b t"]) -> Float[Array, "b p"]:
        """Vectors of length 1 of prompts: begin, text, end, padding."""
        ids = jnp.asarray(ids)
        states = self.text_model(ids)
        last = jnp.argmax(ids if self.end == _OLD_END else ids == self.end, axis=1)
        return _unit(self.text_projection(jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]))


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def preprocess_image(image: UInt8[np.ndarray, "h w 3"], *, size: int = 224) -> Float[np.ndarray, "s s 3"]:
    """The middle of an image as the image tower takes it: scaled (bicubic, on 8 bits), cut, normalised.

    Args:
        image: `[H,W,3]` uint8, RGB.
        size: of the result; the shorter side is scaled to it.

    Raises:
        ValueError: not three colours of 8 bits.
        MissingExtra: Pillow is absent (extra "images").
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    pillow = require("PIL.Image", "images")
    shorter = min(image.shape[:2])
    height, width = (int(size * side / shorter) for side in image.shape[:2])
    scaled = np.asarray(pillow.fromarray(image).resize((width, height), pillow.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return (scaled[top : top + size, left : left + size].astype(np.float32) / 255 - _MEAN) / _STD


def load_clip(directory: str | os.PathLike[str]) -> tuple[CLIP, Any]:
    """A CLIP and its parameters from a Hugging Face folder.

    Args:
        directory: with `config.json` of model type "clip" and `model.safetensors` (or shards and their index).

    Raises:
        FileNotFoundError: no such files.
        KeyError: missing or unexpected weights.
        ValueError: another model type, wrong shapes, or a damaged file.
    """
    path = Path(directory)
    config = read_object(path / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"model_type: expected 'clip', got {config.get('model_type')!r}")
    end = config["text_config"].get("eos_token_id", 49407)
    model = CLIP(ViTConfig.from_hf(config), CLIPTextConfig.from_dict(config), config["projection_dim"], end)
    with open_tensors(path) as tensors:
        table = [
            *(_within("vision_model", leaf) for leaf in vit_table(model.vision, tensors)),
            *(_within("text_model", leaf) for leaf in text_table(model.text, "text_model.")),
        ]
        widths = {"visual_projection": model.vision.hidden_size, "text_projection": model.text.hidden_size}
        for name, width in widths.items():
            shape = (width, model.projection_dim)
            table.append(Leaf(f"{name}/kernel", shape, (Part(f"{name}.weight"),), shape[::-1], transpose=True))
        check(tensors, table, lambda name: name == "logit_scale" or name.endswith(".position_ids"), most=10)
        return model, nest({leaf.path: fill(tensors, leaf, jnp.float32) for leaf in table})


def _within(tower: str, leaf: Leaf) -> Leaf:
    return dataclasses.replace(leaf, path=f"{tower}/{leaf.path}")
