"""What a study found: accuracy with intervals, tests against a baseline, and accuracy against tokens."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.statistics import Interval, bootstrap_ci, holm, mcnemar_exact, paired_bootstrap_ci
from jaxlab.vlm_scaling.cost import Tokens
from jaxlab.vlm_scaling.verdicts import VerdictMetrics


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy.

    Attributes:
      strategy: its name.
      accuracy: mean over questions, with its bootstrap interval; NaN ends with fewer than two images or questions.
      tokens: mean over questions.
      difference: accuracy minus the baseline's, paired; None for the baseline and for a single question.
      p_value: exact McNemar test against the baseline; None where outcomes are expectations, not 0 and 1.
      adjusted: `p_value` after Holm's correction over the strategies.
      selectable: whether it runs without the right answer.
    """

    strategy: str
    accuracy: Interval
    tokens: Tokens
    difference: Interval | None
    p_value: float | None
    adjusted: float | None
    selectable: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """A study's result; questions are in the order of their ids, so that it does not depend on the order given.

    Attributes:
      accuracy: strategy -> mean over questions.
      table: one row a strategy, in the order given.
      baseline: what the others are tested against.
      questions: ids, [Q].
      clusters: [Q], what is independent: labels of the questions' images.
      outcomes: strategy -> [Q], 1 right, 0 wrong, or an expectation.
      tokens: strategy -> [Q], of all kinds.
      answers: strategy -> answers given.
      transitions: strategy -> what became of first answers, for those that revise.
      verdicts: verifier mode -> how good its verdicts are.
      agreement: pair of modes -> share of samples on which their verdicts agree.
    """

    accuracy: Mapping[str, float]
    table: tuple[Row, ...]
    baseline: str
    questions: tuple[str, ...]
    clusters: tuple[str, ...]
    outcomes: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    answers: Mapping[str, tuple[str | None, ...]]
    transitions: Mapping[str, Mapping[str, int]]
    verdicts: Mapping[str, VerdictMetrics]
    agreement: Mapping[tuple[str, str], float]

    def row(self, strategy: str) -> Row:
        """The row of a strategy.

        Raises:
          KeyError: there is none of this name.
        """
        found = [row for row in self.table if row.strategy == strategy]
        if not found:
            raise KeyError(f"strategy: expected one of {', '.join(self.accuracy)}, got {strategy!r}")
        return found[0]

    def frontier(self) -> list[Row]:
        """The selectable strategies that no other beats with as few tokens, cheapest first."""
        rows = {row.strategy: row for row in self.table if row.selectable}
        return [
            rows[name] for name in undominated({name: row.tokens.total for name, row in rows.items()}, self.accuracy)
        ]

    def recommend(self, budget: float) -> Row:
        """The most accurate selectable strategy within a budget, with its expected accuracy: compute-optimal.

        To be asked of a study on a dev split (`split`); on the questions it is to be used for it flatters itself, and
        `choose` is the honest way.

        Args:
          budget: tokens a question, of all kinds.

        Raises:
          ValueError: every strategy takes more.
        """
        within = [row for row in self.frontier() if row.tokens.total <= budget]
        if not within:
            least = min((row.tokens.total for row in self.table if row.selectable), default=math.inf)
            raise ValueError(f"budget: expected at least {least:g} tokens a question, got {budget:g}")
        return within[-1]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Column names and rows, for a table of `core.Report`."""
        kinds = [field.name for field in dataclasses.fields(Tokens)]
        columns = ("strategy", "accuracy", "low", "high", "difference", "p (Holm)", "tokens", *kinds)
        rows = [
            (
                *(row.strategy, row.accuracy.mean, row.accuracy.low, row.accuracy.high),
                *(None if row.difference is None else row.difference.mean, row.adjusted, row.tokens.total),
                *dataclasses.astuple(row.tokens),
            )
            for row in self.table
        ]
        return columns, rows

    def __str__(self) -> str:
        columns, rows = self.cells()
        text = [columns, *([_shown(cell) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in text) for column in range(len(columns))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in text)


def _shown(cell: str | float | None) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}"


def undominated(tokens: Mapping[str, float], accuracy: Mapping[str, float]) -> list[str]:
    """The names in `tokens` that no other beats in accuracy with as few tokens, cheapest first; of equals the first."""
    best, names = -math.inf, []
    for name in sorted(tokens, key=lambda name: (tokens[name], -accuracy[name])):
        if accuracy[name] > best:
            best = accuracy[name]
            names.append(name)
    return names


def make_report(
    *,
    questions: Sequence[str],
    clusters: Sequence[str],
    outcomes: Mapping[str, Sequence[float]],
    answers: Mapping[str, Sequence[str | None]],
    tokens: Mapping[str, Sequence[Tokens]],
    selectable: Mapping[str, bool],
    baseline: str,
    transitions: Mapping[str, Mapping[str, int]],
    verdicts: Mapping[str, VerdictMetrics],
    agreement: Mapping[tuple[str, str], float],
    n_resamples: int,
    seed: int,
) -> Report:
    """Puts a report together.

    Args:
      questions: ids, in one order for everything.
      clusters: label of what is independent, one a question: its image.
      outcomes: strategy -> accuracy of each question.
      answers: strategy -> answer to each.
      tokens: strategy -> tokens of each.
      selectable: strategy -> whether it runs without the right answer.
      baseline: strategy that the others are tested against.
      transitions: see `Report`.
      verdicts: see `Report`.
      agreement: see `Report`.
      n_resamples: of the bootstrap.
      seed: of the bootstrap.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in outcomes.items()}
    several = len(set(clusters)) > 1
    labels = None if len(set(clusters)) == len(clusters) else np.asarray(clusters)
    options = {"clusters": labels, "n_resamples": n_resamples, "seed": seed}
    binary = {name: bool(np.isin(values, (0, 1)).all()) for name, values in arrays.items()}
    tested = [name for name in arrays if name != baseline and binary[name] and binary[baseline]]
    p_values = {name: mcnemar_exact(arrays[name], arrays[baseline]) for name in tested}
    adjusted = dict(zip(tested, map(float, holm(list(p_values.values()))))) if tested else {}
    rows = []
    for name, values in arrays.items():
        mean = float(values.mean())
        rows.append(
            Row(
                strategy=name,
                accuracy=bootstrap_ci(values, **options) if several else Interval(mean, math.nan, math.nan),
                tokens=_mean(tokens[name]),
                difference=paired_bootstrap_ci(values, arrays[baseline], **options)
                if several and name != baseline
                else None,
                p_value=p_values.get(name),
                adjusted=adjusted.get(name),
                selectable=selectable[name],
            )
        )
    return Report(
        accuracy={row.strategy: row.accuracy.mean for row in rows},
        table=tuple(rows),
        baseline=baseline,
        questions=tuple(questions),
        clusters=tuple(clusters),
        outcomes=arrays,
        tokens={name: np.array([each.total for each in taken], np.float64) for name, taken in tokens.items()},
        answers={name: tuple(given) for name, given in answers.items()},
        transitions=transitions,
        verdicts=verdicts,
        agreement=agreement,
    )


def _mean(tokens: Sequence[Tokens]) -> Tokens:
    return Tokens(*np.mean([dataclasses.astuple(each) for each in tokens], axis=0).tolist())
