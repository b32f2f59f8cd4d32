"""Text as packed token batches: documents, split, order, packing, and a position that can be saved.

A corpus of documents is tokenised once and looked at as one long stream per epoch; a batch is addressed by its step
alone, so the position to save is one integer and every process of a multi-host run finds its rows by itself. (Grain
gives seeded order and resumable state for record files read by worker processes; a flat token array indexed by step
needs neither, so it is not a dependency.)
"""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import struct
from numpy.random import PCG64, Generator, SeedSequence

from jaxlab import core
from jaxlab.training.sharding import batch_sharding

_SPLITS = ("train", "validation")
_VALIDATION_FRACTION = 0.05
_PIECE_CHARS = (512, 65536)  # a single file is cut into about 100 pieces within these sizes
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
_DOC_SUFFIXES = (".md", ".rst", ".txt")


@struct.dataclass
class TokenBatch:
    """Packed rows of text; numpy or JAX arrays, targets already shifted.

    `segment_ids` count the documents in a row from 1, 0 is padding; `positions` restart at each document, -1 is
    padding; `weights` is 0 where a target would lie in another document (its last token) or in padding.
    """

    tokens: Any  # [B, T] int32, as all but the last
    targets: Any
    positions: Any
    segment_ids: Any
    weights: Any  # [B, T] float32


