"""Bytes of model states as DeepSpeed's documentation counts them, and parameters of a GPT by its list of arrays."""

import math


def zero2(params, *, offload, per_node, nodes):
    """(device, host of a node): 16-bit weights whole; with offload the host has 16 bytes, or 4 a device if more."""
    devices = per_node * nodes
    if offload:
        return 2 * params, params * max(4 * devices, 16)
    return 2 * params + 18 * params // devices, 4 * params * per_node


def zero3(params, largest, *, optimizer, weights, per_node, nodes):
    """(device, host of a node): everything partitioned, the largest layer gathered."""
    devices = per_node * nodes
    if optimizer and weights:
        return 4 * largest, 18 * params // nodes
    if optimizer:
        return 4 * largest + 2 * params // devices, 16 * params // nodes
    return 4 * largest + 18 * params // devices, 4 * largest * per_node


def gpt_params(layers, hidden, vocab):
    """Sizes of every array of a GPT-2 without positions."""
    norm = [(hidden,), (hidden,)]
    attention = [(hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    mlp = [(hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    arrays = [(vocab, hidden), *norm, *(layers * (2 * norm + attention + mlp))]
    return sum(map(math.prod, arrays))
