"""A whole mixture-of-experts layer in float64 numpy, slot by slot, and its gradient by central differences."""

import math

import numpy as np


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activation(x, name):
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * sigmoid(x)


def route(logits, top_k, *, combine="softmax", drop="none", factor=1.25, min_capacity=4, selection_bias=None):
    """Dictionary of expert_ids, weights, keep `[S,k]`, aux_loss, z_loss, capacity (None if dropless)."""
    logits = np.asarray(logits, np.float64)
    tokens, experts = logits.shape
    if combine in ("sigmoid", "sigmoid_scores"):
        scores = sigmoid(logits)
        probs = scores / scores.sum(axis=1, keepdims=True)
        choose = scores + (0 if selection_bias is None else np.asarray(selection_bias, np.float64))
    else:
        probs = softmax(logits)
        scores, choose = (logits if combine == "logits" else probs), probs

    ids = np.array([sorted(range(experts), key=lambda e: (-choose[t, e], e))[:top_k] for t in range(tokens)])
    ids = ids.reshape(tokens, top_k).astype(int)
    capacity = None
    keep = np.ones((tokens, top_k), bool)
    if drop != "none":
        capacity = max(min_capacity, math.ceil(tokens / experts * factor * top_k))
        for e in range(experts):
            slots = [(t, j) for t in range(tokens) for j in range(top_k) if ids[t, j] == e]
            if drop == "probs":
                slots = sorted(slots, key=lambda slot: -scores[slot[0], e])  # sorted() is stable
            for t, j in slots[capacity:]:
                keep[t, j] = False

    weights = np.zeros((tokens, top_k))
    for t in range(tokens):
        for j in range(top_k):
            weights[t, j] = scores[t, ids[t, j]] if keep[t, j] else 0.0
        if combine in ("softmax_renorm", "sigmoid"):
            weights[t] /= max(weights[t].sum(), np.finfo(np.float32).eps)
    mask = np.zeros((tokens, experts))
    np.put_along_axis(mask, ids, 1.0, axis=1)
    aux_loss = z_loss = 0.0
    if tokens:
        aux_loss = np.mean(probs.mean(axis=0) * mask.mean(axis=0)) * experts**2 / top_k
        z_loss = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    return {
        "expert_ids": ids,
        "weights": weights,
        "keep": keep,
        "aux_loss": aux_loss,
        "z_loss": z_loss,
        "capacity": capacity,
    }


def expert(x, gate, up, down, name="swiglu"):
    """One token through one expert; `gate` is None for two matrices."""
    inner = activation(x @ up, name) if gate is None else activation(x @ gate, "silu") * (x @ up)
    return inner @ down


def layer(params, x, top_k, *, name="swiglu", weight_scale=1.0, **routing):
    """y `[S,H]` and the routing of a layer with the parameter tree of `jaxlab.xmoe.MoE`."""
    x = np.asarray(x, np.float64)
    tree = _float64(params)
    routed = route(x @ tree["router"]["kernel"], top_k, **routing)
    y = np.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(top_k):
            e = routed["expert_ids"][t, j]
            if routed["keep"][t, j]:
                gate = tree["gate"][e] if "gate" in tree else None
                y[t] += (
                    weight_scale * routed["weights"][t, j] * expert(x[t], gate, tree["up"][e], tree["down"][e], name)
                )
        if "shared" in tree:
            shared = expert(x[t], *(tree["shared"][part]["kernel"] for part in ("gate", "up", "down")))
            if "shared_gate" in tree:
                shared = shared * sigmoid(x[t] @ tree["shared_gate"]["kernel"])
            y[t] += shared
    return y, routed


def gradient(value, tree, step=1e-5):
    """The gradient of value(tree) by central differences, number by number, as a tree."""
    tree = _float64(tree)

    def of_leaf(leaf):
        grad = np.zeros_like(leaf)
        for at in np.ndindex(leaf.shape):
            middle = leaf[at]
            leaf[at] = middle + step
            above = value(tree)
            leaf[at] = middle - step
            grad[at] = (above - value(tree)) / (2 * step)
            leaf[at] = middle
        return grad

    def of_tree(node):
        return {name: of_tree(child) for name, child in node.items()} if isinstance(node, dict) else of_leaf(node)

    return of_tree(tree)


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(leaf) for name, leaf in tree.items()}
    return np.array(tree, np.float64)
