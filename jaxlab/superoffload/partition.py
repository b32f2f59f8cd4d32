"""ZeRO over a mesh (arXiv:1910.02054): each rank owns one slice of every bucket, the hosts keep the slices of theirs.

A bucket is cut into equal slices, of which rank r has slice r on the mesh; in host memory a process has the slices of
its own ranks end to end, in one array, so that one host step serves all of them. Among several processes these arrays
are the shards of a global one, over a mesh of one CPU a process.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, PyTree

from jaxlab.training.sharding import batch_sharding, place_state

AXES = ("data", "fsdp", "sequence")
"""Mesh axes that hold ranks: batches are shared out over the first two, sequences over the last."""


class Partition:
    """Where buckets, parameters and batches lie: over a mesh, or on one device and the host beside it.

    Attributes:
      mesh: or None.
      ranks: slices of a bucket; 1 without a mesh.
      processes: how many share the slices.
      host: this process's CPU.
      sliced: sharding of a bucket over the ranks; None without a mesh.
      replicated: sharding of what every rank has; None without a mesh.

    Raises:
      ValueError: a mesh of other axes than `AXES`, or one in which the devices of a process are no neighbours, or in
        which a process has more than another.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh, self.ranks, self.processes = mesh, 1, 1
        self.host = jax.local_devices(backend="cpu")[0]
        self.sliced = self.replicated = self._hosts = None
        if mesh is None:
            self._device = jax.local_devices()[0]
            return
        if odd := [axis for axis, size in mesh.shape.items() if size > 1 and axis not in AXES]:
            raise ValueError(f"mesh: expected no axes but {', '.join(AXES)}, got {', '.join(odd)}")
        self.ranks = mesh.size
        self.sliced = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        owners = [device.process_index for device in mesh.devices.flat]
        order = list(dict.fromkeys(owners))
        self.processes = len(order)
        if owners != list(np.repeat(order, len(owners) // self.processes)):
            raise ValueError(f"mesh: expected equally many neighbouring devices of each process, got those of {owners}")
        if self.processes > 1:
            cpus = [next(d for d in jax.devices("cpu") if d.process_index == process) for process in order]
            self._hosts = NamedSharding(Mesh(np.array(cpus), ("process",)), PartitionSpec("process"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self.mesh == other.mesh

    def __hash__(self) -> int:
        return hash(self.mesh)

    def cut(self, bucket: Float[Array, " n"], lengths: Sequence[int]) -> Float[Array, " m"]:
        """A bucket in slices: of each of its pieces, filled up with zeros, every rank has an equal part.

        As leaves are cut, and not what they are joined to, their gradients can be summed straight into the parts.
        """
        if self.ranks == 1:
            return bucket
        pieces = jnp.split(bucket, np.cumsum(lengths)[:-1])
        rows = [jnp.pad(x, (0, -x.shape[0] % self.ranks)).reshape(self.ranks, -1) for x in pieces]
        return jnp.concatenate(rows, axis=1).reshape(-1)

    def local(self, bucket: Array) -> Array:
        """This process's slices of a bucket, on its host; of one on the mesh, they are copied there."""
        if bucket.sharding == self._hosts:
            return bucket.addressable_shards[0].data
        if self.sliced is None or not bucket.sharding.is_equivalent_to(self.sliced, 1):
            return jax.device_put(bucket, self.host)
        shards = sorted(bucket.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        slices = [jax.device_put(shard.data, self.host) for shard in shards]
        return slices[0] if len(slices) == 1 else jnp.concatenate(slices)

    def shared(self, local: Array) -> Array:
        """The bucket whose slices the processes have on their hosts; nothing is copied."""
        if self._hosts is None:
            return local
        return jax.make_array_from_single_device_arrays((local.shape[0] * self.processes,), self._hosts, [local])

    def on_device(self, local: Array) -> Array:
        """From this process's slices, on its host, to each rank its slice."""
        if self.sliced is None:
            return jax.device_put(local, self._device)
        if self.processes == 1:
            return jax.device_put(local, self.sliced)
        whole = (local.shape[0] * self.processes,)
        return jax.make_array_from_process_local_data(self.sliced, np.asarray(local), whole)

    def on_hosts(self, size: int) -> Sharding:
        """Where the hosts keep a bucket of `size` elements: its slices, or all of one that they cannot share."""
        if self._hosts is None:
            return SingleDeviceSharding(self.host)
        return self._hosts if size % self.processes == 0 else NamedSharding(self._hosts.mesh, PartitionSpec())

    def on_all_hosts(self, function: Any) -> Any:
        """Compiles buckets -> buckets of this partition, both on the hosts."""
        return jax.jit(function, out_shardings=self._hosts)

    def lay(self, bucket: Array, sharding: Sharding) -> Array:
        """A bucket on the hosts, where `sharding` says: it stays, or goes to the ranks."""
        return bucket if bucket.sharding.is_equivalent_to(sharding, 1) else self.on_device(self.local(bucket))

    def whole(self, bucket: Array) -> Array:
        """All of a bucket on this host; collective."""
        if self.processes == 1:
            return jax.device_put(bucket, self.host)
        return jax.device_put(multihost_utils.process_allgather(bucket, tiled=True), self.host)

    def replicate(self, tree: PyTree) -> PyTree:
        """A tree on every rank; processes pass the same values, or arrays that lie on the mesh."""
        if self.mesh is None:
            return tree
        tree = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), tree)
        return place_state(tree, jax.tree.map(lambda _: self.replicated, tree))

    def place_batch(self, batch: PyTree) -> PyTree:
        """Axis 0 over `data` and `fsdp`, axis 1 over `sequence` where that divides it; arrays on the mesh stay.

        Every process passes the same whole batch, or such arrays.

        Raises:
          ValueError: an axis 0 that its ranks do not divide.
        """
        mesh = self.mesh
        if mesh is None:
            return batch

        def sharding(leaf: Any) -> NamedSharding:
            if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh:
                return leaf.sharding
            shape = np.shape(leaf)
            spec = (*batch_sharding(mesh, shape).spec, *(None,) * len(shape))[: len(shape)]
            if len(shape) > 1 and "sequence" in mesh.shape and shape[1] % mesh.shape["sequence"] == 0:
                spec = (spec[0], "sequence", *spec[2:])
            return NamedSharding(mesh, PartitionSpec(*spec))

        batch = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), batch)
        return place_state(batch, jax.tree.map(sharding, batch))

    def over_ranks(self, function: Any, sliced: int) -> Any:
        """Compiles function(*slices, everywhere) -> slices, the first `sliced` arguments of each rank, the last of all.

        The first argument is consumed.
        """
        if self.mesh is not None:
            axes = PartitionSpec(self.mesh.axis_names)
            specs = {"in_specs": (*(axes,) * sliced, PartitionSpec()), "out_specs": axes}
            function = jax.shard_map(function, mesh=self.mesh, **specs, check_vma=False)
        return jax.jit(function, donate_argnums=0)

    def reduced(self, function: Any) -> Any:
        """Compiles function(slices, everywhere, axis_name) -> what all ranks have; it sums over the axes."""
        if self.mesh is None:
            return jax.jit(functools.partial(function, axis_name=None))
        axes = PartitionSpec(self.mesh.axis_names)
        specs = {"in_specs": (axes, PartitionSpec()), "out_specs": PartitionSpec()}
        function = functools.partial(function, axis_name=self.mesh.axis_names)
        return jax.jit(jax.shard_map(function, mesh=self.mesh, **specs, check_vma=False))


def uncut(bucket: Float[Array, " m"], lengths: Sequence[int], ranks: int) -> Float[Array, " n"]:
    """The bucket that `Partition.cut` cut for so many ranks."""
    if ranks == 1:
        return bucket
    widths = [-(-length // ranks) for length in lengths]
    columns = jnp.split(bucket.reshape(ranks, -1), np.cumsum(widths)[:-1], axis=1)
    return jnp.concatenate([x.reshape(-1)[:length] for x, length in zip(columns, lengths)])
