"""Sampling compiled for a GPU that is not here: what reading a question holds, and decoding its samples.

    from jaxlab.core import plan
    from jaxlab.vlm_scaling.compiled import PlanConfig, compile_phase
    print(compile_phase(PlanConfig(n=16), plan.target("h100")).table())

Weights, caches and activations are bfloat16. Caches hold as many slots as prompt and samples need; `sample` rounds both
up to powers of two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.core import find_config, plan
from jaxlab.inference import SamplingArrays, SamplingParams, SharedPrefixCache, decode_step, prefill
from jaxlab.models.decoder import KVCache
from jaxlab.models.qwen2_5_vl import Config, Qwen25VL, abstract_params, image_layout, smart_resize
from jaxlab.models.qwen2_5_vl.positions import host_grid

PHASES = ("decode", "prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Sampling to compile.

    Attributes:
      model: a Qwen2.5-VL's `config.json`, or the folder that holds it.
      questions: decoded together.
      n: samples of each.
      image_height: pixels of a question's one image, before it is resized as usual.
      image_width: likewise.
      text_tokens: of a question.
      max_new_tokens: of a sample.
      phase: "decode": all steps of all samples, a loop of `decode_step`; "prompt": an image encoded, and the prompt of
        its question read.
      shared: samples of a question share its keys and values; False: each has its own copy.
    """

    model: str = "configs/vlm_scaling/qwen2_5_vl_7b.json"
    questions: int = 1
    n: int = 16
    image_height: int = 1024
    image_width: int = 1024
    text_tokens: int = 100
    max_new_tokens: int = 1024
    phase: Literal["decode", "prompt"] = "decode"
    shared: bool = True

    def __post_init__(self):
        for name in ("questions", "n", "image_height", "image_width", "text_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {self.phase!r}")


@functools.lru_cache(maxsize=4)
def model_of(path: str) -> Qwen25VL:
    """The model of a `config.json`, in bfloat16.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model.
    """
    folder = Path(path)
    config = Config.from_hf(folder if folder.is_dir() else find_config(path))
    return Qwen25VL(
        dataclasses.replace(config, text=dataclasses.replace(config.text, dtype="bfloat16", param_dtype="bfloat16"))
    )


def image_grid(config: PlanConfig) -> tuple[int, int, int]:
    """Patches of an image along (time, height, width)."""
    vision = model_of(config.model).config.vision
    factor = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(config.image_height, config.image_width, factor=factor)
    return 1, height // vision.patch_size, width // vision.patch_size


def image_tokens(config: PlanConfig) -> int:
    """Tokens of an image."""
    return math.prod(image_grid(config)) // model_of(config.model).config.vision.spatial_merge_size ** 2


def prompt_tokens(config: PlanConfig) -> int:
    """Tokens of a question with its image."""
    return image_tokens(config) + config.text_tokens


