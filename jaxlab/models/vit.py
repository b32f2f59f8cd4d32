"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929): DINO's and CLIP's, from Hugging Face folders.

Example:
    from jaxlab.models.vit import load_vit
    model, params = load_vit("dino-vitb8")
    features = model.apply({"params": params}, pixels)  # .tokens [B,1+n,D], .keys [B,1+n,H,d]
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.core.untrusted import read_object, understood
from jaxlab.layers import Linear
from jaxlab.models.load import Leaf, Part, Tensors, check, fill, nest, open_tensors
from pallas_kernels.flash_attention import flash_attention

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
_NORM = (("scale", "weight"), ("bias", "bias"))  # our names and torch's of a norm's parameters


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer, under Hugging Face's field names; defaults are those of DINO ViT-B/8.

    Attributes:
        hidden_size: width.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each.
        intermediate_size: width of the MLPs.
        image_size: pixels of an image, either side.
        patch_size: pixels of a patch, either side.
        hidden_act: "gelu" (exact) or "quick_gelu".
        layer_norm_eps: of every norm.
        qkv_bias: biases on queries, keys and values.
        clip: CLIP's form: a norm before the first block, patches mapped without bias.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 8
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    clip: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size={self.patch_size}, got {self.image_size}")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}, got {self.hidden_act!r}")

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token before them."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    @understood("config.json")
    def from_hf(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Reads the content of a `config.json` of model type "vit", "clip" or "clip_vision_model".

        Raises:
            ValueError: another model type, or sizes that do not fit.
            KeyError: a size is missing.
        """
        kind = config.get("model_type")
        if kind == "clip":
            # Published files leave out what are transformers' defaults.
            return cls.from_hf({"model_type": "clip_vision_model", **config["vision_config"]})
        if kind not in ("vit", "clip_vision_model"):
            raise ValueError(f"model_type: expected one of vit, clip, clip_vision_model, got {kind!r}")
        defaults: dict[str, Any] = {"image_size": 224}
        if kind == "clip_vision_model":
            defaults |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        if config.get("num_channels", 3) != 3:
            raise ValueError(f"num_channels: expected 3, got {config['num_channels']}")
        given = {**defaults, **config}
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        absent = [name for name in sizes if name not in given]
        if absent:
            raise KeyError(f"config.json lacks {absent}")
        names = {field.name for field in dataclasses.fields(cls)} & given.keys() - {"clip"}
        return cls(**{name: given[name] for name in names}, clip=kind == "clip_vision_model")


class ViTFeatures(NamedTuple):
    """What a vision transformer makes of images.

    Attributes:
        tokens: `[B,1+n,D]` after the last norm: the class token, then the patches row by row.
        keys: `[B,1+n,H,d]` of the last block's attention.
    """

    tokens: Float[Array, "b t d"]
    keys: Float[Array, "b t h k"]


class _Block(nn.Module):
    """Pre-norm attention over all tokens, and MLP; the carry of a scan over layers has the last keys, too."""

    config: ViTConfig
    implementation: str | None

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        config, x = self.config, carry[0]
        heads, d = config.num_attention_heads, config.hidden_size
        norm = _norm(config, "attn_norm")(x)
        q, k, v = (
            Linear((heads, d // heads), ("embed", "heads", "head_dim"), use_bias=config.qkv_bias, name=name)(norm)
            for name in "qkv"
        )
        out = flash_attention(q, k, v, causal=False, implementation=self.implementation)
        x = x + Linear((d,), ("heads", "head_dim", "embed"), in_axes=2, use_bias=True, name="o")(out)
        hidden = Linear((config.intermediate_size,), ("embed", "mlp"), use_bias=True, name="up")(
            _norm(config, "mlp_norm")(x)
        )
        x = x + Linear((d,), ("mlp", "embed"), use_bias=True, name="down")(_ACTIVATIONS[config.hidden_act](hidden))
        return (x, k), None


def _norm(config: ViTConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


class VisionTransformer(nn.Module):
    """The encoder, float32.

    Attributes:
        config: sizes.
        implementation: of `flash_attention`.
    """

    config: ViTConfig
    implementation: str | None = None

    @nn.compact
    def __call__(self, pixels: Float[Array | np.ndarray, "b h w 3"]) -> ViTFeatures:
        """Encodes normalised images.

        Args:
            pixels: `[B,H,W,3]`, both sides `config.image_size`.

        Raises:
            ValueError: another size.
        """
        config = self.config
        side, patch, d = config.image_size, config.patch_size, config.hidden_size
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise ValueError(f"pixels: expected shape [B, {side}, {side}, 3], got {pixels.shape}")
        batch, rows = pixels.shape[0], side // patch
        tiled = jnp.asarray(pixels, jnp.float32).reshape(batch, rows, patch, rows, patch, 3)
        patches = tiled.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows * rows, 3 * patch * patch)
        x = Linear((d,), (None, "embed"), use_bias=not config.clip, name="patch_embed")(patches)
        first = self.param("class_token", nn.initializers.normal(0.02), (d,))
        x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, d)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (config.tokens, d))
        if config.clip:
            x = _norm(config, "pre_norm")(x)
        heads = config.num_attention_heads
        stack: Any = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        keys = jnp.zeros((batch, config.tokens, heads, d // heads), x.dtype)
        (x, keys), _ = stack(config, self.implementation, name="blocks")((x, keys), None)
        return ViTFeatures(_norm(config, "norm")(x), keys)


def load_vit(directory: str | os.PathLike[str]) -> tuple[VisionTransformer, Any]:
    """A vision transformer and its parameters from a Hugging Face folder: a ViT (DINO), or the image side of a CLIP.

    Args:
        directory: with `config.json` and `model.safetensors` (or shards and their index).

    Raises:
        FileNotFoundError: no such files.
        KeyError: missing or unexpected weights, or a size that `config.json` lacks.
        ValueError: another model type, wrong shapes, or a damaged file.
    """
    path = Path(directory)
    config = ViTConfig.from_hf(read_object(path / "config.json"))
    with open_tensors(path) as tensors:
        table = vit_table(config, tensors)
        check(tensors, table, ignore=_other_side if config.clip else _head, most=10)
        return VisionTransformer(config), nest({leaf.path: fill(tensors, leaf, jnp.float32) for leaf in table})


def _other_side(name: str) -> bool:
    """Whether a stored name of a whole CLIP belongs to another part."""
    return not name.startswith("vision_model.")


def _head(name: str) -> bool:
    """Whether a stored name lies beyond the encoder."""
    return name.removeprefix("vit.").startswith(("pooler.", "classifier."))


class _Names(NamedTuple):
    """Where Hugging Face keeps the parts of a block, and of what surrounds the blocks."""

    block: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    attn_norm: str
    mlp_norm: str
    patches: str
    first: str
    positions: str
    norm: str


_VIT = _Names(
    "encoder.layer", "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
    "embeddings.patch_embeddings.projection", "embeddings.cls_token", "embeddings.position_embeddings", "layernorm",
)  # fmt: skip
_CLIP = _Names(
    "encoder.layers", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1",
    "mlp.fc2", "layer_norm1", "layer_norm2", "embeddings.patch_embedding", "embeddings.class_embedding",
    "embeddings.position_embedding.weight", "post_layernorm",
)  # fmt: skip


def vit_table(config: ViTConfig, tensors: Tensors) -> list[Leaf]:
    """The key table.

    Args:
        config: of the model.
        tensors: the file, whose names say how it was saved.
    """
    names = _CLIP if config.clip else _VIT
    prefix = "vision_model." if config.clip else "vit." * (f"vit.{names.first}" in tensors)
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    inside = (heads, d // heads)

    def vector(path: str, name: str, size: int = d) -> Leaf:
        return Leaf(path, (size,), (Part(prefix + name),), (size,))

    def stacked(path: str, name: str, outputs: tuple[int, ...], inputs: tuple[int, ...] = ()) -> Leaf:
        parts = tuple(
            Part(f"{prefix}{names.block}.{layer}.{name}", (layer,)) for layer in range(config.num_hidden_layers)
        )
        stored = (math.prod(outputs), *([math.prod(inputs)] if inputs else []))
        shape = (config.num_hidden_layers, *inputs, *outputs)
        return Leaf(f"blocks/{path}", shape, parts, stored, transpose=bool(inputs))

    patch = (d, 3, config.patch_size, config.patch_size)
    pixels = math.prod(patch[1:])
    first, positions = (d,) if config.clip else (1, 1, d), (config.tokens, d) if config.clip else (1, config.tokens, d)
    leaves = [
        Leaf("patch_embed/kernel", (pixels, d), (Part(f"{prefix}{names.patches}.weight", file_shape=patch),),
             (d, pixels), transpose=True),
        Leaf("class_token", (d,), (Part(prefix + names.first),), first),
        Leaf("positions", (config.tokens, d), (Part(prefix + names.positions),), positions),
        vector("norm/scale", f"{names.norm}.weight"),
        vector("norm/bias", f"{names.norm}.bias"),
    ]  # fmt: skip
    if config.clip:  # "layrnorm" is how it is stored
        leaves += [vector(f"pre_norm/{ours}", f"pre_layrnorm.{kind}") for ours, kind in _NORM]
    else:
        leaves.append(vector("patch_embed/bias", f"{names.patches}.bias"))
    for path in ("attn_norm", "mlp_norm"):
        leaves += [stacked(f"{path}/{ours}", f"{getattr(names, path)}.{kind}", (d,)) for ours, kind in _NORM]
    maps = [(name, inside, (d,)) for name in "qkv"] + [("o", (d,), inside), ("up", (f,), (d,)), ("down", (d,), (f,))]
    for path, outputs, inputs in maps:
        leaves.append(stacked(f"{path}/kernel", f"{getattr(names, path)}.weight", outputs, inputs))
        if path not in "qkv" or config.qkv_bias:
            leaves.append(stacked(f"{path}/bias", f"{getattr(names, path)}.bias", outputs))
    return leaves
