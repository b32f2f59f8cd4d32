"""MegaFold's data pipeline on H-Ras (721P: two copies, GNP, Mg; an alignment of 15,953 rows), on this CPU.

Reading, building, the cache against building and against the official format (a gzip-compressed pickled dictionary of
narrow arrays), and what a trainer sees of it. The trainer is made up: a step is a sleep, as of a host that waits for
its GPU.
"""

import functools
import gzip
import itertools
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.core import DataUnavailable, data_path
from jaxlab.core.errors import MissingExtra, require
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import FeatureCache, Prefetch, crop, featurize, make_batch, parse_a3m, read_mmcif
from jaxlab.megafold.data.record import narrow
from jaxlab.megafold.features import FEATURES

SYSTEM = "megafold"
NAME = "721P with its alignment"
STEP_S = 0.1


def parse_by_letters(text: str) -> tuple[list[str], list[str], list[list[int]]]:
    """The usual reader: every letter in Python."""
    names, rows, deletions = [], [], []
    for record in text.split(">")[1:]:
        name, _, body = record.partition("\n")
        counts, waiting = [], 0
        for letter in body:
            if letter.islower():
                waiting += 1
            elif letter != "\n":
                counts.append(waiting)
                waiting = 0
        names.append(name)
        rows.append("".join(letter for letter in body if not letter.islower() and letter != "\n"))
        deletions.append(counts)
    return names, rows, deletions


def write_official(path: Path, features: dict[str, np.ndarray]) -> None:
    """The official cache's format."""
    with gzip.open(path, "wb") as file:
        pickle.dump({name: narrow(value) for name, value in features.items()}, file)


def read_official(path: Path) -> dict[str, np.ndarray]:
    """The same arrays back, widened as ours are: the alignment stays narrow."""
    with gzip.open(path, "rb") as file:
        stored = pickle.load(file)
    return {
        name: value if name == "msa" else value.astype(FEATURES[name].dtype, copy=False)
        for name, value in stored.items()
    }


def batches(read: Callable[[], dict[str, np.ndarray]], config: AF3Config) -> Iterator[dict[str, np.ndarray]]:
    """A training run's batches, each from its own key."""
    for step in itertools.count():
        key = jax.random.fold_in(jax.random.key(0), step)
        kept = crop(
            read(), key, max_tokens=config.max_tokens, max_atoms=config.max_atoms, max_msa_rows=config.max_msa_rows
        )
        yield make_batch([kept], config, key)


def rate(source: Iterable[Any], steps: int) -> float:
    """Iterations a second of the made-up trainer."""
    start = time.perf_counter()
    for _ in itertools.islice(source, steps):
        time.sleep(STEP_S)
    return steps / (time.perf_counter() - start)


def _inputs() -> tuple[Path, Path]:
    return data_path("af3/mmcif/721p-assembly1.cif"), data_path("af3/msa/721p-assembly1A_protein.a3m")


def _reading(structure: Path, alignment: Path, repeats: int) -> Iterator[Case]:
    text = alignment.read_text()
    ours, peer = interleaved(lambda: parse_a3m(text), lambda: parse_by_letters(text), repeats=3)
    yield Case(SYSTEM, "A3M, 15,953 rows of 166", "ms", ours * 1e3, peer * 1e3, "letter by letter in Python")
    gemmi = require("gemmi", "folding")
    ours, peer = interleaved(
        lambda: read_mmcif(structure), lambda: gemmi.read_structure(str(structure)), repeats=repeats
    )
    yield Case(SYSTEM, "mmCIF, 2708 atoms", "ms", ours * 1e3, peer * 1e3, "gemmi's structure, without our arrays")


def _cache(structure: Path, alignment: Path, folder: Path, repeats: int) -> Iterator[Case]:
    cache, msas = FeatureCache(folder / "cache", strict=True), {"A": alignment}

    def build() -> dict[str, np.ndarray]:
        return featurize(read_mmcif(structure), msas=msas)

    cached = functools.partial(cache.get, structure, msas=msas)
    features = cached()
    official = folder / "features.pkl.gz"
    write_official(official, features)
    for name, value in read_official(official).items():
        if value.dtype != features[name].dtype or not np.array_equal(value, features[name]):
            raise AssertionError(f"the official format gives other arrays for {name}")
    ours, peer = interleaved(cached, build, repeats=repeats)
    yield Case(SYSTEM, NAME, "ms to have its features", ours * 1e3, peer * 1e3, "building them", 20.0)
    ours, peer = interleaved(cached, lambda: read_official(official), repeats=repeats)
    yield Case(SYSTEM, NAME, "ms to have its features", ours * 1e3, peer * 1e3, "gzip-compressed pickle", 2.5)
    size = sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())
    yield Case(SYSTEM, NAME, "MB on disk", size / 1e6, official.stat().st_size / 1e6, "gzip-compressed pickle")

    config, steps = AF3Config.af3(), 2 * repeats
    cold = rate(batches(build, config), steps)
    warm = rate(batches(cached, config), steps)
    with Prefetch(batches(cached, config)) as ahead:
        next(ahead)
        read_ahead = rate(ahead, steps)
    what = f"made-up trainer, step {STEP_S * 1e3:.0f} ms, crop {config.max_tokens}, {config.max_msa_rows} rows"
    for name, value in (("cache", warm), ("cache and prefetching", read_ahead)):
        yield Case(SYSTEM, f"{what}, {name}", "iterations/s", value, cold, "cold pipeline", higher_is_better=True)
    yield Case(SYSTEM, f"{what}, {name}", "iterations/s", read_ahead, 1 / STEP_S, "step alone", higher_is_better=True)


def cases(quick: bool) -> Iterator[Case]:
    """The cases of `python -m benchmarks megafold_data`; none where the data or gemmi is missing."""
    repeats = 5 if quick else 15
    try:
        structure, alignment = _inputs()
        require("gemmi", "folding")
    except (DataUnavailable, MissingExtra):
        return
    yield from _reading(structure, alignment, repeats)
    with tempfile.TemporaryDirectory() as folder:
        yield from _cache(structure, alignment, Path(folder), repeats)
