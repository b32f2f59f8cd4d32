"""An adaptive entropy coder that works on arrays: asymmetric numeral systems (Duda 2013, arXiv:1311.2540) in lanes.

Rows are divided among lanes, each with its own state, which all read and write one sequence of 16-bit words.
Frequencies are counted as symbols go by, by context, so that no tables are stored. All arithmetic is in whole numbers:
what one machine wrote another reads.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

_BITS = 15
_WHOLE = 1 << _BITS
_LOW = 1 << 16
_RENEWED = 64
"""Frequencies are counted anew after 1, 2, 4, ... steps, and from here on after so many."""
_PRIOR, _SEEN = 32, 24
LARGEST_ALPHABET = 1 << 10
_ESCAPE = 255


class DamagedError(ValueError):
    """Data that no encoder wrote."""


def lanes_for(rows: int) -> int:
    """A lane costs four bytes and a step costs time: about one for 128 rows, at most 4096."""
    return 1 << min(max(math.ceil(math.log2(max(rows, 1) / 128)), 2), 12)


class Encoder:
    """Collects symbols, then writes them all. `Decoder` has to ask for the same in the same order."""

    def __init__(self, lanes: int):
        self._lanes = lanes
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self.numbers: list[int] = []

    def symbols(
        self,
        symbols: Int[np.ndarray, " n"],
        alphabet: int,
        contexts: Int[np.ndarray, " n"] | None = None,
        buckets: Int[np.ndarray, " a"] | None = None,
        width: int = 0,
    ) -> None:
        """Adds symbols.

        Args:
          symbols: from 0 on, below `alphabet`.
          alphabet: how many there are.
          contexts: from 0 on: symbols of one context have frequencies of their own.
          buckets: by symbol: a second context is the bucket of the symbol before, in a lane.
          width: 0: all symbols are equally likely at first; else those about so far from the middle.
        """
        symbols = np.asarray(symbols, np.int64)
        model = _Model(alphabet, contexts, buckets, width)
        steps = _steps(len(symbols), self._lanes)
        before = np.zeros(self._lanes, np.int64)
        for t, rows in enumerate(_rows(len(symbols), steps, self._lanes)):
            if _is_renewed(t):
                model.renew()
            these = symbols[rows]
            where = model.place(rows, before[: len(these)])
            self._steps.append(model.look_up(where, these))
            model.see(where, these)
            before[: len(these)] = these

    def whole(self, values: Int[np.ndarray, " n"], contexts: Int[np.ndarray, " n"] | None = None) -> None:
        """Adds whole numbers around 0; the one before decides what is likely. Those far off are stored as they are."""
        values = np.asarray(values, np.int64)
        limit = min(int(np.abs(values).max(initial=0)), _ESCAPE)
        width = max(int(np.abs(values).mean()) if len(values) else 0, 1)
        self.numbers += [limit, width]
        clipped = np.clip(values, -limit, limit)
        self.symbols(clipped + limit, 2 * limit + 1, contexts, _buckets(limit, width, len(values)), width)
        if limit == _ESCAPE:
            self.numbers += [int(v) for v in values[np.abs(clipped) == limit]]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The states, [lanes] uint32, and the words, uint16, in the order in which they are read."""
        states = np.full(self._lanes, _LOW, np.uint64)
        words = []
        for frequency, start in reversed(self._steps):
            state = states[: len(frequency)]
            full = state >= frequency << np.uint64(32 - _BITS)
            words.append((state[full] & np.uint64(_LOW - 1)).astype("<u2")[::-1])
            state = np.where(full, state >> np.uint64(16), state)
            states[: len(frequency)] = (state // frequency << np.uint64(_BITS)) + state % frequency + start
        sequence = np.concatenate(words)[::-1] if words else np.zeros(0, "<u2")
        return states.astype("<u4"), np.ascontiguousarray(sequence)


class Decoder:
    """Reads what an `Encoder` wrote.

    Raises:
      DamagedError: from all methods, where words or numbers run out.
    """

    def __init__(self, states: np.ndarray, words: np.ndarray, numbers: list[int]):
        self._states, self._words, self._at = states.astype(np.uint64), words.astype(np.uint64), 0
        self._numbers, self._read = numbers, 0

    def symbols(
        self,
        count: int,
        alphabet: int,
        contexts: Int[np.ndarray, " n"] | None = None,
        buckets: Int[np.ndarray, " a"] | None = None,
        width: int = 0,
    ) -> Int[np.ndarray, " n"]:
        """The next `count` symbols; see `Encoder.symbols`."""
        lanes = len(self._states)
        symbols = np.empty(count, np.int64)
        model = _Model(alphabet, contexts, buckets, width)
        before = np.zeros(lanes, np.int64)
        for t, rows in enumerate(_rows(count, _steps(count, lanes), lanes)):
            if _is_renewed(t):
                model.renew()
            active = len(range(*rows.indices(count)))
            where = model.place(rows, before[:active])
            state = self._states[:active]
            slots = state & np.uint64(_WHOLE - 1)
            these = model.find(where, slots.astype(np.int64))
            frequency, start = model.look_up(where, these)
            state = frequency * (state >> np.uint64(_BITS)) + slots - start
            low = state < _LOW
            needed = int(np.count_nonzero(low))
            if self._at + needed > len(self._words):
                raise DamagedError("the coded words end too early")
            state[low] = state[low] << np.uint64(16) | self._words[self._at : self._at + needed]
            self._at += needed
            self._states[:active] = state
            symbols[rows] = these
            model.see(where, these)
            before[:active] = these
        return symbols

    def whole(self, count: int, contexts: Int[np.ndarray, " n"] | None = None) -> Int[np.ndarray, " n"]:
        """The next `count` whole numbers; see `Encoder.whole`."""
        limit, width = self.number(), self.number()
        if not 0 <= limit <= _ESCAPE or not 1 <= width < 1 << 31:
            raise DamagedError(f"a range of {limit} and {width}")
        buckets = _buckets(limit, width, count)
        values = self.symbols(count, 2 * limit + 1, contexts, buckets, width) - limit
        if limit == _ESCAPE:
            far = np.flatnonzero(np.abs(values) == limit)
            values[far] = [self.number() for _ in far]
        return values

    def number(self) -> int:
        """The next of the numbers that are stored as they are."""
        if self._read == len(self._numbers):
            raise DamagedError("the coded numbers end too early")
        self._read += 1
        return self._numbers[self._read - 1]


class _Model:
    """Frequencies of symbols by context, as they have been seen so far."""

    def __init__(self, alphabet: int, contexts: np.ndarray | None, buckets: np.ndarray | None, width: int):
        if not 1 <= alphabet <= LARGEST_ALPHABET:
            raise ValueError(f"alphabet: expected 1 to {LARGEST_ALPHABET} symbols, got {alphabet}")
        self._alphabet, self._buckets = alphabet, buckets
        self._second = 1 if buckets is None else int(buckets.max()) + 1
        self._contexts = None if contexts is None else np.asarray(contexts, np.int64)
        first = 1 if self._contexts is None or not len(self._contexts) else int(self._contexts.max()) + 1
        prior = np.full(alphabet, max(_PRIOR * 8 // alphabet, 1), np.int64)
        if width:
            away = np.abs(np.arange(alphabet) - alphabet // 2)
            prior = 1 + _PRIOR * width**2 // (width**2 + away**2)
        self._counts = np.tile(prior, (first * self._second, 1))

    def place(self, rows: slice, before: np.ndarray) -> np.ndarray:
        """The context of each row of a step."""
        where = 0 if self._contexts is None else self._contexts[rows] * self._second
        return where + (np.zeros(len(before), np.int64) if self._buckets is None else self._buckets[before])

    def renew(self) -> None:
        total = self._counts.sum(axis=1, keepdims=True)
        self._frequency = 1 + self._counts * (_WHOLE - self._alphabet) // total
        rows = np.arange(len(self._counts))
        self._frequency[rows, self._counts.argmax(axis=1)] += _WHOLE - self._frequency.sum(axis=1)
        self._start = np.cumsum(self._frequency, axis=1) - self._frequency
        self._edges = (self._start + rows[:, None] * _WHOLE).ravel()

    def look_up(self, where: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._frequency[where, symbols].astype(np.uint64), self._start[where, symbols].astype(np.uint64)

    def find(self, where: np.ndarray, slots: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self._edges, where * _WHOLE + slots, side="right") - 1
        return places - where * self._alphabet

    def see(self, where: np.ndarray, symbols: np.ndarray) -> None:
        flat = np.bincount(where * self._alphabet + symbols, minlength=self._counts.size)
        self._counts += _SEEN * flat.reshape(self._counts.shape)


def _buckets(limit: int, width: int, rows: int) -> np.ndarray:
    """By symbol, how far from 0 and on which side the number before was: more classes where more rows teach them."""
    values = np.arange(-limit, limit + 1)
    edges = np.array([1, width, 2 * width, 4 * width])[: 0 if rows < 4096 else 1 if rows < 16384 else 4]
    size = np.searchsorted(np.unique(edges), np.abs(values), side="right")
    return size + np.where(values < 0, size.max(), 0) * (size > 0)


def _steps(rows: int, lanes: int) -> int:
    return -(-rows // lanes)


def _rows(count: int, steps: int, lanes: int) -> Iterator[slice]:
    """The rows of each step: one of every lane whose share, `steps` consecutive rows, reaches so far."""
    for t in range(steps):
        yield slice(t, count, steps)


def _is_renewed(step: int) -> bool:
    return step % _RENEWED == 0 or step & (step - 1) == 0
