"""What a Qwen2.5-VL model is, read from and written to Hugging Face's `config.json`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.core.untrusted import understood
from jaxlab.models.decoder import DecoderConfig
from jaxlab.models.sources import read_config

MODEL_TYPE = "qwen2_5_vl"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image encoder, under Hugging Face's field names; defaults are those of the published models.

    Attributes:
        depth: blocks.
        hidden_size: width.
        intermediate_size: width of the MLPs.
        num_heads: attention heads.
        in_channels: of an image.
        patch_size: pixels, either side.
        temporal_patch_size: frames of a patch; a still image is repeated.
        spatial_merge_size: patches, either side, that become one token.
        window_size: pixels, either side, of an attention window.
        fullatt_block_indexes: blocks that attend over the whole image.
        rope_theta: base wavelength of the two-dimensional rotary positions.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: Sequence[int] = (7, 15, 23, 31)
    rope_theta: float | int = 10000.0

    def __post_init__(self):
        object.__setattr__(self, "rope_theta", float(self.rope_theta))
        object.__setattr__(self, "fullatt_block_indexes", tuple(self.fullatt_block_indexes))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "fullatt_block_indexes" and value <= 0:
                raise ValueError(f"vision.{field.name} must be positive, got {value!r}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"vision.hidden_size must be a multiple of 4 * num_heads={4 * self.num_heads}, got {self.hidden_size}"
            )
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(
                f"vision.window_size must hold a token of {self.patch_size * self.spatial_merge_size} pixels, "
                f"got {self.window_size}"
            )

    @property
    def patch_features(self) -> int:
        """Numbers of a patch, the columns of `pixel_values`: 1176 in the published models."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class Config:
    """A Qwen2.5-VL model.

    Attributes:
        vision: the image encoder.
        text: the decoder; its `dtype`, `param_dtype` and `remat` hold for the encoder, too.
        image_token_id: the placeholder that an image's tokens replace.
        video_token_id: that of videos, which are not supported.
        vision_start_token_id: stands before an image.
        vision_end_token_id: stands after it.
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    @property
    def param_dtype(self) -> str:
        """Of all parameters."""
        return self.text.param_dtype

    @classmethod
    @understood("config.json")
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> "Config":
        """Reads a `config.json` of transformers 4 (text fields at the top, `rope_scaling`) or 5 (`text_config`).

        Args:
            config: its content, its path, or the folder that holds it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not a JSON object, another model type, or sizes that do not fit.
            KeyError: a size is missing.
            NotImplementedError: a feature that the decoder or the encoder does not have.
        """
        config = read_config(config)
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type: expected {MODEL_TYPE!r}, got {config.get('model_type')!r}")
        vision = dict(config.get("vision_config") or {})
        if vision.get("hidden_act", "silu") != "silu":
            raise NotImplementedError(f"vision_config: hidden_act={vision['hidden_act']!r}, expected 'silu'")
        rope = vision.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise NotImplementedError(f"vision_config: rope_type={rope['rope_type']!r}, expected 'axial'")
        vision.setdefault("in_channels", vision.get("in_chans", 3))
        vision.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        names = [field.name for field in dataclasses.fields(VisionConfig)]
        text = _text(config)
        out_size = vision.get("out_hidden_size", text.hidden_size)
        if out_size != text.hidden_size:
            raise ValueError(f"vision_config: out_hidden_size must be hidden_size={text.hidden_size}, got {out_size}")
        ids = [field.name for field in dataclasses.fields(cls) if field.name.endswith("token_id")]
        return cls(
            VisionConfig(**{name: vision[name] for name in names if vision.get(name) is not None}),
            text,
            **{name: config[name] for name in ids if name in config},
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, as transformers 5 spells it."""
        vision = dataclasses.asdict(self.vision)
        theta = vision.pop("rope_theta")
        vision |= {
            "model_type": f"{MODEL_TYPE}_vision",
            "hidden_act": "silu",
            "out_hidden_size": self.text.hidden_size,
            "fullatt_block_indexes": list(self.vision.fullatt_block_indexes),
            "rope_parameters": {"rope_type": "axial", "rope_theta": theta},
        }
        text = self.text.to_hf() | {"model_type": f"{MODEL_TYPE}_text"}
        del text["architectures"]
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "text_config": text,
            "vision_config": vision,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


def _text(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder: that of Qwen2, with M-RoPE and other defaults."""
    nested = config.get("text_config")
    given = dict(nested or config)
    tied = config.get("tie_word_embeddings") or given.get("tie_word_embeddings")
    given |= {"model_type": "qwen2", "tie_word_embeddings": bool(tied)}
    given.setdefault("rms_norm_eps", 1e-5)
    rope = {**(given.pop("rope_scaling", None) or {}), **(given.pop("rope_parameters", None) or {})}
    rope.setdefault("rope_theta", given.pop("rope_theta", None) or 1e6)
    rope.setdefault("mrope_section", [16, 24, 24])
    return DecoderConfig.from_hf(given | {"rope_parameters": rope})
