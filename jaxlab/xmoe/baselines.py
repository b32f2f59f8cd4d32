"""The layer as its peers compute it: every function is a dispatcher, and dropless all give the same sums.

`dense` computes every expert on every token. `padded` (GShard, arXiv:2006.16668; DeepSpeed-MoE, arXiv:2201.05596)
moves tokens by products with `[S,E,C]` masks, `tutel` (arXiv:2206.03382) by indices into `[E,C,H]` buffers;
`megablocks` (dMoE, arXiv:2211.15841) rounds every group up to whole tiles, `ragged_dot` leaves the grouped product to
JAX. Under `expert_axes` the first all-gathers tokens, the padded two exchange equal chunks, and the last two are `pft`
with other experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.expert_parallel import pft
from jaxlab.xmoe.experts import Experts, Routed, masked, no_exchange, through_experts
from jaxlab.xmoe.local import local
from jaxlab.xmoe.peers import Peers, topology_of
from jaxlab.xmoe.router import Routing, top_k_gating
from pallas_kernels.dispatch import vary_alike, zeros_alike
from pallas_kernels.token_combine import token_combine
from pallas_kernels.token_gather import token_gather

_TILE_ROWS = 128  # MegaBlocks' block; small groups have smaller ones here
ArrayLike = Array | np.ndarray


def dense(
    x: Float[Array, "s h"], routing: Routing, config: MoEConfig, experts: Experts, key: Array | None = None
) -> Routed:
    """Every expert on every token, times a weight that is mostly zero."""
    del key
    gates = _gates(routing, config)
    if not config.expert_axes:
        return no_exchange(_every_expert(x, gates, experts, config))
    topology = topology_of(config)
    over: dict[str, Any] = {"axis_name": config.expert_axes, "tiled": True}
    tokens = lax.all_gather(x, **over)
    gates = lax.all_to_all(gates, split_axis=1, concat_axis=0, **over)
    y = lax.psum_scatter(_every_expert(tokens, gates, experts, config), scatter_dimension=0, **over)
    abroad = topology.num_devices - topology.devices_per_node
    return Routed(y, jnp.int32(0), jnp.int32(x.shape[0] * abroad))


def padded_gating(
    logits: Float[ArrayLike, "s e"], cfg: MoEConfig, *, train: bool
) -> tuple[Float[Array, "s e c"], Bool[Array, "s e c"], Float[Array, ""]]:
    """GShard's two masks: entry (s, e, c) says that token s has place c at expert e, `combine` with its weight.

    Args:
        logits: router outputs.
        cfg: the layer; dropless, C is S.
        train: chooses the capacity factor.

    Returns:
        combine, float32; dispatch; the load-balancing loss.
    """
    routing = top_k_gating(logits, cfg, train=train)
    combine, dispatch = _masks(routing, cfg)
    return combine, dispatch, routing.aux_loss


def padded(
    x: Float[Array, "s h"], routing: Routing, config: MoEConfig, experts: Experts, key: Array | None = None
) -> Routed:
    """Tokens to `[E,C,H]` and back by products with the masks of `padded_gating`."""
    del key
    combine, dispatch = _masks(routing, config)
    chunks = jnp.einsum("sec,sh->ech", dispatch.astype(x.dtype), x)
    done, abroad = _on_chunks(chunks, config, experts)
    return Routed(jnp.einsum("sec,ech->sh", combine.astype(x.dtype), done), jnp.int32(0), abroad)


def tutel(
    x: Float[Array, "s h"], routing: Routing, config: MoEConfig, experts: Experts, key: Array | None = None
) -> Routed:
    """Tokens to `[E,C,H]` and back by the index of their place: no masks, but as much padding."""
    del key
    (tokens, k), count, capacity = routing.expert_ids.shape, config.num_experts, _capacity(routing)
    total, places = tokens * k, count * capacity
    ids = routing.expert_ids.reshape(-1)
    chosen = ((ids[:, None] == jnp.arange(count)) & routing.keep.reshape(-1, 1)).astype(jnp.int32)
    rank = jnp.take_along_axis(jnp.cumsum(chosen, axis=0), ids[:, None], axis=1)[:, 0] - 1
    inv = jnp.where(routing.keep.reshape(-1), ids * capacity + rank, places)
    slots = (
        jnp.full(places, total, jnp.int32)
        .at[inv]
        .set(jnp.arange(total, dtype=jnp.int32), mode="drop", unique_indices=True)
    )
    taken, inv = slots < total, inv.reshape(tokens, k)

    kernels = config.kernel_implementation
    chunks = masked(token_gather(x, slots // k, inv, places, implementation=kernels), taken)
    done, abroad = _on_chunks(chunks.reshape(count, capacity, x.shape[1]), config, experts)
    rows = masked(done.reshape(places, x.shape[1]), taken)
    y = token_combine(rows, routing.weights, inv, slots, places, implementation=kernels)
    return Routed(y, jnp.int32(0), abroad)


def megablocks(
    x: Float[Array, "s h"], routing: Routing, config: MoEConfig, experts: Experts, key: Array | None = None
) -> Routed:
    """Sorted rows, each expert's rounded up to whole tiles, one product for each tile."""
    return (pft if config.expert_axes else local)(x, routing, config, experts, key, expert_fn=_tile_padded_ffn)


