"""What offloading lets GH200s train, by the compiler's word: whole steps compiled, none of them run."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "superoffload"

# Layers and hidden size of the artifact's models.
SIZES = {
    "3.5B": (70, 2048),
    "5B": (44, 3072),
    "13B": (65, 4096),
    "15B": (18, 8192),
    "20B": (25, 8192),
    "25B": (30, 8192),
}
BATCH, LENGTH, DEVICES = 4, 1024, 8
LENGTHS = tuple(1 << n for n in range(17, 23))
# Host bytes a parameter that no program shows: float32 master, m and v, and the residual undo log of SuperOffload.
_COUNTED = {"gpu_only": 0, "zero_offload": 12, "superoffload": 12 + 3}
_OPTIONS = {"xla_backend_optimization_level": 0}  # only buffers and the schedule are read
_IN_FLIGHT = "xla_gpu_experimental_parallel_async_compute_limit"


def items() -> Iterator[Item]:
    """One row a program."""
    yield from _sizes()
    yield from _fetches()
    yield from _lengths()


def _sizes() -> Iterator[Item]:
    title = (
        f"One GH200 (93.4 of 101.5 GB usable, host 470 of 480 GB), {BATCH} x {LENGTH} tokens, blocks recomputed: GB "
        "of the compiled step (nothing ran). gpu_only: float32 parameters and AdamW; zero_offload: 16-bit weights and "
        "all 16-bit gradients on the GPU; superoffload: layers flow, their gradients leave one by one. Optimizer state "
        "on the host (12 bytes a parameter) and superoffload's undo log (3) are counted, not compiled"
    )
    for name in SIZES:
        for method in _COUNTED:
            yield Item(
                name=f"{name}, {method}",
                table=title,
                settings={"size": SIZES[name], "method": method, "batch": BATCH, "length": LENGTH},
                run=lambda name=name, method=method: _size_row(name, method),
            )


def _fetches() -> Iterator[Item]:
    title = (
        "Share of a layer's bytes whose fetch has a matrix product between its start and its end in the scheduled "
        f"program (SuperOffload, 25B), by XLA's flag {_IN_FLIGHT}"
    )
    for limit in (2, 16):
        yield Item(
            name=f"fetches of 25B, {limit}",
            table=title,
            settings={"size": SIZES["25B"], "batch": BATCH, "length": LENGTH, "in_flight": limit},
            run=lambda limit=limit: _fetch_row(limit),
        )


_LONG = {
    "ulysses": "Ulysses and ZeRO-3, AdamW on the GPUs",
    "weights": "SuperOffload, block inputs on the GPUs",
    "superoffload": "SuperOffload, block inputs on the host",
}


def _lengths() -> Iterator[Item]:
    title = (
        f"13B on {DEVICES} GH200, one sequence over all of them, blocks recomputed: GB of one device and of its host, "
        "of the compiled step (nothing ran; optimizer state and undo log on the host counted)"
    )
    for method in _LONG:
        for length in LENGTHS:
            yield Item(
                name=f"13B, {method}, {length}",
                table=title,
                settings={"size": SIZES["13B"], "method": method, "length": length, "devices": DEVICES},
                run=lambda method=method, length=length: _length_row(method, length),
            )


def _size_row(name: str, method: str) -> dict[str, Any]:
    from jaxlab.models.cost import parameter_count

    config = _config(name)
    if method == "gpu_only":
        from jaxlab.core.plan import target
        from jaxlab.training import TrainConfig, plan

        whole = dataclasses.replace(config, param_dtype="float32")
        made, host = plan(TrainConfig(model=whole, batch_size=BATCH, length=LENGTH), target("gh200")), 0
    else:
        made, host = _step(config, method, batch=BATCH, length=LENGTH)
    count = parameter_count(config).total
    return {
        "model": name,
        "parameters, B": count / 1e9,
        "method": method,
        **_places(made, host + _COUNTED[method] * count),
    }


def _length_row(method: str, length: int) -> dict[str, Any]:
    from jaxlab.models.cost import parameter_count

    config = _config("13B")
    made, host = _step(config, method, batch=1, length=length, devices=DEVICES, offload_inputs=method == "superoffload")
    if method != "ulysses":
        host += _COUNTED["superoffload"] * parameter_count(config).total // DEVICES
    return {"method": _LONG[method], "tokens, K": length >> 10, **_places(made, host)}


def _places(made: Any, host: int) -> dict[str, Any]:
    from jaxlab.superoffload.machine import get_machine
    from jaxlab.superoffload.memory import usable

    return {
        "device": made.bytes["total"] / 1e9,
        "host": host / 1e9,
        "fits": made.fits and host <= usable(get_machine("gh200"))[1],
    }


def _config(name: str) -> Any:
    from jaxlab.models.decoder import DecoderConfig

    layers, hidden = SIZES[name]
    return DecoderConfig(
        vocab_size=50304,
        hidden_size=hidden,
        intermediate_size=math.ceil(8 * hidden / 3 / 128) * 128,  # a gated MLP of as many parameters as 4 * hidden
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="block",
    )


def _step(
    config: Any,
    method: str,
    *,
    batch: int,
    length: int,
    devices: int = 1,
    offload_inputs: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Any, int]:
    """The plan of a step (forward, backward, and AdamW where it is on the GPU), and host bytes of its arrays."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxlab.core import plan
    from jaxlab.core.mesh import DEFAULT_RULES, shardings
    from jaxlab.models.decoder import Decoder, abstract_params
    from jaxlab.superoffload.placement import offload_tree
    from jaxlab.superoffload.stack import OffloadedScan
    from jaxlab.superoffload.ulysses import UlyssesAttention
    from jaxlab.training import TokenBatch, lm_loss
    from jaxlab.training.adamw import OptimizerConfig, optimizer

    on_gpu = method == "ulysses"
    over = plan.target("gh200", f"1x{devices}x1", {"sequence": devices})
    model = Decoder(
        dataclasses.replace(config, param_dtype="float32") if on_gpu else config,
        attention=UlyssesAttention() if devices > 1 else None,
        repeat=None if on_gpu or method == "zero_offload" else OffloadedScan(offload_inputs),
    )
    boxed = abstract_params(model)
    places = shardings(boxed, over.mesh, (("embed", "sequence"), *DEFAULT_RULES))  # ZeRO-3 over the same devices
    params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), nn.meta.unbox(boxed), places)
    part = NamedSharding(over.mesh, PartitionSpec(None, "sequence"))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=part)
    given = TokenBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=part))
    loss = lm_loss(model)

    def gradients(params, given):
        def mean(params):
            out = loss(params, given, None)
            return out.total / out.weight

        return jax.value_and_grad(mean)(params)

    if on_gpu:
        tx = optimizer(OptimizerConfig())
        like = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
        everywhere = NamedSharding(over.mesh, PartitionSpec())
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.get(leaf.shape, everywhere)),
            jax.eval_shape(tx.init, params),
        )

        def update(params, state, given):
            value, grads = gradients(params, given)
            grads = jax.lax.with_sharding_constraint(grads, places)
            updates, state = tx.update(grads, state, params)
            return value, jax.tree.map(jnp.add, params, updates), state

        labels = ("parameters", "optimizer", "input")
        return plan.compile(
            update, params, state, given, target=over, labels=labels, donate_argnums=(0, 1), options=_OPTIONS
        ), 0
    if method == "zero_offload":
        gradients_lie, weights = offload_tree(params), params
    else:
        gradients_lie = weights = {**params, "blocks_0": offload_tree(params["blocks_0"])}
    step = jax.jit(gradients, out_shardings=(None, jax.tree.map(lambda leaf: leaf.sharding, gradients_lie)))
    made = plan.compile(step, weights, given, target=over, labels=("parameters", "input"), options=options or _OPTIONS)
    host = sum(_on_host(tree) for tree in (weights, gradients_lie))
    if offload_inputs:
        host += 2 * config.num_hidden_layers * config.hidden_size * batch * length // devices
    return made, host


