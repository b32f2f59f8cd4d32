"""A decoder in pieces, whose gradients leave one after the other: the embedding, groups of layers, the head."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlab.layers.sharding import constrain
from jaxlab.models.decoder import DecoderConfig, head_weight
from jaxlab.superoffload.segmented import Segmented
from jaxlab.training import Loss, TokenBatch
from jaxlab.training.loss import LMLoss, chunked_cross_entropy


class Pieces(NamedTuple):
    """A decoder for `SuperOffload`, and the way of its parameters there and back.

    Attributes:
      loss: a `Segmented` network, or a loss function where the decoder is one piece.
      split: the decoder's parameters -> those of `loss`.
      join: the inverse.
    """

    loss: Segmented | Callable[[PyTree, PyTree], Array]
    split: Callable[[PyTree], PyTree]
    join: Callable[[PyTree], PyTree]


def scalar_loss(loss: Loss) -> Callable[[PyTree, PyTree], Array]:
    """The mean loss of a batch as `SuperOffload` wants it, (params, batch) -> scalar; 0 for a batch without targets."""

    def mean(params: PyTree, batch: PyTree) -> Array:
        out = loss(params, batch, None)
        return _mean(out.total, out.weight)

    return mean


def can_segment(config: DecoderConfig) -> bool:
    """Whether `decoder_pieces` can cut: layers all alike and without experts, and a head of its own."""
    return len(config.layer_runs()) == 1 and config.moe is None and not config.tie_word_embeddings


def decoder_pieces(loss: LMLoss, layers: int = 1) -> Pieces:
    """A decoder and its loss, cut into the embedding, groups of so many layers, and the head with the last norm.

    A decoder that cannot be cut (`can_segment`) is one piece. The loss is the mean over the batch's weights.

    Args:
      loss: of `lm_loss`.
      layers: of a group; the last group may have fewer.

    Raises:
      ValueError: layers below 1.
    """
    if layers < 1:
        raise ValueError(f"layers: expected a value >= 1, got {layers}")
    model, config = loss.model, loss.model.config
    if not can_segment(config):
        return Pieces(scalar_loss(loss), lambda params: params, lambda params: params)
    bounds = [*range(0, config.num_hidden_layers, layers), config.num_hidden_layers]
    groups = list(itertools.pairwise(bounds))

    def embed(params: PyTree, batch: TokenBatch) -> tuple[Array, Array, Array]:
        batch = jax.tree.map(jnp.asarray, batch)
        x: Any = model.apply({"params": params}, batch.tokens, method=lambda decoder, tokens: decoder.embed(tokens))
        # What goes from piece to piece has a gradient, if only zero.
        x = constrain(x, ("batch", "sequence", None))
        return x, batch.positions.astype(jnp.float32), batch.segment_ids.astype(jnp.float32)

    def group(count: int) -> Callable[[PyTree, Any], Any]:
        windows = None if config.windows is None else config.windows[:count]
        part = model.clone(config=dataclasses.replace(config, num_hidden_layers=count, windows=windows))

        def run(params: PyTree, x: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            positions, segments = (each.astype(jnp.int32) for each in x[1:])
            made: Any = part.apply(
                {"params": params}, x[0], positions, segments, rope_positions=positions, train=True, method="layers"
            )
            return made[0], *x[1:]

        return run

    def head(params: PyTree, x: tuple[Array, Array, Array], batch: TokenBatch) -> Array:
        batch = jax.tree.map(jnp.asarray, batch)
        hidden: Any = model.apply({"params": params}, x[0], method=lambda decoder, x: decoder.final_norm(x))
        weight = head_weight(params).astype(hidden.dtype)
        total, _ = chunked_cross_entropy(hidden, weight, batch.targets, batch.weights)
        return _mean(total, jnp.sum(batch.weights))

    def split(params: PyTree) -> PyTree:
        def layers(first: int, end: int) -> PyTree:
            return {"blocks_0": jax.tree.map(lambda leaf: leaf[first:end], params["blocks_0"])}

        blocks = itertools.starmap(layers, groups)
        return {"embed": params["embed"]}, *blocks, {name: params[name] for name in ("final_norm", "head")}

    def join(parts: PyTree) -> PyTree:
        first, *blocks, last = parts
        layers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(block["blocks_0"] for block in blocks))
        return {**first, "blocks_0": layers, **last}

    runs = {b - a: group(b - a) for a, b in groups}  # equal groups are compiled once
    fns = (embed, *(runs[b - a] for a, b in groups))
    return Pieces(Segmented(fns, head), split, join)


def _mean(total: Array, weight: Array) -> Array:
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
