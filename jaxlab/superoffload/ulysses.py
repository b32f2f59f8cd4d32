"""DeepSpeed-Ulysses (arXiv:2309.14509): sequences over devices, and inside attention heads over devices instead.

Two exchanges of a tensor's size each turn [S/N, B, H, D] into [S, B, H/N, D] and back, so any attention over the whole
sequence serves unchanged.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from pallas_kernels.flash_attention import flash_attention

Attend = Callable[[Array, Array, Array], Array]


def scatter_heads(x: Float[Array, "..."], axis_name: str, *, seq_axis: int = 0, head_axis: int = 2) -> Array:
    """From a part of the sequence with all heads to the whole sequence with a part of the heads.

    To be called inside `jax.shard_map`. Rank r of N gets heads [rH/N, (r+1)H/N); the sequence is in rank order.

    Args:
        x: such as [S/N, B, H, D].
        axis_name: a mesh axis of N devices.
        seq_axis: of x.
        head_axis: of x.

    Returns:
        Such as [S, B, H/N, D].

    Raises:
        ValueError: the axis is unbound, N does not divide H, or axes that x does not have.
    """
    return _exchange(x, axis_name, split=head_axis, join=seq_axis, what="heads")


def gather_heads(x: Float[Array, "..."], axis_name: str, *, seq_axis: int = 0, head_axis: int = 2) -> Array:
    """The inverse of `scatter_heads`: such as [S, B, H/N, D] -> [S/N, B, H, D].

    Args:
        x: the whole sequence, a part of the heads.
        axis_name: a mesh axis of N devices.
        seq_axis: of x.
        head_axis: of x.

    Raises:
        ValueError: the axis is unbound, N does not divide S, or axes that x does not have.
    """
    return _exchange(x, axis_name, split=seq_axis, join=head_axis, what="positions")


def ulysses_attention(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    axis_name: str,
    attn_fn: Attend,
    seq_axis: int = 0,
    head_axis: int = 2,
) -> Float[Array, "..."]:
    """Attention over a sequence that lies over the devices of an axis.

    To be called inside `jax.shard_map`. Key/value heads that N does not divide are repeated, as few times as it takes
    for every rank to get those that its query heads read.

    Args:
        q: such as [S/N, B, H, D].
        k: likewise with Hkv heads; Hkv divides H, query head h reads head h // (H / Hkv).
        v: shaped as k.
        axis_name: a mesh axis of N devices.
        attn_fn: (q, k, v) -> out, on whole sequences and H/N query heads.
        seq_axis: of all of them.
        head_axis: of all of them.

    Returns:
        Shaped as q.

    Raises:
        ValueError: the axis is unbound, N does not divide H, Hkv does not divide H, or k and v differ in shape.
    """
    ranks = _size(axis_name)
    _check_axes(q, seq_axis, head_axis)
    if k.shape != v.shape or k.ndim != q.ndim:
        raise ValueError(f"k and v: expected one shape with {q.ndim} axes like q, got {k.shape} and {v.shape}")
    heads, kv_heads = q.shape[head_axis], k.shape[head_axis]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if heads % ranks:
        raise ValueError(_indivisible("heads", heads, axis_name, ranks))
    group = heads // kv_heads
    repeats = next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)
    if repeats > 1:
        k, v = (jnp.repeat(x, repeats, axis=head_axis) for x in (k, v))
    where = {"seq_axis": seq_axis, "head_axis": head_axis}
    out = attn_fn(*(scatter_heads(x, axis_name, **where) for x in (q, k, v)))
    return gather_heads(out, axis_name, **where)


@dataclasses.dataclass(frozen=True)
class UlyssesAttention:
    """Attention of a decoder whose sequences lie over a mesh axis: `Decoder(config, attention=UlyssesAttention())`.

    With `jax.set_mesh` of a mesh that has the axis, the decoder is called on whole arrays and lays them out by itself;
    batch and heads stay over the axes that `jaxlab.core.DEFAULT_RULES` gives them. Inside a `shard_map` over the axis
    it is called on this rank's tokens; `positions` must then be given, as no rank can count those of the others.

    Attributes:
        axis_name: the mesh axis.
        implementation: of `flash_attention`.
    """

    axis_name: str = "sequence"
    implementation: str | None = None

    def __call__(
        self,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        *,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        scale: float,
        window: int | None,
    ) -> Float[Array, "b t h d"]:
        """The decoder's attention protocol: causal by index, inside each segment.

        Raises:
            ValueError: no such axis, neither of a `shard_map` nor of the mesh in force; a length or a number of heads
                that its size does not divide.
        """
        del positions  # whoever rotates q and k needs them; who sees whom goes by index
        if _bound(self.axis_name):
            return self._attend(q, k, v, segment_ids, scale, window)
        mesh = jax.sharding.get_abstract_mesh()
        if self.axis_name not in mesh.shape:
            raise ValueError(
                f"axis_name: expected an axis of the mesh in force (jax.set_mesh), {dict(mesh.shape)}, or of an "
                f"enclosing shard_map, got {self.axis_name!r}"
            )
        ranks = mesh.shape[self.axis_name]
        if q.shape[1] % ranks:
            raise ValueError(_indivisible("positions", q.shape[1], self.axis_name, ranks))
        q_spec, kv_spec = self._spec(q, "heads", mesh), self._spec(k, "kv_heads", mesh)
        if q_spec[2] != kv_spec[2]:  # the groups of query heads would not meet their keys
            q_spec, kv_spec = (PartitionSpec(*spec[:2], None, None) for spec in (q_spec, kv_spec))
        attend = functools.partial(self._attend, scale=scale, window=window)
        ids = () if segment_ids is None else (segment_ids,)
        spread = jax.shard_map(
            lambda q, k, v, *ids: attend(q, k, v, ids[0] if ids else None),
            mesh=mesh,
            in_specs=(q_spec, kv_spec, kv_spec, *(PartitionSpec(*q_spec[:2]) for _ in ids)),
            out_specs=q_spec,
        )
        return spread(q, k, v, *ids)

    def _attend(self, q, k, v, segment_ids, scale, window):
        if segment_ids is not None:
            segment_ids = lax.all_gather(segment_ids, self.axis_name, axis=1, tiled=True)
        attend = functools.partial(
            flash_attention, segment_ids=segment_ids, scale=scale, window=window, implementation=self.implementation
        )
        return ulysses_attention(q, k, v, axis_name=self.axis_name, attn_fn=attend, seq_axis=1, head_axis=2)

    def _spec(self, x, heads, mesh):
        rules = (("sequence", self.axis_name), *DEFAULT_RULES)
        box = nn.Partitioned(jax.ShapeDtypeStruct(x.shape, x.dtype), ("batch", "sequence", heads, None))
        spec = shardings(box, mesh, rules).spec
        return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def _exchange(x: Array, axis_name: str, *, split: int, join: int, what: str) -> Array:
    ranks = _size(axis_name)
    split, join = _check_axes(x, split, join)
    if x.shape[split] % ranks:
        raise ValueError(_indivisible(what, x.shape[split], axis_name, ranks))
    return lax.all_to_all(x, axis_name, split_axis=split, concat_axis=join, tiled=True)


def _check_axes(x: Array, first: int, second: int) -> tuple[int, int]:
    if not all(-x.ndim <= axis < x.ndim for axis in (first, second)) or first % x.ndim == second % x.ndim:
        raise ValueError(f"seq_axis and head_axis: expected two axes of shape {x.shape}, got {first} and {second}")
    return first % x.ndim, second % x.ndim


def _indivisible(what: str, count: int, axis_name: str, ranks: int) -> str:
    return f"{what}: expected a multiple of the {ranks} devices of axis {axis_name!r}, got {count}"


def _bound(axis_name: str) -> bool:
    try:
        return lax.axis_size(axis_name) > 0
    except NameError:
        return False


def _size(axis_name: str) -> int:
    if not _bound(axis_name):
        raise ValueError(f"axis {axis_name!r} is not bound: expected to be called inside jax.shard_map over it")
    return lax.axis_size(axis_name)