def cache_bytes(config: PlanConfig) -> int:
    """Of the cache that is decoded with, as `jax.eval_shape` sees it; nothing is made."""
    leaves, _ = _shapes(lambda: _cache(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def compile_phase(
    config: PlanConfig, target: plan.Target, *, options: Mapping[str, Any] | None = None, read_kernels: bool = True
) -> plan.Plan:
    """Compiles one phase of sampling for one device; nothing runs.

    All weights lie on the device in either phase, those of the image encoder too.

    Args:
      config: model, sizes and phase.
      target: from `jaxlab.core.plan.target`.
      options: of XLA's compiler.
      read_kernels: whether the plan lists kernels.

    Raises:
      ValueError: a target of several devices, over which the kernel of a shared prefix cannot be divided; an image that
        `smart_resize` does not take.
    """
    if target.mesh.size != 1:
        raise ValueError(f"target: expected one device, got {target.mesh.size}")
    model = model_of(config.model)
    params = nn.meta.unbox(abstract_params(model))
    program, cache, given = (_decode if config.phase == "decode" else _prompt)(config, model)
    return plan.compile(
        program,
        params,
        cache,
        *given,
        target=target,
        labels=("parameters", "cache", *("input",) * len(given)),
        donate_argnums=1,
        options=options,
        read_kernels=read_kernels,
    )


def most(
    config: PlanConfig,
    target: plan.Target,
    name: Literal["n", "questions"],
    *,
    options: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """How many samples of a question, or questions, there is room for while decoding, and the bytes taken then.

    Both that number and the one above it are compiled. (0, 0) if there is no room for one.

    Args:
      config: of which `name` is varied.
      target: one device.
      name: the field.
      options: of XLA's compiler.
    """
    total: dict[int, int] = {}

    def varied(count: int) -> PlanConfig:
        changes: dict[str, Any] = {name: count, "phase": "decode"}
        return dataclasses.replace(config, **changes)

    def compiled(count: int) -> int:
        total[count] = compile_phase(varied(count), target, options=options, read_kernels=False).bytes["total"]
        return total[count]

    one, two = (cache_bytes(varied(count)) for count in (1, 2))
    weights = nn.meta.unbox(abstract_params(model_of(config.model)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    limit = math.floor(target.memory_factor * target.memory_bytes)
    count = plan.search(compiled, limit=limit, start=held + one, least=two - one)
    return count, total[count] if count else 0


def _decode(config: PlanConfig, model: Qwen25VL) -> tuple[Callable[..., Any], list[Any], tuple[Any, ...]]:
    """All steps after the first token, their cache, and further arguments."""
    rows = config.questions * config.n
    cache, cache_form = _shapes(lambda: _cache(config))
    sampling, sampling_form = _shapes(lambda: SamplingArrays.stack([SamplingParams()] * rows))
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    rope = jax.ShapeDtypeStruct((3, rows), jnp.int32)
    text = model.text_model()

    def steps(params, cache, ids, positions, rope_positions, keys, sampling):
        sampling = sampling_form.unflatten(sampling)

        def step(count, state):
            ids, cache = state
            at = {"rope_positions": rope_positions + count}
            ids, _, cache = decode_step(text, params["language"], cache, ids, positions + count, keys, sampling, **at)
            return ids, cache

        ids, cache = jax.lax.fori_loop(0, config.max_new_tokens - 1, step, (ids, cache_form.unflatten(cache)))
        return ids, jax.tree.leaves(cache)

    return steps, cache, (row, row, rope, keys, sampling)


def _prompt(config: PlanConfig, model: Qwen25VL) -> tuple[Callable[..., Any], list[Any], tuple[Any, ...]]:
    """An image encoded and a prompt read, the cache that this fills, and further arguments."""
    vision, text, length = model.config.vision, model.text_model(), prompt_tokens(config)
    grid = image_grid(config)
    layout, layout_form = jax.tree.flatten(image_layout(host_grid([grid], vision.spatial_merge_size), vision))
    cache, cache_form = _shapes(lambda: KVCache.create(model.config.text, 1, length))
    pixels = jax.ShapeDtypeStruct((math.prod(grid), vision.patch_features), jnp.float32)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    rope = jax.ShapeDtypeStruct((3, 1, length), jnp.int32)

    def step(params, cache, ids, pixels, layout, positions, rope_positions):
        whole = {"params": params}
        features = model.apply(whole, pixels, layout_form.unflatten(layout), method="encode_patches")
        embeddings = model.apply(whole, ids, features, method="embed")
        logits, cache = prefill(
            text,
            params["language"],
            cache_form.unflatten(cache),
            None,
            positions,
            embeddings=embeddings,
            rope_positions=rope_positions,
        )
        return logits, jax.tree.leaves(cache)

    return step, cache, (row, pixels, layout, row, rope)


def _cache(config: PlanConfig) -> Any:
    text, rows, length = model_of(config.model).config.text, config.questions * config.n, prompt_tokens(config)
    if not config.shared:
        return KVCache.create(text, rows, length + config.max_new_tokens)
    prefix = KVCache.create(text, config.questions, length)
    lengths = jnp.full(config.questions, length, jnp.int32)
    return SharedPrefixCache.create(text, prefix, lengths, config.n, config.max_new_tokens)


def _shapes(make: Callable[[], Any]) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Leaves as shapes, and the structure: annotated ones take arrays only, which shapes are not."""
    form = None

    def leaves():
        nonlocal form
        found, form = jax.tree.flatten(make())
        return found

    return jax.eval_shape(leaves), form