def _read(path: pathlib.Path) -> str | None:
    """The text of a file, None if it is not text."""
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _folder(root: pathlib.Path, suffixes: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    """(relative path, text) of every text file below a folder, by path; hidden files are left out."""
    documents = []
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        if suffixes is not None and (path.suffix not in suffixes or _SKIPPED_FOLDERS.intersection(parts)):
            continue
        text = _read(path)
        if text:
            documents.append(("/".join(parts), text))
    return documents


def _pieces(text: str) -> list[tuple[str, str]]:
    """One file's text cut at line ends into pieces, so that a single file has something to validate on, too."""
    size = min(max(len(text) // 100, _PIECE_CHARS[0]), _PIECE_CHARS[1])
    pieces, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(lines))
            lines, length = [], 0
    if lines:
        pieces.append("".join(lines))
    return [(f"{index}:{piece}", piece) for index, piece in enumerate(pieces)]


def _package_docs() -> list[tuple[str, str]]:
    """The long descriptions and documentation files of the installed packages, by name."""
    documents = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        _, _, description = (distribution.read_text("METADATA") or "").partition("\n\n")  # headers, blank line, text
        if description.strip():
            documents[f"{name}/METADATA"] = description
        for file in distribution.files or ():
            if file.suffix in _DOC_SUFFIXES and ".." not in file.parts:
                path = pathlib.Path(str(distribution.locate_file(file)))
                if path.is_file() and (text := _read(path)):
                    documents[f"{name}/{file}"] = text
    return sorted(documents.items())


def documents(source: str | pathlib.Path) -> list[tuple[str, str]]:
    """(name, text) of a source's documents, in an order that depends on their names only.

    Args:
        source: `"python-stdlib"` (the running interpreter's library, without its tests), `"package-docs"` (descriptions
            and documentation of the installed packages), a folder (every UTF-8 file in it) or a file (cut into pieces).

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: There is no text in it.
    """
    if source == "python-stdlib":
        found = _folder(pathlib.Path(sysconfig.get_paths()["stdlib"]), (".py",))
    elif source == "package-docs":
        found = _package_docs()
    else:
        path = pathlib.Path(source).expanduser()
        if path.is_dir():
            found = _folder(path)
        elif path.is_file():
            found = _pieces(_read(path) or "")
        else:
            raise FileNotFoundError(
                f"data: expected 'python-stdlib', 'package-docs', a file or a folder, got {str(source)!r}"
            )
    if not found:
        raise ValueError(f"data: expected UTF-8 text, found none in {str(source)!r}")
    return found


def split_documents(found: list[tuple[str, str]], split: str) -> list[tuple[str, str]]:
    """The documents of one split, chosen by a hash of their names: about 5 % (at least one) are for validation.

    A document keeps its side when others come or go, on every machine.
    """
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {_SPLITS}, got {split!r}")
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name, _ in found]
    least = min(hashes) if len(hashes) > 1 else -1.0
    validation = [value < _VALIDATION_FRACTION or value == least for value in hashes]
    if all(validation) and split == "train":
        validation[0] = False
    chosen = [document for document, held_out in zip(found, validation) if held_out == (split == "validation")]
    if not chosen:
        raise ValueError(f"split: expected at least two documents to split off {split!r}, got {len(found)}")
    return chosen


class TextBatches(Iterator[TokenBatch]):
    """Iterator of packed batches; see `text_batches`. Batch `step` depends on corpus, sizes, seed and `step` only."""

    def __init__(
        self,
        sequences: list[np.ndarray],
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        repeat: bool = True,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Holds the tokens of every document (1-d integer arrays); `repeat` shuffles anew each epoch and never ends."""
        for name, value in (("batch_size", batch_size), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {value}")
        self.batch_size, self.length, self.seed, self.repeat, self.mesh = batch_size, length, seed, repeat, mesh
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        self.tokens = np.concatenate(sequences) if sequences else np.zeros(0, np.int64)
        if self.tokens.size < 2:
            raise ValueError(f"source: expected at least two tokens to predict one, got {self.tokens.size}")
        self.max_id = int(self.tokens.max())
        self.tokens = self.tokens.astype(np.uint16 if self.max_id < 2**16 else np.int32)
        self._lengths = lengths
        self._offsets = np.cumsum(lengths) - lengths
        # A window holds `length` tokens and sees one more as its last target; the last window may be part padding.
        self.windows = max(1, -(-(self.tokens.size - 1) // length))
        self._epoch: tuple[int, tuple[np.ndarray, ...]] | None = None
        self._step = 0

    def __next__(self) -> TokenBatch:
        """The next batch."""
        if not self.repeat and self._step * self.batch_size >= self.windows:
            raise StopIteration
        batch = self.batch(self._step)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position, as JSON, with what it is a position in."""
        return {"step": self._step, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: The position belongs to another corpus, seed or batch shape.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise ValueError(f"batches: expected a position with {name} = {ours}, got {state.get(name)}")
        self._step = int(state["step"])

    def batch(self, step: int) -> TokenBatch:
        """Batch number `step`; with a mesh, sharded over its data axes, each process making its own rows only."""
        if self.mesh is None:
            return self._rows(step, 0, self.batch_size)
        shape = (self.batch_size, self.length)
        sharding = batch_sharding(self.mesh, shape)

        def span(index) -> tuple[int, int]:
            return index[0].indices(self.batch_size)[:2]

        spans = sorted({span(index) for index in sharding.addressable_devices_indices_map(shape).values() if index})
        rows = [self._rows(step, *bounds) for bounds in spans]
        return jax.tree.map(
            lambda *leaves: jax.make_array_from_callback(
                shape, sharding, lambda index: leaves[spans.index(span(index))]
            ),
            *rows,
        )

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
            "corpus_tokens": int(self.tokens.size),
        }

    def _order(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Documents in this epoch's order, where each ends in its stream, and the order of the windows."""
        if self._epoch is None or self._epoch[0] != epoch:
            documents, windows = np.arange(self._lengths.size), np.arange(self.windows)
            if self.repeat:
                generator = Generator(PCG64(SeedSequence([self.seed, epoch])))
                documents, windows = generator.permutation(documents), generator.permutation(windows)
            self._epoch = (epoch, (documents, np.cumsum(self._lengths[documents]), windows))
        return self._epoch[1]

    def _rows(self, step: int, start: int, stop: int) -> TokenBatch:
        tokens = np.zeros((stop - start, self.length + 1), np.int32)
        document = np.full((stop - start, self.length + 1), -1, np.int64)  # place in the epoch's order; -1 = padding
        for row in range(start, stop):
            epoch, window = divmod(step * self.batch_size + row, self.windows)
            if epoch > 0 and not self.repeat:
                continue
            order, ends, windows = self._order(epoch)
            first = int(windows[window]) * self.length
            stream = np.arange(first, min(first + self.length + 1, self.tokens.size))
            place = np.searchsorted(ends, stream, side="right")
            inside = stream - (ends[place] - self._lengths[order[place]])
            tokens[row - start, : stream.size] = self.tokens[self._offsets[order[place]] + inside]
            document[row - start, : stream.size] = place
        here, following = document[:, :-1], document[:, 1:]
        valid = here >= 0
        begins = np.concatenate([np.ones_like(valid[:, :1]), here[:, 1:] != here[:, :-1]], axis=1)
        segments = np.where(valid, np.cumsum(begins, axis=1), 0)
        index = np.broadcast_to(np.arange(self.length), here.shape)
        positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
        predicts = valid & (here == following)
        return TokenBatch(
            tokens=tokens[:, :-1],
            targets=np.where(predicts, tokens[:, 1:], 0).astype(np.int32),
            positions=np.where(valid, positions, -1).astype(np.int32),
            segment_ids=segments.astype(np.int32),
            weights=predicts.astype(np.float32),
        )


def text_batches(
    source: str | pathlib.Path,
    tokenizer: Any,
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    split: str = "train",
    mesh: jax.sharding.Mesh | None = None,
) -> TextBatches:
    """Packed batches of real text.

    Documents follow one another without padding, each ended by the tokenizer's end-of-text id if it has one; targets,
    positions and segments never cross from one into the next. `"train"` repeats the corpus for ever, documents and
    windows shuffled anew each epoch; `"validation"` is one pass in order, its last batch filled up with padding.

    Args:
        source: `"python-stdlib"`, `"package-docs"`, a folder or a file; see `documents`.
        tokenizer: Anything with `encode(str) -> list[int]` and `eos_token_id`.
        batch_size: Rows B of a batch, over all devices and processes.
        length: Tokens T of a row.
        seed: Decides the order, together with the step and nothing else.
        split: `"train"` or `"validation"`, parted by a hash of the documents' names.
        mesh: Yields arrays sharded over its data axes, each process packing its own rows only. None: numpy.

    Returns:
        Iterator of `TokenBatch` with `state() -> dict` and `restore(dict)`.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: Unknown split, no text in the source, or sizes below 1.
    """
    chosen = split_documents(documents(source), split)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sequences = [
        np.asarray([*tokenizer.encode(text), *end], np.int32) for _, text in core.progress(chosen, f"tokens of {split}")
    ]
    return TextBatches(sequences, batch_size=batch_size, length=length, seed=seed, repeat=split == "train", mesh=mesh)
