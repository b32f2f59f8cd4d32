"""The layer over 8 devices against one device that computes every expert on every token: values, all gradients, counts.

`MODES` has every way of dispatching; the cases are the main ones, which also run in 2 processes with 4 devices each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.xmoe import MoE, MoEConfig
from tests.oracles import expert_parallel as oracle

TOKENS, DEVICES = 64, 8
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}  # a program that runs once
ONE, TWO, THREE = ("expert",), ("node", "expert"), ("node", "expert", "tensor")
MESHES = {
    ONE: {"expert": 8},
    TWO: {"node": 2, "expert": 4},
    THREE: {"node": 2, "expert": 2, "tensor": 2},
    "ted": {"expert": 4, "tensor": 2},
}
SSMB = {"expert_axes": THREE, "tp_axis": "tensor"}
SIZES = {"num_experts": 16, "top_k": 3, "hidden_size": 16, "ffn_size": 8, "num_shared_experts": 1, "node_size": 4}
# Most with the plain kernels, which compile faster; the exchange is the platform's in any case.
MODES = {
    **{name: {"dispatch": name, "expert_axes": TWO} for name in ("local", "dense", "padded", "tutel", "megablocks")},
    **{name: {"dispatch": name, "expert_axes": ONE} for name in ("ragged_dot", "maxtext", "megatron")},
    "pft": {"dispatch": "pft", "expert_axes": TWO, "implementation": None},
    "pft_padded": {"dispatch": "pft", "expert_axes": ONE, "implementation": ("reference", "padded")},
    "rbd_random": {"dispatch": "rbd", "expert_axes": TWO},
    "rbd_random_groups": {"dispatch": "rbd", "expert_axes": ONE},
    "rbd_first": {"dispatch": "rbd", "expert_axes": TWO, "pilot": "first"},
    "rbd_first_groups": {"dispatch": "rbd", "expert_axes": ONE, "pilot": "first"},
    "rbd_rail": {"dispatch": "rbd", "expert_axes": TWO, "pilot": "rail", "implementation": None},
    "rbd_rail_groups": {"dispatch": "rbd", "expert_axes": ONE, "pilot": "rail"},
    "pft_ssmb": {"dispatch": "pft", **SSMB},
    "rbd_ssmb": {"dispatch": "rbd", **SSMB, "pilot": "rail"},
    "pft_ted": {"dispatch": "pft", "expert_axes": ONE, "tp_axis": "tensor"},
}


def layer(mode, **changes):
    """The configuration of a mode."""
    return MoEConfig(**{**SIZES, "implementation": "reference", **MODES[mode], **changes})


DENSE = MoEConfig(**SIZES, dispatch="dense")


def mesh_of(config):
    """The 8 devices under the axes of a layer."""
    ted = config.tp_axis is not None and config.tp_axis not in config.expert_axes
    return make_mesh(MESHES["ted" if ted else config.expert_axes])


@functools.cache
def problem(tokens=TOKENS, experts=16):
    """Parameters, tokens, and what y is multiplied with."""
    rng = np.random.default_rng(tokens + experts)

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    width, inner = SIZES["hidden_size"], SIZES["ffn_size"]
    params = {
        "router": {"kernel": normal(width, experts)},
        "gate": normal(experts, width, inner, scale=0.3),
        "up": normal(experts, width, inner, scale=0.3),
        "down": normal(experts, inner, width, scale=0.3),
        "shared": {
            "gate": {"kernel": normal(width, inner, scale=0.3)},
            "up": {"kernel": normal(width, inner, scale=0.3)},
            "down": {"kernel": normal(inner, width, scale=0.3)},
        },
    }
    return params, normal(tokens, width), normal(tokens, width)


@functools.cache
def program(config, remat=False):
    """params, x, mix -> (gradients in params and x, (y, metrics)), all replicated; over the mesh if there are axes."""
    mesh = mesh_of(config) if config.expert_axes else None

    def apply(params, x):
        return MoE(config, mesh=mesh).apply({"params": params}, x, train=True, rng=jax.random.key(5))

    def loss(params, x, mix):
        y, metrics = (jax.checkpoint(apply) if remat else apply)(params, x)
        return jnp.sum(y * mix), (y, metrics)

    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, out_shardings=replicated, compiler_options=QUICK_TO_COMPILE)


def run(config, problem, *, remat=False):
    """The outputs of `program` as this process sees them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), program(config, remat)(*problem))


def assert_close(got, want, bound=1e-4):
    """Every leaf, relative to its largest number."""
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-30)
        assert error <= bound, (jax.tree_util.keystr(path), error)


def check_equal(mode):
    """A mode against the dense layer on one device."""
    config = layer(mode)
    grads, (y, metrics) = run(config, problem())
    want_grads, (want_y, want_metrics) = run(DENSE, problem())
    assert_close(y, want_y)
    assert_close(grads, want_grads)
    np.testing.assert_array_equal(metrics.tokens_per_expert, want_metrics.tokens_per_expert)
    assert metrics.dropped_recv == 0
    nodes = mesh_of(config).shape.get("node", 1 if config.tp_axis else 2)
    if config.dispatch in ("pft", "rbd", "maxtext", "megatron"):
        params, x, _ = problem()
        ids = np.argsort(-(x @ params["router"]["kernel"]), axis=1)[:, :3].reshape(DEVICES, -1, 3)
        keep = np.ones(ids.shape, bool)
        abroad = oracle.rows_abroad(ids, keep, 16, nodes, distinct=config.dispatch == "rbd") if nodes > 1 else 0
        assert metrics.inter_node_rows == abroad


def case_pft(folder):
    check_equal("pft_padded")


def case_rbd_random(folder):
    check_equal("rbd_random")


def case_rbd_first_groups(folder):
    check_equal("rbd_first_groups")


def case_rbd_rail_ssmb(folder):
    check_equal("rbd_ssmb")


def case_tutel(folder):
    check_equal("tutel")
