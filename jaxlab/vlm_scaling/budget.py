"""What a budget of tokens is best spent on: strategy and number of samples, chosen on some questions, told on others.

    from jaxlab.vlm_scaling import Study, choose
    report = Study(questions, sampler, strategies=[Majority(n) for n in (1, 4, 16)], n=16).run()
    print(choose(report, 400))          # tokens a question

The strategy that does best on given questions does so in part by luck, and more so the more strategies there are
(winner's curse): its accuracy there is too high on average, and nothing here is told by it. Held-out questions had no
part in the choice, so the chosen strategy's accuracy on them, and its differences to others, are unbiased.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxlab.core.statistics import Interval, bootstrap_ci, paired_bootstrap_ci
from jaxlab.vlm_scaling.report import Report, undominated
from jaxlab.vlm_scaling.study import drawn


@dataclasses.dataclass(frozen=True)
class Point:
    """A strategy, and what became of it.

    Attributes:
      strategy: its name, with the number of samples.
      dev: its accuracy on the dev questions.
      accuracy: on the held-out ones, with its bootstrap interval.
      tokens: a question, mean over the held-out ones.
      difference: the chosen strategy's held-out accuracy minus this one's, paired; of the chosen one, nothing but 0.
    """

    strategy: str
    dev: float
    accuracy: Interval
    tokens: float
    difference: Interval

    @property
    def distinguishable(self) -> bool:
        """Whether the interval of `difference` leaves out 0; taken by itself, not corrected for a family of tests."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a budget is best spent on.

    Attributes:
      budget: tokens a question.
      chosen: the strategy most accurate on the dev questions of those within the budget there, of equals the cheapest.
      runners_up: the others within the budget, by their accuracy on the dev questions.
      hindsight: of them all the one that turned out best on the held-out questions.
      frontier: the strategies that no other beat with as few tokens on the dev questions, cheapest first and whatever
        the budget.
      dev_questions: how many questions were chosen on.
      held_out_questions: how many tell the outcome.
    """

    budget: float
    chosen: Point
    runners_up: tuple[Point, ...]
    hindsight: Point
    frontier: tuple[Point, ...]
    dev_questions: int
    held_out_questions: int

    @property
    def strategy(self) -> str:
        """The name of the recommended strategy."""
        return self.chosen.strategy

    @property
    def accuracy(self) -> Interval:
        """What is to be expected of it: its accuracy on questions that had no part in the choice."""
        return self.chosen.accuracy

    @property
    def tokens(self) -> float:
        """What it takes a question."""
        return self.chosen.tokens

    @property
    def optimism(self) -> float:
        """By how much the dev questions flattered the chosen strategy."""
        return self.chosen.dev - self.chosen.accuracy.mean

    @property
    def regret(self) -> float:
        """Held-out accuracy lost against the best in hindsight, at least 0.

        Hindsight takes the highest of several noisy numbers, so on average this is no less than what is really lost.
        """
        return self.hindsight.accuracy.mean - self.chosen.accuracy.mean

    @property
    def distinguishable(self) -> bool | None:
        """Whether the chosen strategy can be told from the next on the held-out questions; None if it is alone."""
        return self.runners_up[0].distinguishable if self.runners_up else None

    def __str__(self) -> str:
        lines = [
            f"{self.strategy}, for at most {self.budget:g} tokens a question",
            f"accuracy {_shown(self.accuracy)} with {self.tokens:.4g} tokens, on {self.held_out_questions} held-out "
            f"questions ({self.chosen.dev:.3f} on the {self.dev_questions} it was chosen on)",
        ]
        if self.runners_up:
            told = "" if self.distinguishable else "not "
            rival = self.runners_up[0]
            lines.append(f"before {rival.strategy} by {_shown(rival.difference)}: {told}distinguishable")
        lines.append(f"best in hindsight: {self.hindsight.strategy}, regret {self.regret:.3f}")
        return "\n".join(lines)


def choose(
    report: Report,
    budget: float,
    *,
    share: float = 0.5,
    seed: int = 0,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Choice:
    """Chooses a strategy for a budget on a dev split of a study's questions, and tells its accuracy on the others.

    The split is by image, as `split` draws it. Strategies that need the right answer are never chosen.

    Args:
      report: of a `Study`.
      budget: tokens a question, of all kinds, in the mean.
      share: of the images that goes to the dev split, in (0, 1).
      seed: of the split and the bootstrap.
      n_resamples: of the bootstrap.
      level: of the intervals.

    Raises:
      ValueError: a budget not above 0, or below what the cheapest strategy takes; only strategies that need the right
        answer; a share outside (0, 1), or that leaves fewer than two images (or questions) in a part.
    """
    if not budget > 0:
        raise ValueError(f"budget: expected a number of tokens above 0, got {budget}")
    names = [row.strategy for row in report.table if row.selectable]
    if not names:
        raise ValueError(f"report: expected a strategy that needs no right answer, got {', '.join(report.accuracy)}")
    labels = np.asarray(report.clusters)
    dev_labels = drawn(report.clusters, share, seed)
    dev = np.isin(labels, list(dev_labels))
    parts = len(dev_labels), len(set(report.clusters)) - len(dev_labels)
    if min(parts) < 2:
        raise ValueError(
            f"share: expected at least 2 images or questions to choose on and 2 to tell by, got {parts[0]} and "
            f"{parts[1]} at share={share}"
        )
    accuracy = {name: float(report.outcomes[name][dev].mean()) for name in names}
    tokens = {name: float(report.tokens[name][dev].mean()) for name in names}
    within = {name: taken for name, taken in tokens.items() if taken <= budget}
    if not within:
        cheapest = min(tokens, key=lambda name: tokens[name])
        raise ValueError(
            f"budget: expected at least the {tokens[cheapest]:g} tokens a question of {cheapest}, got {budget:g}"
        )
    chosen = undominated(within, accuracy)[-1]
    clusters = None if len(set(report.clusters)) == len(labels) else labels[~dev]
    options: dict[str, Any] = {"clusters": clusters, "n_resamples": n_resamples, "level": level, "seed": seed}
    held_out = {name: report.outcomes[name][~dev] for name in names}
    frontier = undominated(tokens, accuracy)
    points = {
        name: Point(
            strategy=name,
            dev=accuracy[name],
            accuracy=bootstrap_ci(held_out[name], **options),
            tokens=float(report.tokens[name][~dev].mean()),
            difference=paired_bootstrap_ci(held_out[chosen], held_out[name], **options),
        )
        for name in dict.fromkeys((*within, *frontier))
    }
    others = sorted((name for name in within if name != chosen), key=lambda name: (-accuracy[name], tokens[name]))
    best = max((chosen, *others), key=lambda name: points[name].accuracy.mean)  # of equals the chosen one
    return Choice(
        budget=budget,
        chosen=points[chosen],
        runners_up=tuple(points[name] for name in others),
        hindsight=points[best],
        frontier=tuple(points[name] for name in frontier),
        dev_questions=int(dev.sum()),
        held_out_questions=int((~dev).sum()),
    )


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
