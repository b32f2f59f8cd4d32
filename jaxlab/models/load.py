"""Weights on disk: a strict, lazy reader of tensor files, and the tables that say where each tensor goes.

`open_tensors` gives the tensors of a safetensors file, a folder (single file or sharded with an index) or a GGUF file
by name, without reading any of them. A `Leaf` of a key table says which tensors make up one parameter and how their
layout differs; `check` compares a table with a file before a byte of weights is read, and `fill` reads one leaf
straight into its stacked, cast and sharded place. Streaming readers (one layer, one expert) use `read_part`.

Example:
    with open_tensors("folder") as tensors:
        tensors.shape("model.norm.weight"), tensors["model.norm.weight"]
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core.memory import aligned
from jaxlab.core.untrusted import read_object

Select = tuple[slice, ...]


class Tensors:
    """Tensors by name, read when asked for. `where` names the file or folder in messages.

    Subclasses set `where` and `_entries` (by name) and give `shape`, `dtype` and `read`.
    """

    where: str
    _entries: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        raise NotImplementedError

    def dtype(self, name: str) -> np.dtype:
        """Dtype in which `read` gives a tensor, from the header alone."""
        raise NotImplementedError

    def read(self, name: str, select: Select = ()) -> np.ndarray:
        """A tensor, or the part of it that `select` (one slice for each leading dimension) leaves."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the files."""

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(f"{self.where} has no tensor {name!r}")
        return self.read(name)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


