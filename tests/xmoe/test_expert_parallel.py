import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.xmoe import MoE, MoEConfig
from tests.aot import needs_aot
from tests.oracles import moe as oracle
from tests.xmoe.multiprocess_cases import (
    DENSE,
    DEVICES,
    MODES,
    SIZES,
    TOKENS,
    TWO,
    assert_close,
    check_equal,
    layer,
    mesh_of,
    problem,
    run,
)

EXCHANGED = ["pft", "rbd_rail"]  # with the kernels of the platform


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.latest) if mode in EXCHANGED else mode for mode in MODES]
)
def test_every_mode_is_the_dense_layer(mode):
    check_equal(mode)


def test_bfloat16():
    config = layer("rbd_rail")
    params, x, _ = problem()
    apply = jax.jit(MoE(config, mesh=mesh_of(config), dtype="bfloat16").apply)
    y, _ = apply({"params": params}, x, rng=jax.random.key(0))
    assert_close(np.asarray(y), run(DENSE, problem())[1][0], 2e-2)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_drop_policies(policy):
    """Each device drops among its own tokens, before pilots are chosen."""
    drops = {"drop_policy": policy, "capacity_factor": 0.7, "min_capacity": 1, "combine_weight": "softmax_renorm"}
    want_grads, (want, want_metrics) = run(layer("tutel", **drops), problem())
    assert 0.05 < want_metrics.dropped_fraction < 0.6
    for mode in ["pft_padded", "rbd_random"] if policy == "probs" else ["rbd_first"]:
        grads, (y, metrics) = run(layer(mode, **drops), problem())
        assert_close((grads, y), (want_grads, want))
        np.testing.assert_array_equal(metrics.tokens_per_expert, want_metrics.tokens_per_expert)
        assert metrics.dropped_recv == 0


def crowded():
    """All tokens choose experts 0, 1 and 2."""
    params, x, mix = problem()
    kernel = np.zeros_like(params["router"]["kernel"])
    kernel[0] = -np.arange(16)
    x = x.copy()
    x[:, 0] = 1
    return {**params, "router": {"kernel": kernel}}, x, mix


@pytest.mark.parametrize("mode", EXCHANGED)
def test_experts_without_tokens(mode):
    grads, (y, metrics) = run(layer(mode), crowded())
    want_grads, (want, _) = run(DENSE, crowded())
    assert_close((grads, y), (want_grads, want))
    assert metrics.tokens_per_expert.tolist() == [64] * 3 + [0] * 13
    assert not np.any(grads[0]["up"][3:])


@pytest.mark.parametrize("mode", EXCHANGED)
def test_nan_logits_stay_with_their_token(mode):
    params, x, mix = problem()
    x = x.copy()
    x[37, 2] = np.nan
    _, (y, metrics) = run(layer(mode), (params, x, mix))
    assert np.flatnonzero(np.isnan(y).any(axis=1)).tolist() == [37]
    assert metrics.tokens_per_expert.sum() == TOKENS * 3


@pytest.mark.parametrize("mode", EXCHANGED)
def test_every_expert_and_one_token_a_device(mode):
    """k = E, one expert and one token on each device."""
    sizes = {"num_experts": 8, "top_k": 8, "implementation": "reference"}
    few = problem(tokens=DEVICES, experts=8)
    grads, (y, metrics) = run(layer(mode, **sizes), few)
    want_grads, (want, _) = run(dataclasses.replace(DENSE, **sizes), few)
    assert_close((grads, y), (want_grads, want))
    assert metrics.tokens_per_expert.tolist() == [8] * 8
    assert metrics.inter_node_rows == (DEVICES * 4 if mode == "pft" else DEVICES)


@pytest.mark.parametrize("mode", EXCHANGED)
def test_no_tokens(mode):
    grads, (y, metrics) = run(layer(mode), problem(tokens=0))
    assert y.shape == (0, 16)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert metrics.tokens_per_expert.sum() == metrics.dropped_recv == metrics.inter_node_rows == 0


def test_within_one_node_rbd_is_pft():
    grads, (y, metrics) = run(layer("rbd_random_groups", node_size=8), problem())
    want_grads, (want, want_metrics) = run(layer("rbd_random_groups", node_size=8, dispatch="pft"), problem())
    assert metrics.inter_node_rows == want_metrics.inter_node_rows == 0
    jax.tree.map(np.testing.assert_array_equal, (grads, y), (want_grads, want))


