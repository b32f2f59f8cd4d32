"""What must hold on 8 devices, whether one process has them all or two have four each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import Checkpointer, CheckpointError, MetricsLogger, distributed, jsonl, make_mesh, shardings


def _sharded(array, mesh, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _assert_holds(array, expected):
    """The shards that this process has are those of `expected`."""
    assert array.shape == expected.shape
    assert array.addressable_shards
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def case_matmul_over_a_mesh(folder):
    mesh = make_mesh({"fsdp": 2, "tensor": -1})
    assert mesh.shape == {"fsdp": 2, "tensor": 4}
    dense = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp")))
    where = shardings(jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, 4))), mesh)
    assert where["params"]["kernel"].spec == PartitionSpec("fsdp", "tensor")

    def init(key):
        return nn.meta.unbox(dense.init(key, jnp.ones((1, 4))))

    variables = jax.jit(init, out_shardings=where)(jax.random.key(0))
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    total = jax.jit(lambda v, x: dense.apply(v, x).sum())(variables, _sharded(x, mesh, "fsdp"))
    kernel = np.asarray(jax.jit(init)(jax.random.key(0))["params"]["kernel"])
    np.testing.assert_allclose(total.addressable_data(0), (x @ kernel).sum(), rtol=1e-5)


def case_checkpoint_keeps_every_kind_of_leaf(folder):
    mesh = make_mesh({"data": 2, "tensor": 4})
    weights = np.arange(64, dtype=np.float32).reshape(8, 8)
    state = {
        "sharded": _sharded(weights, mesh, "data", "tensor"),
        "replicated": _sharded(weights[0], mesh),
        "local": jnp.arange(3),
        "numpy": np.arange(4),
        "key": jax.random.key(7),
        "step": 12,
    }
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(1, state)
    checkpointer.save(2, state, {"position": 5})
    assert checkpointer.steps() == (2,)
    like = dict(state, sharded=_sharded(0 * weights, mesh, "tensor"))
    restored, extra = checkpointer.restore(like)
    assert extra == {"position": 5}
    assert restored["step"] == 12
    assert restored["sharded"].sharding == like["sharded"].sharding
    _assert_holds(restored["sharded"], weights)
    _assert_holds(restored["replicated"], weights[0])
    np.testing.assert_array_equal(restored["local"], np.arange(3))
    np.testing.assert_array_equal(restored["numpy"], np.arange(4))
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))


def case_eight_devices_restore_on_two(folder):
    mesh = make_mesh({"fsdp": 8})
    weights = np.arange(48, dtype=np.float32).reshape(8, 6)
    keys = jax.jit(
        lambda: jax.random.split(jax.random.key(1), 8), out_shardings=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.save(3, {"weights": _sharded(weights, mesh, "fsdp"), "keys": keys()})
    two = make_mesh({"fsdp": 2}, devices=jax.devices()[::4])  # one of each process, where there are two
    sharding = NamedSharding(two, PartitionSpec("fsdp"))
    restored, _ = checkpointer.restore(
        {
            "weights": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding),
            "keys": jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype, sharding=sharding),
        }
    )
    assert len(restored["weights"].sharding.device_set) == 2
    _assert_holds(restored["weights"], weights)
    expected = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), 8)))
    for shard in restored["keys"].addressable_shards:
        np.testing.assert_array_equal(jax.random.key_data(shard.data), expected[shard.index])


def case_damage_is_an_error_in_every_process(folder):
    mesh = make_mesh({"data": 8})
    checkpointer = Checkpointer(folder / "checkpoints")
    state = {"w": _sharded(np.arange(8.0, dtype=np.float32), mesh, "data")}
    checkpointer.save(0, state)
    if distributed.is_main():
        largest = max((folder / "checkpoints" / "0").rglob("*.ocdbt"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[-1] ^= 1
        largest.write_bytes(content)
    sync_global_devices("damaged")
    with pytest.raises(CheckpointError, match=r"checkpoints, step 0"):
        checkpointer.restore(state)


def case_only_the_main_process_logs(folder):
    with MetricsLogger(folder / "metrics") as logger:
        logger.log(1, {"loss": 2.0})
        logger.log(2, {"loss": jnp.float32(1.5)})
    sync_global_devices("logged")
    assert [row["loss"] for row in jsonl.read(folder / "metrics" / "metrics.jsonl")] == [2.0, 1.5]
