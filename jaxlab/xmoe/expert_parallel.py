"""Experts spread over devices: tokens travel to them, padding-free and, with RBD, without redundant copies.

Dispatchers to be called inside a `jax.shard_map` over `config.expert_axes`; every device has its own tokens and E / W
consecutive experts.
"""

import jax
from jaxtyping import Array, Float

from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.exchange import bring_back, deliver, rows_abroad
from jaxlab.xmoe.experts import ExpertFunction, Experts, Routed, expert_ffn
from jaxlab.xmoe.peers import Peers, device_index, receive_rows, topology_of
from jaxlab.xmoe.pft import build_pft, pft_gather, pft_scatter
from jaxlab.xmoe.rbd import rbd_combine, rbd_dispatch, rbd_plan
from jaxlab.xmoe.router import Routing


def pft(
    x: Float[Array, "s h"],
    routing: Routing,
    config: MoEConfig,
    experts: Experts,
    key: Array | None = None,
    *,
    expert_fn: ExpertFunction = expert_ffn,
) -> Routed:
    """Sends one row for each kept slot to its expert's device, and one back (X-MoE section 2.4).

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
    kernels = config.kernel_implementation
    buffer = build_pft(routing, config)
    rows = pft_gather(x, buffer, implementation=kernels)
    room = receive_rows(config, x.shape[0], routing.capacity, peers.size, local)
    counts = buffer.tokens_per_expert.reshape(peers.size, local)
    received, sizes, lost, delivery = deliver(rows, counts, peers, room, config)
    done = expert_fn(received, experts, sizes, config)
    back = bring_back(done, delivery, peers, rows.shape[0], config)
    y = pft_scatter(back, buffer, routing.weights, implementation=kernels)
    return Routed(y, lost, rows_abroad(delivery.splits, config, topology))


def rbd(
    x: Float[Array, "s h"],
    routing: Routing,
    config: MoEConfig,
    experts: Experts,
    key: Array | None = None,
    *,
    expert_fn: ExpertFunction = expert_ffn,
) -> Routed:
    """Like `pft`, but a token crosses to another node once however many experts it has there (X-MoE section 2.5).

    Within one node there is nothing to save, and it is `pft`.

    Args:
        x: this device's tokens.
        routing: their experts.
        config: the layer; `config.pilot` says which slot's device the row goes to.
        experts: this device's E / W experts.
        key: for "random" pilots; the same key gives the same plan, so that rematerialisation repeats it. Devices draw
            apart from each other.
        expert_fn: what the experts do to rows that lie expert after expert.

    Raises:
        ValueError: unbound axes, experts that do not divide over them, or "random" without a key.
    """
    topology = topology_of(config)
    if config.pilot == "random":
        if key is None:
            raise ValueError("pilot='random' needs a key, got None; 'first' and 'rail' do without")
        key = jax.random.fold_in(key, device_index(config))
    if topology.num_nodes == 1 or x.shape[0] == 0:
        return pft(x, routing, config, experts, expert_fn=expert_fn)
    local_experts(experts, config, topology.num_devices)
    plan = rbd_plan(build_pft(routing, config), config, topology, key)
    sent = rbd_dispatch(x, routing.weights, plan, config, capacity=routing.capacity)
    done = expert_fn(sent.rows, experts, sent.group_sizes, config)
    return Routed(rbd_combine(done, sent, plan, config), sent.dropped_recv, sent.inter_node_rows)


def local_experts(experts: Experts, config: MoEConfig, devices: int) -> int:
    """How many experts this device has.

    Raises:
        ValueError: not E / W.
    """
    count = config.num_experts // devices
    if experts.up.shape[0] != count:
        raise ValueError(
            f"experts must be this device's {count} of num_experts={config.num_experts} on {devices} devices, "
            f"got {experts.up.shape[0]}"
        )
    return count
