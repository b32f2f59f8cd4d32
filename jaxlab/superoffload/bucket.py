"""Flat float32 buckets of a pytree's trainable leaves: what moves between host and accelerator in one piece."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

_ITEM = 4  # bytes of a float32
SPLITS = ("flat", "param")


@dataclasses.dataclass(frozen=True)
class BucketSpec:
    """How a pytree is cut into buckets; hashable, so it may be a static argument.

    Attributes:
      n_buckets: how many.
      sizes: elements of each, padding included.
      groups: leaf indices of each bucket ('param'), or None: buckets that begin and end within leaves ('flat').
      numel: elements of the trainable leaves together.
      order: trainable leaves in the order in which they lie in the buckets.
      shapes: of all leaves.
      dtypes: of all leaves.
      paths: of all leaves, for messages.
      treedef: structure of the tree.
      apart: leaves that share no bucket with the others, the last in `order`.
    """

    sizes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] | None
    numel: int
    order: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    paths: tuple[str, ...]
    treedef: Any
    apart: tuple[int, ...] = ()

    @property
    def n_buckets(self) -> int:
        """How many buckets there are."""
        return len(self.sizes)

    @property
    def holds_apart(self) -> tuple[bool, ...]:
        """Of each bucket whether its leaves are those that lie `apart`."""
        return tuple(pieces[0][0] in self.apart for pieces in pieces_of(self))


def make_buckets(
    params: PyTree,
    *,
    bucket_bytes: int = 64 << 20,
    split: Literal["flat", "param"] = "flat",
    pad_to: int = 128,
    trainable: PyTree | None = None,
    order: Sequence[int] | None = None,
    apart: PyTree | None = None,
) -> BucketSpec:
    """Plans buckets of `bucket_bytes` of float32 (64 MiB: where a C2C link is saturated, paper).

    'flat' cuts the leaves, end to end, into equal slices; the last is filled with zeros up to a multiple of `pad_to`.
    'param' is DeepSpeed's rule: whole leaves, until a bucket has at least `bucket_bytes`, which it may exceed; no
    padding. Leaves without elements lie in no bucket. Those said to lie `apart` are cut in the same way by themselves,
    into buckets behind the others, so that all of a bucket can be stepped on alike (torch's parameter groups).

    Args:
      params: pytree of arrays, or of anything with shape and dtype.
      bucket_bytes: bytes of a bucket, a multiple of 4.
      split: 'flat' or 'param'.
      pad_to: elements; 'flat' only.
      trainable: a pytree of bools, or a prefix of one; False leaves are frozen and lie in no bucket. None: all.
      order: leaf indices (of `jax.tree.leaves`) in forward order; by default as they are.
      apart: a pytree of bools, or a prefix of one; no bucket has both kinds of leaves. None: none.

    Raises:
      ValueError: bucket_bytes not a positive multiple of 4, unknown split, pad_to < 1, an order that is no permutation
        of the leaves (or of the trainable ones), `trainable` or `apart` of another structure.
      TypeError: a trainable leaf that is not floating, or float64, which float32 would round.
    """
    if not isinstance(bucket_bytes, (int, np.integer)) or bucket_bytes < _ITEM or bucket_bytes % _ITEM:
        raise ValueError(f"bucket_bytes: expected a multiple of {_ITEM}, at least {_ITEM}, got {bucket_bytes!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    if pad_to < 1:
        raise ValueError(f"pad_to: expected a value >= 1, got {pad_to}")
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in named)
    shapes = tuple(tuple(jnp.shape(leaf)) for _, leaf in named)
    dtypes = tuple(jnp.dtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf)) for _, leaf in named)
    trained = jax.tree.leaves(marks("trainable", True if trainable is None else trainable, params))
    alone = jax.tree.leaves(marks("apart", False if apart is None else apart, params))
    for path, dtype, is_trained in zip(paths, dtypes, trained):
        if is_trained and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= _ITEM):
            raise TypeError(f"leaf {path}: a trainable leaf must be floating, of at most 32 bits, got {dtype}")
    leaves = [i for i, is_trained in enumerate(trained) if is_trained]
    if order is not None:
        if sorted(order) not in (leaves, list(range(len(paths)))):
            raise ValueError(f"order: expected a permutation of the {len(paths)} leaf indices, got {tuple(order)}")
        leaves = [int(i) for i in order if trained[i]]
    kinds = [[i for i in leaves if alone[i] == kind] for kind in (False, True)]
    parts = [{i: int(np.prod(shapes[i], dtype=np.int64)) for i in kind} for kind in kinds]
    counts, size = parts[0] | parts[1], int(bucket_bytes) // _ITEM
    if split == "flat":
        sizes, groups = sum((_equal_slices(sum(part.values()), size, pad_to) for part in parts), ()), None
    else:
        groups = sum((_whole_leaves(part, size) for part in parts), ())
        sizes = tuple(sum(counts[i] for i in group) for group in groups)
    numel, order = sum(counts.values()), tuple(counts)
    return BucketSpec(sizes, groups, numel, order, shapes, dtypes, paths, treedef, tuple(kinds[1]))


def flatten(tree: PyTree, spec: BucketSpec) -> tuple[Float[Array, " _"], ...]:
    """The trainable leaves of a tree (parameters, gradients) as float32 buckets; padding is zero.

    Raises:
      ValueError: another structure, or a leaf of another shape; the message names its path.
      TypeError: a leaf that is not floating.
    """
    leaves = _matching(tree, spec)
    return fill({i: jnp.ravel(leaves[i]).astype(jnp.float32) for i in spec.order}, spec)


def fill(flat: Mapping[int, Float[Array, " _"]], spec: BucketSpec) -> tuple[Float[Array, " _"], ...]:
    """Buckets of raveled float32 leaves by their indices; padding is zero."""
    buckets = []
    for pieces in pieces_of(spec):
        parts = [flat[i] if stop - start == flat[i].size else flat[i][start:stop] for i, start, stop in pieces]
        padding = spec.sizes[len(buckets)] - sum(part.size for part in parts)
        parts += [jnp.zeros((padding,), jnp.float32)] if padding else []
        buckets.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts))
    return tuple(buckets)


def unflatten(buckets: Sequence[Float[Array, " _"]], spec: BucketSpec, like: PyTree | None = None) -> PyTree:
    """The tree of which these are the buckets: leaves have the shapes and dtypes of the tree the spec was made of.

    Args:
      buckets: of sizes `spec.sizes`.
      spec: as `make_buckets` made it.
      like: a tree of the same structure, for the frozen leaves.

    Raises:
      ValueError: buckets of other sizes; frozen leaves and no `like`, or one of another structure or shape.
    """
    if [jnp.shape(bucket) for bucket in buckets] != [(size,) for size in spec.sizes]:
        raise ValueError(
            f"buckets: expected sizes {spec.sizes}, got shapes {tuple(jnp.shape(bucket) for bucket in buckets)}"
        )
    leaves: list[Any] = [None] * len(spec.shapes)
    if len(spec.order) < len(leaves):
        if like is None:
            raise ValueError("like: expected a tree that holds the frozen leaves, got None")
        leaves = list(_matching(like, spec, only_shapes=True))
    parts: dict[int, list[Array]] = {i: [] for i in spec.order}
    for bucket, pieces in zip(buckets, pieces_of(spec)):
        at = 0
        for i, start, stop in pieces:
            parts[i].append(bucket[at : at + stop - start])
            at += stop - start
    for i, found in parts.items():
        flat = jnp.concatenate(found) if len(found) > 1 else found[0] if found else jnp.zeros((0,), jnp.float32)
        leaves[i] = flat.reshape(spec.shapes[i]).astype(spec.dtypes[i])
    return jax.tree.unflatten(spec.treedef, leaves)


def marks(name: str, given: PyTree, params: PyTree) -> PyTree:
    """A tree of bools like params, of one or of a prefix of one; `name` is the argument's, for the ValueError."""
    try:
        return jax.tree.map(bool, jax.tree.broadcast(given, params))
    except ValueError as error:
        raise ValueError(f"{name}: expected a tree of bools like params, or a prefix of one ({error})") from error


def _equal_slices(numel: int, size: int, pad_to: int) -> tuple[int, ...]:
    whole, rest = divmod(numel, size)
    return (size,) * whole + ((min(size, -(-rest // pad_to) * pad_to),) if rest else ())


def _whole_leaves(counts: dict[int, int], limit: int) -> tuple[tuple[int, ...], ...]:
    groups, group, size = [], [], 0
    for i, count in counts.items():
        if count:
            group.append(i)
            size += count
        if size >= limit:
            groups.append(tuple(group))
            group, size = [], 0
    return (*groups, tuple(group)) if group else tuple(groups)


def pieces_of(spec: BucketSpec) -> list[list[tuple[int, int, int]]]:
    """For each bucket (leaf, start, stop) of the parts of flat leaves that lie in it, in order."""
    counts = {i: int(np.prod(spec.shapes[i], dtype=np.int64)) for i in spec.order}
    if spec.groups is not None:
        return [[(i, 0, counts[i]) for i in group] for group in spec.groups]
    todo = [(i, 0, counts[i]) for i in reversed(spec.order) if counts[i]]
    apart = frozenset(spec.apart)
    buckets = []
    for size in spec.sizes:
        pieces = []
        while size and todo and (not pieces or (todo[-1][0] in apart) == (pieces[0][0] in apart)):
            i, start, stop = todo.pop()
            if stop - start > size:
                todo.append((i, start + size, stop))
                stop = start + size
            pieces.append((i, start, stop))
            size -= stop - start
        buckets.append(pieces)
    return buckets


def _matching(tree: PyTree, spec: BucketSpec, *, only_shapes: bool = False) -> list[Any]:
    """The leaves of a tree of the spec's structure and shapes."""
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if treedef != spec.treedef:
        paths = [jax.tree_util.keystr(path) for path, _ in named]
        missing, extra = sorted(set(spec.paths) - set(paths)), sorted(set(paths) - set(spec.paths))
        details = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
        told = "; ".join(details) or f"expected {spec.treedef}, got {treedef}"
        raise ValueError(f"tree: not of the structure that the buckets were made for: {told}")
    for path, shape, (_, leaf) in zip(spec.paths, spec.shapes, named):
        if jnp.shape(leaf) != shape:
            raise ValueError(f"leaf {path}: expected shape {shape}, got {jnp.shape(leaf)}")
    if not only_shapes:
        for i in spec.order:
            if not jnp.issubdtype(jnp.result_type(named[i][1]), jnp.floating):
                raise TypeError(f"leaf {spec.paths[i]}: expected a floating dtype, got {jnp.result_type(named[i][1])}")
    return [leaf for _, leaf in named]
