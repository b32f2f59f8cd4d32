"""Losses as sums, and the language-model loss that never holds all logits at once."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from jaxlab.models.decoder import Decoder, abstract_params, head_weight
from jaxlab.training.sharding import BATCH_AXES, place_batch
from jaxlab.training.text import TokenBatch

# A chunk of tokens has at most this many logits (256 MiB in f32); smaller batches and vocabularies are one chunk.
_CHUNK_LOGITS = 2**26


@struct.dataclass
class LossOutput:
    """Sums over a batch, so that masks, accumulated pieces and shards agree: the mean loss is `total / weight`.

    All are f32 scalars; `metrics` are sums over the same weight, which the train step reports divided by it.
    """

    total: Any
    weight: Any
    metrics: dict[str, Any] = struct.field(default_factory=dict)


Loss = Callable[[PyTree, PyTree, Array | None], LossOutput]


def _chunk(
    hidden: Float[Array, "*n D"], head: Float[Array, "D V"], targets: Int[Array, "*n"], weights: Float[Array, "*n"]
) -> tuple[Array, Array, Array, Array]:
    """Sums of loss and hits of one chunk, its logits and their log-sum-exps."""
    logits = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
    maximum = jnp.max(logits, axis=-1)
    lse = maximum + jnp.log(jnp.sum(jnp.exp(logits - maximum[..., None]), axis=-1))
    # A comparison with the column index, not a gather: it fuses, and stays local where the vocabulary is sharded.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return jnp.sum((lse - target) * weights), jnp.sum((target >= maximum) * weights), logits, lse


def _split(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]: every chunk holds all rows, so a sharded batch stays where it is."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunks: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the token cross-entropy and of correct greedy predictions, f32.

    Only the logits of one of `chunks` pieces of the sequence exist at a time. Where a gradient is asked for, the
    forward pass makes it along the way (it is linear in the cotangent): no logits are kept, none computed twice.
    Differentiable in `hidden` and `head`, through the first result.
    """

    def body(sums, chunk):
        loss, hits, _, _ = _chunk(chunk[0], head, *chunk[1:])
        return (sums[0] + loss, sums[1] + hits), None

    pieces = [_split(x, chunks) for x in (hidden, targets, weights)]
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), tuple(pieces))[0]


