"""MegaFold's pair stack over 8 devices against one: memory of a device, numbers, and what 8 H100s would hold.

One block's updates of the pairs (both triangle multiplications, both triangle attentions, transition) at the paper's
widths, forward and gradients of the pairs and all weights. The 8 CPU devices are forced, in a process of their own.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.harness import Case
from jaxlab.core import distributed, make_mesh, plan
from jaxlab.core.errors import MissingExtra
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.modules import PairformerStack
from jaxlab.megafold.modules.pair import PairUpdates

SYSTEM = "megafold"
DEVICES = 8
MIB = 2**20


def laid(x: Any, mesh: Mesh | None, *spec: str | None) -> Any:
    """The shape of an array, over a mesh if there is one."""
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@functools.cache
def compiled(n: int, mesh: Mesh | None) -> tuple[Any, Any]:
    """(params, z, mask, d) -> (value, gradients of params and z) of the pair stack in float32; and shapes of params."""
    config = AF3Config.af3()
    updates = PairUpdates(config.pair_heads, config.pair_head_dim, config.transition_factor, 0.0, config.kernels)
    z, mask = jax.ShapeDtypeStruct((1, n, n, config.c_z), jnp.float32), jax.ShapeDtypeStruct((1, n, n), bool)
    params = jax.eval_shape(updates.init, jax.random.key(0), z, mask)

    def step(params, z, mask, d):
        y, pullback = jax.vjp(lambda params, z: updates.apply(params, z, mask), params, z)
        return y, pullback(d)

    pairs = laid(z, mesh, None, "pair")
    args = jax.tree.map(lambda x: laid(x, mesh), params), pairs, laid(mask, mesh, None, "pair"), pairs
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(step).lower(*args).compile(), params


def main(n: int, compared: int) -> None:
    """In a process with 8 devices: temporaries at `n` tokens, and differences at `compared`, as a line of JSON."""
    mesh = make_mesh({"pair": DEVICES})
    one, many = (compiled(n, over)[0].memory_analysis().temp_size_in_bytes / MIB for over in (None, mesh))
    (single, shapes), (spread, _) = compiled(compared, None), compiled(compared, mesh)
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    params = jax.tree.map(lambda x: 0.1 * draw(x.shape), shapes)
    pairs = (1, compared, compared, AF3Config.af3().c_z)
    args = params, draw(pairs), rng.random(pairs[:3]) < 0.9, draw(pairs)
    want = single(*args)
    got = spread(*jax.tree.map(jax.device_put, args, spread.input_shardings[0]))
    errors = [
        max(float(np.abs(a - np.asarray(b)).max() / np.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, both)))
        for both in zip(jax.tree.map(np.asarray, got), want)
    ]
    print(json.dumps({"one": one, "many": many, "values": errors[0], "gradients": errors[1]}))


def cases(quick: bool) -> Iterator[Case]:
    """Bar 6 of the specification, and the block compiled for H100s."""
    n, compared = 256, 32 if quick else 256
    root = Path(__file__).resolve().parent.parent
    (result,) = distributed.run_local(
        ["-m", __name__, str(n), str(compared)], 1, DEVICES, timeout_s=1800, env={"PYTHONPATH": str(root)}
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    found = json.loads(result.stdout.splitlines()[-1])
    what = f"pair stack, f32, N={n}, {DEVICES} devices"
    yield Case(SYSTEM, what, "temporary MiB a device", found["many"], found["one"], "one device", 5.0)
    what = f"pair stack, f32, N={compared}, {DEVICES} devices"
    for name, bound in (("values", 1e-5), ("gradients", 1e-4)):
        yield Case(SYSTEM, what, f"relative difference of {name}", found[name], bound, "bound", 1.0)
    if not quick:
        with contextlib.suppress(MissingExtra):
            yield from _on_gpus(384)


def _on_gpus(n: int) -> Iterator[Case]:
    """One pairformer block at the paper's size, bfloat16, compiled for one H100 and for eight."""
    config = dataclasses.replace(AF3Config.af3(), pairformer_blocks=1)
    stack = PairformerStack(config)
    s = jax.ShapeDtypeStruct((1, n, config.c_s), jnp.bfloat16)
    z = jax.ShapeDtypeStruct((1, n, n, config.c_z), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, n), bool)
    params = jax.eval_shape(stack.init, jax.random.key(0), s, z, mask)

    def step(params, s, z, mask, d):
        return jax.vjp(lambda params, s, z: stack.apply(params, s, z, mask), params, s, z)[1](d)

    def held(devices: int) -> float:
        over = plan.target("h100", topology=f"1x1x{devices}", mesh={"pair": devices})
        tokens, pairs = (laid(x, over.mesh, None, "pair") for x in (s, z))
        args = params, tokens, pairs, mask, (tokens, pairs)
        made = plan.compile(step, *args, target=over, labels=("parameters", *("input",) * 4), read_kernels=False)
        return made.bytes["temporaries"] / MIB

    what = f"pairformer block, bf16, N={n}, {DEVICES} H100s (compiled)"
    yield Case(SYSTEM, what, "temporary MiB a device", held(DEVICES), held(1), "one H100", None)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
