"""The mixture-of-experts layer on this CPU: against its peers in JAX, torch's fused blocks, and dense loops.

The shape is the specification's: 1024 tokens, 64 experts, 6 each, 128 features, inner width 88, f32. All ways of
dispatching compute the same layer from the same parameters; only "index-capacity" drops slots (capacity factor 1.25).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.harness import Case, interleaved
from jaxlab.core.errors import MissingExtra
from jaxlab.xmoe import MoE, MoEConfig, Topology, build_pft, rbd_plan, top_k_gating

SYSTEM = "xmoe"
MIB = 2**20
FORWARD, BOTH = "forward", "forward and gradients"


class Shape(NamedTuple):
    """Sizes of a layer and its batch."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    ffn: int

    def config(self, **settings: Any) -> MoEConfig:
        """The layer."""
        sizes = {"num_experts": self.experts, "top_k": self.top_k, "hidden_size": self.hidden, "ffn_size": self.ffn}
        return MoEConfig(**sizes, **settings)

    def __str__(self) -> str:
        return f"S={self.tokens} E={self.experts} k={self.top_k} H={self.hidden} F={self.ffn}"


LAYER = Shape(1024, 64, 6, 128, 88)
# Groups of 256 rows: what torch's product of one expert, and XLA's, spread over threads.
WIDE = Shape(1024, 8, 2, 256, 896)


class Program(NamedTuple):
    """A compiled program with its arguments, and the bytes that it allocates beside them and its results."""

    run: Callable[[], Any]
    temporaries: int


def program(function: Callable[..., Any], *args: Any) -> Program:
    """Compiles."""
    compiled = jax.jit(function).lower(*args).compile()
    memory: Any = compiled.memory_analysis()
    return Program(functools.partial(compiled, *args), memory.temp_size_in_bytes)


def inputs(config: MoEConfig, tokens: int) -> tuple[jax.Array, Any]:
    """Normal tokens, and parameters that keep their size."""
    layer = MoE(config)
    x = jax.random.normal(jax.random.key(0), (tokens, config.hidden_size))
    return x, jax.jit(layer.init)(jax.random.key(1), x[:1])


def programs(config: MoEConfig, tokens: int, *which: str) -> dict[str, Program]:
    """The layer's forward pass, and the one with the gradients of tokens and parameters."""
    layer, args = MoE(config), inputs(config, tokens)

    def forward(x, params):
        return layer.apply(params, x)[0]

    def both(x, params):
        y, pullback = jax.vjp(forward, x, params)
        return y, pullback(y)

    made = {FORWARD: forward, BOTH: both}
    return {name: program(made[name], *args) for name in which or made}


def timed(
    what: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    name: str,
    bar: float | None,
    repeats: int,
    warmup: int = 2,
) -> Case:
    """Both in turn."""
    mine, theirs = interleaved(ours, peer, repeats=repeats, warmup=warmup)
    return Case(SYSTEM, what, "ms", mine * 1e3, theirs * 1e3, name, bar)


# Way of dispatching, what it is called, its settings, and its bars: time of both passes, temporaries.
PEERS = (
    ("ragged_dot", "lax.ragged_dot", {}, {FORWARD: (12.0, None), BOTH: (None, 12.0)}),
    ("padded", "GShard einsum, [S,E,C] masks", {}, {FORWARD: (10.0, None), BOTH: (None, 4.0)}),
    (
        "tutel",
        "index-capacity 1.25, which drops",
        {"drop_policy": "position", "eval_capacity_factor": 1.25},
        {FORWARD: (1 / 2, None), BOTH: (1 / 1.3, None)},
    ),
    ("megablocks", "tile-padded products", {}, {FORWARD: (None, None), BOTH: (None, None)}),
)


def _against_dispatchers(quick: bool) -> Iterator[Case]:
    ours = programs(LAYER.config(), LAYER.tokens)
    for dispatch, name, settings, bars in PEERS:
        theirs = programs(LAYER.config(dispatch=dispatch, **settings), LAYER.tokens)
        slow = dispatch in ("ragged_dot", "padded")
        repeats = (5 if slow else 7) if quick else (7 if slow else 21)
        for what, (time_bar, memory_bar) in bars.items():
            case = f"layer, {LAYER}, {what}"
            yield timed(case, ours[what].run, theirs[what].run, name, time_bar, repeats, warmup=1)
            sizes = [made[what].temporaries / MIB for made in (ours, theirs)]
            yield Case(SYSTEM, case, "temporary MiB", sizes[0], sizes[1], name, memory_bar)


def torch_block(kind: str, shape: Shape, experts: str) -> Any:
    """The Qwen2-MoE or Mixtral block of transformers, with random parameters.

    Raises:
      ImportError: torch or transformers is missing.
    """
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k}
    sizes["experts_implementation"] = experts
    if kind == "Qwen2-MoE":
        config = transformers.Qwen2MoeConfig(
            **sizes,
            num_experts=shape.experts,
            moe_intermediate_size=shape.ffn,
            shared_expert_intermediate_size=shape.ffn,
        )
        block = Qwen2MoeSparseMoeBlock(config)
    else:
        config = transformers.MixtralConfig(**sizes, num_local_experts=shape.experts, intermediate_size=shape.ffn)
        block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=shape.hidden**-0.5)
    return block


