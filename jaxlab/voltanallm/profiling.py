"""Measuring an engine: how long its iterations take, by clock, batch size and tokens, for tables to be fitted to.

Decode is measured with prompts of several lengths, so that few steps span the whole range of tokens (the paper lets
prompts of one token grow until the memory is full). Each clock of a real GPU is set and measured; a simulated clock
measures nothing, so there the times of the highest one are stretched by `slowdown`.
"""

import csv
import dataclasses
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.core.folders import replace_file
from jaxlab.voltanallm.config import Phase
from jaxlab.voltanallm.control_loop import slowdown
from jaxlab.voltanallm.fitting import fit_decode, fit_prefill
from jaxlab.voltanallm.predictor import LatencyTable

_COLUMNS = ("freq", "batch", "tokens", "ms")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Measured iterations of one phase.

    Attributes:
      phase: "decode" or "prefill".
      freq: [N] MHz.
      batch: [N] running requests; of a prefill, its prompts.
      tokens: [N] in their caches; of a prefill, computed in the iteration.
      ms: [N] its duration.
    """

    phase: Phase
    freq: np.ndarray
    batch: np.ndarray
    tokens: np.ndarray
    ms: np.ndarray

    def __len__(self) -> int:
        return len(self.ms)

    def fit(self, *, boundaries: Sequence[int] | None = None, seed: int = 1) -> LatencyTable:
        """The table of these iterations; `boundaries` and errors are those of `fit_decode`."""
        if self.phase == "prefill":
            return fit_prefill(self.freq, self.tokens, self.ms, seed=seed)
        return fit_decode(self.freq, self.batch, self.tokens, self.ms, boundaries=boundaries, seed=seed)

    def split(self, *, share: float = 0.5, seed: int = 0) -> tuple["Samples", "Samples"]:
        """Two parts, drawn at random: one to fit, one to hold the fit against.

        Raises:
          ValueError: a share that leaves a part empty.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        first = round(share * len(self))
        if not 0 < first < len(self):
            raise ValueError(
                f"share: expected one that leaves both parts of {len(self)} samples something, got {share}"
            )
        return self._rows(np.sort(order[:first])), self._rows(np.sort(order[first:]))

    def error(self, table: LatencyTable) -> float:
        """Mean absolute error of a table's predictions, relative to what was measured (MAPE).

        Raises:
          ValueError: the table predicts none of these iterations.
        """
        predicted = table.predict(self.freq, self.batch, self.tokens)
        known = ~np.isnan(predicted)
        if not known.any():
            raise ValueError("table: expected one that predicts some of the samples, got none of them")
        return float(np.mean(np.abs(predicted[known] / self.ms[known] - 1)))

    def at_clocks(self, freqs: Sequence[int]) -> "Samples":
        """The same iterations at simulated clocks, of which the highest is the one that was measured."""
        highest = max(freqs)
        return dataclasses.replace(
            self,
            freq=np.repeat(np.asarray(freqs), len(self)),
            batch=np.tile(self.batch, len(freqs)),
            tokens=np.tile(self.tokens, len(freqs)),
            ms=np.concatenate([self.ms * slowdown(self.phase, clock, highest) for clock in freqs]),
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows, one an iteration."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(_COLUMNS)
        rows.writerows(zip(*(getattr(self, name).tolist() for name in _COLUMNS)))
        replace_file(path, text.getvalue())

    def _rows(self, index: np.ndarray) -> "Samples":
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in _COLUMNS})