def test_what_does_not_fit_is_lost_in_order():
    """24 rows a device: by source, then expert, then row. Device 0 has experts 0 and 1, device 1 has 2 and 3."""
    config = layer("pft_padded", recv_buffer_factor=1)
    params, x, mix = crowded()
    grads, (y, metrics) = run(config, (params, x, mix))
    assert metrics.dropped_recv == (128 - 24) + (64 - 24)
    served = {0: (0, 1, 2), 1: (0, 2), 2: (2,)}  # by source device
    routed = oracle.route(x.astype(np.float64) @ params["router"]["kernel"], 3)
    shared = [params["shared"][part]["kernel"] for part in ("gate", "up", "down")]
    for token in range(TOKENS):
        want = oracle.expert(x[token], *shared)
        for expert in served.get(token // 8, ()):
            matrices = (params[part][expert] for part in ("gate", "up", "down"))
            weight = routed["weights"][token][list(routed["expert_ids"][token]).index(expert)]
            want = want + weight * oracle.expert(x[token], *matrices)
        np.testing.assert_allclose(y[token], want, atol=1e-4)
    assert not np.any(grads[0]["up"][3:])


def test_rematerialisation_repeats_the_plan():
    """With buffers so small that other pilots would lose other rows."""
    config = layer("rbd_random", recv_buffer_factor=0.5)
    want = run(config, problem())
    assert want[1][1].dropped_recv > 20
    assert_close(run(config, problem(), remat=True), want, 1e-6)


@needs_aot
def test_rbd_compiles_for_16_gpus():
    """The gradient: rows out, their notes, and what each has on its way back; the sums' way home it does not need."""
    from jaxlab.core import plan

    target = plan.target("h100", topology="1x2x8", mesh={"node": 2, "expert": 8})
    sizes = {"num_experts": 32, "top_k": 4, "hidden_size": 128, "ffn_size": 64}
    config = MoEConfig(**sizes, dispatch="rbd", expert_axes=TWO, implementation="reference")
    moe = MoE(config, mesh=target.mesh, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((16 * 256, 128), jnp.bfloat16, sharding=NamedSharding(target.mesh, PartitionSpec(TWO)))
    params = {
        "router": {"kernel": jax.ShapeDtypeStruct((128, 32), jnp.float32)},
        **{
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(target.mesh, PartitionSpec(TWO)))
            for name, shape in (("gate", (32, 128, 64)), ("up", (32, 128, 64)), ("down", (32, 64, 128)))
        },
    }

    def loss(params, x):
        y, _ = moe.apply({"params": params}, x, train=True, rng=jax.random.key(0))
        return jnp.sum(y.astype(jnp.float32))

    compiled = plan.compile(jax.grad(loss, (0, 1)), params, x, target=target, labels=["parameters", "input"])
    ragged = [found for found in compiled.collectives if found.op == "ragged-all-to-all"]
    counts = {axes: sum(found.count for found in ragged if found.axes == axes) for axes in (TWO, ("expert",))}
    assert counts == {TWO: 5, ("expert",): 4}


def test_bad_inputs(unchecked):
    def call(config, axes, experts=16, rows=64):
        mesh = make_mesh(axes)
        params, *_ = problem()
        x = jnp.ones((rows, 16))
        return jax.eval_shape(lambda: MoE(config, mesh=mesh).apply({"params": params}, x, rng=jax.random.key(0)))

    pft = MoEConfig(**SIZES, dispatch="pft", expert_axes=("expert",))
    with pytest.raises(
        ValueError, match="num_devices must be a multiple of the node size, got 8 devices in nodes of 3"
    ):
        call(dataclasses.replace(pft, node_size=3), {"expert": 8})
    with pytest.raises(ValueError, match="num_experts=12 must be a multiple of the 8 devices"):
        call(dataclasses.replace(pft, num_experts=12), {"expert": 8})
    ssmb = layer("pft_ssmb")
    with pytest.raises(ValueError, match="tokens must be a multiple of the size of 'tensor', got 15 tokens over 2"):
        call(ssmb, {"node": 2, "expert": 2, "tensor": 2}, rows=60)
