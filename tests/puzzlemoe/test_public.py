import dataclasses
import inspect

import pytest

from jaxlab import puzzlemoe
from jaxlab.puzzlemoe import baselines


def test_names():
    assert sorted(puzzlemoe.__all__) == dir(puzzlemoe)
    for name in puzzlemoe.__all__:
        assert inspect.getdoc(getattr(puzzlemoe, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        puzzlemoe.no_such_name  # noqa: B018


def test_contract():
    """Positional parameters, then keyword-only ones behind the star, as section 10 of the spec has them."""
    expected = {
        puzzlemoe.expert_stats: "x gate up expert_ids * act",
        puzzlemoe.expert_norms: "layer_stats norm",
        puzzlemoe.random_pairs: "key num_experts ratio",
        puzzlemoe.search_pairs: "key layer x layer_stats cfg * steps",
        puzzlemoe.similarity_mask: "w_i w_j tau",
        puzzlemoe.dual_mask_merge: "w_i w_j n_i n_j * tau axis",
        puzzlemoe.reconstruct: "pair pos",
        puzzlemoe.pack_pair: "pair * underflow checked",
        puzzlemoe.unpack: "words pos dtype",
        puzzlemoe.exponent_histogram: "tree",
        puzzlemoe.quantize_pair: "pair * bits group_size axis",
        puzzlemoe.dequantize_pair: "q pos",
        puzzlemoe.compress_experts: "gate up down layer_stats pairs cfg",
        puzzlemoe.apply_moe_layer: "layer x",
        puzzlemoe.estimate_memory: "hf_config ratio",
        puzzlemoe.collect_expert_stats: "model params batches",
        puzzlemoe.load_hf_moe: "path * dtype",
        puzzlemoe.compress_moe: "model params stats cfg * pairs",
        puzzlemoe.unpack_moe: "model params",
        puzzlemoe.packed_entropy: "words",
        puzzlemoe.quantize_experts: "packed * bits group_size",
        puzzlemoe.quantize_moe: "model params * bits group_size",
        puzzlemoe.compress_checkpoint: "model_dir out_dir cfg * calib pairs bits",
        puzzlemoe.save_packed: "path model params report * format",
        baselines.apply_method: "name model params batches * ratio seed",
        baselines.hc_labels: "features num_groups * linkage",
        baselines.naee_search: "layer x num_drop",
        baselines.wanda_mask: "weight n * sparsity pattern",
        **dict.fromkeys(baselines.METHODS.values(), "layer x layer_stats target_experts * pairs seed"),
    }
    for function, words in expected.items():
        positional, _, keyword = words.partition(" * ")
        parameters = inspect.signature(function).parameters.values()
        kinds = {name: kind is inspect.Parameter.KEYWORD_ONLY for name, kind in ((p.name, p.kind) for p in parameters)}
        assert [name for name, alone in kinds.items() if not alone] == positional.split(), function
        assert [name for name, alone in kinds.items() if alone] == keyword.split(), function
    fields = {
        puzzlemoe.ExpertStats: "sum_sq_in sum_sq_mid tokens calls",
        puzzlemoe.MergedPair: "mag mask_i mask_j sign_i sign_j",
        puzzlemoe.PackedExperts: (
            "gate up down slot_of pos_of dense_gate dense_up dense_down scale_gate scale_up scale_down"
        ),
        puzzlemoe.MoELayer: "router gate up down top_k norm_topk_prob act",
        puzzlemoe.MemoryEstimate: "total_bytes expert_bytes other_bytes",
        puzzlemoe.CompressionReport: (
            "bytes_before bytes_after expert_bytes_before expert_bytes_after pairs mask_density sim_fraction rel_mse "
            "exponent_coverage warnings"
        ),
        puzzlemoe.PuzzleConfig: "ratio tau norm pairing seed underflow unmerged min_tokens",
    }
    for struct, names in fields.items():
        assert [field.name for field in dataclasses.fields(struct)] == names.split()
