"""The Hugging Face `config.json` of each decoder family, read and written.

What a file asks for and the decoder lacks is a `NotImplementedError`, and what a family cannot say is a `ValueError`:
never a silent difference in the numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlab.models.decoder.config import ROPE_TYPES, DecoderConfig, MoESpec, RopeConfig


class _Family(NamedTuple):
    """How one Hugging Face family differs: its class, and what its `config.json` may leave out."""

    architecture: str
    defaults: dict[str, Any]
    qkv_bias: bool = False
    qk_norm: str | None = None
    windows: str = "none"  # "none", "all" (every layer), "gated" (behind use_sliding_window), "typed" (layer_types)
    experts: str = ""  # the naming of the MoE fields: "", "mixtral", "qwen", "qwen2", "olmoe", "deepseek"


_LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
_MISTRAL = {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072}
FAMILIES: dict[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", _LLAMA),
    "mistral": _Family("MistralForCausalLM", _MISTRAL | {"sliding_window": 4096}, windows="all"),
    "qwen2": _Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True, windows="typed"),
    "qwen3": _Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, qk_norm="head", windows="typed"),
    "mixtral": _Family(
        "MixtralForCausalLM",
        _MISTRAL | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        windows="all",
        experts="mixtral",
    ),
    "qwen2_moe": _Family("Qwen2MoeForCausalLM", _QWEN, qkv_bias=True, windows="typed", experts="qwen2"),
    "qwen3_moe": _Family("Qwen3MoeForCausalLM", _QWEN, qk_norm="head", windows="gated", experts="qwen"),
    "olmoe": _Family(
        "OlmoeForCausalLM", {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, qk_norm="full", experts="olmoe"
    ),
    "deepseek": _Family("DeepseekForCausalLM", _LLAMA | {"first_k_dense_replace": 0}, experts="deepseek"),
}
"""Hugging Face `model_type` -> family. "deepseek" is DeepSeekMoE (arXiv:2401.06066) as deepseek-moe-16b stores it."""


def _family(model_type: str) -> _Family:
    if model_type not in FAMILIES:
        raise NotImplementedError(f"model_type {model_type!r}: known families are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _refuse(hf: Mapping[str, Any], model_type: str) -> None:
    """Features of these families that would change the numbers and that the decoder does not have."""
    plain = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "clip_qkv": (None,),
        "partial_rotary_factor": (1, 1.0),
        "quantization_config": (None,),
        "n_group": (None, 1),
    }
    for key, allowed in plain.items():
        if key in hf and hf[key] not in allowed and not (key != "hidden_act" and hf[key] is None):
            wanted = " or ".join(repr(value) for value in allowed)
            raise NotImplementedError(f"{model_type}: {key}={hf[key]!r} is not supported, expected {wanted}")


def _rope_from_hf(hf: Mapping[str, Any], default_theta: float) -> RopeConfig:
    # transformers 5 writes one dictionary, `rope_parameters`; earlier files have `rope_theta` and `rope_scaling`.
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    given.setdefault("rope_theta", hf.get("rope_theta") or default_theta)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise NotImplementedError("rope: partial_rotary_factor other than 1 is not supported")
    if given.pop("mrope_interleaved", False):
        raise NotImplementedError("rope: mrope_interleaved is not supported")
    known = {field.name for field in dataclasses.fields(RopeConfig)}
    unknown = sorted(set(given) - known)
    # Fields of other rope types (short_factor, ...) arrive here with a type that RopeConfig refuses by name.
    rope_type = "default" if kind == "mrope" else kind
    if unknown and rope_type in ROPE_TYPES:
        raise NotImplementedError(f"rope: unknown parameters {unknown} for rope_type {rope_type!r}")
    values = {key: value for key, value in given.items() if key in known and value is not None}
    if rope_type == "default":  # a factor that is left over scales nothing
        values = {key: value for key, value in values.items() if key in ("rope_theta", "mrope_section")}
    if "mrope_section" in values:
        values["mrope_section"] = tuple(values["mrope_section"])
    if rope_type == "yarn" and "factor" not in values and values.get("original_max_position_embeddings"):
        values["factor"] = hf["max_position_embeddings"] / values["original_max_position_embeddings"]
    if values.get("original_max_position_embeddings") is None and hf.get("original_max_position_embeddings"):
        values["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return RopeConfig(**values, rope_type=rope_type)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: every reader, old or new, understands these two."""
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": (
            "factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "mscale",
            "mscale_all_dim", "truncate",
        ),
    }[rope.rope_type]  # fmt: skip
    scaling = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if rope.mrope_section is not None:
        scaling["mrope_section"] = list(rope.mrope_section)
    if scaling:
        scaling = {"rope_type": rope.rope_type, **scaling}
    return {"rope_theta": rope.rope_theta, "rope_scaling": scaling or None}


