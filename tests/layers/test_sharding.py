"""Attention over a mesh: each device on its own rows and heads, and nothing gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.layers.sharding import own_rows_and_heads
from pallas_kernels.flash_attention import flash_attention


def _attend(q, k, v, ids):
    return flash_attention(q, k, v, segment_ids=ids)


def _loss(attend):
    return jax.jit(jax.value_and_grad(lambda *qkv, ids: jnp.sum(attend(*qkv, ids) ** 2), (0, 1, 2)))


@pytest.mark.parametrize(
    ("axes", "kv_heads", "spec"),
    [
        ({"fsdp": 2, "tensor": 2}, 2, ("fsdp", None, "tensor")),
        ({"fsdp": 2, "tensor": 4}, 2, ("fsdp", None, "tensor")),  # fewer key and value heads than devices
        ({"data": 8}, 2, ()),  # rows that the axis does not divide
    ],
)
def test_own_rows_and_heads(axes, kv_heads, spec):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 24, heads, 4)), jnp.float32) for heads in (4, kv_heads, kv_heads))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 24))), jnp.int32)
    want = _loss(_attend)(q, k, v, ids=ids)
    mesh = make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    lies = NamedSharding(mesh, PartitionSpec(*spec))
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, lies if x.shape[2] % axes.get("tensor", 1) == 0 else None) for x in (q, k, v)]
        program = _loss(lambda q, k, v, ids: own_rows_and_heads(_attend, q, k, v, ids)).lower(*args, ids=ids).compile()
        got = program(*args, ids=ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
    assert kv_heads % axes.get("tensor", 1) or "all-gather" not in program.as_text()


def test_a_plain_call_without_a_mesh_and_inside_shard_map():
    calls = []

    def attend(q, k, v, ids):
        calls.append(q.shape)
        assert ids is None
        return q

    q = jnp.ones((2, 3, 2, 4))
    own_rows_and_heads(attend, q, q, q, None)
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        jax.jit(lambda q: own_rows_and_heads(attend, q, q, q, None))(q)
        split = jax.shard_map(
            lambda q: own_rows_and_heads(attend, q, q, q, None),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
        )
        jax.jit(split)(q)
    assert calls == [(2, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4)]


def test_heads_over_a_sequence_axis():
    """Whole sequences of fewer heads."""
    seen = []

    def attend(q, k, v):
        seen.append((q.shape, k.shape))
        return q

    with jax.set_mesh(make_mesh({"tensor": 2, "sequence": 2}, jax.devices()[:4])):
        jax.jit(lambda q, k: own_rows_and_heads(attend, q, k, k)).lower(jnp.ones((1, 8, 8, 4)), jnp.ones((1, 8, 2, 4)))
        jax.jit(lambda q, k: own_rows_and_heads(attend, q, k, k)).lower(jnp.ones((1, 8, 6, 4)), jnp.ones((1, 8, 2, 4)))
    assert seen == [((1, 8, 2, 4), (1, 8, 1, 4)), ((1, 8, 3, 4), (1, 8, 1, 4))]
