"""The half that UNet and ControlNet share: time, first convolution, blocks of falling resolution, the middle."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as AnyArray

from jaxlab.models.sd.attention import KeysValues, Transformer
from jaxlab.models.sd.blocks import Conv, Downsample, ResnetBlock
from jaxlab.models.sd.config import CROSS_ATTENTION_DOWN, CROSS_ATTENTION_MID, EncoderConfig
from jaxlab.models.sd.embeddings import TimeEmbedding

Image = Float[Array, "b _ _ _"]
Maps = list[Float[Array, "b t s"]]
TextPairs = tuple[KeysValues, ...]
"""Keys and values of every cross-attention layer in the order of execution; `[B,S,H,d]` each."""


class Policy(nn.Module):
    """What all networks here have.

    Attributes:
        config: of the network.
        dtype: of the computation; parameters, norms, softmax and time embedding are float32.
        implementation: of the kernels, see `pallas_kernels`; None chooses by platform.
    """

    config: Any
    dtype: str = "float32"
    implementation: str | None = None

    def _resnet(self, width: int, shortcut: bool) -> ResnetBlock:
        config = self.config
        return ResnetBlock(width, config.norm_num_groups, config.norm_eps, shortcut, dtype=self.dtype)

    def _transformer(self, width: int, heads: int, depth: int) -> Transformer:
        config = self.config
        return Transformer(
            width,
            heads,
            depth,
            config.norm_num_groups,
            config.use_linear_projection,
            dtype=self.dtype,
            implementation=self.implementation,
        )


class DownBlock(Policy):
    """Residual blocks, with transformers in between if the block attends, then half the sides.

    Attributes:
        index: of the block.
    """

    index: int = 0

    def setup(self):
        """Makes the submodules."""
        config, width = self.config, self.config.block_out_channels[self.index]
        before = config.block_out_channels[max(self.index - 1, 0)]
        layers = config.layers[self.index]
        attends = config.down_block_types[self.index] == CROSS_ATTENTION_DOWN
        self.resnets = [self._resnet(width, layer == 0 and before != width) for layer in range(layers)]
        args = (width, config.heads[self.index], config.depths[self.index])
        self.attentions = [self._transformer(*args) for _ in range(layers if attends else 0)]
        last = self.index == len(config.block_out_channels) - 1
        self.downsamplers = [] if last else [Downsample(width, dtype=self.dtype)]

    def __call__(
        self, x: Image, time: Float[Array, "b d"], text: Iterator[KeysValues], capture: int | None
    ) -> tuple[Image, list[Image], Maps]:
        """The output, what the decoder takes up again, and the maps kept."""
        skips, maps = [], []
        for layer, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x, kept = self.attentions[layer](x, text, capture)
                maps += kept
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips, maps


class MidBlock(Policy):
    """Two residual blocks with a transformer between, or one residual block."""

    def setup(self):
        """Makes the submodules."""
        config, width = self.config, self.config.block_out_channels[-1]
        attends = config.mid_block_type == CROSS_ATTENTION_MID
        self.resnets = [self._resnet(width, False) for _ in range(2 if attends else 1)]
        self.attentions = [self._transformer(width, config.heads[-1], config.depths[-1])] if attends else []

    def __call__(self, x: Image, time: Float[Array, "b d"], text: Iterator[KeysValues]) -> Image:
        """The same size."""
        x = self.resnets[0](x, time)
        for transformer, resnet in zip(self.attentions, self.resnets[1:]):
            x, _ = transformer(x, text, None)
            x = resnet(x, time)
        return x


class Encoder(Policy):
    """Base class: parameters and steps of the half that is shared."""

    def setup(self):
        """Makes the submodules."""
        config: EncoderConfig = self.config
        policy = {"dtype": self.dtype, "implementation": self.implementation}
        widths = config.block_out_channels
        self.conv_in = Conv(widths[0], dtype=self.dtype)
        self.time_embedding = TimeEmbedding(widths[0], config.flip_sin_to_cos, float(config.freq_shift))
        self.down_blocks = [DownBlock(config, index=index, **policy) for index in range(len(widths))]
        self.mid_block = MidBlock(config, **policy)

    def _attending(self) -> list[Transformer]:
        """Transformers in the order of execution."""
        return [layer for block in (*self.down_blocks, self.mid_block) for layer in block.attentions]

    def text_keys_values(self, text: Float[AnyArray, "b s e"]) -> TextPairs:
        """What every cross-attention layer makes of text states; a call takes it in their place.

        Args:
            text: `[B,S,D]`.

        Returns:
            (keys, values) of each layer in the order of execution, `[B,S,H,d]` each.

        Raises:
            ValueError: D is not the configuration's `cross_attention_dim`.
        """
        text = jnp.asarray(text)
        if text.ndim != 3 or text.shape[2] != self.config.cross_attention_dim:
            raise ValueError(f"text: expected shape [B,S,{self.config.cross_attention_dim}], got {text.shape}")
        return tuple(pair for layer in self._attending() for pair in layer.keys_values(text.astype(self.dtype)))

    def _inputs(self, latents: Any, time: Any, text: Any) -> tuple[Image, Float[Array, "b d"], Iterator[KeysValues]]:
        """Arguments of a call as the blocks take them: latents, activated time embedding, keys and values."""
        latents, time = jnp.asarray(latents, self.dtype), jnp.asarray(time, jnp.float32)
        if latents.ndim != 4 or latents.shape[-1] != self.config.in_channels:
            raise ValueError(f"latents: expected shape [B,h,w,{self.config.in_channels}], got {latents.shape}")
        if time.shape != latents.shape[:1]:
            raise ValueError(f"time: expected shape {latents.shape[:1]}, got {time.shape}")
        pairs = text if isinstance(text, tuple) else self.text_keys_values(text)
        layers = sum(len(layer.transformer_blocks) for layer in self._attending())
        if len(pairs) != layers:
            raise ValueError(f"text: expected keys and values of {layers} layers, got {len(pairs)}")
        wrong = [jnp.shape(keys) for keys, _ in pairs if jnp.shape(keys)[0] != len(latents)]
        if wrong:
            raise ValueError(f"text: expected {len(latents)} rows as latents has, got {wrong[0][0]}")
        return latents, jax.nn.silu(self.time_embedding(time)), iter(pairs)

    def _encode(
        self, x: Image, time: Float[Array, "b d"], text: Iterator[KeysValues], capture: int | None = None
    ) -> tuple[Image, list[Image], Maps]:
        """From the first features to the middle's output; also what the decoder takes up again, and the maps kept."""
        skips, maps = [x], []
        for block in self.down_blocks:
            x, taken, kept = block(x, time, text, capture)
            skips += taken
            maps += kept
        return self.mid_block(x, time, text), skips, maps
