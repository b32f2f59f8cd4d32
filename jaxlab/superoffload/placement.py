"""Where arrays lie: pytrees to host memory and back, and block inputs offloaded between the two passes.

A CPU has one memory, so there the memory kinds are labels and move nothing; on a GPU "pinned_host" is the memory of the
CPU beside it. Arithmetic on an array that lies there is refused or slow: `fetch_tree` it first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

HOST_KINDS = ("pinned_host", "unpinned_host")


def host_sharding(s: Sharding) -> Sharding:
    """The same layout over the same devices, in the pinned host memory beside each of them.

    Args:
        s: any sharding.

    Raises:
        TypeError: not a sharding.
    """
    if not isinstance(s, Sharding):
        raise TypeError(f"s: expected a jax.sharding.Sharding, got {type(s).__name__}")
    return s.with_memory_kind("pinned_host")


def offload_tree(tree: Any) -> Any:
    """The tree in host memory: arrays are moved, abstract ones say that they lie there.

    Works on concrete arrays, on tracers inside `jit`, and on `ShapeDtypeStruct`s that have a sharding (for
    `jaxlab.core.plan`). Layouts over the devices stay.

    Raises:
        ValueError: a `ShapeDtypeStruct` without a sharding.
    """
    return _move(tree, jax.memory.Space.Host)


def fetch_tree(tree: Any) -> Any:
    """The tree in device memory; the inverse of `offload_tree`, for the same kinds of leaves.

    Raises:
        ValueError: a `ShapeDtypeStruct` without a sharding.
    """
    return _move(tree, jax.memory.Space.Device)


def _move(tree: Any, space: jax.memory.Space) -> Any:
    def move(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.device_put(leaf, space)
        if leaf.sharding is None:
            raise ValueError(f"tree{jax.tree_util.keystr(path)}: expected a sharding, got none")
        kind = "pinned_host" if space == jax.memory.Space.Host else "device"
        return leaf.update(sharding=leaf.sharding.with_memory_kind(kind))

    return jax.tree_util.tree_map_with_path(move, tree)


def remat_offload_policy(names: Sequence[str], *, dst: str = "pinned_host") -> Callable[..., Any]:
    """A policy for `jax.checkpoint`: named values wait for the backward pass in host memory, the rest is recomputed.

    Args:
        names: as given to `jax.ad_checkpoint.checkpoint_name`; inside a `scan` only names in its body count.
        dst: "pinned_host" or "unpinned_host".

    Raises:
        ValueError: no names, or an unknown memory.
        TypeError: one string in place of a sequence.
    """
    if isinstance(names, str):
        raise TypeError(f"names: expected a sequence of names, got the string {names!r}")
    if not names:
        raise ValueError("names: expected at least one name, got none")
    if dst not in HOST_KINDS:
        raise ValueError(f"dst: expected one of {', '.join(HOST_KINDS)}, got {dst!r}")
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst=dst,
    )
