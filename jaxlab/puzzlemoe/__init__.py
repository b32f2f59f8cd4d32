"""PuzzleMoE (arXiv:2511.04805): two experts of a trained mixture of experts in the space of one, without training.

A pair keeps one magnitude tensor, and for each expert signs and masks in bits that bfloat16 exponents leave free.

Example:
    import jax
    from jaxlab.puzzlemoe import PuzzleConfig, compress_experts, expert_stats, random_pairs, unpack

    keys = jax.random.split(jax.random.key(0), 5)
    gate, up = (0.02 * jax.random.normal(k, (8, 64, 128)) for k in keys[:2])
    down, x = 0.02 * jax.random.normal(keys[2], (8, 128, 64)), jax.random.normal(keys[3], (256, 64))
    stats = expert_stats(x, gate, up, jax.random.randint(keys[4], (256, 2), 0, 8))
    pairs = random_pairs(jax.random.key(1), 8, ratio=0.5)
    packed = compress_experts(gate, up, down, stats, pairs, PuzzleConfig())
    first_member_of_slot_0 = unpack(packed.gate[0], 0)

`baselines` is a package of it. Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.puzzlemoe import baselines
    from jaxlab.puzzlemoe.bit_packing import PackedEntropy, exponent_histogram, pack_pair, packed_entropy, unpack
    from jaxlab.puzzlemoe.calibration import collect_expert_stats
    from jaxlab.puzzlemoe.compression import PackedExperts, compress_experts
    from jaxlab.puzzlemoe.config import PuzzleConfig
    from jaxlab.puzzlemoe.layer import MoELayer, apply_moe_layer
    from jaxlab.puzzlemoe.memory import MemoryEstimate, estimate_memory
    from jaxlab.puzzlemoe.merging import MergedPair, dual_mask_merge, reconstruct, similarity_mask
    from jaxlab.puzzlemoe.packed_moe import PackedMoE, PackedPolicy
    from jaxlab.puzzlemoe.pairing import random_pairs, search_pairs
    from jaxlab.puzzlemoe.quantization import QuantizedPair, dequantize_pair, quantize_pair
    from jaxlab.puzzlemoe.quantized_experts import quantize_experts
    from jaxlab.puzzlemoe.statistics import ExpertStats, expert_norms, expert_stats
    from jaxlab.puzzlemoe.storage import load_packed, save_packed
    from jaxlab.puzzlemoe.streaming import compress_checkpoint
    from jaxlab.puzzlemoe.whole_model import CompressionReport, compress_moe, load_hf_moe, quantize_moe, unpack_moe

__all__ = [
    "CompressionReport",
    "ExpertStats",
    "MemoryEstimate",
    "MergedPair",
    "MoELayer",
    "PackedEntropy",
    "PackedExperts",
    "PackedMoE",
    "PackedPolicy",
    "PuzzleConfig",
    "QuantizedPair",
    "apply_moe_layer",
    "baselines",
    "collect_expert_stats",
    "compress_checkpoint",
    "compress_experts",
    "compress_moe",
    "dequantize_pair",
    "dual_mask_merge",
    "estimate_memory",
    "expert_norms",
    "expert_stats",
    "exponent_histogram",
    "load_hf_moe",
    "load_packed",
    "pack_pair",
    "packed_entropy",
    "quantize_experts",
    "quantize_moe",
    "quantize_pair",
    "random_pairs",
    "reconstruct",
    "save_packed",
    "search_pairs",
    "similarity_mask",
    "unpack",
    "unpack_moe",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "bit_packing": ("PackedEntropy", "exponent_histogram", "pack_pair", "packed_entropy", "unpack"),
        "calibration": ("collect_expert_stats",),
        "compression": ("PackedExperts", "compress_experts"),
        "config": ("PuzzleConfig",),
        "layer": ("MoELayer", "apply_moe_layer"),
        "memory": ("MemoryEstimate", "estimate_memory"),
        "merging": ("MergedPair", "dual_mask_merge", "reconstruct", "similarity_mask"),
        "packed_moe": ("PackedMoE", "PackedPolicy"),
        "pairing": ("random_pairs", "search_pairs"),
        "quantization": ("QuantizedPair", "dequantize_pair", "quantize_pair"),
        "quantized_experts": ("quantize_experts",),
        "statistics": ("ExpertStats", "expert_norms", "expert_stats"),
        "storage": ("load_packed", "save_packed"),
        "streaming": ("compress_checkpoint",),
        "whole_model": ("CompressionReport", "compress_moe", "load_hf_moe", "quantize_moe", "unpack_moe"),
    },
    modules=("baselines",),
)
