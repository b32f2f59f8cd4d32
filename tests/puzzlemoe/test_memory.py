import json

import pytest

from jaxlab.puzzlemoe import estimate_memory

DEEPSEEK = {"n_shared_experts": 2, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "n_routed_experts": 64}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config(model_type, sizes, **more):
    return {"model_type": model_type, **dict(zip(FIELDS, sizes)), "num_experts_per_tok": 2, **more}


MIXTRAL = config("mixtral", (32000, 4096, 14336, 32, 32), num_key_value_heads=8, num_local_experts=8)
QWEN = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
MODELS = {
    "Mixtral-8x7B": (MIXTRAL, (93.4, 70.9, 48.3)),
    "DeepSeek-MoE-16B": (config("deepseek", (102400, 2048, 10944, 28, 16), **DEEPSEEK), (32.8, 25.3, 17.8)),
    "Qwen1.5-MoE-A2.7B": (
        config("qwen2_moe", (151936, 2048, 5632, 24, 16), num_experts=60, **QWEN),
        (28.6, 22.4, 16.2),
    ),
    "Qwen3-30B-A3B": (
        config(
            "qwen3_moe", (151936, 2048, 6144, 48, 32), num_key_value_heads=4, head_dim=128, num_experts=128,
            moe_intermediate_size=768,
        ),
        (61.1, 46.6, 32.1),
    ),
    "OLMoE-1B-7B": (config("olmoe", (50304, 2048, 1024, 16, 16), num_experts=64), (13.8, 10.6, 7.4)),
    "DeepSeek-V2-Lite": (
        config("deepseek_v2", (102400, 2048, 10944, 27, 16), q_lora_rank=None, **DEEPSEEK, **LATENT),
        (31.4, 24.2, 17.0),
    ),
    "DeepSeek-V3": (
        config(
            "deepseek_v3", (129280, 7168, 18432, 61, 128), n_routed_experts=256, n_shared_experts=1,
            moe_intermediate_size=2048, first_k_dense_replace=3, q_lora_rank=1536, **LATENT,
        ),
        (1342.1, 1015.1, 688.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name):
    """Billions of bytes at 0, 25 and 50 %: the spec's table, and three families beyond it."""
    hf, expected = MODELS[name]
    for ratio, gigabytes in zip((0.0, 0.25, 0.5), expected):
        got = estimate_memory(hf, ratio)
        assert got.total_bytes / 1e9 == pytest.approx(gigabytes, abs=0.051)
        assert got.total_bytes == got.expert_bytes + got.other_bytes
        assert got.expert_bytes == (1 - ratio) * estimate_memory(hf).expert_bytes


def test_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert estimate_memory(source, 0.5) == estimate_memory(MIXTRAL, 0.5)
    with pytest.raises(FileNotFoundError):
        estimate_memory(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        estimate_memory(tmp_path)


def test_wrong_configurations():
    with pytest.raises(ValueError, match="no MoE layers found"):
        estimate_memory(config("llama", (100, 64, 128, 2, 4)))
    dense = dict(MODELS["DeepSeek-V2-Lite"][0], first_k_dense_replace=27)
    with pytest.raises(ValueError, match="no MoE layers found"):
        estimate_memory(dense)
    with pytest.raises(NotImplementedError, match="mamba"):
        estimate_memory(dict(MIXTRAL, model_type="mamba"))
    with pytest.raises(KeyError, match="kv_lora_rank"):
        estimate_memory({key: value for key, value in dense.items() if key != "kv_lora_rank"})
    for ratio in (-0.1, 0.6, 0.01):
        with pytest.raises(ValueError, match="ratio"):
            estimate_memory(MIXTRAL, ratio)