def _cross_entropy_forward(hidden, head, targets, weights, chunks):
    def gradients(hidden, targets, weights):
        loss, hits, logits, lse = _chunk(hidden, head, targets, weights)
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        d_logits = ((jnp.exp(logits - lse[..., None]) - hit) * weights[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("...v,dv->...d", d_logits, head)
        d_head = jnp.einsum("...d,...v->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return loss, hits, d_hidden, d_head

    if chunks == 1:
        loss, hits, d_hidden, d_head = gradients(hidden, targets, weights)
    else:

        def body(sums, chunk):
            loss, hits, d_hidden, d_head = gradients(*chunk)
            return (sums[0] + loss, sums[1] + hits, sums[2] + d_head), d_hidden

        zero = jnp.zeros((), jnp.float32)
        pieces = tuple(_split(x, chunks) for x in (hidden, targets, weights))
        (loss, hits, d_head), d_hidden = jax.lax.scan(body, (zero, zero, jnp.zeros(head.shape, jnp.float32)), pieces)
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return (loss, hits), (d_hidden, d_head.astype(head.dtype))


def _cross_entropy_backward(chunks, residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return (d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None)


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` in as many chunks as its logits need, each device of the mesh in force on its own tokens.

    Left to itself XLA would gather the head, and reduce its gradient, once a chunk instead of once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = auto_axes(mesh, BATCH_AXES, targets.shape[0])
    columns = auto_axes(mesh, ("sequence",), targets.shape[1])
    length = targets.shape[1] // math.prod(mesh.shape[axis] for axis in columns)
    tokens = length * targets.shape[0] // math.prod(mesh.shape[axis] for axis in rows)
    vocabulary_shards = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    chunks = _chunks(tokens, length, -(-head.shape[1] // vocabulary_shards))
    if not rows + columns:
        return cross_entropy(hidden, head, targets, weights, chunks)

    def local(hidden, head, targets, weights):
        return jax.tree.map(lambda x: x[None], cross_entropy(hidden, head, targets, weights, chunks))

    place = PartitionSpec(rows, columns)
    sums = jax.shard_map(
        local,
        in_specs=(place, PartitionSpec(), place, place),
        out_specs=(PartitionSpec(rows + columns),) * 2,
        axis_names=set(rows + columns),
        check_vma=False,
    )(hidden, head, targets, weights)
    return jnp.sum(sums[0]), jnp.sum(sums[1])


def auto_axes(mesh: Any, names: Sequence[str], size: int) -> tuple[str, ...]:
    """The named axes of a mesh over which XLA itself lays arrays out; none if together they do not divide `size`."""
    axes = tuple(
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types)
        if axis in names and kind == AxisType.Auto and mesh.shape[axis] > 1
    )
    return () if size % math.prod(mesh.shape[axis] for axis in axes) else axes


def _chunks(tokens: int, length: int, vocab: int) -> int:
    """The fewest pieces of a sequence, a divisor of its length, that keep a chunk's logits within the limit."""
    wanted = max(1, -(-tokens * vocab // _CHUNK_LOGITS))
    return next(chunks for chunks in range(min(wanted, length), length + 1) if length % chunks == 0)


def _reports(aux: PyTree) -> dict[str, list[Array]]:
    """What sparse layers say about themselves: field name -> one float32 array a run of layers, layers first."""
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        name = getattr(path[-1], "name", getattr(path[-1], "key", None)) if path else None
        found.setdefault(str(name), []).append(leaf.astype(jnp.float32))
    return found


def router_loss(aux: PyTree, aux_loss_coef: int | float, z_loss_coef: int | float) -> Float[Array, ""]:
    """The routers' losses found in `DecoderOutput.aux`: every field `aux_loss` and `z_loss`, summed over the layers."""
    reports, total = _reports(aux), jnp.zeros((), jnp.float32)
    for name, coefficient in (("aux_loss", aux_loss_coef), ("z_loss", z_loss_coef)):
        if coefficient:
            total = total + coefficient * sum(jnp.sum(leaf) for leaf in reports.get(name, ()))
    return total


def router_metrics(aux: PyTree) -> dict[str, Float[Array, ""]]:
    """How routing goes, from `DecoderOutput.aux`; empty without sparse layers.

    `aux_loss`, `z_loss` and `dropped_fraction` are means over the sparse layers, and so is `expert_load_max`, the
    busiest expert's tokens over the mean expert's (1 = balanced); `expert_load_min` is the idlest one's in any layer.
    `dropped_recv` counts rows that receive buffers had no room for, in all layers.
    """
    reports = _reports(aux)
    metrics = {
        name: jnp.mean(jnp.concatenate([leaf.reshape(-1) for leaf in reports[name]]))
        for name in ("aux_loss", "z_loss", "dropped_fraction")
        if name in reports
    }
    if "tokens_per_expert" in reports:
        loads = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in reports["tokens_per_expert"]])
        loads = loads / jnp.maximum(jnp.mean(loads, axis=-1, keepdims=True), 1e-9)
        metrics |= {"expert_load_max": jnp.mean(jnp.max(loads, axis=-1)), "expert_load_min": jnp.min(loads)}
    if "dropped_recv" in reports:
        metrics["dropped_recv"] = jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in reports["dropped_recv"]]))
    return metrics


@dataclasses.dataclass(frozen=True)
class LMLoss:
    """Next-token loss of a decoder, as `lm_loss` makes it: a `Loss` that also knows its parameters' axis names."""

    model: Decoder
    aux_loss_coef: int | float
    z_loss_coef: int | float
    train: bool = True

    def __call__(self, params: PyTree, batch: TokenBatch, rng: Array | None) -> LossOutput:
        """Sums over the batch's weights."""
        batch = jax.tree.map(jnp.asarray, batch)
        out: Any = self.model.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            train=self.train,
            rngs=None if rng is None else {"mlp": rng},
        )
        head = head_weight(params).astype(out.hidden.dtype)
        total, hits = chunked_cross_entropy(out.hidden, head, batch.targets, batch.weights)
        weight = jnp.sum(batch.weights)
        total = total + weight * router_loss(out.aux, self.aux_loss_coef, self.z_loss_coef)
        routing = {name: weight * value for name, value in router_metrics(out.aux).items()}
        return LossOutput(total, weight, {"accuracy": hits, **routing})

    def abstract_params(self) -> PyTree:
        """The parameters' shapes, boxed with their logical axis names."""
        return abstract_params(self.model)


def lm_loss(model: Decoder, *, aux_loss_coef: int | float = 0.01, z_loss_coef: int | float = 0.0) -> "LMLoss":
    """The next-token cross-entropy of a `Decoder` on `TokenBatch`es, plus the routers' losses where it has experts.

    Logits exist one chunk of tokens at a time. Metrics: `accuracy`, the share of tokens that greedy decoding would get,
    and those of `router_metrics` where there are experts.

    Args:
        model: A `jaxlab.models.decoder.Decoder`.
        aux_loss_coef: Weight of the load-balancing loss that sparse layers report in `aux` (X-MoE: 0.01).
        z_loss_coef: Weight of their z-loss.
    """
    return LMLoss(model, aux_loss_coef, z_loss_coef)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(model: Decoder, params: PyTree, batch: TokenBatch) -> LossOutput:
    return LMLoss(model, 0.0, 0.0, train=False)(params, batch, None)


def perplexity(model: Decoder, params: PyTree, batches: Iterable[TokenBatch]) -> float:
    """Exp of the mean token cross-entropy over `batches`, each target weighted equally.

    Raises:
        ValueError: The batches hold no target.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    total = weight = 0.0
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        for batch in batches:
            out = _evaluate(model, params, place_batch(batch, mesh) if isinstance(mesh, Mesh) else batch)
            total, weight = total + float(out.total), weight + float(out.weight)
    if weight == 0:
        raise ValueError("batches: expected at least one token to predict, got none")
    return float(np.exp(total / weight))
