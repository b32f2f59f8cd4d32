"""Where the stored tensors of each decoder family go in the parameter tree, and which names a file may use."""

import re
from collections.abc import Container
from typing import NamedTuple

from jaxlab.models.decoder.config import DecoderConfig, LayerRun
from jaxlab.models.load import Leaf, Part


class _Names(NamedTuple):
    """Names of the sparse MLP inside `model.layers.N.`."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"


_MIXTRAL = _Names("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")
_DEEPSEEK = _Names(shared="mlp.shared_experts")
_SPARSE_NAMES = {"mixtral": _MIXTRAL, "deepseek": _DEEPSEEK}


def decoder_table(config: DecoderConfig, stored: Container[str] = ()) -> list[Leaf]:
    """The key table of a decoder in Hugging Face's names.

    Args:
        config: of the decoder.
        stored: the names a file holds. Experts are stored one by one (what every hub has) or fused as
            `mlp.experts.gate_up_proj [E, 2F, D]` (gate first) and `down_proj [E, D, F]`; the file decides.

    Returns:
        A leaf for each parameter, in the order of the layers.
    """
    d, v = config.hidden_size, config.vocab_size
    table = [_plain("embed/embedding", (v, d), "model.embed_tokens.weight")]
    for index, run in enumerate(config.layer_runs()):
        table += _attention(config, run, f"blocks_{index}")
        table += (_sparse if run.sparse else _dense)(config, run, f"blocks_{index}", stored)
    table.append(_plain("final_norm/scale", (d,), "model.norm.weight"))
    if not config.tie_word_embeddings:
        table.append(Leaf("head/kernel", (d, v), (Part("lm_head.weight"),), (v, d), transpose=True))
    return table


def ignorable(config: DecoderConfig, name: str) -> bool:
    """Names that carry nothing: rotary buffers of old files, and the head of a model whose head is the embedding."""
    return bool(re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name)) or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def _plain(path: str, shape: tuple[int, ...], name: str) -> Leaf:
    return Leaf(path, shape, (Part(name),), shape)


def _stacked(
    run: LayerRun, path: str, name: str, piece: tuple[int, ...], stored: tuple[int, ...], transpose: bool = False
) -> Leaf:
    parts = tuple(Part(f"model.layers.{layer}.{name}", (layer - run.start,)) for layer in range(run.start, run.stop))
    return Leaf(path, (run.stop - run.start, *piece), parts, stored, transpose)


def _attention(config: DecoderConfig, run: LayerRun, block: str) -> list[Leaf]:
    d, dim = config.hidden_size, config.head_dim or 0
    leaves = [
        _stacked(run, f"{block}/attn_norm/scale", "input_layernorm.weight", (d,), (d,)),
        _stacked(run, f"{block}/mlp_norm/scale", "post_attention_layernorm.weight", (d,), (d,)),
    ]
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for name, count in heads.items():
        path, stored = f"{block}/attn/{name}", f"self_attn.{name}_proj"
        kernel = _stacked(run, f"{path}/kernel", f"{stored}.weight", (d, count, dim), (count * dim, d), transpose=True)
        leaves.append(kernel)
        if config.qkv_bias:
            leaves.append(_stacked(run, f"{path}/bias", f"{stored}.bias", (count, dim), (count * dim,)))
        if config.qk_norm and name != "v":
            width = dim if config.qk_norm == "head" else count * dim
            norm = _stacked(run, f"{path}_norm/scale", f"self_attn.{name}_norm.weight", (width,), (width,))
            leaves.append(norm)
    h = config.num_attention_heads
    o = _stacked(run, f"{block}/attn/o/kernel", "self_attn.o_proj.weight", (h, dim, d), (d, h * dim), transpose=True)
    return [*leaves, o]


def _linear(run: LayerRun, path: str, name: str, shape: tuple[int, int]) -> Leaf:
    return _stacked(run, f"{path}/kernel", f"{name}.weight", shape, shape[::-1], transpose=True)


def _gated(run: LayerRun, path: str, name: str, d: int, f: int) -> list[Leaf]:
    return [
        _linear(run, f"{path}/gate", f"{name}.gate_proj", (d, f)),
        _linear(run, f"{path}/up", f"{name}.up_proj", (d, f)),
        _linear(run, f"{path}/down", f"{name}.down_proj", (f, d)),
    ]


def _dense(config: DecoderConfig, run: LayerRun, block: str, stored: Container[str]) -> list[Leaf]:
    return _gated(run, f"{block}/mlp", "mlp", config.hidden_size, config.intermediate_size)


def _sparse(config: DecoderConfig, run: LayerRun, block: str, stored: Container[str]) -> list[Leaf]:
    moe, d, path = config.moe, config.hidden_size, f"{block}/mlp"
    assert moe is not None
    names = _SPARSE_NAMES.get(config.model_type, _Names())
    fused = f"model.layers.{run.start}.mlp.experts.gate_up_proj" in stored
    if fused:
        names = names._replace(router="mlp.gate")
    e, f = moe.num_experts, moe.ffn_size
    leaves = [_linear(run, f"{path}/router", names.router, (d, e))]
    for ours, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
        parts = tuple(
            _fused_expert(layer, expert, run, ours, (e, d, f))
            if fused
            else Part(
                f"model.layers.{layer}.{names.experts}.{expert}.{getattr(names, ours)}.weight",
                (layer - run.start, expert),
            )
            for layer in range(run.start, run.stop)
            for expert in range(e)
        )
        leaf = Leaf(f"{path}/{ours}", (run.stop - run.start, e, *shape), parts, shape[::-1], transpose=True)
        leaves.append(leaf)
    if moe.shared_ffn_size:
        leaves += _gated(run, f"{path}/shared", names.shared, d, moe.shared_ffn_size)
    if moe.shared_gate:
        leaves.append(_linear(run, f"{path}/shared_gate", names.shared_gate, (d, 1)))
    return leaves


def _fused_expert(layer: int, expert: int, run: LayerRun, ours: str, sizes: tuple[int, int, int]) -> Part:
    e, d, f = sizes
    name = f"model.layers.{layer}.mlp.experts.{'down_proj' if ours == 'down' else 'gate_up_proj'}"
    file_shape = (e, d, f) if ours == "down" else (e, 2 * f, d)
    rows = {"gate": slice(0, f), "up": slice(f, 2 * f), "down": slice(0, d)}[ours]
    return Part(name, (layer - run.start, expert), (slice(expert, expert + 1), rows), file_shape)
