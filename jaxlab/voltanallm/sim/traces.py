"""What arrives at a cluster, when, and how long it is: real traces, and real lengths with made-up arrivals."""

import csv
import dataclasses
import datetime
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from jaxlab import core

_COLUMNS = {
    "arrival": ("arrived_at_s", "TIMESTAMP"),
    "prompt": ("num_prefill_tokens", "ContextTokens"),
    "output": ("num_decode_tokens", "GeneratedTokens"),
}
"""Names of the columns here, and in Azure's own files."""

AZURE_CONVERSATION = "traces/azure_llm_2023_conv_first40min.csv"
AZURE_CODE = "traces/azure_llm_2023_code_first40min.csv"
SHAREGPT = "traces/sharegpt_lengths_llama2_tokenizer.csv"
"""Names of `core.data_path`."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Requests without times.

    Attributes:
      prompt: [N] int64 tokens.
      output: [N] int64 tokens, at least 1.
      origin: where they come from and what was done to them, for reports.
      synthetic: whether they were made up, because the real ones were not there.
    """

    prompt: np.ndarray
    output: np.ndarray
    origin: str = ""
    synthetic: bool = False


class Trace:
    """Requests in the order of their arrival.

    Args:
      arrival_s: [N] seconds, ascending, not negative.
      prompt_tokens: [N] whole numbers, at least 1.
      output_tokens: [N] whole numbers, at least 1; the prefill emits the first of them.

    Attributes:
      arrival_s: [N] float64.
      prompt_tokens: [N] int64.
      output_tokens: [N] int64.

    Raises:
      ValueError: unequal lengths, no request, times negative, not finite or unsorted, an empty prompt or output; the
        first offending request is named.
    """

    def __init__(self, arrival_s: ArrayLike, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> None:
        arrival = np.asarray(arrival_s, np.float64)
        prompt = _whole("prompt_tokens", prompt_tokens)
        output = _whole("output_tokens", output_tokens)
        shapes = (arrival.shape, prompt.shape, output.shape)
        if arrival.ndim != 1 or len(set(shapes)) != 1 or not len(arrival):
            raise ValueError(f"trace: expected three columns of one length, at least 1, got shapes {shapes}")
        for name, wrong, expected in (
            ("arrival_s", ~np.isfinite(arrival) | (arrival < 0), "finite, not negative"),
            ("arrival_s", np.diff(arrival, prepend=arrival[:1]) < 0, "ascending"),
            ("prompt_tokens", prompt < 1, "at least 1"),
            ("output_tokens", output < 1, "at least 1"),
        ):
            if wrong.any():
                at = int(np.argmax(wrong))
                value = {"arrival_s": arrival, "prompt_tokens": prompt, "output_tokens": output}[name][at]
                raise ValueError(f"{name}: expected {expected}, got {value} for request {at}")
        self.arrival_s, self.prompt_tokens, self.output_tokens = arrival, prompt, output

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Mean requests per second, first to last; infinite if they come at once."""
        span = self.arrival_s[-1] - self.arrival_s[0]
        return (len(self) - 1) / span if span > 0 else float("inf")

    @classmethod
    def from_lengths(
        cls,
        prompt: ArrayLike,
        output: ArrayLike,
        *,
        rate: float,
        num_requests: int,
        burstiness: float = 1.0,
        seed: int = 0,
    ) -> "Trace":
        """Lengths drawn in pairs with replacement, gaps drawn from a gamma distribution.

        With one seed, the same requests come in the same proportion of time at every rate and burstiness 1.

        Args:
          prompt: [M] tokens.
          output: [M] tokens.
          rate: requests per second.
          num_requests: to draw.
          burstiness: the distribution's shape, its scale is 1 / (rate * burstiness): 1 is a Poisson process, less is
            burstier (serving benchmarks of vLLM and SGLang).
          seed: of lengths and gaps; each has a stream of its own.

        Raises:
          ValueError: a rate, burstiness or number out of range, or lengths that `Trace` does not take.
        """
        prompt, output = np.asarray(prompt), np.asarray(output)
        for name, value in (("rate", rate), ("burstiness", burstiness)):
            if not (value > 0 and np.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if num_requests < 1:
            raise ValueError(f"num_requests: expected at least 1, got {num_requests}")
        if prompt.ndim != 1 or prompt.shape != output.shape or not len(prompt):
            raise ValueError(f"output: expected as many lengths as prompts, at least 1, got {output.shape}")
        lengths, gaps = (np.random.default_rng([seed, stream]) for stream in range(2))
        drawn = lengths.integers(len(prompt), size=num_requests)
        times = np.cumsum(gaps.gamma(burstiness, 1 / burstiness, size=num_requests)) / rate
        return cls(times, prompt[drawn], output[drawn])

    @classmethod
    def azure(cls, path: str | os.PathLike[str]) -> "Trace":
        """Azure's LLM inference traces (Patel et al., Splitwise, ISCA 2024), or a CSV with such columns.

        Args:
          path: a CSV with arrived_at_s, num_prefill_tokens and num_decode_tokens, or TIMESTAMP, ContextTokens and
            GeneratedTokens; times are counted from the first request.

        Raises:
          ValueError: a column is missing, a cell is no number, or `Trace` does not take the values.
        """
        columns = _read(path, ("arrival", "prompt", "output"))
        return cls(columns["arrival"] - columns["arrival"][:1], columns["prompt"], columns["output"])

    def at_rate(self, rate: float) -> "Trace":
        """The same requests in less or more time, `rate` a second on average.

        Raises:
          ValueError: a rate that is not positive, or requests that all come at once.
        """
        if not (rate > 0 and np.isfinite(rate)):
            raise ValueError(f"rate: expected a positive number, got {rate}")
        if not np.isfinite(self.rate):
            raise ValueError("rate: expected a trace of some duration, got requests that all come at once")
        return Trace(self.arrival_s * (self.rate / rate), self.prompt_tokens, self.output_tokens)

    def part(self, start: int, stop: int) -> "Trace":
        """Requests `start` to `stop - 1`, the first one at time 0."""
        arrival = self.arrival_s[start:stop]
        return Trace(arrival - arrival[:1], self.prompt_tokens[start:stop], self.output_tokens[start:stop])


def read_lengths(
    path: str | os.PathLike[str], *, max_prompt: int | None = None, mean_output: float | None = None
) -> Lengths:
    """The two columns of lengths of a CSV.

    Args:
      path: a CSV with num_prefill_tokens and num_decode_tokens.
      max_prompt: longer prompts are left out.
      mean_output: outputs are multiplied by one factor, so that this is their mean, and rounded up.

    Raises:
      ValueError: a column is missing, a cell is no number, or nothing is left.
    """
    columns = _read(path, ("prompt", "output"))
    kept = columns["prompt"] <= (np.inf if max_prompt is None else max_prompt)
    if not kept.any():
        raise ValueError(
            f"max_prompt: expected at least {columns['prompt'].min():g}, got {max_prompt}: no prompt is left"
        )
    return _adapted(columns["prompt"][kept], columns["output"][kept], max_prompt, mean_output, Path(path).name)


def sharegpt(*, max_prompt: int | None = 725, mean_output: float | None = 200.0, download: bool = True) -> Lengths:
    """Lengths of ShareGPT conversations, as short as those that VoltanaLLM is measured with.

    The file has whole conversations (means of 2340 tokens in and 439 out); the paper samples the first two turns, with
    some 250 tokens in. Prompts up to 725 tokens have a mean of 250; their outputs are scaled to the mean of 200 that
    serving benchmarks report for such samples (ours: the paper's is not known). Where the file is absent, lognormal
    lengths of the same means are made up.

    Args:
      max_prompt: longer prompts are left out; None: none.
      mean_output: of the scaled outputs; None: as they are.
      download: whether to download what is not on this machine.
    """
    try:
        return read_lengths(core.data_path(SHAREGPT, download=download), max_prompt=max_prompt, mean_output=mean_output)
    except core.DataUnavailable:
        generator = np.random.default_rng(0)
        prompt = np.ceil(generator.lognormal(5.1, 0.95, 8192))
        output = np.ceil(generator.lognormal(5.7, 0.9, 8192))
        return dataclasses.replace(
            _adapted(prompt, output, max_prompt, mean_output, "lognormal lengths"), synthetic=True
        )


def _adapted(prompt: np.ndarray, output: np.ndarray, longest: int | None, mean: float | None, origin: str) -> Lengths:
    kept = prompt <= (np.inf if longest is None else longest)
    prompt, output = prompt[kept], output[kept]
    if mean is not None:
        output = np.ceil(output * (mean / output.mean()))
        origin += f", outputs scaled to a mean of {mean:g}"
    if longest is not None:
        origin += f", prompts up to {longest}"
    return Lengths(prompt.astype(np.int64), np.maximum(output, 1).astype(np.int64), origin)


def _read(path: str | os.PathLike[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV as float64, without requests that have no output; says how many those were."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        names = {}
        for column in wanted:
            found = [name for name in _COLUMNS[column] if name in header]
            if not found:
                raise ValueError(f"{path}: expected a column {' or '.join(_COLUMNS[column])}, got {', '.join(header)}")
            names[column] = found[0]
        rows = list(reader)
    columns: dict[str, list[float]] = {column: [] for column in wanted}
    for line, row in enumerate(rows, 2):
        for column, name in names.items():
            try:
                columns[column].append(_number(row[name]))
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {line}: expected a number as {name}, got {row[name]!r}") from None
    arrays = {column: np.array(values) for column, values in columns.items()}
    empty = arrays["output"] == 0
    if empty.any():
        warnings.warn(f"{path}: {empty.sum()} of {len(empty)} requests have no output and are left out", stacklevel=3)
    return {column: values[~empty] for column, values in arrays.items()}


def _number(cell: str) -> float:
    """A number, or a date with its time as seconds."""
    try:
        return float(cell)
    except ValueError:
        moment = datetime.datetime.fromisoformat(cell)
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()


def _whole(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        as_float = np.asarray(array, np.float64)
        if not (np.isfinite(as_float) & (as_float == np.floor(as_float))).all():
            raise ValueError(f"{name}: expected whole numbers, got {as_float[as_float != np.floor(as_float)][:1]}")
    return array.astype(np.int64)