def ragged_dot(
    x: Float[Array, "s h"], routing: Routing, config: MoEConfig, experts: Experts, key: Array | None = None
) -> Routed:
    """Sorted rows through `jax.lax.ragged_dot` and its own gradient."""
    return (pft if config.expert_axes else local)(x, routing, config, experts, key, expert_fn=_ragged_dot_ffn)


def _gates(routing: Routing, config: MoEConfig) -> Float[Array, "s e"]:
    """Each token's weight of every expert."""
    hot = routing.expert_ids[..., None] == jnp.arange(config.num_experts)
    return jnp.sum(jnp.where(hot, routing.weights[..., None], 0), axis=1)


def _every_expert(
    x: Float[Array, "s h"], gates: Float[Array, "s e"], experts: Experts, config: MoEConfig
) -> Float[Array, "s h"]:
    rows = jnp.broadcast_to(x, (gates.shape[1], *x.shape))
    return jnp.einsum("esh,se->sh", _batched_ffn(rows, experts, config), gates.astype(x.dtype))


def _batched_ffn(chunks: Float[Array, "e c h"], experts: Experts, config: MoEConfig) -> Float[Array, "e c h"]:
    """Expert e on the rows of chunk e."""
    return through_experts(chunks, experts, config, functools.partial(jnp.einsum, "ech,ehf->ecf"))


def _capacity(routing: Routing) -> int:
    return routing.expert_ids.shape[0] if routing.capacity is None else routing.capacity


def _masks(routing: Routing, config: MoEConfig) -> tuple[Float[Array, "s e c"], Bool[Array, "s e c"]]:
    hot = (routing.expert_ids[..., None] == jnp.arange(config.num_experts)) & routing.keep[..., None]
    chosen = jnp.any(hot, axis=1)
    place = jnp.where(chosen, jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - 1, -1)
    dispatch = place[..., None] == jnp.arange(_capacity(routing))
    return jnp.where(dispatch, _gates(routing, config)[..., None], 0), dispatch


def _on_chunks(
    chunks: Float[Array, "e c h"], config: MoEConfig, experts: Experts
) -> tuple[Float[Array, "e c h"], Int[Array, ""]]:
    """The experts on the rows meant for them, wherever they are; and the rows that went to other nodes."""
    if not config.expert_axes:
        return _batched_ffn(chunks, experts, config), jnp.int32(0)
    topology, peers = topology_of(config), Peers(config.expert_axes)
    count, capacity, width = chunks.shape
    devices, mine = topology.num_devices, count // topology.num_devices
    arrived = peers.swap(chunks.reshape(devices, mine, capacity, width))
    by_expert = jnp.swapaxes(arrived, 0, 1).reshape(mine, devices * capacity, width)
    done = _batched_ffn(by_expert, experts, config).reshape(mine, devices, capacity, width)
    back = peers.swap(jnp.swapaxes(done, 0, 1)).reshape(chunks.shape)
    abroad = count // topology.num_nodes * (topology.num_nodes - 1) * capacity
    return back, jnp.int32(abroad)


