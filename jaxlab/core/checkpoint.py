"""Checkpoints that are whole or absent: Orbax for the arrays, a manifest for everything that must be checked.

A step is the folder `<folder>/<step>` with

    arrays/         Orbax (OCDBT), one entry a leaf
    manifest.json   the leaves (name, kind, shape, dtype; Python scalars themselves), `extra`, and size and CRC-32 of
                    every file under arrays/

It is written as `.saving-<step>` and becomes visible by one rename. All processes of a cluster call every method, on a
shared file system.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxlab.core.errors import CheckpointError
from jaxlab.core.untrusted import inside, read_object

T = TypeVar("T")

_FORMAT = "jaxlab.checkpoint/1"
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_SCALARS = (bool, int, float, str)


class Checkpointer:
    """Saves and restores pytrees of arrays, PRNG keys and Python scalars, by step.

    A kill at any moment leaves the steps that were there before, whole (a step saved anew changes its place with the
    old one in two renames). What 8 devices saved may be restored on 2.
    """

    def __init__(self, folder: str | os.PathLike, keep: int | None = 3):
        """Makes the folder when first saving.

        Args:
          folder: where the steps lie.
          keep: how many of the newest steps to keep; None keeps all.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected at least 1, or None for all, got {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> tuple[int, ...]:
        """The finished steps, ascending."""
        if not self.folder.is_dir():
            return ()
        found = (path for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())
        return tuple(sorted(int(path.name) for path in found if any(path.iterdir())))

    def latest(self) -> int | None:
        """The newest finished step, or None. Steps whose saving was cut off do not count."""
        return max(self.steps(), default=None)

    def save(self, step: int | np.integer, state: Any, extra: Any = None) -> None:
        """Saves `state` as `step`, and removes the oldest steps beyond `keep`. A step saved before is replaced.

        Args:
          step: a number of at least 0.
          state: a pytree of JAX or numpy arrays, PRNG key arrays, and Python int, float, bool, str.
          extra: any JSON value: the data position, the config.

        Raises:
          TypeError: a leaf, or `extra`, that cannot be saved.
        """
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step: expected an integer of at least 0, got {step!r}")
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra: expected a JSON value: {error}") from error
        named = _named(state)
        leaves = {name: _describe(name, leaf) for name, leaf in named}
        arrays = {name: _savable(leaf) for name, leaf in named if _in_orbax(leaves[name])}
        temporary = self.folder / f".saving-{step}"
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".saving-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        jax.block_until_ready(state)  # what failed on the way to the state is told here; in a barrier it would hang
        _barrier(f"save-{step}-begin")
        if arrays:
            _write_arrays(temporary / _ARRAYS, arrays)
        _barrier(f"save-{step}-arrays")
        files = _checksums(temporary)
        if jax.process_index() == 0:
            manifest = {"format": _FORMAT, "step": int(step), "leaves": leaves, "files": files, "extra": extra}
            _write_synced(temporary / _MANIFEST, json.dumps(manifest).encode())
            self._publish(temporary, self.folder / str(int(step)))
        _barrier(f"save-{step}-end")

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any]:
        """Restores a step into the structure, dtypes and shardings of `like`.

        Args:
          like: a pytree of arrays, or of `ShapeDtypeStruct`s with or without shardings (without: the first local
            device), and Python scalars. A numpy array stands for a numpy array.
          step: which step; default the latest.

        Returns:
          The state, and the `extra` it was saved with.

        Raises:
          FileNotFoundError: there is no such step, or none at all.
          CheckpointError: the step is damaged, not ours, or does not fit `like`; the message names folder, step, leaf.
        """
        path, where = self._find(step)
        wanted = _named(like)
        manifest = _agree(lambda: _checked_manifest(path, dict(wanted), where), where)
        saved = manifest["leaves"]
        arrays = _read_arrays(path / _ARRAYS, {name: leaf for name, leaf in wanted if _in_orbax(saved[name])}, where)
        values = [_as_wanted(name, arrays.get(name), saved[name], leaf) for name, leaf in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), values), manifest["extra"]

    def extra(self, step: int | None = None) -> Any:
        """What a step, by default the latest, was saved with, for who needs it to know what to restore.

        Raises:
          FileNotFoundError: there is no such step, or none at all.
          CheckpointError: the step is damaged or not ours; the message names folder and step.
        """
        path, where = self._find(step)
        return _agree(lambda: _manifest(path, where), where)["extra"]

    def _find(self, step: int | None) -> tuple[Path, str]:
        """The folder of a step, and how messages name it."""
        step = self.latest() if step is None else int(step)
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; steps there: {known}")
        return self.folder / str(step), f"checkpoint {self.folder}, step {step}"

    def _publish(self, temporary: Path, final: Path) -> None:
        """The one rename, then the removal of what is too old, each folder renamed away before it is emptied."""
        replaced = [_hide(final)] if final.exists() else []
        os.rename(temporary, final)
        _sync_folder(self.folder)
        outdated = self.steps()[: -self.keep] if self.keep is not None else ()
        for hidden in (*replaced, *(_hide(self.folder / str(old)) for old in outdated)):
            shutil.rmtree(hidden)


