"""Experts where the tokens are: no token moves."""

import functools

import jax
from jaxtyping import Array, Float

from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.experts import ExpertFunction, Experts, Routed, expert_ffn, no_exchange
from jaxlab.xmoe.pft import build_pft, pft_gather, pft_scatter
from jaxlab.xmoe.router import Routing


def local(
    x: Float[Array, "s h"],
    routing: Routing,
    config: MoEConfig,
    experts: Experts,
    key: Array | None = None,
    *,
    expert_fn: ExpertFunction = expert_ffn,
) -> Routed:
    """The padding-free layer on this device's tokens: gather, grouped product, weighted sum.

    With `expert_axes` the experts' matrices are gathered from the other devices; their gradients are summed back.

    Args:
        x: this device's tokens.
        routing: their experts.
        config: the layer.
        experts: this device's E / W experts.
        key: not used.
        expert_fn: what the experts do to rows that lie expert after expert.
    """
    del key
    pft = build_pft(routing, config)
    kernels = config.kernel_implementation
    rows = pft_gather(x, pft, implementation=kernels)
    rows = expert_fn(rows, gather_experts(experts, config), pft.tokens_per_expert, config)
    return no_exchange(pft_scatter(rows, pft, routing.weights, implementation=kernels))


def gather_experts(experts: Experts, config: MoEConfig) -> Experts:
    """All E experts, from the devices of `expert_axes`; the given ones where there are no axes."""
    if not config.expert_axes:
        return experts
    gather = functools.partial(jax.lax.all_gather, axis_name=config.expert_axes, axis=0, tiled=True)
    return jax.tree.map(gather, experts)
