"""GGUF files of small models, written as llama.cpp does; for comparisons and tests."""

from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(
    path: Path, arch: str, config: dict[str, Any], weights: dict[str, np.ndarray], kind: str = "F32"
) -> None:
    """Writes stored weights as llama.cpp's converter does: its names, experts stacked, llama's q and k rows in pairs.

    Args:
        path: of the file.
        arch: llama.cpp's name of the architecture.
        config: Hugging Face `config.json`.
        weights: under Hugging Face's stored names.
        kind: how matrices whose rows allow it are quantised; the others stay F32.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in config:
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    for name, value in _llama_cpp_tensors(arch, config, weights, experts).items():
        value = np.ascontiguousarray(value, np.float32)
        stored = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[stored]
        if value.ndim < 2 or value.shape[-1] % block:
            stored = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_tensors(
    arch: str, config: dict[str, Any], weights: dict[str, np.ndarray], experts: int
) -> dict[str, np.ndarray]:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    leaves = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "block_sparse_moe.gate": "ffn_gate_inp",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    }
    leaves |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    leaves |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    leaves |= {f"mlp.shared_expert.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")}
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {
        f"{ours}.weight": weights[f"{name}.weight"] for name, ours in whole.items() if f"{name}.weight" in weights
    }
    for name, value in weights.items():
        if ".layers." not in name or ".experts." in name:
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        leaf, _, kind = rest.rpartition(".")
        if arch == "llama" and leaves[leaf] in ("attn_q", "attn_k"):
            value = value.reshape(heads[leaves[leaf][-1]], 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        tensors[f"blk.{layer}.{leaves[leaf]}.{kind}"] = value[0] if leaf == "mlp.shared_expert_gate" else value
    spellings = (
        {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj"},
        {"gate": "block_sparse_moe.experts.{}.w1", "up": "block_sparse_moe.experts.{}.w3",
         "down": "block_sparse_moe.experts.{}.w2"},
    )  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        for spelling in spellings:
            for kind, pattern in spelling.items():
                names = [f"model.layers.{layer}.{pattern.format(expert)}.weight" for expert in range(experts)]
                if experts and names[0] in weights:
                    tensors[f"blk.{layer}.ffn_{kind}_exps.weight"] = np.stack([weights[name] for name in names])
    return tensors
