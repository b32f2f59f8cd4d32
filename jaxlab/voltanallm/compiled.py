"""A step of the engine compiled for GPUs that are not here: what a pool of pages leaves room for.

from jaxlab.core import plan
from jaxlab.voltanallm.compiled import PlanConfig, compile_phase
print(compile_phase(PlanConfig(batch=64), plan.target("h100")).table())
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.inference import SamplingParams, programs
from jaxlab.inference.paged import Packing
from jaxlab.inference.params import SamplingArrays
from jaxlab.models.decoder import Decoder, DecoderConfig, RopeConfig, abstract_params

PHASES = ("decode", "prefill")


def _llama() -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope=RopeConfig(
            rope_theta=500000.0,
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A step to compile.

    Attributes:
      model: Llama 3.1 8B's shape by default.
      phase: "decode": one token of every request; "prefill": prompts read.
      batch: requests decoded together.
      context: tokens of each, prompt and answer; the pool holds them all.
      prefill_tokens: read in one step (official default of a batch: 16384).
      page_size: tokens in a page.
      mesh: axes over the devices; empty: all along `tensor`.
    """

    model: DecoderConfig = dataclasses.field(default_factory=_llama)
    phase: Literal["decode", "prefill"] = "decode"
    batch: int = 128
    context: int = 2048
    prefill_tokens: int = 16384
    page_size: int = 16
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"tensor": -1})

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {self.phase!r}")
        for name in ("batch", "context", "prefill_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.context > self.model.max_position_embeddings:
            raise ValueError(f"context: expected at most {self.model.max_position_embeddings}, got {self.context}")

    @property
    def pages(self) -> int:
        """Of the pool, the scratch page included."""
        return 1 + self.batch * math.ceil(self.context / self.page_size)


def compile_phase(
    config: PlanConfig, target: plan.Target, *, options: Mapping[str, Any] | None = None, read_kernels: bool = True
) -> plan.Plan:
    """Compiles one step of the engine for a target; nothing runs.

    Args:
      config: model, sizes and phase.
      target: from `jaxlab.core.plan.target`; key and value heads lie over its `tensor` axis.
      options: of XLA's compiler.
      read_kernels: whether the plan lists kernels.

    Raises:
      ValueError: a `tensor` axis that does not divide the key and value heads.
    """
    mesh, own = target.mesh, config.model
    shards = mesh.shape.get("tensor", 1)
    if own.num_key_value_heads % shards:
        raise ValueError(
            f"mesh: expected a tensor axis that divides {own.num_key_value_heads} key and value heads, got {shards}"
        )
    model = Decoder(own)
    names = abstract_params(model)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(names),
        shardings(names, mesh, DEFAULT_RULES),
    )
    heads = NamedSharding(mesh, PartitionSpec(None, "tensor" if shards > 1 else None))
    shape = own.num_hidden_layers, own.num_key_value_heads, config.pages, config.page_size, own.head_dim
    pool = (jax.ShapeDtypeStruct(shape, own.dtype, sharding=heads),) * 2
    whole = NamedSharding(mesh, PartitionSpec()) if mesh.size > 1 else None
    step, given = (_decode if config.phase == "decode" else _prefill)(config, model, whole)
    return plan.compile(
        step,
        params,
        pool,
        *given,
        target=target,
        labels=("parameters", "cache", *("input",) * len(given)),
        donate_argnums=1,
        options=options,
        read_kernels=read_kernels,
    )


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _decode(config: PlanConfig, model: Any, whole: Any) -> tuple[Any, tuple[Any, ...]]:
    rows, width = config.batch, math.ceil(config.context / config.page_size)
    sampling, form = jax.tree.flatten(SamplingArrays.stack([SamplingParams()] * rows))

    def step(params, pool, ids, positions, table, seeds, sampling, report):
        draws = programs.Draws(seeds, jax.tree.unflatten(form, sampling), report)
        drawn, pool = programs.decode(model, params, pool, ids, positions, table, draws, replicated=whole)
        return drawn.ids, drawn.logps, pool

    report = jax.ShapeDtypeStruct((), jnp.bool_)
    return step, (_ids(rows), _ids(rows), _ids(rows, width), _ids(rows), sampling, report)


def _prefill(config: PlanConfig, model: Any, whole: Any) -> tuple[Any, tuple[Any, ...]]:
    buckets = programs.Buckets.of(
        (config.batch,),
        row_pages=math.ceil(config.context / config.page_size),
        prefill_tokens=config.prefill_tokens,
        page_size=config.page_size,
    )
    tokens, rows, pages = buckets.tokens[-1], programs.rows_of(buckets.tokens[-1]), buckets.pages[-1]

    def step(params, pool, ids, positions, table, packing, columns):
        packed = Packing(*packing)
        return programs.read(model, params, pool, ids, positions, table, packed, columns, replicated=whole)

    packing = (_ids(1, tokens), _ids(1, tokens), _ids(1, pages), _ids(1, pages))
    return step, (_ids(1, tokens), _ids(1, tokens), _ids(1, pages), packing, _ids(1, rows))
