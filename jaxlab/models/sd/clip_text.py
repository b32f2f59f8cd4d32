"""CLIP's text encoder (Radford et al., 2021, arXiv:2103.00020): prompts to the states that the UNet attends to."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlab.core.untrusted import understood
from jaxlab.layers import Linear
from jaxlab.layers.sharding import named
from jaxlab.models import load
from jaxlab.models.sources import read_config

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
_PREFIX = "text_model."


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """A text encoder, under Hugging Face's names; defaults are those of Stable Diffusion 1.5 (ViT-L/14's).

    Attributes:
      vocab_size: number of tokens.
      hidden_size: width of the states.
      intermediate_size: width of the feed-forward layers.
      num_hidden_layers: number of layers.
      num_attention_heads: heads of each.
      max_position_embeddings: most tokens of a prompt.
      hidden_act: "quick_gelu" (OpenAI's) or "gelu" (exact).
      layer_norm_eps: added to the variances.

    Raises:
      ValueError: another activation, or heads that do not divide the width.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {tuple(_ACTIVATIONS)}, got {self.hidden_act!r}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of {self.hidden_size}, got {self.num_attention_heads}"
            )

    @classmethod
    @understood("config.json")
    def from_dict(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> "CLIPTextConfig":
        """Reads a configuration.

        Args:
          config: content of a `config.json`, its path, or the folder that holds it; of a whole CLIP the text part.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not JSON, or of another kind of model.
        """
        config = read_config(config)
        kind = config.get("model_type", "clip_text_model")
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"model_type: expected 'clip_text_model', got {kind!r}")
        config = config["text_config"] if kind == "clip" else config
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})


class CLIPTextLayer(nn.Module):
    """One layer: causal attention and a feed-forward network, each after a norm.

    Attributes:
      config: of the encoder.
      dtype: of the computation.
    """

    config: CLIPTextConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], None]:
        """The layer's output, and nothing: the form that `nn.scan` takes."""
        config = self.config
        linear = functools.partial(Linear, use_bias=True, dtype=self.dtype)
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        normed = _norm(config, "attn_norm")(x).astype(self.dtype)
        q, k, v = (linear((heads, size), ("embed", "heads", "head_dim"), name=name)(normed) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear((config.hidden_size,), ("heads", "head_dim", "embed"), in_axes=2, name="o")(attended)
        normed = _norm(config, "mlp_norm")(x).astype(self.dtype)
        hidden = _ACTIVATIONS[config.hidden_act](
            linear((config.intermediate_size,), ("embed", "mlp"), name="up")(normed)
        )
        return x + linear((config.hidden_size,), ("mlp", "embed"), name="down")(hidden), None


class CLIPTextEncoder(nn.Module):
    """Tokens to states; parameters are float32, norms and softmax are computed in it.

    Attributes:
      config: of the encoder.
      dtype: of the computation.
    """

    config: CLIPTextConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: Int[Array | np.ndarray, "b t"]) -> Float[Array, "b t d"]:
        """States after the final norm.

        Args:
          ids: padded prompts.

        Raises:
          ValueError: another rank or dtype, or more tokens than positions.
        """
        config = self.config
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids: expected integers of shape [B,S], got {ids.dtype} {ids.shape}")
        if ids.shape[1] > config.max_position_embeddings:
            raise ValueError(f"ids: expected at most {config.max_position_embeddings} tokens, got {ids.shape[1]}")
        init = nn.initializers.normal(0.02)
        width = config.hidden_size
        tokens = self.param("tokens", named(init, ("vocab", "embed")), (config.vocab_size, width))
        positions = self.param("positions", named(init, (None, "embed")), (config.max_position_embeddings, width))
        x = (tokens[ids] + positions[: ids.shape[1]]).astype(self.dtype)
        layers: Any = nn.scan(
            CLIPTextLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, self.dtype, name="layers")(x)
        return _norm(config, "norm")(x).astype(self.dtype)


def _norm(config: CLIPTextConfig, name: str) -> nn.LayerNorm:
    # One pass over x would lose its variance beside a large mean.
    return nn.LayerNorm(config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def load_text_encoder(
    directory: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    """A text encoder from a folder with `config.json` and `model.safetensors`, single or sharded.

    Names may begin with "text_model." or not. Position indices and a projection, which the states do not pass through,
    are not read.

    Args:
      directory: the folder.
      dtype: of the computation; the parameters are float32, whatever the file's.

    Returns:
      The module and its parameters: `module.apply({"params": params}, ids)`.

    Raises:
      FileNotFoundError: no configuration or weights.
      KeyError: missing or unexpected weights, the first ten of either.
      ValueError: mis-shaped weights, the first ten, a damaged file, another kind of model, or a dtype that is not
        floating.
    """
    load.check_floating(dtype=dtype)
    config = CLIPTextConfig.from_dict(Path(directory))
    with load.open_tensors(directory) as tensors:
        prefix = _PREFIX if f"{_PREFIX}final_layer_norm.weight" in tensors else ""
        leaves = _table(config, prefix)
        unread = {f"{prefix}embeddings.position_ids", "text_projection.weight"}
        load.check(tensors, leaves, unread.__contains__, most=10)
        params = load.nest({leaf.path: load.fill(tensors, leaf, jnp.float32) for leaf in leaves})
    return CLIPTextEncoder(config, dtype), params


def _table(config: CLIPTextConfig, prefix: str) -> list[load.Leaf]:
    width, hidden = (config.hidden_size,), (config.intermediate_size,)
    heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    table = (config.vocab_size, *width)
    places = (config.max_position_embeddings, *width)
    leaves = [
        load.Leaf("tokens", table, (load.Part(f"{prefix}embeddings.token_embedding.weight"),), table),
        load.Leaf("positions", places, (load.Part(f"{prefix}embeddings.position_embedding.weight"),), places),
        load.Leaf("norm/scale", width, (load.Part(f"{prefix}final_layer_norm.weight"),), width),
        load.Leaf("norm/bias", width, (load.Part(f"{prefix}final_layer_norm.bias"),), width),
    ]
    stacked = functools.partial(_stacked, f"{prefix}encoder.layers", config.num_hidden_layers)
    for path, name in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        leaves += [stacked(f"{path}/scale", f"{name}.weight", width), stacked(f"{path}/bias", f"{name}.bias", width)]
    maps = (
        ("q", "self_attn.q_proj", width, heads),
        ("k", "self_attn.k_proj", width, heads),
        ("v", "self_attn.v_proj", width, heads),
        ("o", "self_attn.out_proj", heads, width),
        ("up", "mlp.fc1", width, hidden),
        ("down", "mlp.fc2", hidden, width),
    )
    for path, name, inputs, outputs in maps:
        leaves.append(stacked(f"{path}/kernel", f"{name}.weight", outputs, inputs))
        leaves.append(stacked(f"{path}/bias", f"{name}.bias", outputs))
    return leaves


def _stacked(
    prefix: str, layers: int, path: str, name: str, outputs: tuple[int, ...], inputs: tuple[int, ...] = ()
) -> load.Leaf:
    """A parameter of all layers: a matrix from `inputs` to `outputs`, or a vector."""
    parts = tuple(load.Part(f"{prefix}.{layer}.{name}", (layer,)) for layer in range(layers))
    stored = (math.prod(outputs), *([math.prod(inputs)] if inputs else []))
    return load.Leaf(f"layers/{path}", (layers, *inputs, *outputs), parts, stored, transpose=bool(inputs))
