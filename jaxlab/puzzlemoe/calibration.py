"""Calibration of a whole model: one forward pass, in which every sparse layer reports what its experts see."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlab.layers.linear import Linear
from jaxlab.models.decoder import Decoder, DecoderConfig, MoEPolicy
from jaxlab.puzzlemoe.statistics import ExpertStats, expert_stats
from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.moe import MoE
from jaxlab.xmoe.router import top_k_gating

ArrayLike = Array | np.ndarray


def collect_expert_stats(model: Any, params: Any, batches: Iterable[Int[ArrayLike, "b t"]]) -> ExpertStats:
    """Statistics of every sparse layer, from forward passes of the model as it is (paper: 128 x 2048 tokens of C4).

    The MLPs of the decoder are replaced, over the same parameters, by ones that report; no activation is stored, and
    all layers see the uncompressed model's activations.

    Args:
        model: a `Decoder` with experts.
        params: its parameters.
        batches: token ids; each batch is one call.

    Returns:
        Statistics with a leading L, the sparse layers in order.

    Raises:
        ValueError: the model has no experts or is packed already; no batches, or ids that are no tokens.
    """
    check_moe(model, params)
    recording = model.clone(mlp=Recording())
    total = None
    for tokens in batches:
        stats = _aux(recording, params, check_tokens(tokens, model.config))
        total = stats if total is None else total + stats
    if total is None:
        raise ValueError("batches must hold at least one batch of tokens, got none")
    return total


def layer_inputs(model: Any, params: Any, tokens: Int[ArrayLike, "b t"]) -> Float[Array, "l s d"]:
    """What every sparse layer takes, the rows of a batch joined."""
    return _aux(model.clone(mlp=Recording(inputs=True)), params, check_tokens(tokens, model.config))


@functools.partial(jax.jit, static_argnums=0)
def _aux(model: Decoder, params: Any, tokens: Array) -> Any:
    output: Any = model.apply({"params": params}, tokens)
    return jax.tree.map(lambda *runs: jnp.concatenate(runs), *output.aux.values())


@dataclasses.dataclass(frozen=True)
class Recording:
    """An MLP protocol: the default MLPs, whose sparse ones return `ExpertStats` (or their input rows) as aux."""

    inputs: bool = False

    def __call__(self, config: DecoderConfig, layer_is_sparse: bool) -> nn.Module:
        """The MLP of a layer."""
        if not layer_is_sparse:
            return MoEPolicy()(config, False)
        return _RecordingMoE(MoEPolicy().layer_config(config), config.dtype, self.inputs)


class _RecordingMoE(nn.Module):
    """`xmoe.MoE` over the same parameters, with another report."""

    config: MoEConfig
    dtype: str
    inputs: bool

    def __call__(self, x: Float[Array, "b t d"], *, train: bool = False) -> tuple[Float[Array, "b t d"], Any]:
        params: Any = nn.meta.unbox(self.variables["params"])
        layer: Any = MoE(self.config, dtype=self.dtype, parent=None)
        y, _ = layer.apply({"params": params}, x, train=train)
        rows = x.reshape(-1, x.shape[-1])
        if self.inputs:
            return y, rows
        router: Any = Linear((self.config.num_experts,), ("embed", None), dtype="float32", parent=None)
        routing = top_k_gating(router.apply({"params": params["router"]}, rows), self.config, train=False)
        return y, expert_stats(rows.astype(self.dtype), params["gate"], params["up"], routing.expert_ids)


def check_moe(model: Any, params: Any) -> None:
    """Raises ValueError unless the model is a decoder with gated experts that are not packed."""
    sparse = check_config(getattr(model, "config", None))
    block = next(index for index, run in enumerate(model.config.layer_runs()) if run.sparse)
    if "experts" in params[f"blocks_{block}"]["mlp"]:
        raise ValueError(f"the experts of {len(sparse)} layers are packed already; unpack_moe gives an ordinary model")


def check_config(config: DecoderConfig | None) -> list[int]:
    """The sparse layers.

    Raises:
        ValueError: there are none, or experts have two matrices instead of three.
    """
    sparse = [] if config is None else [i for i in range(config.num_hidden_layers) if config.is_sparse(i)]
    if config is None or config.moe is None or not sparse:
        raise ValueError("no MoE layers found: the model has no experts")
    if config.moe.activation != "swiglu":
        raise ValueError(f"experts must be gated (activation 'swiglu'), got moe.activation={config.moe.activation!r}")
    return sparse


def check_tokens(tokens: Any, config: DecoderConfig) -> Array:
    """A batch as int32 `[B,T]`.

    Raises:
        ValueError: not two-dimensional, empty, or ids that are no tokens.
        TypeError: not integers.
    """
    ids = np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"calibration tokens must be integers, got {ids.dtype}")
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"calibration tokens must be [B, T] and not empty, got shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in 0..{config.vocab_size - 1}, got {ids.min()}..{ids.max()}")
    return jnp.asarray(ids, jnp.int32)