def _windows_from_hf(hf: Mapping[str, Any], family: _Family, model_type: str) -> tuple[int | None, ...] | None:
    layers, width = hf["num_hidden_layers"], hf.get("sliding_window")
    if family.windows == "none" or not width:
        return None
    if family.windows != "all" and not hf.get("use_sliding_window", False):
        return None
    if family.windows in ("all", "gated"):
        return (width,) * layers
    types = hf.get("layer_types")
    if types is None:
        start = hf.get("max_window_layers", 28)
        if model_type == "qwen2_moe":
            sliding = [i % 2 == 0 and i < start for i in range(layers)]
        else:
            sliding = [i >= start for i in range(layers)]
    else:
        unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
        if unknown:
            raise NotImplementedError(f"{model_type}: layer_types {unknown} are not supported")
        sliding = [kind == "sliding_attention" for kind in types]
    return tuple(width if slides else None for slides in sliding)


def _experts_from_hf(hf: Mapping[str, Any], naming: str) -> MoESpec | None:
    if not naming:
        return None
    layers = range(hf["num_hidden_layers"])
    if naming == "mixtral":
        return MoESpec(hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"], renormalise=True)
    renormalise = bool(hf.get("norm_topk_prob"))
    if naming == "olmoe":
        experts = hf.get("num_experts", hf.get("num_local_experts"))
        return MoESpec(experts, hf["num_experts_per_tok"], hf["intermediate_size"], renormalise=renormalise)
    if naming == "deepseek":
        if hf.get("topk_method", "greedy") != "greedy":
            raise NotImplementedError(
                f"deepseek: topk_method={hf['topk_method']!r} is not supported, expected 'greedy'"
            )
        first, step = hf["first_k_dense_replace"], hf.get("moe_layer_freq", 1)
        sparse = tuple(i for i in layers if i >= first and i % step == 0)
        return MoESpec(
            hf["n_routed_experts"],
            hf["num_experts_per_tok"],
            hf["moe_intermediate_size"],
            shared_ffn_size=(hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"],
            renormalise=renormalise,
            scoring=hf.get("scoring_func", "softmax"),
            scale=hf.get("routed_scaling_factor", 1.0),
            sparse_layers=None if len(sparse) == len(layers) else sparse,
        )
    dense, step = set(hf.get("mlp_only_layers") or ()), hf.get("decoder_sparse_step", 1)
    sparse = tuple(i for i in layers if i not in dense and (i + 1) % step == 0)
    return MoESpec(
        hf.get("num_experts", hf.get("num_local_experts")),
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        shared_ffn_size=hf["shared_expert_intermediate_size"] if naming == "qwen2" else 0,
        shared_gate=naming == "qwen2",
        renormalise=renormalise,
        sparse_layers=None if len(sparse) == len(layers) else sparse,
    )


def _experts_to_hf(config: DecoderConfig, naming: str) -> dict[str, Any]:
    moe = config.moe
    if moe is None or not naming:
        return {}
    common = {"num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.renormalise}
    if naming == "mixtral":
        return {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    if naming == "olmoe":
        return common | {"num_experts": moe.num_experts}
    dense = [i for i in range(config.num_hidden_layers) if not config.is_sparse(i)]
    if naming == "deepseek":
        return common | {
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_ffn_size // moe.ffn_size or None,
            "moe_intermediate_size": moe.ffn_size,
            "first_k_dense_replace": len(dense),
            "moe_layer_freq": 1,
            "scoring_func": moe.scoring,
            "routed_scaling_factor": moe.scale,
        }
    shared = {"shared_expert_intermediate_size": moe.shared_ffn_size} if naming == "qwen2" else {}
    return common | shared | {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.ffn_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }  # fmt: skip


def read(hf: Mapping[str, Any]) -> DecoderConfig:
    """`DecoderConfig.from_hf` on the content of a `config.json`."""
    model_type = str(hf.get("model_type"))
    family = _family(model_type)
    hf = {**family.defaults, **{key: value for key, value in hf.items() if not (key == "head_dim" and value is None)}}
    _refuse(hf, model_type)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in sizes if hf.get(name) is None]
    if missing:
        raise KeyError(f"config.json of a {model_type} lacks {missing}")
    try:
        moe = _experts_from_hf(hf, family.experts)
    except KeyError as error:
        raise KeyError(f"config.json of a {model_type} lacks {error}") from error
    return DecoderConfig(
        **{name: hf[name] for name in sizes},
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim"),
        max_position_embeddings=hf["max_position_embeddings"],
        rms_norm_eps=hf["rms_norm_eps"],
        rope=_rope_from_hf(hf, family.defaults.get("rope_theta", 10000.0)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=bool(hf.get("qkv_bias", True)) if family.qkv_bias else False,
        qk_norm=family.qk_norm,
        windows=_windows_from_hf(hf, family, model_type),
        moe=moe,
        model_type=model_type,
    )


def _spell(config: DecoderConfig) -> dict[str, Any]:
    family = _family(config.model_type)
    # Mixtral and OLMoE have no dense layers: their one width is the expert's.
    width_of_all = config.moe.ffn_size if config.moe and family.experts in ("mixtral", "olmoe") else None
    hf = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": width_of_all or config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_rope_to_hf(config.rope),
        **_experts_to_hf(config, family.experts),
    }
    if family.qkv_bias and config.model_type == "qwen2_moe":
        hf["qkv_bias"] = config.qkv_bias
    width = max((w for w in config.windows or () if w), default=None)
    if family.windows != "none":
        hf["sliding_window"] = width
    if family.windows in ("gated", "typed"):
        hf["use_sliding_window"] = width is not None
    if family.windows == "typed":
        windows = config.windows or (None,) * config.num_hidden_layers
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
        hf["max_window_layers"] = config.num_hidden_layers
    return hf


def _lost(config: DecoderConfig) -> list[str]:
    """Fields that do not come back from the family's own spelling."""
    if (config.moe is None) != (not _family(config.model_type).experts):
        return ["moe"]
    try:
        back = read(_spell(config))
    except ValueError:  # Qwen2-MoE without a shared expert
        return ["moe"]
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    held = set(names) - {"dtype", "param_dtype", "remat", "scan"}
    if config.moe is not None and config.moe.sparse_layers is None:
        held.discard("intermediate_size")  # no layer uses it
    return [name for name in names if name in held and getattr(back, name) != getattr(config, name)]


def write(config: DecoderConfig) -> dict[str, Any]:
    """`DecoderConfig.to_hf`."""
    if config.moe is not None and config.moe.activation != "swiglu":
        raise NotImplementedError(
            f"model_type {config.model_type!r}: moe.activation={config.moe.activation!r} (experts of two matrices) "
            "has no Hugging Face form, expected 'swiglu'"
        )
    lost = _lost(config)
    if lost:
        able = [name for name in FAMILIES if not _lost(dataclasses.replace(config, model_type=name))]
        can = f"families that can: {', '.join(able)}" if able else "no known family can"
        said = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"model_type {config.model_type!r} cannot express {said}; {can}")
    return _spell(config)
