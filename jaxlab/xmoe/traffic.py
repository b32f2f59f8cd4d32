"""What a compiled layer sends where, and what it computes meanwhile: read from the program, which is never run."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxlab.core.plan import Plan
    from jaxlab.xmoe.config import MoEConfig

EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Bound(NamedTuple):
    """Bytes of rows that one device can send at most in the exchanges of a program, both directions together.

    Buffers have the size of the worst case, so this is what the program has room for, not what a batch sends
    (`dispatch_volume` counts that). A padded exchange always sends all of it.

    Attributes:
        across: in exchanges over all devices, or from node to node; of them 1 / N stay in the node if all nodes get
            equally much.
        inside: in exchanges among the devices of a node.
    """

    across: int
    inside: int


def layer_plan(
    config: "MoEConfig",
    tokens: int,
    mesh: Mapping[str, int],
    *,
    gpu: str = "h100",
    dtype: str = "bfloat16",
    options: Mapping[str, Any] | None = None,
) -> "Plan":
    """Compiles one layer's forward pass in training over a mesh of described nodes.

    Args:
        config: the layer; its `expert_axes` are axes of the mesh.
        tokens: of one device.
        mesh: sizes of the axes, the nodes first.
        gpu: a preset of `jaxlab.core.plan`.
        dtype: of the activations.
        options: of XLA's compiler.
    """
    import math

    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxlab.core import plan, shardings
    from jaxlab.xmoe.moe import MoE

    nodes, *inner = mesh.values()
    over = plan.target(gpu, f"1x{nodes}x{math.prod(inner)}", mesh)
    layer = MoE(config, mesh=over.mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    names = jax.eval_shape(lambda key: layer.init(key, jnp.zeros((1, config.hidden_size), dtype)), key)
    variables = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(names),
        shardings(names, over.mesh),
    )
    rows = NamedSharding(over.mesh, PartitionSpec(tuple(mesh)))
    x = jax.ShapeDtypeStruct((tokens * over.mesh.size, config.hidden_size), jnp.dtype(dtype), sharding=rows)
    return plan.compile(
        lambda variables, x, key: layer.apply(variables, x, train=True, rng=key),
        variables,
        x,
        key,
        target=over,
        labels=("parameters", "input", "input"),
        options=options,
    )


def bound(made: "Plan", across: str = "node") -> Bound:
    """The room for rows in the exchanges of a plan; counts and places, a few thousandths of it, are in it too.

    Args:
        made: of `layer_plan`.
        across: the mesh axis from node to node.
    """
    sizes = {True: 0, False: 0}
    for each in made.collectives:
        if each.op in EXCHANGES:
            sizes[across in each.axes] += each.bytes * each.count
    return Bound(sizes[True], sizes[False])


class Window(NamedTuple):
    """An exchange of a scheduled program.

    Attributes:
        exchange: its name in the program.
        meanwhile: what the program starts between the exchange's start and its end, by the names the source gave.
        synchronous: XLA made it wait for the exchange at once.
    """

    exchange: str
    meanwhile: tuple[str, ...]
    synchronous: bool


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTES = re.compile(r"[\])}] (fusion|custom-call|dot|while|conditional|call)\(")
_NAME = re.compile(r'op_name="([^"]*)"')


def windows(hlo: str, exchanges: Sequence[str] = ("ragged-all-to-all",)) -> tuple[Window, ...]:
    """What runs between start and end of each exchange of a scheduled module, in the order of the schedule.

    Args:
        hlo: the text of the compiled module (`Plan.hlo`); a GPU's is scheduled.
        exchanges: operations, without "-start".
    """
    opened: dict[str, tuple[list[str], bool]] = {}
    closed: list[Window] = []
    for line in hlo.splitlines():
        if (instruction := _INSTRUCTION.match(line)) is None:
            continue
        name = instruction[1]
        if any(re.search(rf"[\])}}] {op}-start\(", line) for op in exchanges):
            opened[name] = ([], '"is_sync":true' in line)
        elif ended := re.search(rf" (?:{'|'.join(exchanges)})-done\(%?([\w.\-]+)", line):
            meanwhile, synchronous = opened.pop(ended[1])
            closed.append(Window(ended[1], tuple(meanwhile), synchronous))
        elif _COMPUTES.search(line):
            told = _NAME.search(line)
            for meanwhile, _ in opened.values():
                meanwhile.append(told[1] if told else name)
    return tuple(closed)
