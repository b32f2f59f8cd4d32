"""How two other systems send tokens to their experts, step by step as they do it, for comparison (section 5).

Both exchange only real rows, as `pft` does. They differ in what they spend around the exchange: sorts, copies, masks of
every token and expert, and sums that scatter.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.exchange import Splits, exchange, fitting, permute_rows, regrouping, starts_of
from jaxlab.xmoe.expert_parallel import local_experts, rows_abroad
from jaxlab.xmoe.experts import ExpertFunction, Experts, Routed, expert_ffn
from jaxlab.xmoe.peers import Peers, receive_rows, topology_of
from jaxlab.xmoe.router import Routing


def maxtext(
    x: Float[Array, "s h"],
    routing: Routing,
    config: MoEConfig,
    experts: Experts,
    key: Array | None = None,
    *,
    expert_fn: ExpertFunction = expert_ffn,
) -> Routed:
    """MaxText's dropless `RoutedMoE`: tokens repeated k times and sorted, sizes gathered, rows sorted again on arrival.

    Slots that the capacity dropped travel with weight 0, since that layer knows no drops. Its buffer is for all slots
    of all devices, or `recv_buffer_factor` times the own ones.

    Args:
        x: this device's tokens.
        routing: their experts.
        config: the layer.
        experts: this device's E / W experts.
        key: not used.
        expert_fn: what the experts do to rows that lie expert after expert.

    Raises:
        ValueError: unbound axes, or experts that do not divide over them.
    """
    del key
    topology = topology_of(config)
    peers = Peers(config.expert_axes)
    local = local_experts(experts, config, peers.size)
    (tokens, k), width = routing.expert_ids.shape, x.shape[1]
    chosen = routing.expert_ids.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    rows = _sort_rows(jnp.repeat(x, k, axis=0), order)
    counts = jnp.bincount(chosen, length=config.num_experts).astype(jnp.int32)

    lost, splits = jnp.int32(0), None
    if peers.size > 1:
        everyones = _gathered(counts, peers)
        room = receive_rows(config, tokens, None, peers.size, config.num_experts)
        splits, kept, lost = _splits(everyones, peers, room)
        arrived = exchange(rows, splits, peers, room, config.exchange_implementation)
        expert = jnp.repeat(jnp.tile(jnp.arange(local), peers.size), kept.reshape(-1), total_repeat_length=room)
        by_expert = jnp.argsort(expert, stable=True)
        done = expert_fn(_sort_rows(arrived, by_expert), experts, jnp.sum(kept, 0), config)
        done = _sort_rows(done, jnp.argsort(by_expert))
        rows = exchange(done, splits.reversed(), peers, tokens * k, config.exchange_implementation)
    else:
        rows = expert_fn(rows, experts, counts, config)
    home = _sort_rows(rows, jnp.argsort(order)).reshape(tokens, k, width)
    y = jnp.einsum("skh,sk->sh", home.astype(jnp.float32), routing.weights).astype(x.dtype)
    return Routed(y, lost, rows_abroad(splits, config, topology))


def megatron(
    x: Float[Array, "s h"],
    routing: Routing,
    config: MoEConfig,
    experts: Experts,
    key: Array | None = None,
    *,
    expert_fn: ExpertFunction = expert_ffn,
) -> Routed:
    """Megatron-Core's all-to-all dispatcher: `[S,E]` masks choose the rows, chunks are reordered, sums are scattered.

    Args:
        x: this device's tokens.
        routing: their experts.
        config: the layer.
        experts: this device's E / W experts.
        key: not used.
        expert_fn: what the experts do to rows that lie expert after expert.

    Raises:
        ValueError: unbound axes, or experts that do not divide over them.
    """
    del key
    topology = topology_of(config)
    peers = Peers(config.expert_axes)
    local = local_experts(experts, config, peers.size)
    (tokens, k), all_experts = routing.expert_ids.shape, config.num_experts
    length = tokens * k if routing.capacity is None else min(tokens * k, all_experts * routing.capacity)
    hit = (routing.expert_ids[..., None] == jnp.arange(all_experts)) & routing.keep[..., None]
    routing_map = jnp.any(hit, axis=1)
    probs = jnp.sum(jnp.where(hit, routing.weights[..., None], 0.0), axis=1)

    # Unused rows name a token past the last: nothing is read from there, or added.
    picked = jnp.nonzero(routing_map.T.reshape(-1), size=length, fill_value=tokens * all_experts)[0]
    token = jnp.where(picked < tokens * all_experts, picked % max(tokens, 1), tokens)
    rows = x.at[token].get(mode="fill", fill_value=0)
    weights = probs.T.reshape(-1).at[picked].get(mode="fill", fill_value=0)
    counts = jnp.sum(routing_map, axis=0, dtype=jnp.int32)

    lost, splits = jnp.int32(0), None
    if peers.size > 1:
        room = receive_rows(config, tokens, routing.capacity, peers.size, local)
        splits, kept, lost = _splits(_gathered(counts, peers), peers, room)
        arrived = exchange(rows, splits, peers, room, config.exchange_implementation)
        chunks = regrouping(kept, room)
        done = expert_fn(permute_rows(arrived, chunks, config), experts, jnp.sum(kept, 0), config)
        done = permute_rows(done, chunks.reversed(), config)
        rows = exchange(done, splits.reversed(), peers, length, config.exchange_implementation)
    else:
        rows = expert_fn(rows, experts, counts, config)
    weighted = rows.astype(jnp.float32) * weights[:, None]
    y = jnp.zeros((tokens, x.shape[1]), jnp.float32).at[token].add(weighted, mode="drop").astype(x.dtype)
    return Routed(y, lost, rows_abroad(splits, config, topology))


def _gathered(counts: Int[Array, " e"], peers: Peers) -> Int[Array, "w e"]:
    """Everybody's counts."""
    return lax.all_gather(counts, peers.axes)


def _splits(counts: Int[Array, "w e"], peers: Peers, room: int) -> tuple[Splits, Int[Array, "w local"], Int[Array, ""]]:
    """The splits that follow from everybody's counts, the rows kept of each source and local expert, and rows lost."""
    devices = peers.size
    me = lax.axis_index(peers.axes)
    sizes = jnp.sum(counts.reshape(devices, devices, -1), axis=2)
    starts = jax.vmap(starts_of)(sizes)
    lands = jax.vmap(starts_of)(sizes.T)
    kept = jax.vmap(lambda column: fitting(column, room))(sizes.T)
    arriving = lax.dynamic_index_in_dim(counts.reshape(devices, devices, -1), me, 1, keepdims=False)
    mine = fitting(arriving.reshape(-1), room).reshape(arriving.shape)
    splits = Splits(starts[me], kept[:, me], lands[:, me], lands[me], kept[me], starts[:, me])
    return splits, mine, jnp.sum(arriving - mine)


@jax.custom_vjp
def _sort_rows(x: Float[Array, "m h"], order: Int[Array, " m"]) -> Float[Array, "m h"]:
    """x[order]; the gradient sorts back."""
    return x[order]


def _sort_rows_forward(x, order):
    return x[order], order


def _sort_rows_backward(order, grads):
    return grads[jnp.argsort(order)], None


_sort_rows.defvjp(_sort_rows_forward, _sort_rows_backward)
