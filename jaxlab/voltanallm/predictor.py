"""EcoPred: latency, or energy, of one iteration as a plane over batch size and tokens, for every clock and segment.

    decode:   ITL(f, b, K) = alpha_{f,s} * b + beta_{f,s} * K + gamma_{f,s}      (ms)
    prefill:  TTFT(f, T)   = a_f * T + c_f                                       (ms)

b are the running requests, K their tokens in the cache, T the prompt tokens of a batch. A decode iteration is a
staircase in b, so the batch sizes are cut into segments (arXiv 2509.04827 and its code; the files are the code's).
`jaxlab.voltanallm.fitting` makes tables from measurements.
"""

import bisect
import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast, overload, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.core.folders import replace_file
from jaxlab.voltanallm.config import PHASES, Phase

Table = TypeVar("Table", bound="PlaneTable")

NOT_POSITIVE = 20.0
"""What is predicted where a plane says 0 or less (official code)."""

_COLUMNS: dict[Phase, dict[str, str]] = {
    "decode": {
        "freq": "freq",
        "bs_start": "start",
        "bs_end": "end",
        "coef_bs": "batch",
        "coef_tokens": "tokens",
        "coef_intercept": "intercept",
        "r_2": "r2",
    },
    "prefill": {"freq": "freq", "coef_tokens": "tokens", "coef_intercept": "intercept", "r_2": "r2"},
}
_WHOLE = ("freq", "bs_start", "bs_end")


@dataclasses.dataclass(frozen=True)
class Plane:
    """One row of a table.

    Attributes:
      freq: clock in MHz.
      tokens: coefficient of the tokens.
      intercept: the constant.
      batch: coefficient of the batch size; 0 in prefill tables, like the next two.
      start: first batch size of the segment.
      end: last batch size of the segment.
      r2: coefficient of determination of the fit, over all its points.
    """

    freq: int
    tokens: float
    intercept: float
    batch: float = 0.0
    start: int = 0
    end: int = 0
    r2: float = 1.0


@runtime_checkable
class Predictor(Protocol):
    """What controllers and routers ask of a table: a `PlaneTable`, or any other model of an iteration."""

    @property
    def phase(self) -> Phase:
        """Of the iterations that it predicts."""
        ...

    @property
    def freqs(self) -> tuple[int, ...]:
        """Clocks that it knows, in MHz, ascending."""
        ...

    def predict(self, freq: Any, batch: Any, tokens: Any) -> Any:
        """As `PlaneTable.predict`."""
        ...