class SafetensorsTensors(Tensors):
    """One or several safetensors files as one set of tensors.

    Args:
        files: tensor name -> file, or a list of files that each say what they hold.
        where: for messages.

    Raises:
        ValueError: a file is damaged, or holds not what the index says.
    """

    def __init__(self, files: Mapping[str, Path] | Sequence[Path], where: Path):
        self.where = str(where)
        self._handles: dict[Path, Any] = {}
        self._entries = {}
        for path in sorted(set(files.values())) if isinstance(files, Mapping) else files:
            handle = self._open(path)
            held = set(handle.keys())
            listed = {name for name, file in files.items() if file == path} if isinstance(files, Mapping) else held
            if held != listed:
                raise ValueError(
                    f"{path} does not hold what the index of {where} says: "
                    f"absent {sorted(listed - held)}, not listed {sorted(held - listed)}"
                )
            for name in held:
                if name in self._entries:
                    raise ValueError(f"tensor {name!r} is in both {self._entries[name]} and {path}")
                self._entries[name] = path

    def _open(self, path: Path) -> Any:
        import safetensors

        try:
            handle = safetensors.safe_open(str(path), framework="numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        self._handles[path] = handle
        return handle

    def _slice(self, name: str) -> Any:
        return self._handles[self._entries[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header alone."""
        stored = self._slice(name).get_dtype()
        known = {"BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "BOOL": np.bool_}
        if stored in known:
            return np.dtype(known[stored])
        kinds = {"F": "float", "I": "int", "U": "uint"}
        try:
            return np.dtype(kinds[stored[0]] + stored[1:])
        except (KeyError, TypeError):
            raise NotImplementedError(f"{self.where}: tensor {name!r} has dtype {stored}, which is not read") from None

    def read(self, name: str, select: Select = ()) -> np.ndarray:
        """A tensor, or the part of it that `select` leaves; only that part is read from disk."""
        if not select:
            return self._handles[self._entries[name]].get_tensor(name)
        return self._slice(name)[select]

    def close(self) -> None:
        """Lets go of the files."""
        self._handles.clear()


def open_tensors(source: str | os.PathLike[str], stem: str = "model") -> Tensors:
    """Opens weights without reading them.

    Args:
        source: a `.safetensors` or `.gguf` file (a GGUF's tensors keep its own names), or a folder with
            `<stem>.safetensors` or `<stem>.safetensors.index.json`.
        stem: "model" in language models, "diffusion_pytorch_model" in diffusers folders.

    Raises:
        FileNotFoundError: no such file, naming the places searched; or a shard that the index names is absent.
        ValueError: damaged file or index.
    """
    path = Path(source)
    if path.is_dir():
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        if single.is_file():
            return SafetensorsTensors([single], path)
        if not index.is_file():
            raise FileNotFoundError(f"no weights: neither {single} nor {index} exists")
        return SafetensorsTensors(_read_index(index), path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights: {path} does not exist")
    if path.suffix == ".gguf":
        from jaxlab.models.gguf import GgufFile

        return GgufFile(path)
    return SafetensorsTensors([path], path)


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = read_object(index)["weight_map"]
        files = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    outside = sorted({str(file) for file in files.values() if file.parent != index.parent})
    if outside:
        raise ValueError(f"{index} names shards outside its folder: {outside}")
    absent = sorted({str(file) for file in files.values() if not file.is_file()})
    if absent:
        raise FileNotFoundError(f"{index} names shards that do not exist: {', '.join(absent)}")
    return files


@dataclass(frozen=True)
class Part:
    """One stored tensor, or a piece of one, and its place in a leaf.

    Attributes:
        name: of the tensor in the file.
        index: leading indices into the leaf: (), (layer,) or (layer, expert).
        select: slices of the stored tensor that are this part; () = all of it.
        file_shape: of the whole stored tensor when `select` takes a piece; None = the leaf's stored shape.
    """

    name: str
    index: tuple[int, ...] = ()
    select: Select = ()
    file_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Leaf:
    """One parameter and the stored tensors it is stacked from.

    Attributes:
        path: its place in the parameter tree, "blocks_0/attn/q/kernel".
        shape: its full shape.
        parts: they tile the leaf.
        stored: shape of each part on disk.
        transpose: stored matrices are `[out, in]`, ours `[in, out]` with the axes of either side unfolded; or the
            stored axes in the order of ours, as `np.transpose` takes them.
    """

    path: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stored: tuple[int, ...]
    transpose: bool | tuple[int, ...] = False

    def piece_shape(self) -> tuple[int, ...]:
        """Shape of one part in our layout."""
        return self.shape[len(self.parts[0].index) :]

    def ours(self, stored: np.ndarray) -> np.ndarray:
        """A stored part in our layout (a view)."""
        stored = stored.reshape(self.stored)
        return (stored.transpose(self._order()) if self.transpose else stored).reshape(self.piece_shape())

    def theirs(self, piece: np.ndarray) -> np.ndarray:
        """The inverse of `ours`."""
        if not self.transpose:
            return piece.reshape(self.stored)
        order = self._order()
        return piece.reshape([self.stored[axis] for axis in order]).transpose(np.argsort(order))

    def _order(self) -> tuple[int, ...]:
        return self.transpose if isinstance(self.transpose, tuple) else tuple(range(len(self.stored)))[::-1]


def check(
    tensors: Tensors,
    table: Iterable[Leaf],
    ignore: Callable[[str], bool] = lambda name: False,
    *,
    most: int | None = None,
) -> None:
    """Compares a file's header with a table.

    Args:
        tensors: the file.
        table: everything that will be read.
        ignore: names that the file may hold for no leaf.
        most: names that a message lists of each kind, with their number; None: all of them.

    Raises:
        KeyError: missing and unexpected names.
        ValueError: shapes that differ.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for leaf in table:
        expected |= {part.name: part.file_shape or leaf.stored for part in leaf.parts}
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(name for name in set(tensors) - set(expected) if not ignore(name))
    if missing or unexpected:
        kinds = {"missing": missing, "unexpected": unexpected}
        listed = [f"{kind} weights {_first(names, most)}" for kind, names in kinds.items()]
        raise KeyError(f"{tensors.where}: {', '.join(listed)}")
    wrong = [
        f"{name} expected {shape}, got {tensors.shape(name)}"
        for name, shape in sorted(expected.items())
        if tensors.shape(name) != shape
    ]
    if wrong:
        rest = f"; and {len(wrong) - most} more" if most is not None and len(wrong) > most else ""
        raise ValueError(f"{tensors.where}: wrong shapes: {'; '.join(wrong[:most])}{rest}")


def _first(names: list[str], most: int | None) -> str:
    return str(names) if most is None or len(names) <= most else f"{names[:most]} and {len(names) - most} more"


def read_part(tensors: Tensors, leaf: Leaf, *index: int) -> np.ndarray:
    """One part of a leaf in our layout and the stored dtype: `read_part(tensors, leaf, layer, expert)`."""
    for part in leaf.parts:
        if part.index == index:
            return leaf.ours(tensors.read(part.name, part.select))
    raise IndexError(f"{leaf.path} has no part {index}; its shape is {leaf.shape}")


Region = tuple[tuple[int, int], ...]


def check_floating(**dtypes: Any) -> None:
    """Raises ValueError unless each is a floating dtype; the keywords are the names that it tells."""
    for name, dtype in dtypes.items():
        try:
            known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"{name}: expected a floating dtype such as float32 or bfloat16, got {dtype!r}")


def fill(tensors: Tensors, leaf: Leaf, dtype: Any, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Reads a leaf into its place.

    Each stored tensor is read once and copied into the slices that this process's devices hold; what none of them
    holds (an expert of another host) is never read, and the whole leaf exists on the host only where it is unsharded.

    Args:
        tensors: the file.
        leaf: what to read.
        dtype: of the result.
        sharding: of the result; None = the default device.
    """
    dtype = jnp.dtype(dtype)
    if sharding is None:
        placement: dict[Any, Region] = {None: tuple((0, size) for size in leaf.shape)}
    else:
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        placement = {device: _region(index or (), leaf.shape) for device, index in indices.items()}
    buffers = {region: aligned([hi - lo for lo, hi in region], dtype) for region in set(placement.values())}
    for part in leaf.parts:
        depth = len(part.index)
        takers = [
            region
            for region in buffers
            if all(lo <= i < hi for i, (lo, hi) in zip(part.index, region[:depth]))
        ]  # fmt: skip
        if not takers:
            continue
        piece = leaf.ours(tensors.read(part.name, part.select))
        for region in takers:
            inside = tuple(i - lo for i, (lo, _) in zip(part.index, region[:depth]))
            buffers[region][inside] = piece[tuple(slice(lo, hi) for lo, hi in region[depth:])]
    if sharding is None:
        return jax.device_put(buffers[placement[None]])
    arrays = [jax.device_put(buffers[region], device) for device, region in placement.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    index = tuple(index) + (slice(None),) * (len(shape) - len(index))
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat
