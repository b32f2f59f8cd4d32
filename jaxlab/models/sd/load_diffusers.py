"""Networks from the folders of a diffusers checkpoint, and their parameters without one.

The key table comes from the module itself: its tree has diffusers' names but for the few that `_RENAMED` lists, and the
layout on disk follows from a parameter's shape.
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from jaxlab.models import load
from jaxlab.models.sd.autoencoder_kl import AutoencoderKL
from jaxlab.models.sd.config import ControlNetConfig, UNetConfig, VAEConfig
from jaxlab.models.sd.controlnet import ControlNet
from jaxlab.models.sd.unet2d_condition import UNet2DCondition

STEM = "diffusion_pytorch_model"

_AUTOENCODER = "/attention/"  # in paths of attention that old autoencoders name and lay out otherwise
_LISTS = "(?:down_|up_|transformer_|controlnet_down_)?blocks|resnets|attentions|downsamplers|upsamplers"
_RENAMED = (
    (rf"(^|/)({_LISTS})_(\d+)", r"\1\2/\3"),
    (r"/attention/", "/"),
    (r"/to_out/", "/to_out/0/"),
    (r"/ff/up/", "/ff/net/0/proj/"),
    (r"/ff/down/", "/ff/net/2/"),
    (r"/(kernel|scale)$", "/weight"),
    ("/", "."),
)
_OLD_ATTENTION = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))


def abstract_params(module: nn.Module) -> Any:
    """The parameter tree as shapes, boxed with logical axis names: what `jaxlab.core.shardings` takes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: module.init(key, **_smallest_input(module)), key)["params"]


def init_params(module: nn.Module, key: Array) -> Any:
    """Fresh parameters of a network of this package, plain float32 arrays."""
    return (_init if isinstance(key, jax.core.Tracer) else _init_once)(module, key)


def _init(module, key):
    return nn.meta.unbox(module.init(key, **_smallest_input(module))["params"])


# What the compiler would spend on making it fast is lost. Such options are for programs of their own.
_init_once = jax.jit(_init, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def _smallest_input(module: Any) -> dict[str, Any]:
    config = module.config
    side = 2 ** (len(config.block_out_channels) - 1)
    if isinstance(config, VAEConfig):
        return {"image": jnp.zeros((1, side, side, config.in_channels))}
    given = {
        "latents": jnp.zeros((1, side, side, config.in_channels)),
        "time": jnp.zeros(1),
        "text": jnp.zeros((1, 1, config.cross_attention_dim)),
    }
    if isinstance(config, ControlNetConfig):
        side *= config.hint_factor
        given["hint"] = jnp.zeros((1, side, side, config.conditioning_channels))
    return given


def table(module: nn.Module, tensors: load.Tensors) -> list[load.Leaf]:
    """The key table.

    Args:
        module: a network of this package.
        tensors: a file, which says by its names and shapes in which layout it keeps an autoencoder's attention.
    """
    return [_leaf(path, shape, tensors) for path, shape in _shapes(module)]


@functools.lru_cache(maxsize=16)
def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Path and shape of each parameter; tracing a network of full size takes seconds."""
    flat = load.flatten(nn.meta.unbox(abstract_params(module)))
    return tuple((path, tuple(leaf.shape)) for path, leaf in flat.items())


def _leaf(path: str, shape: tuple[int, ...], tensors: load.Tensors) -> load.Leaf:
    name = _stored_name(path, tensors)
    if path.endswith(("/bias", "/scale")):
        return load.Leaf(path, shape, (load.Part(name),), (math.prod(shape),))
    if len(shape) == 4:
        return load.Leaf(path, shape, (load.Part(name),), (shape[3], shape[2], *shape[:2]), (2, 3, 1, 0))
    inputs = 2 if path.endswith("/to_out/kernel") else 1
    stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    # Old autoencoders keep the maps of their attention as 1x1 convolutions.
    as_conv = _AUTOENCODER in path and name in tensors and len(tensors.shape(name)) == 4
    part = load.Part(name, file_shape=(*stored, 1, 1) if as_conv else None)
    return load.Leaf(path, shape, (part,), stored, transpose=True)


def _stored_name(path: str, tensors: load.Tensors) -> str:
    name = path
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    if _AUTOENCODER in path and name not in tensors:
        old = functools.reduce(lambda name, renamed: name.replace(*renamed), _OLD_ATTENTION, name)
        return old if old in tensors else name
    return name


def load_unet(
    directory: str | os.PathLike[str], *, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[UNet2DCondition, Any]:
    """A UNet from a diffusers folder: `config.json` and `diffusion_pytorch_model.safetensors`, single or sharded.

    Args:
        directory: the folder.
        dtype: of the computation.
        param_dtype: of the parameters, whatever the file's.

    Returns:
        The module and its parameters: `module.apply({"params": params}, latents, time, text)`.

    Raises:
        FileNotFoundError: no configuration or weights, naming the places.
        ValueError: a configuration of another network or behaviour; mis-shaped weights, the first ten listed; a damaged
            file; a dtype that is not floating.
        KeyError: missing or unexpected weights, the first ten of either listed.
    """
    return _load(UNet2DCondition, UNetConfig, directory, dtype, param_dtype)


def load_controlnet(
    directory: str | os.PathLike[str], *, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[ControlNet, Any]:
    """A ControlNet from a diffusers folder; arguments and errors are those of `load_unet`."""
    return _load(ControlNet, ControlNetConfig, directory, dtype, param_dtype)


def load_vae(
    directory: str | os.PathLike[str], *, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[AutoencoderKL, Any]:
    """An autoencoder from a diffusers folder, its attention under new names or old; otherwise as `load_unet`."""
    return _load(AutoencoderKL, VAEConfig, directory, dtype, param_dtype)


def _load(kind: Any, config: Any, directory: Any, dtype: str, param_dtype: str) -> Any:
    load.check_floating(dtype=dtype, param_dtype=param_dtype)
    config = config.from_dict(Path(directory))
    with load.open_tensors(directory, STEM) as tensors:
        leaves = table(kind(config), tensors)
        load.check(tensors, leaves, most=10)
        return kind(config, dtype), load.nest({leaf.path: load.fill(tensors, leaf, param_dtype) for leaf in leaves})