class PlaneTable:
    """Planes by clock and segment, looked up one by one or by arrays.

    Args:
      phase: "decode" or "prefill".
      planes: in any order.

    Attributes:
      phase: as given.
      planes: sorted by clock, then segment.
      freqs: clocks in MHz, ascending.
      segments: (first, last) batch size of every piece between two boundaries of any clock; empty for prefill.

    Raises:
      ValueError: no planes, numbers that are not finite, two planes of one clock for the same batch size, or a gap.
    """

    def __init__(self, phase: Phase, planes: Iterable[Plane]):
        if phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")
        self.phase: Phase = phase
        self.planes = tuple(sorted(planes, key=lambda plane: (plane.freq, plane.start)))
        _check(phase, self.planes)
        self.freqs = tuple(sorted({plane.freq for plane in self.planes}))
        starts = {plane.start for plane in self.planes}
        ends = {plane.end for plane in self.planes}
        edges = sorted({start - 1 for start in starts} | ends)
        self.segments = tuple((low + 1, high) for low, high in itertools.pairwise(edges) if phase == "decode")
        self._last = max(ends)
        # rows[clock][batch size] is a row of the coefficients, whose first one is "no prediction".
        self._index: dict[float, int] = {freq: index for index, freq in enumerate(self.freqs)}
        rows = np.zeros((len(self.freqs), self._last + 2), np.intp)
        for row, plane in enumerate(self.planes, 1):
            rows[self._index[plane.freq], plane.start : plane.end + 1] = row
        none = (math.nan, math.nan, math.nan)
        self._coefficients = [none, *((plane.batch, plane.tokens, plane.intercept) for plane in self.planes)]
        self._rows = rows.tolist()
        self._row_array = rows
        self._clock_array = np.full(self.freqs[-1] + 2, -1)
        self._clock_array[list(self.freqs)] = range(len(self.freqs))
        self._freq_array = np.array(self.freqs, np.float64)
        self._coefficient_arrays = tuple(np.array(self._coefficients).T.copy())

    @classmethod
    def from_csv(cls: type[Table], path: str | os.PathLike[str], phase: Phase = "decode") -> Table:
        """Reads a table.

        Args:
          path: a CSV with freq, coef_tokens, coef_intercept and r_2, for decode also bs_start, bs_end and coef_bs;
            other columns are left alone.
          phase: which of the two it must be.

        Raises:
          ValueError: a column is absent, the table is of the other phase, a cell is not a finite number, or segments
            overlap or leave gaps; row (the header is row 1) and column are named.
        """
        if phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")
        columns = _COLUMNS[phase]
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            absent = [name for name in columns if name not in header]
            if absent:
                hint = " (a prefill table?)" if set(_COLUMNS["prefill"]) <= set(header) else ""
                raise ValueError(f"{path}: expected a {phase} table with column {absent[0]}, got {header}{hint}")
            if phase == "prefill" and "coef_bs" in header:
                raise ValueError(f"{path}: expected a prefill table, got column coef_bs of a decode table")
            planes = [
                Plane(**cast(Any, {field: _cell(path, line, name, row[name]) for name, field in columns.items()}))
                for line, row in enumerate(reader, 2)
            ]
        try:
            return cls(phase, planes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table; reading it gives the same numbers to the last bit."""
        columns = _COLUMNS[self.phase]
        lines = [",".join(columns)]
        for plane in self.planes:
            lines.append(",".join(repr(getattr(plane, field)) for field in columns.values()))
        replace_file(path, "\n".join(lines) + "\n")

    @overload
    def predict(self, freq: float, batch: float, tokens: float, *, extrapolate: bool = False) -> float: ...
    @overload
    def predict(
        self, freq: ArrayLike, batch: ArrayLike, tokens: ArrayLike, *, extrapolate: bool = False
    ) -> np.ndarray: ...
    def predict(
        self, freq: ArrayLike, batch: ArrayLike, tokens: ArrayLike, *, extrapolate: bool = False
    ) -> float | np.ndarray:
        """The planes' values; the three arguments broadcast.

        A clock between two of the table gets what lies between their values, in proportion. 0 where there is nothing
        to do (tokens <= 0, or in decode batch <= 0), `NOT_POSITIVE` where the value would be 0 or less, NaN for a
        batch size in no segment: above the last one, or a fraction between two. Prefill ignores the batch size.

        Args:
          freq: MHz.
          batch: running requests.
          tokens: in their cache, or in the prompts of a batch.
          extrapolate: go on beyond the table's clocks along its outermost two (a single one stays constant).

        Returns:
          float64 of the broadcast shape; a float if all three are scalars.

        Raises:
          ValueError: a clock outside the table, without `extrapolate`.
        """
        if isinstance(freq, _PLAIN) and isinstance(batch, _PLAIN) and isinstance(tokens, _PLAIN):
            return self._one(freq, batch, tokens, extrapolate)
        freq, batch, tokens = np.asarray(freq), np.asarray(batch), np.asarray(tokens)
        if not (freq.ndim or batch.ndim or tokens.ndim):
            return self._one(freq.item(), batch.item(), tokens.item(), extrapolate)
        return self._many(freq, batch, tokens, extrapolate)

    def _one(self, freq: float, batch: float, tokens: float, extrapolate: bool) -> float:
        decode = self.phase == "decode"
        low = self._index.get(freq)
        weight = 0.0
        if low is None:
            low, weight = self._between(freq, extrapolate)
        if tokens <= 0 or (decode and batch <= 0):
            return 0.0
        if not decode:
            floor = ceil = 0
        elif batch <= self._last:
            floor = int(batch)
            ceil = floor if floor == batch else floor + 1
        else:
            return math.nan
        value = self._plane(low, floor, ceil, batch, tokens)
        if weight:
            value += weight * (self._plane(low + 1, floor, ceil, batch, tokens) - value)
        return NOT_POSITIVE if value <= 0 else value

    def _plane(self, clock: int, floor: int, ceil: int, batch: float, tokens: float) -> float:
        rows = self._rows[clock]
        row = rows[floor]
        if rows[ceil] != row:
            return math.nan
        alpha, beta, gamma = self._coefficients[row]
        return beta * tokens + alpha * batch + gamma

    def _between(self, freq: float, extrapolate: bool) -> tuple[int, float]:
        """The clock below one that is not in the table, and how far it is on the way to the next one."""
        if not self.freqs[0] <= freq <= self.freqs[-1] and (not extrapolate or math.isnan(freq)):
            raise ValueError(
                f"freq: expected a clock of the table, {self.freqs[0]} to {self.freqs[-1]} MHz, got {freq}"
            )
        if len(self.freqs) == 1:
            return 0, 0.0
        low = min(max(bisect.bisect_right(self.freqs, freq) - 1, 0), len(self.freqs) - 2)
        return low, (freq - self.freqs[low]) / (self.freqs[low + 1] - self.freqs[low])

    def _many(self, freq: np.ndarray, batch: np.ndarray, tokens: np.ndarray, extrapolate: bool) -> np.ndarray:
        shape = np.broadcast_shapes(freq.shape, batch.shape, tokens.shape)
        freq, batch, tokens = (np.broadcast_to(each, shape).reshape(-1) for each in (freq, batch, tokens))
        values = np.empty(math.prod(shape))
        for start in range(0, len(values), _BLOCK):
            part = slice(start, start + _BLOCK)
            self._fill(values[part], freq[part], batch[part], tokens[part], extrapolate)
        return values.reshape(shape)

    def _fill(
        self, out: np.ndarray, freq: np.ndarray, batch: np.ndarray, tokens: np.ndarray, extrapolate: bool
    ) -> None:
        low, offset = self._clocks_below(freq)
        # Columns of the rows; fractions have two neighbours, which must be of one segment.
        floor = ceil = None
        if self.phase == "decode":
            floor = batch
            if not (batch.min() >= 0 and batch.max() <= self._last):
                floor = np.where(np.isnan(batch), 0, np.clip(batch, 0, self._last + 1))
            if batch.dtype.kind not in "iu":
                floor, ceil = floor.astype(np.intp), np.ceil(floor).astype(np.intp)
        self._planes_at(out, low, floor, ceil, batch, tokens)
        if offset is not None:
            self._interpolate(out, low, offset, floor, ceil, batch, tokens, extrapolate)
        small = out <= 0
        if small.any():
            out[small] = NOT_POSITIVE
        idle = tokens <= 0
        if self.phase == "decode":
            idle |= batch <= 0
        if idle.any():
            out[idle] = 0.0

    def _clocks_below(self, freq: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Index of the table's clock at or below each one (or of the first), and MHz above it; None: all 0."""
        if freq.dtype.kind in "iu":
            exact = self._clock_array.take(freq, mode="clip")
            if exact.min() >= 0:
                return exact, None
        low = np.searchsorted(self._freq_array[1:], freq, side="right")
        offset = freq - self._freq_array[low]
        return low, (offset if offset.any() else None)

    def _interpolate(
        self,
        out: np.ndarray,
        low: np.ndarray,
        offset: np.ndarray,
        floor: np.ndarray | None,
        ceil: np.ndarray | None,
        batch: np.ndarray,
        tokens: np.ndarray,
        extrapolate: bool,
    ) -> None:
        """Goes on from the values at the clocks below, by what the clocks lie above them."""
        freq = self._freq_array[low] + offset
        outside = ~((freq >= self.freqs[0]) & (freq <= self.freqs[-1]))
        if outside.any() and (not extrapolate or np.isnan(freq).any()):
            self._between(float(freq[outside][0]), False)
        if len(self.freqs) == 1:
            return
        # The last clock, and what is above it, is reached from the one before.
        last = low == len(self.freqs) - 1
        above = np.where(last, low - 1, low + 1)
        upper = np.empty_like(out)
        self._planes_at(upper, above, floor, ceil, batch, tokens)
        step = offset / (self._freq_array[above] - self._freq_array[low])
        np.copyto(out, out + step * (upper - out), where=offset != 0)

    def _planes_at(
        self,
        out: np.ndarray,
        clock: np.ndarray,
        floor: np.ndarray | None,
        ceil: np.ndarray | None,
        batch: np.ndarray,
        tokens: np.ndarray,
    ) -> None:
        alpha, beta, gamma = self._coefficient_arrays
        row = clock * self._row_array.shape[1]
        if floor is not None:
            row += floor
        row = self._row_array.take(row)
        if ceil is not None:
            row[self._row_array.take(clock * self._row_array.shape[1] + ceil) != row] = 0
        np.multiply(beta.take(row), tokens, out=out)
        if floor is not None:
            out += alpha.take(row) * batch
        out += gamma.take(row)


class LatencyTable(PlaneTable):
    """Predicted milliseconds of an iteration."""


class EnergyTable(PlaneTable):
    """Predicted joules of an iteration, in the schema of a latency table and looked up alike."""


_PLAIN = (int, float)
_BLOCK = 8192
"""Elements looked up at once: what lies in between then stays in the processor's cache."""


def _check(phase: Phase, planes: Sequence[Plane]) -> None:
    if not planes:
        raise ValueError("table: expected at least one row, got none")
    for plane in planes:
        for name, field in _COLUMNS[phase].items():
            value = getattr(plane, field)
            if not math.isfinite(value) or (name == "freq" and value <= 0):
                raise ValueError(f"column {name} at {plane.freq} MHz: expected a finite number, got {value}")
        if phase == "decode" and not 1 <= plane.start <= plane.end:
            raise ValueError(
                f"column bs_end at {plane.freq} MHz: expected 1 <= bs_start <= bs_end, got {plane.start}..{plane.end}"
            )
    for before, plane in itertools.pairwise(planes):
        if before.freq != plane.freq:
            continue
        if phase == "prefill":
            raise ValueError(f"column freq: expected every clock once, got {plane.freq} MHz twice")
        if plane.start != before.end + 1:
            fault = "overlaps" if plane.start <= before.end else "leaves a gap after"
            raise ValueError(
                f"column bs_start at {plane.freq} MHz: segment {plane.start}..{plane.end} {fault} "
                f"{before.start}..{before.end}"
            )


def _cell(path: str | os.PathLike[str], line: int, name: str, text: str | None) -> float | int:
    try:
        value = float(text)  # pyrefly: ignore[bad-argument-type]  None, for a short row, is a TypeError
    except (TypeError, ValueError):
        raise ValueError(f"{path}, row {line}, column {name}: expected a number, got {text!r}") from None
    if not math.isfinite(value) or (name in _WHOLE and value != int(value)):
        expected = "whole" if name in _WHOLE else "finite"
        raise ValueError(f"{path}, row {line}, column {name}: expected a {expected} number, got {text}")
    return int(value) if name in _WHOLE else value
