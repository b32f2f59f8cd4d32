"""What the networks are, read from the `config.json` of diffusers folders."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxlab.core.untrusted import understood
from jaxlab.models.sources import read_config

CROSS_ATTENTION_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_ATTENTION_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
CROSS_ATTENTION_MID, MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

_ANY = object()
_SILU = ("silu", "swish")
_UNET_FIXED: Mapping[str, Any] = {
    "act_fn": _SILU,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "only_cross_attention": False,
    "num_attention_heads": None,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "addition_embed_type_num_heads": _ANY,  # of an embedding that must be absent
    "upcast_attention": _ANY,  # the softmax is always in float32
}
_VAE_FIXED: Mapping[str, Any] = {
    "act_fn": _SILU,
    "down_block_types": _ANY,  # only their number matters, and that is checked against the widths
    "up_block_types": _ANY,
    "force_upcast": _ANY,
}


class _FromDict:
    """Reading a diffusers `config.json`: known fields, and a check that the rest asks for nothing that is not here."""

    CLASS_NAME: ClassVar[str]
    FIXED: ClassVar[Mapping[str, Any]] = _UNET_FIXED

    @classmethod
    @understood("config.json")
    def from_dict(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> Any:
        """Reads a configuration.

        Args:
            config: content of a diffusers `config.json`, its path, or the folder that holds it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, a network of another class, a behaviour that the module does not have (named with its
                value), or sizes that do not fit.
        """
        config = read_config(config)
        if config.get("_class_name", cls.CLASS_NAME) != cls.CLASS_NAME:
            raise ValueError(f"_class_name: expected {cls.CLASS_NAME!r}, got {config['_class_name']!r}")
        names = {field.name for field in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
        unknown = []
        for name, value in config.items():
            allowed = cls.FIXED.get(name, _NOTHING)
            if name in names or name.startswith("_") or allowed is _ANY:
                continue
            if value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                unknown.append(f"{name}={value!r}")
        if unknown:
            raise ValueError(f"{cls.__name__}: not supported: {', '.join(unknown[:10])}")
        return cls(**{name: value for name, value in config.items() if name in names})


_NOTHING = (None, False)  # what a key that nobody here knows may say


@dataclasses.dataclass(frozen=True)
class EncoderConfig(_FromDict):
    """What a UNet and its ControlNet share, under diffusers' names; defaults are those of Stable Diffusion 1.5.

    Lists become tuples, and a number that stands for every block is repeated for each.

    Attributes:
        in_channels: of the latents.
        down_block_types: kinds of the blocks of the encoder, "CrossAttnDownBlock2D" or "DownBlock2D".
        mid_block_type: "UNetMidBlock2DCrossAttn" or "UNetMidBlock2D" (without attention).
        block_out_channels: width of each block.
        layers_per_block: residual blocks of each encoder block; a decoder block has one more.
        attention_head_dim: *number of heads* of each block: the name is a mistake of diffusers that stayed.
        cross_attention_dim: width of the text states.
        transformer_layers_per_block: transformer layers after each residual block.
        use_linear_projection: whether the maps around transformers are stored as matrices, not as 1x1 convolutions.
        norm_num_groups: of group normalisation.
        norm_eps: of group normalisation, but that before transformers, where it is 1e-6.
        flip_sin_to_cos: cosines come first in the time embedding.
        freq_shift: of the time embedding's frequencies.
    """

    in_channels: int = 4
    down_block_types: Sequence[str] = (*(CROSS_ATTENTION_DOWN,) * 3, DOWN)
    mid_block_type: str = CROSS_ATTENTION_MID
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int | Sequence[int] = 2
    attention_head_dim: int | Sequence[int] = 8
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | Sequence[int] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float | int = 0

    def __post_init__(self):
        _tuples(self, "block_out_channels", "down_block_types")
        for name in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, name)
            value = (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)
            object.__setattr__(self, name, value)
            _one_each(self, name)
        _one_each(self, "down_block_types")
        _known(self, "down_block_types", (CROSS_ATTENTION_DOWN, DOWN))
        _known(self, "mid_block_type", (CROSS_ATTENTION_MID, MID))
        _divides(self, self.norm_num_groups, "norm_num_groups")
        kinds = (*self.down_block_types, self.mid_block_type)
        widths = (*self.block_out_channels, self.block_out_channels[-1])
        for kind, width, heads in zip(kinds, widths, (*self.heads, self.heads[-1])):
            if kind in (CROSS_ATTENTION_DOWN, CROSS_ATTENTION_MID) and (heads < 1 or width % heads):
                raise ValueError(f"attention_head_dim: {heads} heads do not divide the {width} channels of their block")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        return tuple(self.attention_head_dim)  # pyrefly: ignore[bad-argument-type]

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual blocks of each encoder block."""
        return tuple(self.layers_per_block)  # pyrefly: ignore[bad-argument-type]

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer layers after each residual block, by block."""
        return tuple(self.transformer_layers_per_block)  # pyrefly: ignore[bad-argument-type]


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """A `UNet2DCondition`.

    Attributes:
        out_channels: of the prediction.
        up_block_types: kinds of the blocks of the decoder, "UpBlock2D" or "CrossAttnUpBlock2D".
        sample_size: height and width of the latents it was trained on; nothing depends on it.
    """

    CLASS_NAME = "UNet2DConditionModel"

    out_channels: int = 4
    up_block_types: Sequence[str] = (UP, *(CROSS_ATTENTION_UP,) * 3)
    sample_size: int | Sequence[int] | None = 64

    def __post_init__(self):
        super().__post_init__()
        _tuples(self, "up_block_types")
        if not isinstance(self.sample_size, int | None):
            _tuples(self, "sample_size")
        _one_each(self, "up_block_types")
        _known(self, "up_block_types", (CROSS_ATTENTION_UP, UP))
        for kind, width, heads in zip(self.up_block_types, self.block_out_channels[::-1], self.heads[::-1]):
            if kind == CROSS_ATTENTION_UP and width % heads:
                raise ValueError(f"attention_head_dim: {heads} heads do not divide the {width} channels of their block")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A `ControlNet`.

    Attributes:
        conditioning_channels: of the hint.
        conditioning_embedding_out_channels: widths of the hint encoder; each but the first halves the hint's sides.
        controlnet_conditioning_channel_order: "rgb" or "bgr".
    """

    CLASS_NAME = "ControlNetModel"
    FIXED: ClassVar[Mapping[str, Any]] = {**_UNET_FIXED, "global_pool_conditions": False}

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    def __post_init__(self):
        super().__post_init__()
        _tuples(self, "conditioning_embedding_out_channels")
        _known(self, "controlnet_conditioning_channel_order", ("rgb", "bgr"))

    @property
    def hint_factor(self) -> int:
        """Pixels of the hint for one latent, either side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class VAEConfig(_FromDict):
    """An `AutoencoderKL`.

    Attributes:
        in_channels: of the image.
        out_channels: of the image that comes back.
        latent_channels: of the latents.
        block_out_channels: width of each block; each but the last halves the sides.
        layers_per_block: residual blocks of each encoder block; a decoder block has one more.
        norm_num_groups: of group normalisation.
        mid_block_add_attention: attention between the two residual blocks in the middle.
        use_quant_conv: a 1x1 convolution after the encoder.
        use_post_quant_conv: one before the decoder.
        scaling_factor: latents times it have unit variance; the module does not apply it.
        sample_size: height and width of the images it was trained on; nothing depends on it.
    """

    CLASS_NAME = "AutoencoderKL"
    FIXED: ClassVar[Mapping[str, Any]] = _VAE_FIXED

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    sample_size: int | Sequence[int] = 512

    def __post_init__(self):
        _tuples(self, "block_out_channels")
        _divides(self, self.norm_num_groups, "norm_num_groups")

    @property
    def factor(self) -> int:
        """Pixels for one latent, either side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _tuples(config: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(config, name, tuple(getattr(config, name)))


def _one_each(config: Any, name: str) -> None:
    blocks, given = len(config.block_out_channels), getattr(config, name)
    if len(given) != blocks:
        raise ValueError(f"{name}: expected one for each of the {blocks} blocks, got {given}")


def _known(config: Any, name: str, known: Sequence[str]) -> None:
    given = getattr(config, name)
    for value in (given,) if isinstance(given, str | None) else given:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _divides(config: Any, groups: int, name: str) -> None:
    wrong = [width for width in config.block_out_channels if groups < 1 or width % groups]
    if wrong:
        raise ValueError(f"{name}: {groups} does not divide block_out_channels {wrong}")
