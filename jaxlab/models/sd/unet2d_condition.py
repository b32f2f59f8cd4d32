"""The UNet of Stable Diffusion 1.x (Rombach et al., 2022, arXiv:2112.10752) as diffusers lays it out."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as AnyArray

from jaxlab.models.sd.attention import KeysValues, Transformer
from jaxlab.models.sd.blocks import Conv, GroupNorm, Upsample
from jaxlab.models.sd.config import CROSS_ATTENTION_UP, UNetConfig
from jaxlab.models.sd.encoder import Encoder, Image, Maps, Policy, TextPairs


class UpBlock(Policy):
    """Residual blocks that take up what the encoder left, with transformers if the block attends; then larger sides.

    Attributes:
        index: of the block, counted from the deepest.
    """

    index: int = 0

    def setup(self):
        """Makes the submodules."""
        config, index = self.config, self.index
        width = config.block_out_channels[::-1][index]
        layers = config.layers[::-1][index] + 1
        self.resnets = [self._resnet(width, True) for _ in range(layers)]
        args = (width, config.heads[::-1][index], config.depths[::-1][index])
        attends = config.up_block_types[index] == CROSS_ATTENTION_UP
        self.attentions = [self._transformer(*args) for _ in range(layers if attends else 0)]
        last = index == len(config.block_out_channels) - 1
        self.upsamplers = [] if last else [Upsample(width, dtype=self.dtype)]

    def __call__(
        self, x: Image, skips: list[Image], time: Float[Array, "b d"], text: Iterator[KeysValues], capture: int | None
    ) -> tuple[Image, Maps]:
        """The output and the maps kept; takes from the end of `skips`."""
        maps = []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), time)
            if self.attentions:
                x, kept = self.attentions[layer](x, text, capture)
                maps += kept
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x, maps


class UNet2DCondition(Encoder):
    """Predicts noise, or whatever it was trained on, from latents, a time and text states.

    Attributes:
        config: a `UNetConfig`.

    Example:
        unet = UNet2DCondition(UNetConfig(block_out_channels=(32, 64), down_block_types=(...), ...))
        eps = unet.apply({"params": params}, latents, time, text)
    """

    config: UNetConfig = UNetConfig()

    def setup(self):
        """Makes the submodules."""
        super().setup()
        config, policy = self.config, {"dtype": self.dtype, "implementation": self.implementation}
        self.up_blocks = [UpBlock(config, index=index, **policy) for index in range(len(config.up_block_types))]
        norm = {"activation": jax.nn.silu, "dtype": self.dtype}
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.norm_eps, **norm)
        self.conv_out = Conv(config.out_channels, dtype=self.dtype)

    def _attending(self) -> list[Transformer]:
        return super()._attending() + [layer for block in self.up_blocks for layer in block.attentions]

    def __call__(
        self,
        latents: Float[AnyArray, "b h w c"],
        time: AnyArray,
        text: Float[AnyArray, "b s e"] | TextPairs,
        down_residuals: Sequence[Image] | None = None,
        mid_residual: Image | None = None,
        *,
        capture: int | None = None,
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], Float[Array, "l b t s"]]:
        """The prediction at a time.

        Args:
            latents: `[B,h,w,in_channels]`.
            time: `[B]`, any real number of 0 to 1000.
            text: states `[B,S,D]`, or what `text_keys_values` made of them.
            down_residuals: of a `ControlNet`, added to what the decoder takes up again.
            mid_residual: of the same, added to the middle's output.
            capture: keeps the maps of cross-attention layers with so many query places, of down and up blocks.

        Returns:
            `[B,h,w,out_channels]` float32; with `capture` also the head means `[L,B,T,S]` float32 of the layers kept,
            in the order of execution.

        Raises:
            ValueError: shapes that do not fit the configuration or one another, naming the argument; a resolution to
                capture at which no layer attends.
        """
        features, embedding, pairs = self._inputs(latents, time, text)
        x, skips, maps = self._encode(self.conv_in(features), embedding, pairs, capture)
        if down_residuals is not None:
            expected, given = [skip.shape for skip in skips], [residual.shape for residual in down_residuals]
            if expected != given:
                raise ValueError(f"down_residuals: expected shapes {expected}, got {given}")
            skips = [skip + residual.astype(skip.dtype) for skip, residual in zip(skips, down_residuals)]
        if mid_residual is not None:
            if mid_residual.shape != x.shape:
                raise ValueError(f"mid_residual: expected shape {x.shape}, got {mid_residual.shape}")
            x = x + mid_residual.astype(x.dtype)
        for block in self.up_blocks:
            x, kept = block(x, skips, embedding, pairs, capture)
            maps += kept
        out = self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)
        if capture is None:
            return out
        if not maps:
            raise ValueError(f"capture: no cross-attention layer has {capture} places at latents of {features.shape}")
        return out, jnp.stack(maps)
