"""Whole models on one GPU, packed or not: the steps that `jaxlab.inference` runs, compiled ahead of time, never run.

Weights, cache and activations are bfloat16; the cache is donated; the next token is drawn on the device. Bytes are
XLA's buffer assignment, so no estimate enters but where a search looks first.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlab.core.untrusted import read_object
from jaxlab.puzzlemoe.config import UNMERGED, check_name, num_pairs

if TYPE_CHECKING:
    from jaxlab.core.plan import Plan, Target
    from jaxlab.models.decoder import Decoder

MODELS = {
    "mixtral-8x7b": "configs/puzzlemoe/mixtral_8x7b.json",
    "qwen3-30b-a3b": "configs/puzzlemoe/qwen3_30b_a3b.json",
    "deepseek-moe-16b": "configs/puzzlemoe/deepseek_moe_16b.json",
    "qwen1.5-moe-a2.7b": "configs/puzzlemoe/qwen1_5_moe_a2_7b.json",
}
"""The models that the paper compresses: name -> the Hugging Face `config.json`, a file of the project."""

PHASES = ("decode", "prefill")
RATIOS = (0.0, 0.25, 0.5)
CONTEXT_STEP = 128
"""`longest_context` counts positions in steps of so many."""

# Only bytes are read here, so the kernels' code need be neither optimised nor assembled.
_BYTES_ONLY = {"options": {"xla_backend_optimization_level": 0}, "read_kernels": False}


def hf_config(name: str) -> dict[str, Any]:
    """The content of a `config.json`: of one of `MODELS`, or of a path.

    Raises:
        ValueError: neither; the known models are listed.
    """
    from pathlib import Path

    from jaxlab.core import find_config

    path = find_config(MODELS[name]) if name in MODELS else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"model must be one of {', '.join(MODELS)}, or the path of a config.json, got {name!r}")
    return read_object(path)


def serving_plan(
    hf_config: Mapping[str, Any],
    target: "Target",
    *,
    ratio: float = 0.0,
    phase: str = "decode",
    batch: int = 1,
    context: int = 1536,
    prompt: int | None = None,
    unmerged: str = "bf16",
    options: Mapping[str, Any] | None = None,
    read_kernels: bool = True,
) -> "Plan":
    """What one step of serving a model holds on one GPU.

    Args:
        hf_config: content of a `config.json` of a model with experts, a family that `Decoder` has.
        target: one device, from `jaxlab.core.plan.target`.
        ratio: fraction of the expert slots that is removed, as in `PuzzleConfig`; 0 = bfloat16 experts.
        phase: "decode" (`decode_step`: a token for each row) or "prefill" (`prefill` of whole prompts, and the draw).
        batch: rows.
        context: positions of each row in the cache.
        prompt: tokens of each prompt that a prefill writes; None = `context`.
        unmerged: how experts without a partner are kept, as in `PuzzleConfig`.
        options: as in `plan.compile`.
        read_kernels: as in `plan.compile`.

    Returns:
        The plan; of its `bytes`, "parameters" are weights, words and the experts' addresses.

    Raises:
        ValueError: an unknown phase or `unmerged`, sizes below 1, a prompt longer than the context, a model without
            experts, a ratio outside [0, 0.5] or too small for a pair.
        NotImplementedError: a family that the decoder does not have.
    """
    from jaxlab.core import plan

    check_name("phase", phase, PHASES)
    prompt = context if prompt is None else prompt
    if min(batch, context, prompt) < 1 or prompt > context:
        raise ValueError(
            f"batch, context and prompt must be at least 1 and prompt at most context, got {batch}, {context}, {prompt}"
        )
    step, args = _step(_model(hf_config, ratio, unmerged), phase, batch, context, prompt)
    labels = ("parameters", "cache", *("input",) * (len(args) - 2))
    return plan.compile(
        step, *args, target=target, labels=labels, donate_argnums=1, options=options, read_kernels=read_kernels
    )


def _model(hf_config: Mapping[str, Any], ratio: float, unmerged: str) -> "Decoder":
    from jaxlab.models.decoder import Decoder, DecoderConfig
    from jaxlab.puzzlemoe.packed_moe import PackedPolicy

    check_name("unmerged", unmerged, UNMERGED)
    config = DecoderConfig.from_hf(hf_config)
    spec = config.moe
    if spec is None:
        raise ValueError(f"no MoE layers found in the configuration of a {config.model_type}")
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    if not ratio:
        return Decoder(config)
    return Decoder(config, mlp=PackedPolicy(num_pairs(spec.num_experts, ratio), unmerged))


def _step(
    model: "Decoder", phase: str, batch: int, context: int, prompt: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function, and its arguments as shapes: parameters, cache, tokens, positions, keys, sampling."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from jaxlab.inference import SamplingArrays, SamplingParams, decode_step, prefill, sample
    from jaxlab.models.decoder import KVCache
    from jaxlab.models.decoder.model import abstract_params

    # As leaves: shapes in place of arrays are not what the structure's annotations say.
    sampling, structure = jax.tree.flatten(SamplingArrays.stack([SamplingParams()] * batch))

    def decode(params, cache, ids, positions, keys, sampling):
        return decode_step(model, params, cache, ids, positions, keys, structure.unflatten(sampling))

    def fill(params, cache, tokens, positions, keys, sampling):
        logits, cache = prefill(model, params, cache, tokens, positions)
        return *sample(logits, keys, structure.unflatten(sampling)), cache

    rows = jax.ShapeDtypeStruct((batch,) if phase == "decode" else (batch, prompt), jnp.int32)
    drawn = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    cache = jax.eval_shape(lambda: KVCache.create(model.config, batch, context))
    params = nn.meta.unbox(abstract_params(model))
    return decode if phase == "decode" else fill, (params, cache, rows, rows, drawn, sampling)


def largest_batch(hf_config: Mapping[str, Any], target: "Target", *, context: int = 2048, **settings: Any) -> int:
    """The most rows of `context` positions that fit; 0 if one does not.

    Args:
        hf_config: as in `serving_plan`.
        target: one device.
        context: positions of a row.
        **settings: `ratio`, `phase`, `unmerged` of `serving_plan`.
    """
    return _largest(hf_config, target, lambda rows: {"batch": rows, "context": context}, settings)


def longest_context(hf_config: Mapping[str, Any], target: "Target", *, batch: int = 1, **settings: Any) -> int:
    """The most positions that fit with so many rows, a multiple of `CONTEXT_STEP`; 0 if not even one step does.

    It may exceed what the model was trained for. In a prefill all of them are one prompt.

    Args:
        hf_config: as in `serving_plan`.
        target: one device.
        batch: rows.
        **settings: `ratio`, `phase`, `unmerged` of `serving_plan`.
    """
    steps = _largest(hf_config, target, lambda steps: {"batch": batch, "context": CONTEXT_STEP * steps}, settings)
    return CONTEXT_STEP * steps


def _largest(
    hf_config: Mapping[str, Any], target: "Target", sizes: Callable[[int], dict[str, Any]], settings: dict[str, Any]
) -> int:
    """The largest n whose plan fits while that of n + 1, which is compiled too, does not."""
    from jaxlab.core.plan import search
    from jaxlab.models.cost import kv_cache_bytes
    from jaxlab.puzzlemoe.memory import estimate_memory

    model = _model(hf_config, settings.get("ratio", 0.0), settings.get("unmerged", "bf16"))
    one = sizes(1)
    return search(
        lambda n: serving_plan(hf_config, target, **sizes(n), **settings, **_BYTES_ONLY).bytes["total"],
        limit=math.floor(target.memory_factor * target.memory_bytes),
        start=estimate_memory(hf_config, settings.get("ratio", 0.0)).total_bytes,
        least=kv_cache_bytes(model.config, one["batch"], one["context"]),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model in one form and phase on one GPU, in bytes.

    Attributes:
        model: its name.
        gpu: a preset of `jaxlab.core.plan`.
        ratio: of `PuzzleConfig`; 0 = bfloat16.
        phase: one of `PHASES`.
        batch: rows that were compiled.
        context: positions of their cache.
        bytes: of the plan.
        experts: of `bytes["parameters"]`, the routed experts.
        usable: what a program may take of the device.
        largest_batch: at `context_of_batch`; None where it was not asked for.
        context_of_batch: positions of each of its rows.
        longest_context: of one row, likewise.
    """

    model: str
    gpu: str
    ratio: float
    phase: str
    batch: int
    context: int
    bytes: dict[str, int]
    experts: int
    usable: int
    largest_batch: int | None = None
    context_of_batch: int | None = None
    longest_context: int | None = None

    @property
    def fits(self) -> bool:
        """Whether `bytes["total"]` can be had."""
        return self.bytes["total"] <= self.usable

    @property
    def gpus(self) -> int:
        """So many such GPUs hold these bytes at the least, if they could be split evenly."""
        return -(-self.bytes["total"] // self.usable)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {**dataclasses.asdict(self), "fits": self.fits, "gpus": self.gpus}


def fit(
    model: str,
    gpu: str = "h100",
    *,
    ratio: float = 0.0,
    phase: str = "decode",
    batch: int = 1,
    context: int = 1536,
    prompt: int | None = None,
    search_context: int | None = None,
) -> Fit:
    """Compiles a model's step for a GPU.

    Args:
        model: one of `MODELS`, or the path of a `config.json`.
        gpu: a preset of `jaxlab.core.plan`.
        ratio: as in `serving_plan`.
        phase: as in `serving_plan`.
        batch: as in `serving_plan`.
        context: as in `serving_plan`.
        prompt: as in `serving_plan`.
        search_context: also find the most rows of so many positions, and the longest context of one row (some more
            compilations).
    """
    from jaxlab.core.plan import target
    from jaxlab.puzzlemoe.memory import estimate_memory

    hf, over = hf_config(model), target(gpu)
    how: dict[str, Any] = {"ratio": ratio, "phase": phase}
    made = serving_plan(hf, over, **how, batch=batch, context=context, prompt=prompt, **_BYTES_ONLY)
    searched = search_context is not None
    return Fit(
        model=model,
        gpu=gpu,
        **how,
        batch=batch,
        context=context,
        bytes=dict(made.bytes),
        experts=estimate_memory(hf, ratio).expert_bytes,
        usable=math.floor(over.memory_factor * over.memory_bytes),
        largest_batch=largest_batch(hf, over, context=search_context, **how) if searched else None,
        context_of_batch=search_context,
        longest_context=longest_context(hf, over, **how) if searched else None,
    )


def table(found: Sequence[Fit]) -> str:
    """Fits of one kind of GPU as a text table."""
    titles = ("parameters", "cache", "temporaries", "total")
    limit = f"GiB on one {found[0].gpu}, of which {found[0].usable / 2**30:.1f} can be used"
    rows = [limit, f"{'':18}{'experts':13}{'phase':9}" + "".join(f"{title:>12}" for title in titles) + "  fits one"]
    for each in found:
        stored = f"{each.ratio:.0%} packed" if each.ratio else "bf16"
        sizes = "".join(f"{each.bytes[title] / 2**30:>12.2f}" for title in titles)
        verdict = "yes" if each.fits else f"no: {each.gpus} at least"
        more = []
        if each.largest_batch is not None:
            more.append(f"{each.largest_batch} rows of {each.context_of_batch}")
        if each.longest_context is not None:
            more.append(f"one of {each.longest_context}")
        told = f"; at most {', or '.join(more)}" if more else ""
        rows.append(f"{each.model:18}{stored:13}{each.phase:9}{sizes}  {verdict}{told}")
    return "\n".join(rows)
