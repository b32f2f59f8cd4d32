import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxlab.core import DEFAULT_RULES, MESH_AXES, make_mesh, shardings


@pytest.mark.latest
def test_shapes():
    assert make_mesh({"data": 2, "tensor": -1}).shape == {"data": 2, "tensor": 4}
    assert make_mesh({}).shape == {"data": 8}
    mesh = make_mesh({"fsdp": -1}, devices=jax.devices()[:3])
    assert list(mesh.devices.flat) == jax.devices()[:3]
    assert mesh.axis_types == (AxisType.Auto,)
    assert make_mesh({"node": 2, "expert": 4}).axis_names == ("node", "expert")


@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        ({"model": 8}, ValueError, ["'model'", "tensor"]),
        ({"data": 3}, ValueError, ["3", "8"]),
        ({"data": 3, "tensor": -1}, ValueError, ["3", "8"]),
        ({"data": 16, "tensor": -1}, ValueError, ["16", "8"]),
        ({"data": -1, "tensor": -1}, ValueError, ["data, tensor"]),
        ({"data": 0}, ValueError, ["'data'", "0"]),
        ({"data": -2}, ValueError, ["'data'", "-2"]),
        ({"data": 8.0}, TypeError, ["'data'", "8.0"]),
    ],
)
def test_bad_shapes(unchecked, shape, error, words):
    with pytest.raises(error) as caught:
        make_mesh(shape)
    for word in words:
        assert word in str(caught.value)


def _boxed(shape, *names):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)


def _specs(tree, mesh, rules=DEFAULT_RULES):
    return jax.tree.map(lambda sharding: sharding.spec, shardings(tree, mesh, rules))


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((16, 8), ("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        ((2, 8, 4, 6), ("layers", "embed", "heads", "head_dim"), PartitionSpec(None, "fsdp", "tensor")),
        ((8, 3), ("embed", "kv_heads"), PartitionSpec("fsdp")),  # 3 heads over 2: replicated
        ((7, 8), ("embed", "mlp"), PartitionSpec(None, "tensor")),
        ((8, 8), ("mlp", "heads"), PartitionSpec("tensor")),  # an axis shards one dimension of a leaf
        ((4, 8), ("batch", "sequence"), PartitionSpec("fsdp")),  # data and sequence are not in this mesh
        ((8, 8), (None, "embed"), PartitionSpec(None, "fsdp")),
        ((8, 8), ("expert", "unheard_of"), PartitionSpec()),
        ((8, 8), ("fsdp", "tensor"), PartitionSpec("fsdp", "tensor")),  # mesh axes stand for themselves
        ((), (), PartitionSpec()),
    ],
)
def test_rules(shape, names, spec):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert _specs({"p": _boxed(shape, *names)}, mesh) == {"p": spec}


def test_one_dimension_over_two_axes():
    mesh = make_mesh({"node": 2, "expert": 2, "data": 2})
    leaf = _boxed((8, 4), "expert", "embed")
    assert _specs(leaf, mesh) == PartitionSpec(("node", "expert"))
    assert _specs(_boxed((2, 4), "expert", "embed"), mesh) == PartitionSpec()  # 2 experts over 4 places
    assert _specs(_boxed((8, 4), "batch", None), make_mesh({"data": 2, "fsdp": 4})) == PartitionSpec(("data", "fsdp"))
    # Ranks of expert parallelism are data parallel in dense blocks; with sequence-sharded experts tensor ranks join.
    assert _specs(_boxed((8, 4), "batch", None), mesh) == PartitionSpec(("data", "node", "expert"))
    joined = make_mesh({"node": 2, "expert": 2, "tensor": 2})
    assert _specs(_boxed((8, 4, 6), "expert_tensor", "embed", "mlp"), joined) == PartitionSpec(
        ("node", "expert", "tensor")
    )


def test_own_rules():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    rules = (("embed", "tensor"), ("mlp", None), ("heads", "tensor"), ("heads", "fsdp"))
    assert _specs(_boxed((8, 8), "embed", "mlp"), mesh, rules) == PartitionSpec("tensor")
    assert _specs(_boxed((8, 8), "embed", "heads"), mesh, rules) == PartitionSpec("tensor", "fsdp")  # the second rule


def test_a_tree_as_eval_shape_gives_it():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
            return nn.Dense(8, kernel_init=init)(x), None

    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    abstract = jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((2, 8)), None)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    where = shardings({**abstract, "step": 3, "plain": np.zeros(4)}, mesh)
    assert where["params"]["Dense_0"] == {
        "kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")),
        "bias": NamedSharding(mesh, PartitionSpec()),
    }
    assert where["step"] == where["plain"] == NamedSharding(mesh, PartitionSpec())


def test_a_mesh_without_devices():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    assert shardings(_boxed((8, 8), "embed", "mlp"), mesh) == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))


def test_too_many_names():
    with pytest.raises(ValueError, match=r"name 2 dimensions, the leaf has shape \(8,\)"):
        shardings(_boxed((8,), "embed", "mlp"), make_mesh({"fsdp": 8}))


def test_default_rules_name_mesh_axes():
    targets = [target for _, target in DEFAULT_RULES if target is not None]
    assert {axis for target in targets for axis in ([target] if isinstance(target, str) else target)} <= set(MESH_AXES)
