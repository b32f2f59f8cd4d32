"""The image encoder: blocks over patches that attend within windows or over the image, and the merger to tokens.

Patches come in groups that merge into one token. Tokens are put in the order of their windows first, so that a window
is a run of rows; the merger's output is put back into the order of the image.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.layers import GatedMLP, Linear, RMSNorm, apply_rope, rope_frequencies, rope_tables
from jaxlab.models.qwen2_5_vl.config import VisionConfig
from pallas_kernels.varlen_attention import varlen_attention

_EPSILON = 1e-6  # of every norm in the encoder


@struct.dataclass
class Layout:
    """Where the patches of a batch of images stand; made by `image_layout` on the host.

    Attributes:
        order: `[m]` token (in image order) at each place of the window order.
        inverse: `[m]` place in the window order of each token.
        places: `[2,n]` row and column of each patch, in the window order.
        windows: `[W+1]` rows at which windows begin, and the end of the last.
        images: `[I+1]` the same of whole images.
        longest_window: most patches of a window.
        longest_image: most patches of an image.
    """

    order: Int[Array, " m"] | np.ndarray
    inverse: Int[Array, " m"] | np.ndarray
    places: Int[Array, "2 n"] | np.ndarray
    windows: Int[Array, " w"] | np.ndarray
    images: Int[Array, " i"] | np.ndarray
    longest_window: int = struct.field(pytree_node=False)
    longest_image: int = struct.field(pytree_node=False)


def image_layout(grid: Int[np.ndarray, "images 3"], config: VisionConfig) -> Layout:
    """The layout of images of `grid` patches (time, height, width); frames are images of their own."""
    merge = config.spatial_merge_size
    side = config.window_size // (merge * config.patch_size)
    order, places, windows, images = [], [], [], []
    start = 0
    for frames, height, width in grid.tolist():
        rows, columns = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
        patches = np.stack([rows, columns]).transpose(0, 1, 3, 2, 4).reshape(2, -1, merge * merge)
        index = np.arange(height * width // merge**2).reshape(height // merge, width // merge)
        tiles = [
            index[top : top + side, left : left + side].ravel()
            for top in range(0, index.shape[0], side)
            for left in range(0, index.shape[1], side)
        ]
        within = np.concatenate(tiles)
        for _ in range(frames):
            order.append(start + within)
            places.append(patches[:, within].reshape(2, -1))
            windows += [len(tile) * merge**2 for tile in tiles]
            images.append(height * width)
            start += index.size
    joined = np.concatenate(order).astype(np.int32)
    return Layout(
        order=joined,
        inverse=np.argsort(joined).astype(np.int32),
        places=np.concatenate(places, axis=1).astype(np.int32),
        windows=np.cumsum([0, *windows]).astype(np.int32),
        images=np.cumsum([0, *images]).astype(np.int32),
        longest_window=max(windows),
        longest_image=max(images),
    )


def pad_layout(layout: Layout, patches: int, group: int) -> Layout:
    """The layout with room for `patches`, so that images of many sizes are one program.

    Rows past the images belong to none of them; what the encoder gives there means nothing.

    Args:
        layout: of `image_layout`.
        patches: rows of the padded `pixel_values`, a multiple of `group`.
        group: patches of a token.
    """
    tokens = layout.order.shape[0]
    rest = np.arange(tokens, patches // group, dtype=np.int32)

    def offsets(ends: Any) -> np.ndarray:
        return np.pad(ends, (0, _power_of_two(len(ends) - 1) + 1 - len(ends)), mode="edge")

    return Layout(
        order=np.concatenate([layout.order, rest]),
        inverse=np.concatenate([layout.inverse, rest]),
        places=np.pad(layout.places, ((0, 0), (0, patches - layout.places.shape[1]))),
        windows=offsets(layout.windows),
        images=offsets(layout.images),
        longest_window=_power_of_two(layout.longest_window),
        longest_image=_power_of_two(layout.longest_image),
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class VisionAttention(nn.Module):
    """Multi-head attention within segments, with biases and two-dimensional rotary positions."""

    config: VisionConfig
    max_length: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], cos: Float[Array, "n half"], sin: Float[Array, "n half"], offsets: Array
    ) -> Float[Array, "n d"]:
        """Rows of a segment, of which `offsets` are the beginnings, see each other."""
        heads, policy = self.config.num_heads, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features, names = (3 * heads, self.config.head_dim), ("embed", "heads", "head_dim")
        qkv = Linear(features, names, use_bias=True, name="qkv", **policy)(x)
        q, k, v = jnp.split(qkv, 3, axis=1)
        q, k = (apply_rope(part[None], cos[None], sin[None])[0] for part in (q, k))
        # The parameters do not depend on it, and of a constant input XLA would compute it while it compiles.
        out = q if self.is_initializing() else varlen_attention(q, k, v, offsets, max_length=self.max_length)
        names = ("heads", "head_dim", "embed")
        return Linear((x.shape[-1],), names, in_axes=2, use_bias=True, name="o", **policy)(out)


class VisionBlock(nn.Module):
    """Pre-norm attention and gated MLP; the carry and the (absent) output of a scan over layers."""

    config: VisionConfig
    max_length: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array, offsets: Array) -> tuple[Array, None]:
        """One block."""
        config, policy = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = RMSNorm(_EPSILON, "embed", self.param_dtype, name="attn_norm")(x)
        x = x + VisionAttention(config, self.max_length, name="attn", **policy)(norm, cos, sin, offsets)
        norm = RMSNorm(_EPSILON, "embed", self.param_dtype, name="mlp_norm")(x)
        return x + GatedMLP(config.intermediate_size, use_bias=True, name="mlp", **policy)(norm), None


def block_runs(config: VisionConfig) -> Iterator[tuple[bool, int]]:
    """Runs of blocks that attend alike: whether over whole images, and how many; run i is `blocks_i`."""
    kinds = (layer in config.fullatt_block_indexes for layer in range(config.depth))
    for full, layers in itertools.groupby(kinds):
        yield full, len(list(layers))


class VisionTower(nn.Module):
    """Patches to tokens of the decoder's width.

    Attributes:
        config: of the encoder.
        out_size: width of the decoder.
        dtype: of the computation.
        param_dtype: of the parameters.
        remat: "block" recomputes each block in the backward pass.
    """

    config: VisionConfig
    out_size: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "n c"], layout: Layout) -> Float[Array, "m d"]:
        """Encodes the patches of `preprocess_image`, images one after the other, laid out by `image_layout`."""
        config, policy = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Linear((config.hidden_size,), (None, "embed"), name="patch_embed", **policy)(pixel_values)
        tokens, group = layout.order.shape[0], config.spatial_merge_size**2
        x = x.reshape(tokens, group, -1)[layout.order].reshape(x.shape)
        frequencies, _ = rope_frequencies(config.head_dim // 2, config.rope_theta)
        sections = (len(frequencies), len(frequencies))
        cos, sin = rope_tables(
            jnp.asarray(layout.places)[:, None], np.concatenate([frequencies] * 2), sections=sections
        )
        block = nn.remat(VisionBlock, prevent_cse=False) if self.remat == "block" else VisionBlock
        for index, (full, layers) in enumerate(block_runs(config)):
            offsets = jnp.asarray(layout.images if full else layout.windows)
            longest = layout.longest_image if full else layout.longest_window
            stack: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,) * 3,
                length=layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(config, longest, name=f"blocks_{index}", **policy)(x, cos[0], sin[0], offsets)
        x = RMSNorm(_EPSILON, "embed", self.param_dtype, name="merger_norm")(x).reshape(tokens, -1)
        x = Linear((x.shape[-1],), ("embed", "mlp"), use_bias=True, name="merger_up", **policy)(x)
        x = jax.nn.gelu(x, approximate=False)
        x = Linear((self.out_size,), ("mlp", "embed"), use_bias=True, name="merger_down", **policy)(x)
        return x[layout.inverse]
