"""Features built once and read many times (MegaFold, ahead-of-time cache of the deterministic half of the pipeline).

A record is named by the content that it comes from, so a changed file, option or schema is a miss and nothing is ever
out of date. It is an uncompressed `.npz` beside a JSON manifest (shapes, types, offsets, checksum) that is written
last: without manifest there is no record. `os.replace` puts both in place; writers of one record write the same bytes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core import tasks
from jaxlab.core.data import registry
from jaxlab.megafold.data.featurization import Options, Paths, TemplatePaths, featurize
from jaxlab.megafold.data.mmcif import read_mmcif
from jaxlab.megafold.data.record import read_record, write_record
from jaxlab.megafold.features import FEATURES, RESTYPES

VERSION = 1  # of what `featurize` makes of the same input: raise it with every change of that
_SETTLED_NS = 2_000_000_000  # a file younger than this may change again without a new time stamp
_STALE_S = 3600.0  # an unfinished file older than this was left by a writer that died


class CacheCorruptionError(ValueError):
    """A record of the cache is damaged; the message names it."""


@dataclasses.dataclass
class CacheStats:
    """What a cache did since it was opened.

    Attributes:
      hits: records read.
      misses: records built, damaged ones among them.
      bytes: of the records read and written.
      build_seconds: spent on building.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    build_seconds: float = 0.0