def _on_host(tree: Any) -> int:
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind == "pinned_host"
    )


def _fetch_row(limit: int) -> dict[str, Any]:
    options = {**_OPTIONS, _IN_FLIGHT: limit}
    made, _ = _step(_config("25B"), "superoffload", batch=BATCH, length=LENGTH, options=options)
    loops = [_hidden(computation) for computation in made.hlo.split("\n}\n") if "ENTRY" not in computation]
    forward, backward = (loop for loop in loops if loop is not None)
    return {"in flight": limit, "forward": forward, "backward": backward, "device": made.bytes["total"] / 1e9}


def _hidden(computation: str) -> float | None:
    """The share of the bytes fetched in a loop's body behind a product; None if it fetches nothing."""
    lines = computation.splitlines()
    total = hidden = 0
    for i, line in enumerate(lines):
        fetched = re.match(r" *%dynamic-slice-start\S* = .*S\(5\)\}.*?\), bf16\[([\d,]+)\]", line)
        if fetched is None:
            continue
        end = next(j for j, later in enumerate(lines) if f"fusion-done({line.split()[0]})" in later)
        size = math.prod(map(int, fetched[1].split(",")))
        total += size
        hidden += size * any(re.match(r" *%\S*(gemm|dot|custom-call)", between) for between in lines[i:end])
    return hidden / total if total else None