def torch_run(block: Any, shape: Shape, what: str) -> Callable[[], Any]:
    """A pass of the block over random tokens."""
    import torch

    x = torch.randn(1, shape.tokens, shape.hidden)

    def forward():
        with torch.no_grad():
            return block(x)

    def both():
        x.grad = None
        block.zero_grad()
        y = block(x)
        y.backward(y.detach())

    x.requires_grad_(what == BOTH)
    return forward if what == FORWARD else both


def _against_torch(quick: bool) -> Iterator[Case]:
    """The block's fastest way of running its experts: one product for all groups ("grouped_mm")."""
    shared = {"shared_ffn_size": LAYER.ffn, "shared_gate": True}
    mixtral = {"combine_weight": "softmax_renorm"}
    for kind, shape, settings in (("Qwen2-MoE", LAYER, shared), ("Mixtral", WIDE, mixtral)):
        try:
            block = torch_block(kind, shape, "grouped_mm")
        except ImportError:
            return
        ours = programs(shape.config(**settings), shape.tokens)
        for what, made in ours.items():
            peer = torch_run(block, shape, what)
            name = f"torch, transformers' {kind} block, grouped_mm"
            yield timed(f"layer, {shape}, {what}", made.run, peer, name, 1.0, 7 if quick else 21)


def loop_over_experts(config: MoEConfig) -> Callable[[jax.Array, Any], jax.Array]:
    """Every expert in turn, on every token, with weights that are mostly zero."""

    def run(x, variables):
        params = variables["params"]
        routing = top_k_gating(x @ params["router"]["kernel"], config, train=False)

        def expert(e, y):
            gate, up, down = (params[name][e] for name in ("gate", "up", "down"))
            weight = jnp.sum(jnp.where(routing.expert_ids == e, routing.weights, 0), axis=1, keepdims=True)
            return y + weight * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)

        return jax.lax.fori_loop(0, config.num_experts, expert, jnp.zeros_like(x))

    return run


def _decoding(quick: bool) -> Iterator[Case]:
    """Few tokens: calls of tens of microseconds, many of them in turn."""
    from flax import linen as nn

    for tokens in (1, 4, 8):
        shape = LAYER._replace(tokens=tokens)
        config = shape.config()
        ours = programs(config, tokens, FORWARD)[FORWARD]
        x, params = inputs(config, tokens)
        peers = {"loop over all experts": program(loop_over_experts(config), x, nn.meta.unbox(params)).run}
        with contextlib.suppress(ImportError):
            block = torch_block("Mixtral", shape, "eager")
            peers["torch, loop over the experts hit"] = torch_run(block, shape, FORWARD)
        for name, peer in peers.items():
            yield timed(f"layer, {shape}, {FORWARD}", ours.run, peer, name, 1.0, 50 if quick else 300)


def _planning(quick: bool) -> Iterator[Case]:
    """The plan of a redundancy-bypassing dispatch, nothing exchanged, beside the layer's forward pass at H = 1024."""
    shape = LAYER._replace(hidden=1024)
    config = shape.config(pilot="random")
    layer = programs(config, shape.tokens, FORWARD)[FORWARD]
    logits = jax.random.normal(jax.random.key(2), (shape.tokens, shape.experts))
    pft = jax.jit(lambda logits: build_pft(top_k_gating(logits, config, train=False), config))(logits)
    plan = program(lambda pft, key: rbd_plan(pft, config, Topology(32, 8), key, device=0), pft, jax.random.key(3))
    what = f"RBD plan over 4 nodes of 8, {shape}"
    yield timed(what, plan.run, layer.run, "PFT forward", 4.0, 7 if quick else 21)


def _sequence_sharding() -> Iterator[Case]:
    """Temporaries of a device's gradient program where tensor-parallel ranks split the tokens, compiled for H100s.

    Four data-parallel ranks with 4096 tokens each, experts spread over all devices, receive buffers for balanced load.
    """
    from flax import linen as nn

    from jaxlab.core import plan, shardings

    shape = Shape(4096, 256, 8, 7168, 2048)  # the paper's Large

    def temporaries(ranks: int) -> int:
        target = plan.target("h100", f"1x4x{ranks}", {"expert": 4, "tensor": ranks})
        config = shape.config(
            expert_axes=("expert", "tensor"), tp_axis="tensor", dispatch="pft", recv_buffer_factor=1.0
        )
        layer = MoE(config, mesh=target.mesh)
        dtype = jnp.bfloat16
        names = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, shape.hidden), dtype)))
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            nn.meta.unbox(names),
            shardings(names, target.mesh),
        )
        rows = NamedSharding(target.mesh, PartitionSpec("expert"))
        x = jax.ShapeDtypeStruct((4 * shape.tokens, shape.hidden), dtype, sharding=rows)

        def both(params, x, cotangent):
            y, pullback = jax.vjp(lambda *args: layer.apply(*args)[0], params, x)
            return y, pullback(cotangent)

        made = plan.compile(both, params, x, x, target=target, labels=["parameters", "input", "input"])
        return made.bytes["temporaries"]

    try:
        one, four = temporaries(1), temporaries(4)
    except MissingExtra:
        return
    case = f"SSMB, {shape}, gradients, bfloat16, H100, TP=4"
    yield Case(SYSTEM, case, "temporary MiB", four / MIB, one / MIB, "TP=1", 1 / 0.30)


def cases(quick: bool) -> Iterator[Case]:
    """The cases of `python -m benchmarks xmoe`."""
    yield from _against_dispatchers(quick)
    yield from _against_torch(quick)
    yield from _decoding(quick)
    yield from _planning(quick)
    yield from _sequence_sharding()
