"""Small real data files by name, with origin, checksum and licence; none of them ships with the package.

    from jaxlab.core import data_path
    lines = data_path("math/gsm8k_test.jsonl").read_text().splitlines()

`data_registry.json` lists them: sources (licence, origin, and a URL where the file can be had unchanged), and the files
of each with their SHA-256.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from jaxlab.core.errors import DataUnavailable


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A registered file.

    Attributes:
      name: its name here, a relative path.
      sha256: of its content.
      licence: under which it may be used, and whom to credit.
      origin: where it comes from, and what was changed.
      url: where exactly this content can be downloaded; None: nowhere.
    """

    name: str
    sha256: str
    licence: str
    origin: str
    url: str | None


@functools.cache
def registry() -> dict[str, DataFile]:
    """Every registered file by name."""
    sources = json.loads(Path(__file__).with_name("data_registry.json").read_text())
    return {
        name: DataFile(name, sha256, source["licence"], source["origin"], source.get("urls", {}).get(name))
        for source in sources
        for name, sha256 in source["files"].items()
    }


def data_path(name: str, *, download: bool = True) -> Path:
    """The path of a registered data file, or of a folder of them.

    It is looked for in `$JAXLAB_DATA`, in `../shared/data` beside a checkout of this repository, in the cache, and then
    downloaded into the cache where it has a URL. Content that does not match its checksum does not count.

    Args:
      name: a registered name such as "math/gsm8k_test.jsonl", or a folder of them such as "splats/fox".
      download: whether to download what is not on this machine.

    Raises:
      ValueError: an unknown name; the message has the nearest known one.
      DataUnavailable: it is nowhere; the message lists the places.
    """
    files = [file for file in registry().values() if file.name == name or file.name.startswith(name.rstrip("/") + "/")]
    if not files:
        known = sorted(registry())
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(f"name: unknown data file {name!r}; did you mean {near[0]!r}? ({len(known)} are registered)")
    searched = []
    for place, folder in _places():
        found = next((problem for file in files if (problem := _problem(folder / file.name, file))), None)
        if found is None:
            return folder / name
        searched.append(f"{place}: {folder / name} ({found})")
    if not download:
        searched.append("download: not asked for")
    elif missing := [file.name for file in files if file.url is None]:
        searched.append(f"download: {missing[0]} has no URL; its origin: {registry()[missing[0]].origin}")
    else:
        try:
            for file in files:
                _download(file)
            return _cache() / name
        except Exception as error:  # requests, the file system, a checksum: to the caller it is one thing
            searched.append(f"download: {error}")
    raise DataUnavailable(f"data file {name!r} is not available; looked in\n  " + "\n  ".join(searched))


def _places() -> Iterator[tuple[str, Path]]:
    if folder := os.environ.get("JAXLAB_DATA"):
        yield "$JAXLAB_DATA", Path(folder)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        yield "../shared/data", checkout.parent / "shared" / "data"
    yield "cache", _cache()


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("jaxlab")) / "data"


def _problem(path: Path, file: DataFile) -> str | None:
    if not path.is_file():
        return "absent" if path.name == Path(file.name).name else f"{file.name} absent"
    status = path.stat()
    if _sha256(path, status.st_size, status.st_mtime_ns) != file.sha256:
        return f"{file.name} has another SHA-256 than {file.sha256}"
    return None


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """The checksum of a file in its present state; size and time are there for the cache."""
    del size, changed_ns
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(file: DataFile) -> None:
    import pooch

    target = _cache() / file.name
    if file.url is not None and _problem(target, file):
        pooch.retrieve(
            file.url,
            known_hash=f"sha256:{file.sha256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=30),  # pyrefly: ignore[bad-argument-type]  # pooch's own stub is off
        )
