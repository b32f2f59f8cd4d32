"""Bytes of a mixture-of-experts model before and after compression, from its `config.json` alone."""

import os
from collections.abc import Mapping
from typing import Any

from flax import struct

from jaxlab.models.cost import parameter_count
from jaxlab.models.decoder import DecoderConfig
from jaxlab.models.sources import read_config
from jaxlab.puzzlemoe.config import num_pairs

_BYTES = 2
_MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")


@struct.dataclass
class MemoryEstimate:
    """Bytes of a model's weights in bfloat16 and packed words.

    Attributes:
        total_bytes: all weights.
        expert_bytes: routed experts, in every layer.
        other_bytes: everything else: embeddings, attention, norms, routers, shared experts, dense layers.
    """

    total_bytes: int
    expert_bytes: int
    other_bytes: int


def estimate_memory(hf_config: Mapping[str, Any] | str | os.PathLike[str], ratio: float = 0.0) -> MemoryEstimate:
    """Bytes of a model whose experts are compressed by `ratio`, everything in 16 bits.

    Args:
        hf_config: a Hugging Face `config.json` (content, path, or folder) of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE,
            DeepSeek-MoE, DeepSeek-V2 or DeepSeek-V3 (without its next-token-prediction layers).
        ratio: fraction of the expert slots that is removed, as in `PuzzleConfig`; 0 = the model as it is.

    Raises:
        ValueError: a model without experts; ratio outside [0, 0.5], or too small for one pair.
        NotImplementedError: an unknown family.
        KeyError: a size is missing.
        FileNotFoundError: no such file.
    """
    hf = read_config(hf_config)
    if hf.get("model_type") in _MLA_FAMILIES:
        other, layers, experts, weights = _latent_attention_model(hf)
    else:
        config = DecoderConfig.from_hf(hf)
        moe = config.moe
        layers = sum(map(config.is_sparse, range(config.num_hidden_layers)))
        experts, weights = (moe.num_experts, 3 * config.hidden_size * moe.ffn_size) if moe is not None else (0, 0)
        other = parameter_count(config).total - layers * experts * weights
    if not layers * experts:
        raise ValueError(f"no MoE layers found in the configuration of a {hf.get('model_type')}")
    slots = experts - num_pairs(experts, ratio) if ratio else experts
    expert_bytes = _BYTES * layers * slots * weights
    return MemoryEstimate(expert_bytes + _BYTES * other, expert_bytes, _BYTES * other)


def _latent_attention_model(hf: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """DeepSeek-V2 and V3 (arXiv:2405.04434): other weights, layers with experts, experts, weights of one."""
    d, depth, heads = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    latent, q_latent = hf["kv_lora_rank"], hf.get("q_lora_rank")
    queries = heads * (nope + rope)
    attention = d * queries if q_latent is None else q_latent * (d + 1 + queries)
    attention += d * (latent + rope) + latent + latent * heads * (nope + value) + heads * value * d
    experts, weights = hf.get("n_routed_experts") or 0, 3 * d * (hf.get("moe_intermediate_size") or 0)
    first, step = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    layers = sum(i >= first and i % step == 0 for i in range(depth)) if experts else 0
    router = experts * (d + (1 if hf["model_type"] == "deepseek_v3" else 0))
    sparse = router + (hf.get("n_shared_experts") or 0) * weights
    dense = (depth - layers) * 3 * d * hf["intermediate_size"]
    embedding = hf["vocab_size"] * d * (1 if hf.get("tie_word_embeddings") else 2)
    return depth * (attention + 2 * d) + layers * sparse + dense + embedding + d, layers, experts, weights