def profile_decode(
    engine: Any,
    gpu: Any = None,
    *,
    freqs: Sequence[int] = (),
    batches: Sequence[int] | None = None,
    fills: Sequence[float] = (0.05, 0.35, 0.65, 0.9),
    steps: int = 8,
) -> Samples:
    """Times decode iterations. The engine must be idle; call its `warmup` before.

    Args:
      engine: an `Engine`.
      gpu: whose clocks are swept; None, or a simulated one: they are modelled.
      freqs: MHz; empty: those the GPU supports, 1 MHz without one.
      batches: running requests; None: each bucket of the engine, and one more than the bucket before it.
      fills: shares of the tokens that a batch of each size can hold, at which it is measured.
      steps: iterations of each.

    Raises:
      ValueError: an engine with work, a batch above its `max_running` or too large for its pages, or a share outside
        (0, 1).
    """
    _check_idle(engine)
    most = min(engine.config.max_running, engine.config.batch_buckets[-1])
    if batches is None:
        edges = [size for size in engine.config.batch_buckets if size <= most]
        batches = sorted({*edges, *(size + 1 for size in edges if size < most)})
    if not batches or min(batches) < 1 or max(batches) > most:
        raise ValueError(f"batches: expected sizes from 1 to {most}, got {tuple(batches)}")
    if not fills or not all(0 < share < 1 for share in fills):
        raise ValueError(f"fills: expected shares between 0 and 1, got {tuple(fills)}")

    def measure(clock: int) -> list[tuple[float, ...]]:
        rows: list[tuple[float, ...]] = []
        for batch in core.progress(batches, f"decode, {clock} MHz"):
            room = (engine.free_pages // batch) * engine.config.page_size
            room = min(engine.model.config.max_position_embeddings, room)
            for share in fills:
                rows += _decode_rows(engine, clock, batch, share, room, steps)
        return rows

    return _swept("decode", measure, gpu, freqs)


def profile_prefill(
    engine: Any,
    gpu: Any = None,
    *,
    freqs: Sequence[int] = (),
    lengths: Sequence[int] | None = None,
    repeats: int = 4,
) -> Samples:
    """Times iterations that read one prompt; arguments and errors are those of `profile_decode`.

    Args:
      engine: an `Engine`.
      gpu: whose clocks are swept.
      freqs: MHz.
      lengths: tokens of the prompts, up to what one iteration reads; None: eight from a sixteenth of that on.
      repeats: of each.
    """
    _check_idle(engine)
    most = min(engine.config.prefill_chunk, engine.model.config.max_position_embeddings - 2)
    lengths = sorted({max(2, most * part // 16) for part in range(1, 17, 2)}) if lengths is None else lengths
    if not lengths or min(lengths) < 1 or max(lengths) > most:
        raise ValueError(f"lengths: expected 1 to {most} tokens, got {tuple(lengths)}")

    def measure(clock: int) -> list[tuple[float, ...]]:
        rows: list[tuple[float, ...]] = []
        for length in core.progress(lengths, f"prefill, {clock} MHz"):
            for _ in range(repeats):
                (request,) = _add(engine, 1, length, 1)
                rows += [(clock, *row) for row in _timed(engine, 1)]
                engine.abort(request)
                engine.step()
        return rows

    return _swept("prefill", measure, gpu, freqs)


def _check_idle(engine: Any) -> None:
    if engine.has_work:
        raise ValueError("engine: expected one without work, got one that has requests")


def _decode_rows(engine: Any, clock: int, batch: int, share: float, room: int, steps: int) -> list[tuple[float, ...]]:
    # The first request goes on while the last one is read, at worst a prompt a step.
    length = max(1, int(share * (room - steps)))
    drawn = steps + 2 + batch + -(-batch * length // engine.config.prefill_chunk)
    if drawn >= room:
        raise ValueError(f"batches: expected sizes that leave each request more than {drawn} tokens, got {batch}")
    requests = _add(engine, batch, min(length, room - drawn), drawn)
    began: set[Any] = set()
    while len(began) < batch:
        began |= {output.request_id for output in engine.step() if output.new_token_ids}
    rows: list[tuple[float, ...]] = [(clock, *row) for row in _timed(engine, steps) if row[0] == batch]
    for request in requests:
        engine.abort(request)
    engine.step()
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class PhaseProfile:
    """An engine measured in one phase.

    Attributes:
      samples: its iterations.
      table: fitted to all of them.
      error: of a table fitted to half of them, on the other half (MAPE).
    """

    samples: Samples
    table: LatencyTable
    error: float


def profile(
    engine: Any, folder: str | os.PathLike[str], gpu: Any = None, *, freqs: Sequence[int] = (), steps: int = 16
) -> dict[Phase, PhaseProfile]:
    """Measures both phases, and leaves the tables that controllers predict by: `decode.csv` and `prefill.csv`.

    Args:
      engine: an `Engine` without work; call its `warmup` before.
      folder: gets the tables, and the iterations as `decode_samples.csv` and `prefill_samples.csv`.
      gpu: as in `profile_decode`, like the next two.
      freqs: MHz.
      steps: decode iterations at each point.

    Raises:
      ValueError: an engine with work, or one too small to be measured.
    """
    found: dict[Phase, PhaseProfile] = {
        "prefill": _fitted(profile_prefill(engine, gpu, freqs=freqs), None),
        "decode": _fitted(profile_decode(engine, gpu, freqs=freqs, steps=steps), engine.config.batch_buckets),
    }
    for phase, made in found.items():
        made.samples.to_csv(Path(folder) / f"{phase}_samples.csv")
        made.table.to_csv(Path(folder) / f"{phase}.csv")
    return found


def _fitted(samples: Samples, boundaries: Sequence[int] | None) -> PhaseProfile:
    half, held = samples.split()
    error = held.error(half.fit(boundaries=boundaries))
    return PhaseProfile(samples, samples.fit(boundaries=boundaries), error)


_PROMPTS = np.random.default_rng(0)


def _add(engine: Any, count: int, length: int, max_tokens: int) -> list[Any]:
    """Adds prompts that share nothing, and whose answers do not end by themselves."""
    from jaxlab.inference import SamplingParams

    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    vocabulary = engine.model.config.vocab_size
    return [engine.add_request(_PROMPTS.integers(vocabulary, size=length).tolist(), greedy) for _ in range(count)]


def _timed(engine: Any, steps: int) -> list[tuple[float, float, float]]:
    """Running requests, tokens and ms of steps, without those that compiled something."""
    rows = []
    for _ in range(steps):
        compiled, start = engine.compile_count, time.perf_counter()
        engine.step()
        ms, seen = 1000 * (time.perf_counter() - start), engine.metrics()
        if engine.compile_count == compiled:
            rows.append((float(seen.running), float(seen.tokens), ms))
    return rows


def _swept(phase: Phase, measure: Any, gpu: Any, freqs: Sequence[int]) -> Samples:
    """Runs `measure` at each clock of a real GPU, and once otherwise."""
    real = gpu is not None and not hasattr(gpu, "set_load")
    clocks = tuple(freqs) or (tuple(gpu.supported_clocks()) if gpu is not None else (1,))
    rows: list[tuple[float, ...]] = []
    if real:
        try:
            for clock in clocks:
                gpu.set_clock(clock)
                rows += measure(clock)
        finally:
            gpu.reset()
    else:
        rows = measure(max(clocks))
    columns = np.array(rows, np.float64).reshape(-1, len(_COLUMNS)).T
    samples = Samples(phase, columns[0].astype(int), *columns[1:])
    return samples if real else samples.at_clocks(clocks)
