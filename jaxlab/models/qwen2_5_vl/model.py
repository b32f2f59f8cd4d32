"""Qwen2.5-VL: image tokens among text tokens, in the decoder of `jaxlab.models.decoder`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.models.decoder import Decoder, DecoderConfig, default_mlp
from jaxlab.models.qwen2_5_vl.config import Config
from jaxlab.models.qwen2_5_vl.positions import check_placeholders, host_grid, mrope_index
from jaxlab.models.qwen2_5_vl.vision import Layout, VisionTower, image_layout

ArrayLike = Array | np.ndarray


@struct.dataclass
class Filled:
    """A cache that knows how far its rows are: what `Qwen25VL` hands on from call to call.

    Attributes:
        cache: a `Cache` of the decoder.
        lengths: `[B]` tokens in it, the next free slot.
        next_position: `[B]` M-RoPE position of the next text token.
    """

    cache: Any
    lengths: Int[Array, " b"]
    next_position: Int[Array, " b"]


class Qwen25VL(nn.Module):
    """The model; parameters are {"visual": ..., "language": those of a `Decoder`}.

    Example:
        pixels, grid = preprocess_image(image)
        logits, _ = model.apply({"params": params}, ids, pixel_values=pixels, image_grid_thw=grid)

    Attributes:
        config: sizes.
        mlp: makes the MLP of a layer of the decoder, see `jaxlab.models.decoder.default_mlp`.
    """

    config: Config
    mlp: Callable[[DecoderConfig, bool], nn.Module] = default_mlp

    def setup(self):
        """Makes the submodules."""
        text = self.config.text
        self.visual = VisionTower(self.config.vision, text.hidden_size, text.dtype, text.param_dtype, text.remat)
        self.language = Decoder(text, self.mlp)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        position_ids: Any = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "b t v"], Any]:
        """One pass.

        Args:
            input_ids: `[B,T]`; images are runs of `config.image_token_id`.
            attention_mask: `[B,T]`, 0 where padded, on either side. With a cache, of these tokens alone.
            pixel_values: `[n_patches,1176]`, the images of all rows in the reading order of their placeholders.
            image_grid_thw: `[n_images,3]` host integers, static under jit.
            position_ids: `[3,B,T]`; None is `mrope_index`, and after a first call with a cache what follows it.
            cache: any empty `Cache` of `config.text`, or what an earlier call returned.

        Returns:
            logits `[B,T,V]` float32 (undefined where padded), and the cache as `Filled` (None without one).

        Raises:
            ValueError: placeholders without images, or not as many as these have tokens (ids that are traced cannot be
                counted); pixel rows other than those of the grid; shapes that differ.
        """
        mask = attention_mask if attention_mask is None else jnp.asarray(attention_mask)
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: expected shape {input_ids.shape}, got {mask.shape}")
        if position_ids is not None and position_ids.shape != (3, *input_ids.shape):
            raise ValueError(f"position_ids: expected shape {(3, *input_ids.shape)}, got {position_ids.shape}")
        features = None
        if pixel_values is not None or image_grid_thw is not None:
            check_placeholders(input_ids, self.check_images(pixel_values, image_grid_thw), self.config.image_token_id)
            features = self.encode_images(pixel_values, image_grid_thw)
        embeddings = self.embed(input_ids, features)
        valid = jnp.ones(input_ids.shape, bool) if mask is None else mask != 0
        if cache is not None and not isinstance(cache, Filled):
            zeros = jnp.zeros(input_ids.shape[0], jnp.int32)
            cache = Filled(cache, zeros, zeros)
        if position_ids is None:
            position_ids, _ = mrope_index(input_ids, image_grid_thw, attention_mask, config=self.config)
            if cache is not None:
                position_ids = position_ids + cache.next_position[:, None]
        position_ids = jnp.asarray(position_ids, jnp.int32)
        if cache is None:
            segments = None if mask is None else valid.astype(jnp.int32)
            out = self.language(None, None, segments, embeddings=embeddings, rope_positions=position_ids)
            return out.logits, None
        slots = cache.lengths[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(valid, slots, -1)
        out = self.language(None, slots, cache=cache.cache, embeddings=embeddings, rope_positions=position_ids)
        highest = jnp.max(jnp.where(valid, position_ids, -1), axis=(0, 2))
        lengths = cache.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return out.logits, Filled(out.cache, lengths, jnp.maximum(cache.next_position, highest + 1))

    def encode_images(self, pixel_values: Any, image_grid_thw: Any) -> Float[Array, "m d"]:
        """The tokens of images: `[n_patches / 4, D]`, one image after the other.

        Args:
            pixel_values: of `preprocess_image`.
            image_grid_thw: `[n_images,3]` host integers, static under jit.

        Raises:
            ValueError: one without the other, rows that are not those of the grid, or a bad grid.
        """
        self.check_images(pixel_values, image_grid_thw)
        grid = host_grid(image_grid_thw, self.config.vision.spatial_merge_size)
        return self.encode_patches(pixel_values, image_layout(grid, self.config.vision))

    def check_images(self, pixel_values: Any, image_grid_thw: Any) -> int:
        """How many tokens images give; checks that patches and grid fit."""
        if pixel_values is None or image_grid_thw is None:
            absent = "pixel_values" if pixel_values is None else "image_grid_thw"
            raise ValueError(f"{absent}: expected beside the other of pixel_values and image_grid_thw, got None")
        merge = self.config.vision.spatial_merge_size
        grid = host_grid(image_grid_thw, merge)
        expected = (int(np.prod(grid, axis=1).sum()), self.config.vision.patch_features)
        if pixel_values.shape != expected:
            raise ValueError(
                f"pixel_values: expected shape {expected} for the grid {grid.tolist()}, got {pixel_values.shape}"
            )
        return expected[0] // merge**2

    def encode_patches(self, pixel_values: Any, layout: Layout) -> Float[Array, "m d"]:
        """`encode_images` of a layout made before, which may be padded: then it need not be static under jit."""
        return self.visual(jnp.asarray(pixel_values, jnp.dtype(self.config.text.dtype)), layout)

    def embed(self, input_ids: Int[ArrayLike, "b t"], features: Any = None, rows: Any = None) -> Float[Array, "b t d"]:
        """Embeddings of tokens, with the images' `features` `[m,D]` in the places of the placeholders.

        Args:
            input_ids: `[B,T]`.
            features: of `encode_images`.
            rows: `[B,T]`, which of the features stands at a placeholder; None: each once, in reading order.

        Raises:
            ValueError: without `rows`, the placeholders are not as many as the features.
        """
        if rows is None:
            check_placeholders(input_ids, 0 if features is None else features.shape[0], self.config.image_token_id)
        ids = jnp.asarray(input_ids)
        embeddings = self.language.embed(ids)
        if features is None:
            return embeddings
        is_image = ids == self.config.image_token_id
        if rows is None:
            rows = jnp.cumsum(is_image.reshape(-1), dtype=jnp.int32).reshape(ids.shape) - 1
        images = features.astype(embeddings.dtype)[jnp.clip(rows, 0, features.shape[0] - 1)]
        return jnp.where(is_image[..., None], images, embeddings)

    def text_model(self) -> Decoder:
        """The decoder by itself, of parameters `params["language"]`: for `prefill`, `decode_step`, `generate`."""
        return Decoder(self.config.text, self.mlp, parent=None)


def _smallest_input(config: Config) -> dict[str, Any]:
    """One image of one token, and one word."""
    merge, vision = config.vision.spatial_merge_size, config.vision
    other = 0 if config.image_token_id else 1
    return {
        "input_ids": np.array([[config.image_token_id, other]], np.int32),
        "pixel_values": np.zeros((merge**2, vision.patch_features), np.float32),
        "image_grid_thw": np.array([[1, merge, merge]], np.int32),
    }


def abstract_params(model: Qwen25VL) -> Any:
    """The parameter tree as shapes, boxed with logical axis names: what `jaxlab.core.shardings` takes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: model.init(key, **_smallest_input(model.config)), key)["params"]


def init_params(model: Qwen25VL, key: Array) -> Any:
    """Fresh parameters, plain arrays in `param_dtype`. Jit with `out_shardings` to make them sharded."""
    return (_init if isinstance(key, jax.core.Tracer) else _init_once)(model, key)


def _init(model, key):
    return nn.meta.unbox(model.init(key, **_smallest_input(model.config))["params"])


# What the compiler would spend on making it fast is lost. Such options are for programs of their own.
_init_once = jax.jit(_init, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