def _hide(step: Path) -> Path:
    """Renames a step so that it no longer counts; should its removal be cut off, the next save sees to it."""
    hidden = step.with_name(f".saving-removed-{step.name}")
    os.rename(step, hidden)
    return hidden


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with their paths, such as `params/blocks_0/attn/q/kernel`."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/") or "value", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    if len({name for name, _ in named}) != len(named):
        raise ValueError("state: two leaves have the same path; dictionary keys must differ as text, and hold no '/'")
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """What the manifest says of a leaf."""
    if type(leaf) in _SCALARS:
        return {"kind": "scalar", "dtype": type(leaf).__name__, "shape": [], "value": leaf}
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.dtype != object:
        return {"kind": "key" if _is_key(leaf) else "array", "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    raise TypeError(
        f"state: leaf {name!r} is {type(leaf).__name__}, expected an array, a PRNG key, int, float, bool or str"
    )


def _in_orbax(entry: Mapping[str, Any]) -> bool:
    """Scalars and empty arrays, which Orbax refuses, are in the manifest alone."""
    return entry["kind"] != "scalar" and math.prod(entry["shape"]) > 0


def _savable(leaf: Any) -> Any:
    """Several processes write a global array together; what each has for itself is written by the first, from numpy."""
    array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(array, jax.Array) and not (jax.process_count() > 1 and array.is_fully_addressable):
        return array
    return np.asarray(array)


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))


def _read_arrays(path: Path, leaves: Mapping[str, Any], where: str) -> dict[str, Any]:
    import orbax.checkpoint as ocp
    from etils import epath

    if not leaves:
        return {}
    arguments = {}
    for name, like in leaves.items():
        sharding = _read_sharding(like)
        if sharding is None:
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            arguments[name] = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    item = dict.fromkeys(leaves, 0)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        _check_stored(handler.metadata(epath.Path(path)).tree, leaves)  # a Checkpointer's own would swallow errors
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments))
    except Exception as error:
        raise CheckpointError(f"{where}: the arrays cannot be read: {error}") from error


