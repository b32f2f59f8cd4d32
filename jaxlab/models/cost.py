"""What a decoder costs: parameters, FLOPs, cache bytes, and model FLOPs utilisation.

A multiply-add is two FLOPs. Only matrix products count (projections, attention, experts that run, router, head), as in
the PaLM paper's MFU (arXiv:2204.02311, appendix B), but with the keys that a causal query really sees: about half of
that paper's attention term. Training is three times the forward pass; recomputation (`remat`) is not model FLOPs.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxlab.models.decoder.config import DecoderConfig

PEAK_BF16_FLOPS = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "gh200": 989e12,
    "b200": 2250e12,
    "mi250x": 383e12,
}
"""Dense bfloat16 FLOP/s of one package, from the makers' data sheets (H100 and later: SXM, without sparsity)."""


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: all of them.
        active: those that one token meets: top_k of the experts, everything else.
        embedding: of `total`, the embedding and an untied head.
    """

    total: int
    active: int
    embedding: int


class Flops(NamedTuple):
    """Matrix-product FLOPs by place."""

    projections: float
    attention: float
    mlp: float
    router: float
    head: float

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(self))


def parameter_count(config: DecoderConfig) -> ParameterCount:
    """Counts the parameters of a decoder without building it."""
    d, dim, heads, kv_heads = _sizes(config)
    layer = _projection_weights(config) + 2 * d
    if config.qkv_bias:
        layer += (heads + 2 * kv_heads) * dim
    if config.qk_norm:
        layer += 2 * dim if config.qk_norm == "head" else (heads + kv_heads) * dim
    embedding = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    total = active = embedding + d + layer * config.num_hidden_layers
    for run in config.layer_runs():
        layers = run.stop - run.start
        total += layers * (_mlp_weights(config, run.sparse, every=True) + _router_weights(config, run.sparse))
        active += layers * (_mlp_weights(config, run.sparse, every=False) + _router_weights(config, run.sparse))
    return ParameterCount(total, active, embedding)


def forward_flops(config: DecoderConfig, stop: int, *, start: int = 0, causal: bool = True) -> Flops:
    """FLOPs of one forward pass over the tokens at positions start..stop-1 of a sequence.

    `forward_flops(config, prompt)` is a prefill, `forward_flops(config, p + 1, start=p)` one decode step.

    Args:
        config: of the decoder.
        stop: position after the last token.
        start: position of the first token; earlier ones are in the cache.
        causal: count the keys that a query sees; False counts all `stop` keys (what an implementation that masks
            instead of skipping executes).

    Raises:
        ValueError: not 0 <= start < stop.
    """
    if not 0 <= start < stop:
        raise ValueError(f"start and stop: expected 0 <= start < stop, got start={start}, stop={stop}")
    tokens = stop - start
    _, dim, heads, _ = _sizes(config)
    attention = mlp = router = 0
    for run in config.layer_runs():
        layers = run.stop - run.start
        keys = _visible(start, stop, run.window) if causal else tokens * stop
        attention += layers * 2 * 2 * heads * dim * keys
        mlp += layers * 2 * tokens * _mlp_weights(config, run.sparse, every=False)
        router += layers * 2 * tokens * _router_weights(config, run.sparse)
    projections = 2 * tokens * config.num_hidden_layers * _projection_weights(config)
    head = 2 * tokens * config.vocab_size * config.hidden_size
    return Flops(float(projections), float(attention), float(mlp), float(router), float(head))


def flops_per_token(config: DecoderConfig, length: int, *, training: bool = False, causal: bool = True) -> float:
    """Mean FLOPs of a token in a sequence of `length`: forward, or with `training` forward and backward.

    Args:
        config: of the decoder.
        length: tokens in the sequence.
        training: three times the forward pass.
        causal: see `forward_flops`.
    """
    return forward_flops(config, length, causal=causal).total / length * (3 if training else 1)


def kv_cache_bytes(config: DecoderConfig, batch: int, length: int, dtype: str | None = None) -> int:
    """Bytes of the keys and values of `batch` rows of `length` slots; dtype None is the model's."""
    itemsize = jnp.dtype(dtype or config.dtype).itemsize
    _, dim, _, kv_heads = _sizes(config)
    return 2 * config.num_hidden_layers * batch * length * kv_heads * dim * itemsize


def mfu(config: DecoderConfig, tokens_per_s: float, length: int, *, peak_flops: float, devices: int = 1) -> float:
    """Model FLOPs utilisation of training: achieved over possible, 0..1.

    Args:
        config: of the decoder.
        tokens_per_s: of all devices together.
        length: of the training sequences.
        peak_flops: FLOP/s of one device in the dtype of the products, such as `PEAK_BF16_FLOPS["h100"]`.
        devices: how many.
    """
    return tokens_per_s * flops_per_token(config, length, training=True) / (peak_flops * devices)


def _sizes(config: DecoderConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.head_dim or 0, config.num_attention_heads, config.num_key_value_heads


def _projection_weights(config: DecoderConfig) -> int:
    d, dim, heads, kv_heads = _sizes(config)
    return 2 * d * dim * (heads + kv_heads)


def _mlp_weights(config: DecoderConfig, sparse: bool, *, every: bool) -> int:
    """Weights of the MLPs of one layer: of every expert, or of those that a token meets."""
    d, moe = config.hidden_size, config.moe
    if not sparse or moe is None:
        return 3 * d * config.intermediate_size
    experts = moe.num_experts if every else moe.top_k
    matrices = 3 if moe.activation == "swiglu" else 2
    return d * (matrices * experts * moe.ffn_size + 3 * moe.shared_ffn_size) + (d if moe.shared_gate else 0)


def _router_weights(config: DecoderConfig, sparse: bool) -> int:
    return config.hidden_size * config.moe.num_experts if sparse and config.moe is not None else 0


def _visible(start: int, stop: int, window: int | None) -> int:
    """Keys seen by the queries at start..stop-1, the query's own position included."""

    def up_to(count: int) -> int:  # by queries 0..count-1
        if window is None or count <= window:
            return count * (count + 1) // 2
        return window * (window + 1) // 2 + (count - window) * window

    return up_to(stop) - up_to(start)
