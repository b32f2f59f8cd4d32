"""Qwen2.5-VL (Bai et al., 2025, arXiv:2502.13923): image encoder, M-RoPE, and the decoder of `jaxlab.models.decoder`.

Example:
    import numpy as np
    from jaxlab.models.qwen2_5_vl import load, preprocess_image

    model, params = load("folder")
    pixels, grid = preprocess_image(np.zeros((56, 84, 3), np.uint8))
    tokens = model.apply({"params": params}, pixels, grid, method="encode_images")  # [6, D]
"""

from jaxlab.models.qwen2_5_vl.config import Config, VisionConfig
from jaxlab.models.qwen2_5_vl.images import preprocess_image, smart_resize
from jaxlab.models.qwen2_5_vl.model import Filled, Qwen25VL, abstract_params, init_params
from jaxlab.models.qwen2_5_vl.positions import mrope_index
from jaxlab.models.qwen2_5_vl.vision import Layout, VisionTower, image_layout, pad_layout
from jaxlab.models.qwen2_5_vl.weights import load, save

__all__ = [
    "Config",
    "Filled",
    "Layout",
    "Qwen25VL",
    "VisionConfig",
    "VisionTower",
    "abstract_params",
    "image_layout",
    "init_params",
    "load",
    "mrope_index",
    "pad_layout",
    "preprocess_image",
    "save",
    "smart_resize",
]
