"""The layer over a mesh, in the caller's shard_map, under the mesh in force: sums, gradients, metrics, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxlab.core import make_mesh
from jaxlab.xmoe import MoE, MoEConfig, MoEMetrics
from tests.xmoe.test_baselines import check_equal

RNG = np.random.default_rng(4)
SIZES = {"num_experts": 8, "top_k": 2, "hidden_size": 8, "ffn_size": 4, "shared_ffn_size": 4, "shared_gate": True}
DROPS = {"drop_policy": "probs", "capacity_factor": 0.6, "min_capacity": 1}
X, MIX = (jnp.asarray(RNG.normal(size=(8, 4, 8)), jnp.float32) for _ in range(2))


@functools.cache
def params():
    tree = nn.meta.unbox(jax.jit(MoE(MoEConfig(**SIZES)).init)(jax.random.key(0), X))["params"]
    return jax.tree.map(lambda leaf: 2 * leaf, tree)


def gradients(apply):
    """Of a loss of y and the z-loss, in parameters and x, taken outside of whatever `apply` opens; y; metrics."""

    def loss(tree, x):
        y, metrics = apply(tree, x)
        return jnp.sum(y * MIX) + 0.3 * metrics.z_loss, (y, metrics)

    grads, (y, metrics) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params(), X)
    return (grads, y, metrics.z_loss, metrics.tokens_per_expert), metrics


@functools.cache
def expected():
    layer = MoE(MoEConfig(**SIZES))
    return gradients(lambda tree, x: layer.apply({"params": tree}, x))[0]


@pytest.mark.latest
@pytest.mark.parametrize(
    ("shape", "dispatch", "axes", "tp_axis"),
    [
        ({"node": 2, "expert": 4}, "pft", ("node", "expert"), None),
        ({"data": 2, "expert": 4}, "local", ("expert",), None),
        ({"expert": 4, "tensor": 2}, "pft", ("expert", "tensor"), "tensor"),
        ({"expert": 4, "tensor": 2}, "pft", ("expert",), "tensor"),
        ({"data": 2, "sequence": 2, "tensor": 2}, "local", (), None),
    ],
)
def test_over_a_mesh(shape, dispatch, axes, tp_axis):
    layer = MoE(MoEConfig(**SIZES, dispatch=dispatch, expert_axes=axes, tp_axis=tp_axis), mesh=make_mesh(shape))
    check_equal(gradients(lambda tree, x: layer.apply({"params": tree}, x))[0], expected())


def test_inside_the_callers_shard_map():
    """Local shards of x and experts; the caller's own axis beside the experts' is left to it."""
    layer, mesh = MoE(MoEConfig(**SIZES, dispatch="pft", expert_axes=("expert",))), make_mesh({"data": 2, "expert": 4})
    rows = P(("data", "expert"))
    weights = {name: P("expert") if name in ("gate", "up", "down") else P() for name in params()}
    metrics = MoEMetrics(*[P("data")] * 6)

    def body(tree, x):
        y, metrics = layer.apply({"params": tree}, x)
        return y, jax.tree.map(lambda leaf: leaf[None], metrics)

    opened = jax.shard_map(body, mesh=mesh, in_specs=(weights, rows), out_specs=(rows, metrics))

    def apply(tree, x):
        y, metrics = opened(tree, x)
        mean = functools.partial(jnp.mean, axis=0)
        return y, metrics.replace(z_loss=mean(metrics.z_loss), tokens_per_expert=jnp.sum(metrics.tokens_per_expert, 0))

    check_equal(gradients(apply)[0], expected())


@pytest.mark.parametrize("axes", [("expert",), ()])
def test_under_the_mesh_in_force(axes):
    layer = MoE(MoEConfig(**SIZES, dispatch="pft" if axes else "local", expert_axes=axes))
    want = expected()
    with jax.set_mesh(make_mesh({"data": 2, "expert": 2, "tensor": 2})):
        check_equal(gradients(lambda tree, x: layer.apply({"params": tree}, x))[0], want)


def test_rows_that_a_mesh_does_not_divide_stay_together():
    layer, x = MoE(MoEConfig(**SIZES)), X[0, :3]
    apply = jax.jit(layer.apply)
    want, _ = apply({"params": params()}, x)
    with jax.set_mesh(make_mesh({"data": 8})):
        y, _ = apply({"params": params()}, x)
    np.testing.assert_allclose(y, want, atol=1e-6)


@pytest.mark.parametrize("tp_axis", [None, "tensor"])
def test_metrics_are_sums_and_means_of_the_devices(tp_axis):
    """Each device drops among its own tokens: as the layer does on each part by itself."""
    mesh = make_mesh({"node": 2, "expert": 2, "tensor": 2})
    axes = ("node", "expert") if tp_axis is None else ("node", "expert", "tensor")
    config = MoEConfig(**SIZES, **DROPS, dispatch="pft", expert_axes=axes, tp_axis=tp_axis)
    layer, alone = MoE(config, mesh=mesh), MoE(MoEConfig(**SIZES, **DROPS))

    @functools.partial(jax.jit, static_argnums=0)
    def apply(layer, x):
        return layer.apply({"params": params()}, x, train=True)

    y, metrics = apply(layer, X)
    parts = [apply(alone, part) for part in X.reshape(4 if tp_axis is None else 8, -1, 8)]
    np.testing.assert_allclose(y.reshape(-1, 8), np.concatenate([part[0] for part in parts]), atol=1e-5)
    for name, reduce in (
        ("aux_loss", np.mean), ("z_loss", np.mean), ("dropped_fraction", np.mean), ("tokens_per_expert", np.sum)
    ):  # fmt: skip
        want = reduce([getattr(part[1], name) for part in parts], axis=0)
        np.testing.assert_allclose(getattr(metrics, name), want, rtol=1e-5)
    assert 0.1 < metrics.dropped_fraction < 0.6
    assert 0 < metrics.inter_node_rows <= 64
    assert metrics.dropped_recv == 0


def test_devices_draw_their_own_jitter():
    layer = MoE(MoEConfig(**SIZES, jitter_eps=0.5, expert_axes=("expert",)), mesh=make_mesh({"expert": 8}))
    x = jnp.broadcast_to(X[:1], X.shape)
    y, _ = jax.jit(lambda key: layer.apply({"params": params()}, x, train=True, rng=key))(jax.random.key(0))
    assert len(np.unique(np.asarray(y[:, 0, 0]).round(6))) > 2


def test_refusals(unchecked):
    mesh = make_mesh({"node": 2, "expert": 4})

    def apply(x=X, sizes=SIZES, mesh=mesh, train=False, **changes):
        layer = MoE(MoEConfig(**sizes, **changes), mesh=mesh)
        return layer.apply({"params": params()}, x, train=train)

    with pytest.raises(
        ValueError, match=r"x has 12 rows, which must be a multiple of 8, the devices of \('node', 'exp"
    ):
        apply(X[:3], expert_axes=("node", "expert"))
    with pytest.raises(ValueError, match="num_experts=6 must be a multiple of the 4 devices"):
        apply(sizes=SIZES | {"num_experts": 6}, expert_axes=("expert",))
    with pytest.raises(ValueError, match=r"\['pair'\] are no axes of the mesh, which has \('node', 'expert'\)"):
        apply(expert_axes=("pair",))
    with pytest.raises(ValueError, match="pilot='random' needs rng"):
        apply(expert_axes=("node", "expert"), dispatch="rbd")
    with pytest.raises(ValueError, match="in nodes of 3"):
        apply(expert_axes=("expert",), dispatch="pft", node_size=3)
    with pytest.raises(ValueError, match="tokens must be a multiple of the size of 'tensor', got 1 tokens over 2"):
        apply(X[0], mesh=make_mesh({"expert": 4, "tensor": 2}), expert_axes=("expert", "tensor"), tp_axis="tensor")
    with pytest.raises(ValueError, match="ffn_size=4 must be a multiple of the 8 devices of 'tensor'"):
        apply(mesh=make_mesh({"tensor": 8}), tp_axis="tensor")