def _check_stored(stored: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Compares what the files tell of the arrays with what is wanted: reading takes the memory that they tell.

    Orbax never writes chunks that are larger than their array; unpacking one of any size takes its memory, too.
    """
    for name, like in leaves.items():
        shape, dtype = tuple(like.shape), like.dtype
        if _is_key(like):
            shape, dtype = (*shape, *dtype._impl.key_shape), np.dtype(np.uint32)
        found = stored[name]
        got = (tuple(found.shape), str(np.dtype(found.dtype)))
        if got != (shape, str(dtype)):
            raise ValueError(f"leaf {name!r} is stored as {_text(got)}, expected {_text((shape, str(dtype)))}")
        chunks = found.storage.chunk_shape
        if len(chunks) != len(shape) or any(chunk > size for chunk, size in zip(chunks, shape)):
            raise ValueError(f"leaf {name!r} of shape {shape} is stored in chunks of {chunks}")


def _read_sharding(like: Any) -> Sharding | None:
    """The sharding to read into; None: read all of it as numpy, then place it."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or (isinstance(like, jax.Array) and not like.committed):
        return None
    if jax.process_count() > 1 and sharding.is_fully_addressable:
        return None
    if _is_key(like) and isinstance(sharding, NamedSharding):  # key data has one more dimension, never split
        spec = (*sharding.spec, *[None] * (like.ndim + 1 - len(sharding.spec)))
        return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
    return sharding


def _as_wanted(name: str, raw: Any, entry: Mapping[str, Any], like: Any) -> Any:
    """The leaf in the form of `like`. What is not committed to a device there is not committed here."""
    if type(like) in _SCALARS:
        return entry["value"]
    if raw is None and _is_key(like):
        raw = np.zeros((*like.shape, *like.dtype._impl.key_shape), np.uint32)
    elif raw is None:
        raw = np.full(like.shape, entry.get("value", 0), like.dtype)
    if isinstance(like, np.generic):
        return raw[()]
    if isinstance(like, np.ndarray):
        return raw
    if isinstance(raw, jax.Array):
        return jax.random.wrap_key_data(raw, impl=_key_implementation(like)) if _is_key(like) else raw
    raw = jnp.asarray(raw)
    value = jax.random.wrap_key_data(raw, impl=_key_implementation(like)) if _is_key(like) else raw
    sharding = getattr(like, "sharding", None)
    committed = like.committed if isinstance(like, jax.Array) else sharding is not None
    return jax.device_put(value, sharding) if committed else value


def _key_implementation(like: Any) -> Any:
    return like.dtype._impl.name  # a ShapeDtypeStruct has no other way to say it; `jax.random.key_impl` wants an array


def _checked_manifest(path: Path, wanted: Mapping[str, Any], where: str) -> dict[str, Any]:
    manifest = _manifest(path, where)
    _check_leaves(manifest["leaves"], wanted, where)
    _check_files(path, manifest["files"], where)
    return manifest


def _manifest(path: Path, where: str) -> dict[str, Any]:
    try:
        manifest = read_object(path / _MANIFEST)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{where}: {_MANIFEST} is missing; this is no checkpoint of ours, or a damaged one"
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where}: {_MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{where}: {_MANIFEST} is not of format {_FORMAT!r}")
    _check_form(path, manifest, f"{where}: {_MANIFEST}")
    return manifest


def _check_form(path: Path, manifest: Mapping[str, Any], where: str) -> None:
    """Types, sizes, and names of files that stay below the folder of the arrays."""
    leaves, files = manifest.get("leaves"), manifest.get("files")
    if not isinstance(leaves, dict) or not isinstance(files, dict) or "extra" not in manifest:
        raise CheckpointError(f"{where}: expected leaves and files by name, and extra")
    for name, entry in leaves.items():
        if not _is_described(entry):
            raise CheckpointError(f"{where}: leaf {name!r}: expected kind, dtype and shape, got {str(entry)[:80]}")
    for name, sums in files.items():
        try:
            file = inside(path, name, "file")
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if path / _ARRAYS not in file.parents:
            raise CheckpointError(f"{where}: file: expected a path below {path / _ARRAYS}, got {name!r}")
        if not _are_sizes(sums) or len(sums) != 2:
            raise CheckpointError(f"{where}: file {name}: expected size and CRC-32, got {str(sums)[:80]}")


def _is_described(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not _are_sizes(entry.get("shape")):
        return False
    if entry.get("kind") == "scalar":
        value = entry.get("value")
        return type(value) in _SCALARS and type(value).__name__ == entry["dtype"] and not entry["shape"]
    return entry.get("kind") in ("array", "key")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_leaves(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    def some(names: list[str]) -> str:
        return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    if missing or unexpected:
        parts = [f"leaf {some(missing)} is wanted but not saved"] if missing else []
        parts += [f"leaf {some(unexpected)} is saved but not wanted"] if unexpected else []
        raise CheckpointError(f"{where}: {'; '.join(parts)}")
    for name, like in wanted.items():
        entry = saved[name]
        if type(like) in _SCALARS:
            got, expected = entry["kind"], "scalar"
            if got == expected:
                got, expected = entry["dtype"], type(like).__name__
        elif not hasattr(like, "shape"):
            raise TypeError(
                f"like: leaf {name!r} is {type(like).__name__}, expected an array, ShapeDtypeStruct or scalar"
            )
        elif entry["kind"] == "scalar":
            got, expected = _scalar_as(entry, like), (tuple(like.shape), str(like.dtype))
        else:
            got, expected = (tuple(entry["shape"]), entry["dtype"]), (tuple(like.shape), str(like.dtype))
        if got != expected:
            raise CheckpointError(f"{where}: leaf {name!r} was saved as {_text(got)}, expected {_text(expected)}")


def _scalar_as(entry: Mapping[str, Any], like: Any) -> Any:
    """A saved Python number may be wanted as a zero-dimensional array of its kind, as `jax.eval_shape` describes it."""
    kind = {"int": jnp.integer, "float": jnp.floating, "bool": jnp.bool_}.get(entry["dtype"])
    fits = kind is not None and like.shape == () and jnp.issubdtype(like.dtype, kind)
    if fits and entry["dtype"] == "int":
        limits = jnp.iinfo(like.dtype)
        fits = limits.min <= entry["value"] <= limits.max
    return ((), str(like.dtype)) if fits else f"Python {entry['dtype']} {str(entry['value'])[:40]}"


def _text(described: Any) -> str:
    return f"{described[1]}{list(described[0])}" if isinstance(described, tuple) else str(described)


def _array_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / _ARRAYS).rglob("*") if file.is_file())


def _share(items: list[Any]) -> list[Any]:
    """This process's part of a job that the processes split."""
    return items[jax.process_index() :: jax.process_count()]


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _checksums(path: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of the arrays; each process reads a part, the first collects them."""
    own = {str(file.relative_to(path)): [file.stat().st_size, _crc(file)] for file in _share(_array_files(path))}
    if jax.process_count() == 1:
        return own
    (path / f"sums.{jax.process_index()}").write_text(json.dumps(own))
    _barrier("checksums")
    sums = {}
    if jax.process_index() == 0:
        for file in sorted(path.glob("sums.*")):
            sums |= json.loads(file.read_text())
            file.unlink()
    return sums


def _check_files(path: Path, sums: Mapping[str, list[int]], where: str) -> None:
    for name, (size, _) in sums.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{where}: file {name} is missing")
        if (found := file.stat().st_size) != size:
            raise CheckpointError(f"{where}: file {name} is truncated or changed: got {found} bytes, expected {size}")
    for name in _share(sorted(sums)):
        if _crc(path / name) != sums[name][1]:
            raise CheckpointError(f"{where}: file {name} is damaged: its CRC-32 differs from that of the save")


def _agree(check: Callable[[], T], where: str) -> T:
    """Runs a check in every process; when one fails all do, for the others would wait for it in the reading."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = check()
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failure is None and failed.any():
            failure = CheckpointError(f"{where}: refused by process {int(np.argmax(failed))}, which tells why")
    if failure is not None:
        raise failure
    return result


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxlab.checkpoint.{name}")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