class FeatureCache:
    """Features by the content of their files, in a folder that several processes may share.

    Args:
      folder: where; made if it is not there.
      strict: raise on a damaged record rather than build it anew with a warning.

    Raises:
      PermissionError: (when constructed) the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike, *, strict: bool = False):
        self.folder, self.strict, self.stats = Path(folder), strict, CacheStats()
        self._digests: dict[tuple[Any, ...], str] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._temporary("probe")
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise PermissionError(f"folder: cannot write to {self.folder}: {error}") from error

    def key(
        self,
        path: str | os.PathLike,
        *,
        msas: Paths | None = None,
        templates: TemplatePaths | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The name of a record: a BLAKE2b hash of every input file, every option, and the schema.

        Raises:
          FileNotFoundError: an input file is not there.
          ValueError: an unknown option.
        """
        chosen: dict[str, Any] = dataclasses.asdict(Options.of(options))
        if chosen["ccd"] is not None:
            records = sorted(Path(chosen["ccd"]).glob("*.cif"))
            chosen["ccd"] = {record.name: self._digest(record) for record in records}
        content = {
            "made": _made(),
            "structure": self._digest(path),
            "msas": {chain: self._digest(file) for chain, file in (msas or {}).items()},
            "templates": {chain: [self._digest(file) for file in files] for chain, files in (templates or {}).items()},
            "options": chosen,
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def get(
        self,
        path: str | os.PathLike,
        *,
        msas: Paths | None = None,
        templates: TemplatePaths | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """What `featurize` makes of these inputs, read if it is there, else built and kept.

        Raises:
          CacheCorruptionError: the record is damaged and the cache strict.
          Exception: what reading and building raise; then nothing is kept.
        """
        given: dict[str, Any] = {"msas": msas, "templates": templates, "options": options}
        key = self.key(path, **given)
        try:
            features = self._read(key)
        except CacheCorruptionError as error:
            if self.strict:
                raise
            warnings.warn(f"{error}; it is built anew", stacklevel=2)
            features = None
        if features is None:
            start = time.perf_counter()
            features = featurize(read_mmcif(path), **given)
            self.stats.build_seconds += time.perf_counter() - start
            self.stats.misses += 1
            if self.key(path, **given) == key:  # else a file changed meanwhile
                self._write(key, features)
        else:
            self.stats.hits += 1
        return features

    def precompute(
        self, paths: Iterable[str | os.PathLike | Mapping[str, Any]], workers: int = 1
    ) -> list[tasks.TaskResult]:
        """Builds what is not there yet, in other processes.

        Args:
          paths: structure files, or mappings with the arguments of `get`.
          workers: how many processes.

        Returns:
          For each path its key as `value`, or why there is none as `error`; the work counts in `stats`.
        """
        build = functools.partial(_build, os.fspath(self.folder), self.strict)
        items = ({"path": item} if isinstance(item, str | os.PathLike) else dict(item) for item in paths)
        results = []
        for result in tasks.map(build, items, workers=workers, retries=0):
            key, stats = result.value or (None, {})
            for name, value in stats.items():
                setattr(self.stats, name, getattr(self.stats, name) + value)
            results.append(tasks.TaskResult(result.item["path"], key, result.error))
        return results

    def verify(self) -> list[str]:
        """The keys of the damaged records."""
        damaged = []
        for key in self._keys():
            try:
                self._read(key, count=False)
            except CacheCorruptionError:
                damaged.append(key)
        return damaged

    def prune(self, max_bytes: int) -> int:
        """Removes the records that were not used for longest until the rest is no larger; returns the bytes freed.

        Raises:
          ValueError: a negative size.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected at least 0, got {max_bytes}")
        freed = 0
        for path in self.folder.glob("*/*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_S:
                freed += _remove(path)
        records = []
        for key in self._keys():
            manifest, data = self._files(key)
            try:
                used = manifest.stat()
                records.append((used.st_mtime_ns, used.st_size + (data.stat().st_size if data.exists() else 0), key))
            except FileNotFoundError:
                continue  # another process removed it
        total = sum(size for _, size, _ in records)
        for _, size, key in sorted(records):
            if total <= max_bytes:
                break
            total -= size
            freed += sum(_remove(file) for file in self._files(key))  # the manifest first: then it is no record
        return freed

    def _files(self, key: str) -> tuple[Path, Path]:
        stem = self.folder / key[:2] / key
        return stem.with_suffix(".json"), stem.with_suffix(".npz")

    def _keys(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*/*.json"))

    def _temporary(self, name: str) -> Path:
        return self.folder / f"{name}.{os.getpid()}.{secrets.token_hex(6)}.tmp"

    def _digest(self, path: str | os.PathLike) -> str:
        """A hash of a file's content; remembered while its time stamp, size and inode are the same."""
        state = os.stat(path)
        identity = (os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns)
        if identity not in self._digests:
            digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=20).hexdigest()
            if time.time_ns() - state.st_mtime_ns < _SETTLED_NS:
                return digest
            self._digests[identity] = digest
        return self._digests[identity]

    def _read(self, key: str, count: bool = True) -> dict[str, np.ndarray] | None:
        """A record; None where there is none."""
        manifest, data = self._files(key)
        try:
            text = manifest.read_bytes()
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
            if content["key"] != key:
                raise ValueError(f"its manifest is of {content['key']}")
            features, size = read_record(data, content)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CacheCorruptionError(f"record {key} of {self.folder} is damaged: {error}") from error
        if count:
            self.stats.bytes += len(text) + size
            with contextlib.suppress(OSError):  # removed meanwhile
                os.utime(manifest)  # when it was last used, for `prune`
        return features

    def _write(self, key: str, features: dict[str, np.ndarray]) -> None:
        manifest, data = self._files(key)
        manifest.parent.mkdir(exist_ok=True)
        temporary = self._temporary(f"{key[:2]}/{key}")
        try:
            text = json.dumps({"key": key, **write_record(temporary, features)})
            size = len(text) + temporary.stat().st_size
            os.replace(temporary, data)
            temporary.write_text(text)
            os.replace(temporary, manifest)
        finally:
            temporary.unlink(missing_ok=True)
        self.stats.bytes += size


@functools.cache
def _made() -> str:
    """A hash of what decides about a record beside its files: this code, the schema, the library's components."""
    components = {name: file.sha256 for name, file in registry().items() if name.startswith("af3/ccd/")}
    features = {name: [*feature.axes, np.dtype(feature.dtype).str] for name, feature in FEATURES.items()}
    text = json.dumps([VERSION, features, RESTYPES, components], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _build(folder: str, strict: bool, item: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    cache = FeatureCache(folder, strict=strict)
    cache.get(**item)
    return cache.key(**item), dataclasses.asdict(cache.stats)


def _remove(path: Path) -> int:
    """Removes a file, if another process has not; returns its size."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
