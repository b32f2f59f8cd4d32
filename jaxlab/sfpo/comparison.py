"""Which method gets how far with how many rollouts, and how sure that is; runs that never get there are counted.

The target is a part of what the first method gains: its accuracy at the start, plus a share of the rise to the best of
its smoothed accuracy, the mean over its seeds. A run reaches it at its first measurement whose smoothed accuracy is at
least that. One that never does is censored: it enters every mean with all it had, which is too little for it, and the
ratio becomes a bound, which the table says.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlab.core import statistics

AXES = ("rollouts", "seconds")


class Costs(NamedTuple):
    """Seconds of one round of sampling (rewards included), of a plain update, and of a slow-fast one."""

    sampling: float
    plain: float
    slow_fast: float

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]]) -> "Costs":
        """Medians, so that an interruption or a busy neighbour does not count; steps that compiled are left out.

        Args:
          steps: lines of `metrics.jsonl`, of one run or of several alike.
        """
        warm = [row for row in steps if not row["compilations"]] or list(steps)
        updates = {
            active: [row["update_seconds"] for row in warm if bool(row["sfpo_active"]) is active]
            for active in (False, True)
        }
        plain, slow_fast = (float(np.median(updates[active])) if updates[active] else 0.0 for active in (False, True))
        return cls(float(np.median([row["rollout_seconds"] / _rounds(row) for row in warm])), plain, slow_fast)


def _rounds(row: Mapping[str, float]) -> float:
    return row.get("sampling_rounds", 1.0)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run at its measurements, the first of which is the start.

    Attributes:
      steps: `[E]`.
      rollouts: `[E]` completions drawn so far, those that dynamic sampling threw away included.
      seconds: `[E]` of rollouts and updates so far, every one at its `Costs`.
      sampled: `[E]` accuracy at temperature 1.
      greedy: `[E]` accuracy of the likeliest answers.
      entropy: `[S]` of the policy, nats a token, one a step.
      rollout_seconds: of the mean step, likewise.
      update_seconds: of the mean step.
      fast_steps: steps with slow-fast updates.
      skipped: updates that were not made since their gradient was not finite.
    """

    steps: np.ndarray
    rollouts: np.ndarray
    seconds: np.ndarray
    sampled: np.ndarray
    greedy: np.ndarray
    entropy: np.ndarray
    rollout_seconds: float
    update_seconds: float
    fast_steps: int
    skipped: int

    @classmethod
    def of(
        cls,
        steps: Sequence[Mapping[str, float]],
        evaluations: Sequence[Mapping[str, float]],
        before: Any,
        batch_size: int,
        costs: Costs | None = None,
    ) -> "Curve":
        """Puts a run's log together.

        Args:
          steps: lines of `metrics.jsonl`, every step once.
          evaluations: measurements, ascending.
          before: the accuracy at the start.
          batch_size: completions of one round of sampling.
          costs: of the method; None: of this run.
        """
        costs = costs or Costs.of(steps)
        rounds = np.array([_rounds(row) for row in steps])
        sampling = costs.sampling * rounds
        updating = np.array([costs.slow_fast if row["sfpo_active"] else costs.plain for row in steps])
        at = np.array([0, *(int(row["step"]) for row in evaluations)])

        def column(name: str) -> np.ndarray:
            return np.array([getattr(before, name), *(row[name] for row in evaluations)])

        return cls(
            steps=at,
            rollouts=np.concatenate([[0.0], np.cumsum(batch_size * rounds)])[at],
            seconds=np.concatenate([[0.0], np.cumsum(sampling + updating)])[at],
            sampled=column("sampled"),
            greedy=column("greedy"),
            entropy=np.array([row["entropy"] for row in steps]),
            rollout_seconds=float(sampling.mean()),
            update_seconds=float(updating.mean()),
            fast_steps=int(sum(row["sfpo_active"] for row in steps)),
            skipped=int(sum(row["skipped"] for row in steps)),
        )


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times less one method needs than another, seed by seed.

    Attributes:
      mean: the geometric mean over seeds; above 1 the method needs less.
      low: of its 95 % bootstrap interval; None with one seed.
      high: of it.
      bound: what `mean` is, seen that some runs never reached the target: "" (all did), "at least", "at most", or
        "unknown" where runs of both did not.
    """

    mean: float
    low: float | None
    high: float | None
    bound: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A method at one target.

    Attributes:
      method: its name.
      share: of the first method's gain.
      target: accuracy to reach.
      reached: runs that did.
      runs: of how many.
      needed: axis -> mean over the runs of what it took; those that never reached it count with all they had.
      ratios: axis -> the first method's need over this one's.
    """

    method: str
    share: float
    target: float
    reached: int
    runs: int
    needed: Mapping[str, float]
    ratios: Mapping[str, Ratio]


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each place, of fewer at the beginning."""
    return np.array([np.mean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)])


def target_of(curves: Sequence[Curve], share: float, width: int) -> float:
    """The accuracy that a share of the gain of these runs is: of the best of their mean smoothed curve."""
    mean = np.mean([smoothed(curve.sampled, width) for curve in curves], axis=0)
    return float((1 - share) * mean[0] + share * mean.max())  # exact at 1: a lone run does reach its own best


def first_at(curve: Curve, target: float, width: int) -> int | None:
    """Index of the first measurement after the start that reaches a target; None where none does."""
    there = np.flatnonzero(smoothed(curve.sampled, width)[1:] >= target)
    return int(there[0]) + 1 if len(there) else None


def collapsed(curve: Curve, width: int) -> bool:
    """Whether a run ends having lost more than half of what it had gained at its best, or below its start."""
    smooth = smoothed(curve.sampled, width)
    start = smooth[0]
    return bool(smooth[-1] < start + 0.5 * (smooth.max() - start))


def compare(curves: Mapping[str, Sequence[Curve]], *, shares: Sequence[float], width: int) -> list[Outcome]:
    """Every method against the first one, for each share of its gain.

    Args:
      curves: method -> one curve a seed, the same seeds in the same order.
      shares: of the gain.
      width: of the smoothing.

    Raises:
      ValueError: methods with different numbers of runs, or none.
    """
    counts = {len(runs) for runs in curves.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"curves: expected as many runs of every method, got {sorted(counts)}")
    first = next(iter(curves.values()))
    rows = []
    for share in shares:
        target = target_of(first, share, width)
        theirs = {axis: _needed(first, target, width, axis) for axis in AXES}
        for method, runs in curves.items():
            mine = {axis: _needed(runs, target, width, axis) for axis in AXES}
            reached = [first_at(curve, target, width) is not None for curve in runs]
            bound = _bound(all(first_at(curve, target, width) is not None for curve in first), all(reached))
            rows.append(
                Outcome(
                    method,
                    share,
                    target,
                    sum(reached),
                    len(runs),
                    {axis: float(values.mean()) for axis, values in mine.items()},
                    {axis: _ratio(theirs[axis], mine[axis], "" if runs is first else bound) for axis in AXES},
                )
            )
    return rows


def _needed(runs: Sequence[Curve], target: float, width: int, axis: str) -> np.ndarray:
    values = []
    for curve in runs:
        at = first_at(curve, target, width)
        values.append(getattr(curve, axis)[-1 if at is None else at])
    return np.array(values)


def _bound(first_reached: bool, reached: bool) -> str:
    if first_reached:
        return "" if reached else "at most"
    return "at least" if reached else "unknown"


def _ratio(theirs: np.ndarray, mine: np.ndarray, bound: str) -> Ratio:
    logs = np.log(theirs) - np.log(mine)
    if len(logs) < 2:
        return Ratio(math.exp(logs[0]), None, None, bound)
    interval = statistics.bootstrap_ci(logs)
    return Ratio(math.exp(interval.mean), math.exp(interval.low), math.exp(interval.high), bound)
