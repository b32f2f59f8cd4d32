"""Labels, numerics and lowered text; a CPU has one memory, so nothing is saved here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlab.core import make_mesh, plan
from jaxlab.superoffload.placement import fetch_tree, host_sharding, offload_tree, remat_offload_policy
from tests.aot import needs_aot

MIB = 2**20


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.latest
def test_to_the_host_and_back():
    mesh = make_mesh({"fsdp": 8})
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    assert host_sharding(place) == NamedSharding(mesh, PartitionSpec("fsdp"), memory_kind="pinned_host")
    assert host_sharding(SingleDeviceSharding(jax.devices()[0])).memory_kind == "pinned_host"
    tree = {
        "a": jax.device_put(np.arange(16.0), place),
        "b": jax.device_put(np.float32(3), NamedSharding(mesh, PartitionSpec())),
    }
    there = offload_tree(tree)
    assert kinds(there) == {"pinned_host"}
    assert there["a"].sharding.spec == PartitionSpec("fsdp")
    back = fetch_tree(there)
    assert kinds(back) == {"device"}
    jax.tree.map(np.testing.assert_array_equal, back, tree)

    @jax.jit
    def update(tree):
        return offload_tree(jax.tree.map(lambda leaf: 2 * leaf, fetch_tree(tree)))

    doubled = update(there)
    assert kinds(doubled) == {"pinned_host"}
    np.testing.assert_array_equal(doubled["a"], 2 * np.arange(16.0))


@needs_aot
def test_on_a_gpu_the_host_holds_it():
    """An optimizer's moments in and out of host memory, a block input offloaded: by XLA's own buffers for a GH200."""
    over = plan.target("gh200")
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(over.mesh, PartitionSpec()))

    def step(moments, gradient):
        moments = jax.tree.map(lambda m: 0.9 * m + gradient, fetch_tree(moments))
        return offload_tree(moments), moments["m"].sum()

    moments = offload_tree({"m": shape, "v": shape})
    assert kinds(moments) == {"pinned_host"}
    assert kinds(fetch_tree(moments)) == {"device"}
    made = plan.compile(step, moments, shape, target=over, labels=("optimizer", "input"), donate_argnums=0)
    assert (made.bytes["host"], made.bytes["optimizer"], made.bytes["input"]) == (8 * MIB, 0, 4 * MIB)
    text = jax.jit(step).trace(moments, shape).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("annotate_device_placement") >= 4
    assert "pinned_host" in text


@pytest.mark.latest
def test_named_values_wait_on_the_host():
    x, w = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)

    def loss(w, x):
        def body(x, _):
            return jnp.tanh(checkpoint_name(x, "block_input") @ w), None

        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, length=3)[0] ** 2)

    policy = jax.checkpoint_policies.everything_saveable
    plain = jax.jit(jax.grad(loss))(w, x)
    policy = remat_offload_policy(["block_input"])
    jax.clear_caches()
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(w, x), plain)
    assert "f32<host>[3,4,4]" in str(jax.make_jaxpr(jax.grad(loss))(w, x))
    text = jax.jit(jax.grad(loss)).trace(w, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "pinned_host" in text
    assert "annotate_device_placement" in text


def test_bad_inputs(unchecked):
    with pytest.raises(TypeError, match=r"s: expected a jax.sharding.Sharding, got str"):
        host_sharding("cpu")
    with pytest.raises(ValueError, match=r"tree\['a'\]: expected a sharding, got none"):
        offload_tree({"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ValueError, match="names: expected at least one name, got none"):
        remat_offload_policy([])
    with pytest.raises(TypeError, match="names: expected a sequence of names, got the string 'block_input'"):
        remat_offload_policy("block_input")
    with pytest.raises(ValueError, match="dst: expected one of pinned_host, unpinned_host, got 'disk'"):
        remat_offload_policy(["a"], dst="disk")
