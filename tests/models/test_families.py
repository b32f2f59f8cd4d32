import dataclasses
import json

import pytest

from benchmarks.parity import PEERS
from jaxlab.models.decoder import DecoderConfig, MoESpec, RopeConfig
from jaxlab.models.decoder.families import FAMILIES
from tests.models.checkpoints import golden

BASE = DecoderConfig(100, 32, 64, 3, 4, 2)
SPARSE = dataclasses.replace(BASE, model_type="qwen3_moe", qk_norm="head", moe=MoESpec(8, 2, 16))


@pytest.mark.latest
@pytest.mark.parametrize("name", sorted(PEERS))
def test_what_is_read_is_written(name, tmp_path):
    config = DecoderConfig.from_hf(golden(name)["config"])
    assert DecoderConfig.from_hf(config.to_hf()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(tmp_path) == DecoderConfig.from_hf(str(tmp_path / "config.json")) == config


# The config.json of published models, shortened to the fields that say something.
PUBLISHED = {
    "Llama-3.2-1B": (
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
         "attention_bias": False, "hidden_act": "silu", "mlp_bias": False,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        lambda c: c.rope == RopeConfig(5e5, "llama3", 32.0, 8192) and c.tie_word_embeddings and c.windows is None),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "max_position_embeddings": 32768, "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "use_mrope": False},
        lambda c: c.qkv_bias and c.windows is None and c.head_dim == 64 and c.rope.rope_theta == 1e6),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
         "num_experts": 128, "num_experts_per_tok": 8, "sliding_window": None, "use_sliding_window": False,
         "max_window_layers": 48, "rope_theta": 1000000.0},
        lambda c: c.moe == MoESpec(128, 8, 768, renormalise=True) and c.qk_norm == "head"),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        lambda c: c.windows == (4096,) * 32),
    "deepseek-moe-16b": (
        {"model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1,
         "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
         "norm_topk_prob": False, "num_experts_per_tok": 6, "scoring_func": "softmax", "rope_scaling": None,
         "rms_norm_eps": 1e-6, "rope_theta": 10000, "aux_loss_alpha": 0.001, "max_position_embeddings": 4096},
        lambda c: c.moe == MoESpec(64, 6, 1408, shared_ffn_size=2816, sparse_layers=tuple(range(1, 28)))
        and [run.sparse for run in c.layer_runs()] == [False, True]),
    "Qwen2.5-VL text": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
         "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
         "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0},
        lambda c: c.rope == RopeConfig(1e6, mrope_section=(16, 24, 24))),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations(name):
    hf, holds = PUBLISHED[name]
    config = DecoderConfig.from_hf(hf)
    assert holds(config)
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_transformers_reads_what_is_written():
    transformers = pytest.importorskip("transformers")
    hf = PUBLISHED["Llama-3.2-1B"][0]
    config = transformers.LlamaConfig.from_dict(DecoderConfig.from_hf(hf).to_hf() | {"torch_dtype": "float32"})
    assert config.rope_parameters == {**hf["rope_scaling"], "rope_theta": 5e5}
    assert config.head_dim == 64
    assert str(config.dtype).endswith("float32")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic': known types are default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        ({"model_type": "olmoe", "clip_qkv": 8.0, "num_experts": 4, "num_experts_per_tok": 2}, "clip_qkv=8.0"),
        ({"model_type": "llama4"}, "'llama4': known families are"),
        ({"model_type": None}, "known families are"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes, said):
    with pytest.raises(NotImplementedError, match=said):
        DecoderConfig.from_hf(BASE.to_hf() | changes)


def test_missing_sizes_are_listed():
    hf = BASE.to_hf()
    del hf["hidden_size"], hf["vocab_size"]
    with pytest.raises(KeyError, match=r"\['vocab_size', 'hidden_size'\]"):
        DecoderConfig.from_hf(hf)
    hf = SPARSE.to_hf()
    del hf["moe_intermediate_size"]
    with pytest.raises(KeyError, match="moe_intermediate_size"):
        DecoderConfig.from_hf(hf)


def test_what_a_family_cannot_say_is_refused():
    with pytest.raises(ValueError, match=r"'llama' cannot express qkv_bias=True; families that can: qwen2"):
        dataclasses.replace(BASE, qkv_bias=True).to_hf()
    with pytest.raises(ValueError, match=r"cannot express moe=.*can: deepseek"):
        dataclasses.replace(BASE, moe=MoESpec(4, 2, 8, shared_ffn_size=16)).to_hf()
    with pytest.raises(ValueError, match="no known family can"):
        dataclasses.replace(SPARSE, moe=MoESpec(8, 2, 16, scoring="sigmoid")).to_hf()
    windows = dataclasses.replace(BASE, model_type="qwen2", qkv_bias=True, windows=(None, 8, 8))
    assert DecoderConfig.from_hf(windows.to_hf()) == windows
    with pytest.raises(NotImplementedError, match="'gpt2'"):
        dataclasses.replace(BASE, model_type="gpt2").to_hf()
    assert set(FAMILIES) >= {"llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size must be 1 to 2147483648, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads=4, got 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"qk_norm": "both"}, "qk_norm must be"),
        ({"remat": "all"}, "remat must be"),
        ({"dtype": "fp32"}, "dtype must be one of"),
        ({"windows": (None, 3)}, "windows must be one positive width or None for each of the 3 layers"),
        ({"windows": (0, 1, 2)}, "windows must be"),
        ({"moe": {"sparse_layers": (3,)}}, r"moe.sparse_layers must be distinct layers in 0..2"),
        ({"moe": {"top_k": 9}}, "moe.top_k must be in 1..8, got 9"),
        ({"moe": {"scoring": "relu"}}, "moe.scoring"),
        ({"moe": {"shared_gate": True}}, "moe.shared_gate needs a shared expert"),
        ({"rope": {"rope_theta": 0.0}}, "rope.rope_theta must be positive"),
        ({"rope": {"factor": 0.5}}, "rope.factor must be at least 1"),
        ({"rope": {"mrope_section": (1, 1, 1)}}, "rope.mrope_section must be three counts that sum to head_dim / 2"),
    ],
)
def test_impossible_configurations(changes, said):
    moe, rope = changes.pop("moe", None), changes.pop("rope", None)
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(
            BASE,
            **changes,
            **({"moe": MoESpec(**{"num_experts": 8, "top_k": 2, "ffn_size": 16} | moe)} if moe else {}),
            **({"rope": RopeConfig(**rope)} if rope else {}),
        )


def test_filled_in_and_hashable():
    config = dataclasses.replace(BASE, head_dim=None, rms_norm_eps=1, windows=(4, None, 4), rope=RopeConfig(10000))
    assert config.head_dim == 8
    assert isinstance(config.rms_norm_eps, float)
    assert isinstance(config.rope.rope_theta, float)
    assert hash(config) == hash(dataclasses.replace(config))
    assert [tuple(run) for run in config.layer_runs()] == [(0, 1, False, 4), (1, 2, False, None), (2, 3, False, 4)]
    assert dataclasses.replace(BASE, windows=(None, None, None)).windows is None
    scaled = dataclasses.replace(BASE, rope=RopeConfig(rope_type="yarn", factor=2.0))
    assert scaled.rope.original_max_position_embeddings == BASE.max_position_embeddings
