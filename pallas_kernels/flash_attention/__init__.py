"""Softmax attention without stored logits: causal, windowed, packed segments, grouped-query heads."""

from pallas_kernels.flash_attention.api import flash_attention

__all__ = ["flash_attention"]