def _tile_padded_ffn(
    rows: Float[Array, "m h"], experts: Experts, group_sizes: Int[Array, " e"], config: MoEConfig
) -> Float[Array, "m h"]:
    """Pads every group to whole tiles, multiplies tile by tile, and takes the padding out again."""
    (m, width), count = rows.shape, group_sizes.shape[0]
    if m == 0:
        return rows
    tile = min(_TILE_ROWS, max(8, 1 << (m // count // 2).bit_length() >> 1))
    tiles = -(-m // tile) + count
    heights = -(-group_sizes // tile)
    last_tile, last_row = jnp.cumsum(heights), jnp.cumsum(group_sizes)
    owner = jnp.minimum(jnp.searchsorted(last_tile, jnp.arange(tiles), side="right"), count - 1).astype(jnp.int32)
    # Row r of its group is row r of the group's tiles.
    inside = jnp.arange(tiles * tile) - jnp.repeat((last_tile - heights)[owner] * tile, tile)
    group = jnp.repeat(owner, tile)
    real = inside < group_sizes[group]
    source = jnp.where(real, (last_row - group_sizes)[group] + inside, m)
    of_row = jnp.minimum(jnp.searchsorted(last_row, jnp.arange(m), side="right"), count - 1)
    place = (last_tile - heights)[of_row] * tile + jnp.arange(m) - (last_row - group_sizes)[of_row]
    place = jnp.where(jnp.arange(m) < last_row[-1], place, tiles * tile)

    def multiply(blocks: Array, matrices: Array) -> Array:
        return _tile_products(*vary_alike(blocks, matrices, owner, last_tile[-1]))

    blocks = masked(token_gather(rows, source, place[:, None], tiles * tile), real)
    blocks = blocks.reshape(tiles, tile, width)
    done = through_experts(blocks, experts, config, multiply)
    done = done.reshape(tiles * tile, width)
    back = token_gather(done, place, source[:, None], m)
    return masked(back, jnp.arange(m) < last_row[-1])


@jax.custom_vjp
def _tile_products(
    blocks: Float[Array, "t b k"], matrices: Float[Array, "e k n"], owner: Int[Array, " t"], used: Int[Array, ""]
) -> Float[Array, "t b n"]:
    """blocks[t] @ matrices[owner[t]] for the tiles in use, zeros for the rest."""

    def multiply(t, out):
        return out.at[t].set(blocks[t] @ matrices[owner[t]])

    shape = (*blocks.shape[:2], matrices.shape[2])
    return lax.fori_loop(0, used, multiply, zeros_alike(shape, blocks.dtype, blocks))


def _tile_products_forward(*args):
    return _tile_products(*args), args


def _tile_products_backward(residuals, grads):
    blocks, matrices, owner, used = residuals

    # Added in place, tile by tile; the transpose that JAX would take adds an array of all experts for each tile.
    def add(t, total):
        return total.at[owner[t]].add(blocks[t].T @ grads[t])

    d_matrices = lax.fori_loop(0, used, add, zeros_alike(matrices.shape, matrices.dtype, grads))
    return _tile_products(grads, jnp.swapaxes(matrices, 1, 2), owner, used), d_matrices, None, None


_tile_products.defvjp(_tile_products_forward, _tile_products_backward)


def _ragged_dot_ffn(
    rows: Float[Array, "m h"], experts: Experts, group_sizes: Int[Array, " e"], config: MoEConfig
) -> Float[Array, "m h"]:
    multiply = functools.partial(lax.ragged_dot, group_sizes=group_sizes)
    return through_experts(rows, experts, config, multiply)
