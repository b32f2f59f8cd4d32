"""What a training run is fed: structures by name, and batches that the seed and the step alone decide."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import FeatureCache, Prefetch, crop, featurize, make_batch, read_mmcif, synthetic_batch
from jaxlab.megafold.data.cropping import Method, select
from jaxlab.megafold.features import FEATURES

Features = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """A structure to train on; files are paths, or names of `core.data_path`.

    Attributes:
      structure: mmCIF.
      msas: chain -> A3M.
      templates: chain -> mmCIF files.
      tokens: ranges (first, behind the last) that are kept every time; none: crops are drawn.
    """

    structure: str
    msas: dict[str, str] = dataclasses.field(default_factory=dict)
    templates: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tokens: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for first, behind in self.tokens:
            if not 0 <= first < behind:
                raise ValueError(f"tokens: expected ranges (first, behind the last), got {(first, behind)}")

    @property
    def name(self) -> str:
        """The structure file's, without its endings."""
        return Path(self.structure).name.partition(".")[0]

    def files(self) -> dict[str, Any]:
        """The arguments of `FeatureCache.get`.

        Raises:
          FileNotFoundError: neither a file nor a data file that is here.
        """
        return {
            "path": find(self.structure),
            "msas": {chain: find(name) for chain, name in self.msas.items()},
            "templates": {chain: [find(name) for name in names] for chain, names in self.templates.items()},
        }

    def features(self, cache: FeatureCache | None) -> Features:
        """Those of the whole structure: from the cache, or built anew."""
        files = self.files()
        return featurize(read_mmcif(files.pop("path")), **files) if cache is None else cache.get(**files)

    def cropped(self, features: Features, config: AF3Config, key: jax.Array, method: Method | None = None) -> Features:
        """The tokens named, or a crop drawn for the sizes of `config`.

        Raises:
          ValueError: tokens that are not there.
        """
        if not self.tokens:
            sizes = {name: getattr(config, name) for name in ("max_tokens", "max_atoms", "max_msa_rows")}
            return crop(features, key, method=method, **sizes)
        count, last = len(features["restype"]), max(behind for _, behind in self.tokens)
        if last > count:
            raise ValueError(f"tokens: expected at most {count}, those of {self.structure}, got {last}")
        return select(features, np.unique(np.concatenate([np.arange(*span) for span in self.tokens])))


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """A made-up structure in the place of an `Example`, where no data is.

    Attributes:
      config: it fills.
      seed: which one.
    """

    config: AF3Config
    seed: int = 0

    @property
    def name(self) -> str:
        """It says that it is made up."""
        return f"made-up {self.seed}"

    def features(self, cache: FeatureCache | None) -> Features:
        """Those of the whole structure, without padding; there is nothing to cache."""
        del cache
        batch = synthetic_batch(self.config, jax.random.key(self.seed))
        there = {letter: int(batch[name].sum()) for letter, name in (("N", "token_mask"), ("A", "atom_mask"))}
        there["E"] = int((batch["bonds"][0, :, 0] >= 0).sum())
        return {
            name: batch[name][(0, *(slice(there.get(str(axis))) for axis in feature.axes))]
            for name, feature in FEATURES.items()
        }

    def cropped(self, features: Features, config: AF3Config, key: jax.Array, method: Method | None = None) -> Features:
        """All of it: it is made to fit."""
        del config, key, method
        return features


class Feed(Iterator[Features]):
    """Batches for ever; a context manager. What `jaxlab.training.fit` wants of batches: it goes on at any step.

    Example r of step i's batch is structure i * batch_size + r, counted around.

    Args:
      examples: the structures.
      config: of the network, for sizes.
      key: decides crops, conformers and alignment rows, with the step.
      batch_size: structures of a batch.
      cache: of features; None builds them anew every time.
      ahead: batches that a thread keeps ready; 0: none, they are made when asked for.
      method: of drawn crops; None: any.

    Raises:
      ValueError: no example.
    """

    def __init__(
        self,
        examples: Sequence[Example | MadeUp],
        config: AF3Config,
        key: jax.Array,
        *,
        batch_size: int = 1,
        cache: FeatureCache | None = None,
        ahead: int = 2,
        method: Method | None = None,
    ):
        if not examples:
            raise ValueError("examples: expected at least one structure, got none")
        self._examples, self._config, self._key = tuple(examples), config, key
        self._batch_size, self._cache, self._ahead, self._method = batch_size, cache, ahead, method
        self._step = 0
        self._source: Iterator[Features] | None = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> Features:
        if self._source is None:
            made = map(self.batch, itertools.count(self._step))
            self._source = Prefetch(made, self._ahead) if self._ahead else made
        batch = next(self._source)
        self._step += 1
        return batch

    def batch(self, step: int) -> Features:
        """That of step `step`, counted from 0."""
        key = jax.random.fold_in(self._key, step)
        kept = []
        for row in range(self._batch_size):
            example = self._examples[(step * self._batch_size + row) % len(self._examples)]
            cropped_by = jax.random.fold_in(core.named_key(key, "crop"), row)
            kept.append(example.cropped(example.features(self._cache), self._config, cropped_by, self._method))
        return make_batch(kept, self._config, core.named_key(key, "batch"))

    def state(self) -> dict[str, int]:
        """Where it is, for a checkpoint."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on there."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the thread; the next batch starts another."""
        if isinstance(self._source, Prefetch):
            self._source.close()
        self._source = None


def find(name: str | os.PathLike) -> Path:
    """A file: a path, or one that `core.data_path` knows.

    Raises:
      FileNotFoundError: neither (`DataUnavailable` where the name is known and the file not here).
    """
    path = Path(name)
    if path.is_file():
        return path
    with contextlib.suppress(ValueError):  # a name that is not known
        return core.data_path(os.fspath(name))
    raise FileNotFoundError(f"{os.fspath(name)} does not exist")
