"""ControlNet (Zhang et al., 2023, arXiv:2302.05543): a copy of the encoder that is also told a hint image."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as AnyArray

from jaxlab.models.sd.blocks import Conv
from jaxlab.models.sd.config import ControlNetConfig
from jaxlab.models.sd.encoder import Encoder, Image, TextPairs


class HintEncoder(nn.Module):
    """Convolutions from an image to features of the latents' size.

    Attributes:
        config: of the network.
        dtype: of the computation.
    """

    config: ControlNetConfig
    dtype: str = "float32"

    def setup(self):
        """Makes the submodules."""
        widths = self.config.conditioning_embedding_out_channels
        self.conv_in = Conv(widths[0], dtype=self.dtype)
        self.blocks = [
            Conv(wide, stride=stride, dtype=self.dtype)
            for before, after in itertools.pairwise(widths)
            for wide, stride in ((before, 1), (after, 2))
        ]
        self.conv_out = Conv(self.config.block_out_channels[0], zero=True, dtype=self.dtype)

    def __call__(self, hint: Image) -> Float[Array, "b y x d"]:
        """Encodes `hint`."""
        for layer in (self.conv_in, *self.blocks):
            hint = jax.nn.silu(layer(hint))
        return self.conv_out(hint)


class ControlNet(Encoder):
    """Residuals for a `UNet2DCondition` of the same encoder.

    Attributes:
        config: a `ControlNetConfig`.
    """

    config: ControlNetConfig = ControlNetConfig()

    def setup(self):
        """Makes the submodules."""
        super().setup()
        config = self.config
        connection = {"size": 1, "zero": True, "dtype": self.dtype}
        widths = [config.block_out_channels[0]]
        for index, (width, layers) in enumerate(zip(config.block_out_channels, config.layers)):
            widths += [width] * (layers + (index < len(config.block_out_channels) - 1))
        self.controlnet_cond_embedding = HintEncoder(config, self.dtype)
        self.controlnet_down_blocks = [Conv(width, **connection) for width in widths]
        self.controlnet_mid_block = Conv(widths[-1], **connection)

    def hint_features(self, hint: Float[AnyArray, "b y x c"]) -> Float[Array, "b h w d"]:
        """What an image adds after the first convolution; a call takes it by the keyword of the same name.

        Args:
            hint: `[B,H,W,3]` in [0, 1], in red, green, blue.

        Raises:
            ValueError: other channels, or sides that the latents' do not divide evenly.
        """
        config, shape = self.config, jnp.shape(hint)
        if (
            len(shape) != 4
            or shape[3] != config.conditioning_channels
            or any(s % config.hint_factor for s in shape[1:3])
        ):
            raise ValueError(
                f"hint: expected shape [B,H,W,{config.conditioning_channels}], "
                f"H and W multiples of {config.hint_factor}, got {shape}"
            )
        hint = jnp.asarray(hint, self.dtype)
        if config.controlnet_conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        return self.controlnet_cond_embedding(hint)

    def __call__(
        self,
        latents: Float[AnyArray, "b h w c"],
        time: AnyArray,
        text: Float[AnyArray, "b s e"] | TextPairs,
        hint: Float[AnyArray, "b y x hint"] | None = None,
        scale: Any = 1.0,
        *,
        hint_features: Float[AnyArray, "b h w d"] | None = None,
    ) -> tuple[tuple[Image, ...], Image]:
        """Residuals at a time.

        Args:
            latents: `[B,h,w,in_channels]`.
            time: `[B]`, any real number of 0 to 1000.
            text: states `[B,S,D]`, or what `text_keys_values` made of them.
            hint: `[B,H,W,3]` in [0, 1].
            scale: all residuals are multiplied by it; a number, traced or not.
            hint_features: in place of `hint`, what `hint_features` made of it.

        Returns:
            The residuals of the encoder's outputs, in their order, and of the middle.

        Raises:
            ValueError: both or neither of `hint` and `hint_features`; shapes that do not fit, naming the argument.
        """
        if (hint is None) == (hint_features is None):
            raise ValueError("hint: expected exactly one of hint and hint_features")
        features, embedding, pairs = self._inputs(latents, time, text)
        added = self.hint_features(hint) if hint is not None else jnp.asarray(hint_features, self.dtype)
        x = self.conv_in(features)
        if added.shape != x.shape:
            raise ValueError(f"hint: expected features of shape {x.shape}, got {added.shape}")
        x, skips, _ = self._encode(x + added, embedding, pairs)
        scale = jnp.asarray(scale, x.dtype)
        down = tuple(connect(skip) * scale for connect, skip in zip(self.controlnet_down_blocks, skips, strict=True))
        return down, self.controlnet_mid_block(x) * scale
