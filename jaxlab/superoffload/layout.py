"""Which leaf lies where in which bucket, for all segments of a network together."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxlab.superoffload.bucket import BucketSpec, fill, flatten, make_buckets, marks, pieces_of, unflatten
from jaxlab.superoffload.partition import Partition, uncut

Gradients = Iterable[tuple[int, tuple[Array, ...]]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The buckets of a tree of parameters, cut into slices.

    Attributes:
      specs: of each segment; one for a network that is no `Segmented`.
      pieces: of a `Segmented` network with its head; None for another.
      partition: how the buckets are shared.
    """

    specs: tuple[BucketSpec, ...]
    pieces: int | None
    partition: Partition

    @classmethod
    def of(
        cls, params: PyTree, pieces: int | None, partition: Partition, decay_mask: PyTree | None = None, **settings: Any
    ) -> "Layout":
        """The layout of parameters; leaves that are not floating are frozen, those that do not decay lie apart.

        Args:
          params: a tree; with pieces, a tuple of trees.
          pieces: as for the class.
          partition: as for the class.
          decay_mask: a tree of bools like params, or a prefix of one; None: every leaf decays.
          **settings: of `make_buckets`.

        Raises:
          ValueError: params that are no such tuple, a mask of another structure.
        """
        parts = _parts(params, pieces)
        decays = marks("decay_mask", True if decay_mask is None else decay_mask, params)
        apart = _parts(jax.tree.map(lambda leaf: not leaf, decays), pieces)
        specs = (make_buckets(x, trainable=_floating(x), apart=alone, **settings) for x, alone in zip(parts, apart))
        return cls(tuple(specs), pieces, partition)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Segment, and number in it, of every bucket."""
        return [(s, b) for s, spec in enumerate(self.specs) for b in range(spec.n_buckets)]

    @property
    def decays(self) -> tuple[bool, ...]:
        """Of every bucket whether its leaves decay."""
        return tuple(not apart for spec in self.specs for apart in spec.holds_apart)

    def parts(self, tree: PyTree) -> tuple[PyTree, ...]:
        """A tree by segment.

        Raises:
          ValueError: no tuple with one entry a segment, where there are several.
        """
        return _parts(tree, self.pieces)

    def cut(self, tree: PyTree) -> tuple[Array, ...]:
        """The buckets of a tree, in slices."""
        return sum((cut(part, spec, self.partition) for part, spec in zip(self.parts(tree), self.specs)), ())

    def join(self, buckets: Sequence[Array], like: PyTree | None = None, dtype: Any = jnp.float32) -> PyTree:
        """The tree that these buckets hold, in one dtype; frozen leaves come from `like`."""
        likes = [None] * len(self.specs) if like is None else self.parts(like)
        trees, todo = [], iter(buckets)
        for spec, part in zip(self.specs, likes):
            dtypes = tuple(jnp.dtype(dtype) if i in spec.order else found for i, found in enumerate(spec.dtypes))
            whole = [uncut(bucket, lengths, self.partition.ranks) for lengths, bucket in zip(lengths_of(spec), todo)]
            trees.append(unflatten(whole, replace(spec, dtypes=dtypes), part))
        return trees[0] if self.pieces is None else tuple(trees)

    def by_segment(self, buckets: Sequence[Array]) -> list[tuple[int, tuple[Array, ...]]]:
        """Buckets as a backward pass gives them, last segment first."""
        found: list[list[Array]] = [[] for _ in self.specs]
        for (segment, _), bucket in zip(self.places, buckets):
            found[segment].append(bucket)
        return [(segment, tuple(found[segment])) for segment in reversed(range(len(found)))]

    def cut_again(self, buckets: Sequence[Array], saved: Sequence[Mapping[str, Any]], ranks: int) -> tuple[Array, ...]:
        """The buckets of the same parameters in another layout: `told` by it, and for so many ranks."""
        made: tuple[Array, ...] = ()
        todo = iter(buckets)
        for spec, old in zip(self.specs, saved):
            cut = zip(old["buckets"], old["filled"], todo)
            parts = [uncut(bucket, pieces, ranks)[:filled] for pieces, filled, bucket in cut]
            if not parts:
                continue
            ends = np.cumsum([math.prod(shape) for _, shape in old["leaves"]])
            leaves = jnp.split(jnp.concatenate(parts), ends[:-1])
            found = {path: leaf for (path, _), leaf in zip(old["leaves"], leaves)}
            new = fill({i: found[spec.paths[i]] for i in spec.order}, spec)
            made += tuple(self.partition.cut(bucket, pieces) for bucket, pieces in zip(new, lengths_of(spec)))
        return made

    def told(self) -> list[dict[str, Any]]:
        """For JSON, by segment: leaves in order, the pieces that buckets are cut in, and how far leaves fill them."""
        return [
            {
                "buckets": lengths_of(spec),
                "filled": [sum(stop - start for _, start, stop in pieces) for pieces in pieces_of(spec)],
                "leaves": [[spec.paths[i], list(spec.shapes[i])] for i in spec.order],
            }
            for spec in self.specs
        ]

    def trained(self) -> "Layout":
        """The same buckets, of a tree with `optax.MaskedNode` in the places of frozen leaves."""
        return replace(self, specs=tuple(_trained(spec) for spec in self.specs))


def cut(tree: PyTree, spec: BucketSpec, partition: Partition) -> tuple[Array, ...]:
    """One segment's buckets, in slices."""
    return tuple(partition.cut(bucket, lengths) for bucket, lengths in zip(flatten(tree, spec), lengths_of(spec)))


def lengths_of(spec: BucketSpec) -> list[list[int]]:
    """Elements of the pieces of leaves in each bucket; the padding is one more piece."""
    pieces = [[stop - start for _, start, stop in bucket] for bucket in pieces_of(spec)]
    return [[*found, size - sum(found)] if size > sum(found) else found for found, size in zip(pieces, spec.sizes)]


def _parts(tree: PyTree, pieces: int | None) -> tuple[PyTree, ...]:
    if pieces is None:
        return (tree,)
    if not isinstance(tree, tuple) or len(tree) != pieces:
        got = f"a tuple of {len(tree)}" if isinstance(tree, tuple) else type(tree).__name__
        raise ValueError(f"params: expected a tuple of {pieces}, one a piece and one for the head, got {got}")
    return tree


def _floating(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: bool(jnp.issubdtype(jnp.result_type(x), jnp.floating)), tree)


def _trained(spec: BucketSpec) -> BucketSpec:
    kept = sorted(spec.order)
    number = {i: at for at, i in enumerate(kept)}
    masked = [0 if i in number else optax.MaskedNode() for i in range(len(spec.paths))]
    return replace(
        spec,
        groups=None if spec.groups is None else tuple(tuple(number[i] for i in group) for group in spec.groups),
        order=tuple(number[i] for i in spec.order),
        shapes=tuple(spec.shapes[i] for i in kept),
        dtypes=tuple(spec.dtypes[i] for i in kept),
        paths=tuple(spec.paths[i] for i in kept),
        treedef=jax.tree.structure(jax.tree.unflatten(spec.treedef, masked)),
        apart=tuple(number[i] for i in spec.apart),
    )
