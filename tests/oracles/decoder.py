"""The whole decoder in float64 numpy, one token and one head at a time where that is clearer."""

import numpy as np

from tests.oracles.attention import attention


def decoder(config, params, tokens, *, segment_ids=None, positions=None):
    """Logits [B,T,V] of the decoder without a cache, default rope."""
    tree = _to_float64(params)
    tokens = np.asarray(tokens)
    if positions is None:
        positions = _positions(tokens, segment_ids)
    x = tree["embed"]["embedding"][tokens]
    for index, run in enumerate(config.layer_runs()):
        for layer in range(run.stop - run.start):
            x = _block(config, run, _layer(tree[f"blocks_{index}"], layer), x, positions, segment_ids)
    x = _norm(x, tree["final_norm"]["scale"], config.rms_norm_eps)
    return x @ (tree["embed"]["embedding"].T if config.tie_word_embeddings else tree["head"]["kernel"])


def _to_float64(tree):
    if isinstance(tree, dict):
        return {name: _to_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _layer(tree, index):
    return {name: _layer(leaf, index) if isinstance(leaf, dict) else leaf[index] for name, leaf in tree.items()}


def _positions(tokens, segment_ids):
    positions = np.zeros(tokens.shape, int)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            same = segment_ids is None or segment_ids[b, t] == segment_ids[b, t - 1]
            positions[b, t] = positions[b, t - 1] + 1 if same else 0
    return positions


def _norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _rotate(x, positions, theta):
    """Pairs (i, i + half) as complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _silu(x):
    return x / (1 + np.exp(-x))


def _block(config, run, layer, x, positions, segment_ids):
    y = _norm(x, layer["attn_norm"]["scale"], config.rms_norm_eps)
    heads = {}
    for name in "qkv":
        heads[name] = np.einsum("btd,dhk->bthk", y, layer["attn"][name]["kernel"])
        if "bias" in layer["attn"][name]:
            heads[name] = heads[name] + layer["attn"][name]["bias"]
    for name in "qk":
        if config.qk_norm == "head":
            heads[name] = _norm(heads[name], layer["attn"][f"{name}_norm"]["scale"], config.rms_norm_eps)
        elif config.qk_norm == "full":
            flat = heads[name].reshape(*y.shape[:2], -1)
            flat = _norm(flat, layer["attn"][f"{name}_norm"]["scale"], config.rms_norm_eps)
            heads[name] = flat.reshape(heads[name].shape)
        heads[name] = _rotate(heads[name], positions, config.rope.rope_theta)
    out = attention(heads["q"], heads["k"], heads["v"], q_segments=segment_ids, window=run.window)
    x = x + np.einsum("bthk,hkd->btd", out, layer["attn"]["o"]["kernel"])
    y = _norm(x, layer["mlp_norm"]["scale"], config.rms_norm_eps)
    return x + (sparse_mlp(config.moe, layer["mlp"], y) if run.sparse else _gated(layer["mlp"], y))


def _gated(tree, x):
    gate, up, down = (tree[name]["kernel"] for name in ("gate", "up", "down"))
    return (_silu(x @ gate) * (x @ up)) @ down


def sparse_mlp(moe, tree, x):
    """Every token visits its k best experts, one after the other."""
    flat = x.reshape(-1, x.shape[-1])
    y = np.zeros_like(flat)
    for index, token in enumerate(flat):
        logits = token @ tree["router"]["kernel"]
        scores = 1 / (1 + np.exp(-logits)) if moe.scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-scores, kind="stable")[: moe.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if moe.renormalise else 1.0) * moe.scale
        for expert, weight in zip(chosen, weights):
            inner = _silu(token @ tree["gate"][expert]) * (token @ tree["up"][expert])
            y[index] += weight * (inner @ tree["down"][expert])
        if moe.shared_ffn_size:
            shared = _gated(tree["shared"], token)
            if moe.shared_gate:
                shared = shared / (1 + np.exp(-(token @ tree["shared_gate"]["kernel"])))
            y[index] += shared
    return y.reshape(x.shape)
