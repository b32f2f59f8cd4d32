"""Weights laid out for decoding on a CPU.

A decode step multiplies a handful of rows with every weight, so it costs what reading the weights costs. The stored
tree loses twice there: a scan over stacked layers copies each layer out before use, and XLA's CPU products of few rows
read `[in, out]` matrices at about half the speed of `[out, in]`. `decode_params` makes, once, one tree for each layer
with transposed kernels, q, k and v joined and gate and up joined, and the embedding as the head where they are tied;
`Decoder` accepts both forms.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.models.decoder import Decoder, MoEPolicy, default_mlp


def decode_params(model: Any, params: Any) -> Any:
    """The parameters as a CPU decodes fastest; elsewhere, sharded, or of another network, `params` itself.

    It costs one pass over the weights and, embeddings aside, their memory again. `generate` does it by itself; an
    engine, or a caller of many short generations, does it once and passes the result wherever params go.

    Args:
        model: the decoder.
        params: its parameters; in the decode form already, they come back as they are.
    """
    leaves = jax.tree.leaves(params)
    local = all(
        isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and len(leaf.devices()) == 1
        for leaf in leaves
    )
    if not isinstance(model, Decoder) or not local or is_decode_form(params):
        return params
    if any(device.platform != "cpu" for leaf in leaves for device in leaf.devices()):
        return params
    changed = {name: params[name] for name in params if name.startswith("blocks_") or name == "head"}
    tied = {} if "head" in params else {"head": {"kernel_t": params["embed"]["embedding"]}}
    return {**params, **tied, **_lay_out(model, changed)}


def is_decode_form(params: Any) -> bool:
    """Whether `decode_params` made this tree."""
    return "layer_0" in params.get("blocks_0", {})


@jax.jit(static_argnums=0)
def _lay_out(model: Decoder, params: Any) -> Any:
    laid_out = {}
    for name, tree in params.items():
        if name == "head":
            laid_out[name] = _transposed(tree)
            continue
        layers = tree["attn_norm"]["scale"].shape[0]
        laid_out[name] = {
            f"layer_{index}": _layer(model, jax.tree.map(lambda leaf: leaf[index], tree))  # noqa: B023
            for index in range(layers)
        }
    return laid_out


def _layer(model: Decoder, tree: Any) -> Any:
    attn = dict(tree["attn"])
    attn["qkv"] = _joined(*(attn.pop(name) for name in "qkv"))
    attn["o"] = _transposed(attn["o"], in_axes=2)
    mlp = tree["mlp"]
    if (model.mlp is default_mlp or isinstance(model.mlp, MoEPolicy)) and "router" not in mlp:
        mlp = {"gate_up": _joined(mlp["gate"], mlp["up"]), "down": _transposed(mlp["down"])}
    return {**tree, "attn": attn, "mlp": mlp}


def _transposed(linear: Any, in_axes: int = 1) -> Any:
    kernel = linear["kernel"]
    flat = kernel.reshape(math.prod(kernel.shape[:in_axes]), -1)
    return {"kernel_t": flat.T} | {name: leaf for name, leaf in linear.items() if name != "kernel"}


def _joined(*linears: Any) -> Any:
    joined = {"kernel_t": jnp.concatenate([_transposed(linear)["kernel_t"] for linear in linears])}
    if "bias" in linears[0]:
        joined["bias"] = jnp.concatenate([linear["bias"] for linear in linears])
    return joined
