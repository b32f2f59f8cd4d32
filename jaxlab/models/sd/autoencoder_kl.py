"""The autoencoder of Stable Diffusion: images to the mean and log variance of latents, and latents to images."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as AnyArray

from jaxlab.models.sd.attention import Attention
from jaxlab.models.sd.blocks import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from jaxlab.models.sd.config import VAEConfig

_EPSILON = 1e-6  # of every norm
_LOG_VARIANCE = (-30.0, 20.0)
Image = Float[Array, "b _ _ _"]


class _Part(nn.Module):
    """What the parts have: `config`, `dtype` and `implementation` of the whole."""

    config: VAEConfig
    dtype: str = "float32"
    implementation: str | None = None

    def _resnet(self, before: int, width: int) -> ResnetBlock:
        groups = self.config.norm_num_groups
        return ResnetBlock(width, groups, _EPSILON, before != width, timed=False, dtype=self.dtype)

    def _norm(self, activation=None) -> GroupNorm:
        return GroupNorm(self.config.norm_num_groups, _EPSILON, activation, self.dtype)


class ImageAttention(_Part):
    """One head of attention over the places of an image, beside a residual connection."""

    def setup(self):
        """Makes the submodules."""
        self.group_norm = self._norm()
        width = self.config.block_out_channels[-1]
        self.attention = Attention(width, 1, True, self.dtype, self.implementation)

    def __call__(self, x: Image) -> Image:
        """The same size."""
        rows, height, width, channels = x.shape
        out, _ = self.attention(self.group_norm(x).reshape(rows, height * width, channels))
        return x + out.reshape(x.shape)


class Middle(_Part):
    """Two residual blocks, with attention between."""

    def setup(self):
        """Makes the submodules."""
        width = self.config.block_out_channels[-1]
        self.resnets = [self._resnet(width, width) for _ in range(2)]
        policy = (self.config, self.dtype, self.implementation)
        self.attentions = [ImageAttention(*policy)] if self.config.mid_block_add_attention else []

    def __call__(self, x: Image) -> Image:
        """The same size."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(_Part):
    """Residual blocks, then half the sides.

    Attributes:
        index: of the block.
    """

    index: int = 0

    def setup(self):
        """Makes the submodules."""
        widths = self.config.block_out_channels
        before, width = widths[max(self.index - 1, 0)], widths[self.index]
        self.resnets = [
            self._resnet(width if layer else before, width) for layer in range(self.config.layers_per_block)
        ]
        last = self.index == len(widths) - 1
        self.downsamplers = [] if last else [Downsample(width, (0, 1), self.dtype)]

    def __call__(self, x: Image) -> Image:
        """Encodes one step further."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(_Part):
    """Residual blocks, then twice the sides.

    Attributes:
        index: of the block, counted from the deepest.
    """

    index: int = 0

    def setup(self):
        """Makes the submodules."""
        widths = self.config.block_out_channels[::-1]
        before, width = widths[max(self.index - 1, 0)], widths[self.index]
        layers = self.config.layers_per_block + 1
        self.resnets = [self._resnet(width if layer else before, width) for layer in range(layers)]
        last = self.index == len(widths) - 1
        self.upsamplers = [] if last else [Upsample(width, self.dtype)]

    def __call__(self, x: Image) -> Image:
        """Decodes one step further."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(_Part):
    """Images to moments."""

    def setup(self):
        """Makes the submodules."""
        config, policy = self.config, (self.config, self.dtype, self.implementation)
        self.conv_in = Conv(config.block_out_channels[0], dtype=self.dtype)
        self.down_blocks = [DownBlock(*policy, index) for index in range(len(config.block_out_channels))]
        self.mid_block = Middle(*policy)
        self.conv_norm_out = self._norm(jax.nn.silu)
        self.conv_out = Conv(2 * config.latent_channels, dtype=self.dtype)

    def __call__(self, x: Image) -> Image:
        """Encodes `x`."""
        for layer in (self.conv_in, *self.down_blocks, self.mid_block, self.conv_norm_out, self.conv_out):
            x = layer(x)
        return x


class Decoder(_Part):
    """Latents to images."""

    def setup(self):
        """Makes the submodules."""
        config, policy = self.config, (self.config, self.dtype, self.implementation)
        self.conv_in = Conv(config.block_out_channels[-1], dtype=self.dtype)
        self.mid_block = Middle(*policy)
        self.up_blocks = [UpBlock(*policy, index) for index in range(len(config.block_out_channels))]
        self.conv_norm_out = self._norm(jax.nn.silu)
        self.conv_out = Conv(config.out_channels, dtype=self.dtype)

    def __call__(self, x: Image) -> Image:
        """Decodes `x`."""
        for layer in (self.conv_in, self.mid_block, *self.up_blocks, self.conv_norm_out, self.conv_out):
            x = layer(x)
        return x


class AutoencoderKL(nn.Module):
    """The autoencoder. Its latents are *not* multiplied by the configuration's `scaling_factor`.

    Attributes:
        config: a `VAEConfig`.
        dtype: of the computation; parameters, norms and softmax are float32.
        implementation: of the kernels, see `pallas_kernels`; None chooses by platform.

    Example:
        mean, logvar = vae.apply({"params": params}, image, method="encode")
        image = vae.apply({"params": params}, mean, method="decode")
    """

    config: VAEConfig = VAEConfig()
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self):
        """Makes the submodules."""
        config, policy = self.config, (self.config, self.dtype, self.implementation)
        self.encoder, self.decoder = Encoder(*policy), Decoder(*policy)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, 1, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, 1, dtype=self.dtype)

    def encode(
        self, image: Float[AnyArray, "b y x c"]
    ) -> tuple[Float[Array, "b h w latent"], Float[Array, "b h w latent"]]:
        """Mean and log variance (limited to -30 to 20) of the posterior, float32.

        Args:
            image: `[B,H,W,3]` in [-1, 1].

        Raises:
            ValueError: other channels, or sides that are no multiple of the factor between image and latents.
        """
        config, shape = self.config, jnp.shape(image)
        if len(shape) != 4 or shape[3] != config.in_channels or any(side % config.factor for side in shape[1:3]):
            raise ValueError(
                f"image: expected shape [B,H,W,{config.in_channels}], H and W multiples of {config.factor}, got {shape}"
            )
        moments = self.encoder(jnp.asarray(image, self.dtype))
        moments = self.quant_conv(moments) if config.use_quant_conv else moments
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *_LOG_VARIANCE)

    def decode(self, latents: Float[AnyArray, "b h w latent"]) -> Float[Array, "b y x c"]:
        """The image `[B,H,W,3]` of latents that are not scaled, float32, about [-1, 1].

        Raises:
            ValueError: other channels.
        """
        config, shape = self.config, jnp.shape(latents)
        if len(shape) != 4 or shape[3] != config.latent_channels:
            raise ValueError(f"latents: expected shape [B,h,w,{config.latent_channels}], got {shape}")
        x = jnp.asarray(latents, self.dtype)
        x = self.post_quant_conv(x) if config.use_post_quant_conv else x
        return self.decoder(x).astype(jnp.float32)

    def __call__(self, image: Float[AnyArray, "b y x c"]) -> Float[Array, "b y x o"]:
        """The image that comes back from the posterior's mean."""
        return self.decode(self.encode(image)[0])
