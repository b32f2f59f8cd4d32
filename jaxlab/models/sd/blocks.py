"""What the image networks are made of: convolution, group normalisation, residual blocks, changes of resolution.

Images are `[B,h,w,C]`. How a convolution is computed is decided in `conv`, for every network.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers import Linear

Padding = tuple[tuple[int, int], tuple[int, int]]

_FEW_PLACES = 256


def conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], *, stride: int = 1, padding: Padding
) -> Float[Array, "b y x o"]:
    """A convolution (cross-correlation, as in torch) of x with zeros around it.

    XLA's own, except on a CPU for few places: there the cost is reading the kernel, which one product of all patches
    does at memory's speed (measured 1.3 to 4 times as fast up to 256 places of 640 to 2560 channels, equal at 1024).
    """
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    return _conv(x, kernel, stride, padding)


# Checkpointed: the backward pass keeps x and the kernel, not the patches.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    def whole(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)

    def by_patches(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = [x[:, i : i + high : stride, j : j + wide : stride] for i, j in np.ndindex(kernel.shape[:2])]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    high, wide = (x.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis] + 1 for axis in (0, 1))
    if x.shape[0] * -(-high // stride) * -(-wide // stride) > _FEW_PLACES:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=by_patches, default=whole)


class Conv(nn.Module):
    """A convolution with bias.

    Attributes:
        features: channels of the result.
        size: of the square kernel, 1 or 3.
        stride: 1 or 2.
        padding: zeros around the image, (before, after) on either axis; as torch's `padding=1` where size is 3.
        zero: starts at zero (ControlNet's connections), so that it changes nothing before it is trained.
        dtype: of the computation.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    zero: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b y x o"]:
        """Convolves `x`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = nn.initializers.zeros_init() if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        dtype = jnp.dtype(self.dtype)
        y = conv(x.astype(dtype), kernel.astype(dtype), stride=self.stride, padding=(self.padding, self.padding))
        return y + bias.astype(dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, 2018, arXiv:1803.08494), computed in float32.

    Attributes:
        groups: of neighbouring channels.
        epsilon: added to the variance.
        activation: applied to the result in float32.
        dtype: of the result.
    """

    groups: int
    epsilon: float
    activation: Callable[[Any], Any] | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises over places and the channels of a group."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        y = group_norm(x, scale.astype(jnp.float32), bias.astype(jnp.float32), self.groups, self.epsilon)
        return (self.activation(y) if self.activation else y).astype(self.dtype)


def group_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, epsilon: float
) -> Float[Array, "b h w c"]:
    """The normalisation itself, float32."""
    wide = x.astype(jnp.float32)
    mean = _group_mean(jnp.mean(wide, axis=(1, 2)), groups)
    variance = _group_mean(jnp.mean(jnp.square(wide - mean[:, None, None]), axis=(1, 2)), groups)
    factor = jax.lax.rsqrt(variance + epsilon) * scale
    return wide * factor[:, None, None] + (bias - mean * factor)[:, None, None]


def _group_mean(x: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """The mean of each group, in the place of each of its channels."""
    return jnp.repeat(jnp.mean(x.reshape(x.shape[0], groups, -1), axis=-1), x.shape[1] // groups, axis=1)


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a residual connection, told the time between them.

    Attributes:
        features: channels of the result.
        groups: of the norms.
        epsilon: of the norms.
        shortcut: whether the connection is a 1x1 convolution, as it must be where the channels change.
        timed: whether a time embedding is added.
        dtype: of the computation.
    """

    features: int
    groups: int
    epsilon: float
    shortcut: bool
    timed: bool = True
    dtype: str = "float32"

    def setup(self):
        """Makes the submodules."""
        norm = {"activation": jax.nn.silu, "dtype": self.dtype}
        self.norm1, self.norm2 = (GroupNorm(self.groups, self.epsilon, **norm) for _ in range(2))
        self.conv1, self.conv2 = (Conv(self.features, dtype=self.dtype) for _ in range(2))
        if self.timed:
            self.time_emb_proj = Linear((self.features,), (None, "embed"), use_bias=True, dtype="float32")
        if self.shortcut:
            self.conv_shortcut = Conv(self.features, 1, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w i"], time: Float[Array, "b d"] | None = None) -> Float[Array, "b h w o"]:
        """`time`: the embedding after its activation, float32."""
        y = self.conv1(self.norm1(x))
        if time is not None:
            y = y + self.time_emb_proj(time).astype(y.dtype)[:, None, None]
        y = self.conv2(self.norm2(y))
        return (self.conv_shortcut(x) if self.shortcut else x) + y


class Downsample(nn.Module):
    """Half the sides, by a convolution of stride 2.

    Attributes:
        features: channels.
        padding: zeros around the image: (1, 1) in UNets, (0, 1) in autoencoders.
        dtype: of the computation.
    """

    features: int
    padding: tuple[int, int] = (1, 1)
    dtype: str = "float32"

    def setup(self):
        """Makes the submodules."""
        self.conv = Conv(self.features, stride=2, padding=self.padding, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b y x c"]:
        """Halves `x`."""
        return self.conv(x)


class Upsample(nn.Module):
    """Larger sides, by nearest neighbours and a convolution.

    Attributes:
        features: channels.
        dtype: of the computation.
    """

    features: int
    dtype: str = "float32"

    def setup(self):
        """Makes the submodules."""
        self.conv = Conv(self.features, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b h w c"], size: Sequence[int] | None = None) -> Float[Array, "b y x c"]:
        """To `size` (height, width), or twice as large."""
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return self.conv(_nearest(_nearest(x, 1, height), 2, width))


def _nearest(x: Array, axis: int, size: int) -> Array:
    """Nearest neighbours along an axis: place i takes floor(i * old / new)."""
    old = x.shape[axis]
    if size % old == 0:
        return jnp.repeat(x, size // old, axis=axis)
    return jnp.take(x, jnp.arange(size) * old // size, axis=axis)
