"""Attention over the places of an image and over words, and the transformer between residual blocks.

Attention to words whose probabilities are kept is `attention_with_map`; all other attention, to words as well, is
`flash_self_attention`: on a CPU measured as fast as XLA's own at 64 places, and 1.5 to 5 times at 1024 and more.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers import Linear
from jaxlab.models.sd.blocks import Conv, GroupNorm
from pallas_kernels.attention_with_map import attention_with_map
from pallas_kernels.flash_self_attention import flash_self_attention

KeysValues = tuple[Float[Array, "b s _ _"], Float[Array, "b s _ _"]]
"""Keys and values of one cross-attention layer, `[B,S,H,d]` each."""

_TRANSFORMER_EPSILON = 1e-6  # of the norm before a transformer; the residual blocks' is configured


class LayerNorm(nn.Module):
    """Layer normalisation over channels (epsilon 1e-5), computed in float32.

    Attributes:
        dtype: of the result.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Normalises `x`."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-5)
        return (centred * inverse * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of `[B,T,C]` to itself, or to keys and values made before by `keys_values`.

    Attributes:
        channels: C.
        heads: of them.
        use_bias: biases on queries, keys and values; the output has one always.
        dtype: of the computation.
        implementation: of the kernels.
    """

    channels: int
    heads: int
    use_bias: bool = False
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self):
        """Makes the submodules."""
        features, names = (self.heads, self.channels // self.heads), ("embed", "heads", "head_dim")
        policy = {"use_bias": self.use_bias, "dtype": self.dtype}
        self.to_q = Linear(features, names, **policy)
        self.to_k = Linear(features, names, **policy)
        self.to_v = Linear(features, names, **policy)
        names = ("heads", "head_dim", "embed")
        self.to_out = Linear((self.channels,), names, in_axes=2, use_bias=True, dtype=self.dtype)

    def keys_values(self, states: Float[Array, "b s e"]) -> KeysValues:
        """Keys and values of what is attended to: `[B,S,H,d]` each."""
        return self.to_k(states), self.to_v(states)

    def __call__(
        self, x: Float[Array, "b t c"], keys_values: KeysValues | None = None, *, keep_map: bool = False
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b t s"] | None]:
        """The output, and with `keep_map` the head mean of the probabilities."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        if keep_map:
            out, probabilities = attention_with_map(self.to_q(x), k, v, implementation=self.implementation)
        else:
            out, probabilities = flash_self_attention(self.to_q(x), k, v, implementation=self.implementation), None
        return self.to_out(out), probabilities


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2020, arXiv:2002.05202) of four times the width, with the exact GELU.

    Attributes:
        channels: of input and output.
        dtype: of the computation.
    """

    channels: int
    dtype: str = "float32"

    def setup(self):
        """Makes the submodules."""
        policy = {"use_bias": True, "dtype": self.dtype}
        self.up = Linear((8 * self.channels,), ("embed", "mlp"), **policy)
        self.down = Linear((self.channels,), ("mlp", "embed"), **policy)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        """Value and gate are the halves of one map."""
        value, gate = jnp.split(self.up(x), 2, axis=-1)
        return self.down(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm and beside a residual connection.

    Attributes:
        channels: C.
        heads: of both attentions.
        dtype: of the computation.
        implementation: of the kernels.
    """

    channels: int
    heads: int
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self):
        """Makes the submodules."""
        attention = {"dtype": self.dtype, "implementation": self.implementation}
        self.norm1, self.norm2, self.norm3 = (LayerNorm(self.dtype) for _ in range(3))
        self.attn1 = Attention(self.channels, self.heads, **attention)
        self.attn2 = Attention(self.channels, self.heads, **attention)
        self.ff = FeedForward(self.channels, self.dtype)

    def keys_values(self, text: Float[Array, "b s e"]) -> KeysValues:
        """Of the cross-attention."""
        return self.attn2.keys_values(text)

    def __call__(
        self, x: Float[Array, "b t c"], text: KeysValues, *, keep_map: bool
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b t s"] | None]:
        """The output and the cross-attention's head means, if kept."""
        x = x + self.attn1(self.norm1(x))[0]
        out, probabilities = self.attn2(self.norm2(x), text, keep_map=keep_map)
        x = x + out
        return x + self.ff(self.norm3(x)), probabilities


class Transformer(nn.Module):
    """Transformer blocks over the places of an image, between two 1x1 maps, beside a residual connection.

    Attributes:
        channels: of the image.
        heads: of all attention.
        depth: blocks.
        groups: of the norm.
        linear_projection: whether the two maps are matrices rather than 1x1 convolutions.
        dtype: of the computation.
        implementation: of the kernels.
    """

    channels: int
    heads: int
    depth: int = 1
    groups: int = 32
    linear_projection: bool = False
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self):
        """Makes the submodules."""
        policy = {"dtype": self.dtype, "implementation": self.implementation}
        self.norm = GroupNorm(self.groups, _TRANSFORMER_EPSILON, dtype=self.dtype)
        self.proj_in, self.proj_out = self._projection(), self._projection()
        self.transformer_blocks = [TransformerBlock(self.channels, self.heads, **policy) for _ in range(self.depth)]

    def _projection(self) -> nn.Module:
        if self.linear_projection:
            return Linear((self.channels,), (None, "embed"), use_bias=True, dtype=self.dtype)
        return Conv(self.channels, 1, dtype=self.dtype)

    def keys_values(self, text: Float[Array, "b s e"]) -> tuple[KeysValues, ...]:
        """Of each block's cross-attention."""
        return tuple(block.keys_values(text) for block in self.transformer_blocks)

    def __call__(
        self, x: Float[Array, "b h w c"], text: Iterator[KeysValues], capture: int | None
    ) -> tuple[Float[Array, "b h w c"], list[Float[Array, "b t s"]]]:
        """The output, and head means of each block if the image has `capture` places. Takes a pair for each block."""
        rows, height, width, channels = x.shape
        y = self.proj_in(self.norm(x)).reshape(rows, height * width, channels)
        maps = []
        for block in self.transformer_blocks:
            y, probabilities = block(y, next(text), keep_map=capture == height * width)
            maps += [] if probabilities is None else [probabilities]
        return x + self.proj_out(y.reshape(x.shape)), maps
