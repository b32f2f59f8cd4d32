"""Ways to spend samples on a question, each a small object with a name and a number of samples.

    from jaxlab.vlm_scaling import BestOfN, Majority, Oracle, RandomOf
    strategies = [Majority(8), Majority(16), BestOfN(8), BestOfN(8, mode="blind+solution"), Oracle(8), RandomOf(8)]

A strategy is run on a `View` of one question and tells what it answered, how right that is, and what it cost. New ones
need no registration: anything with `name`, `n`, `modes`, `needs` and `run`.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxlab.vlm_scaling import select
from jaxlab.vlm_scaling.aha import outcome
from jaxlab.vlm_scaling.cost import Tokens
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.inputs import MODES, filled
from jaxlab.vlm_scaling.samples import Sample
from jaxlab.vlm_scaling.view import View

DEFAULT_MODE = "image+solution"


@dataclass(frozen=True)
class Outcome:
    """What a strategy made of a question.

    Attributes:
      answer: given; None: none, or not one.
      accuracy: 1 for right, 0 for wrong, or an expectation in between.
      tokens: what it took.
      transition: what became of the first answer, for strategies that revise; "" for the others.
    """

    answer: str | None
    accuracy: float
    tokens: Tokens
    transition: str = ""


@runtime_checkable
class Strategy(Protocol):
    """What a study compares.

    Attributes:
      name: unique in a study, with the number of samples: "majority@8".
      n: samples it looks at.
      modes: verifier modes it needs.
      needs: methods of the sampler it needs, beyond `sample`.
      selectable: False where the right answer is needed to run it.
    """

    name: str
    n: int
    modes: tuple[str, ...]
    needs: tuple[str, ...]
    selectable: bool

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        ...


class _Strategy:
    """What strategies have in common."""

    n: int = 0
    modes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    selectable: bool = True

    def _check(self, least: int = 1) -> None:
        if self.n < least:
            raise ValueError(f"n: expected at least {least}, got {self.n}")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")

    def _sampled(self, view: View) -> Tokens:
        return view.meter.sampling(view.question, view.samples[: self.n])

    def _verified(self, view: View, mode: str) -> Tokens:
        shown = MODES[mode]
        return self._sampled(view) + view.meter.verifying(
            view.question, view.samples[: self.n], blind=shown.image == "none", answer_only=shown.answer_only
        )

    def _asked(self, view: View, prompt: str, answer: Sample) -> Tokens:
        question = dataclasses.replace(view.question, text=prompt)
        image = 0 if view.meter.prefix_cache else view.meter.image(question)
        return Tokens(prompt=view.meter.prompt(question), image=image, generated=answer.n_tokens)


def _suffix(mode: str) -> str:
    return "" if mode == DEFAULT_MODE else f"[{mode}]"


class Greedy(_Strategy):
    """One sample at temperature 0."""

    name = "greedy"
    needs = ("greedy",)

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        sample = view.greedy()
        answer = view.read(sample.text)
        return Outcome(answer, float(view.right(answer)), view.meter.sampling(view.question, [sample]))


class Majority(_Strategy):
    """The most frequent answer of n (`select.majority`); `tie="expected"`: the share of tied groups that is right."""

    def __init__(
        self,
        n: int,
        *,
        key: Literal["equivalence", "raw"] = "equivalence",
        tie: Literal["first", "random", "expected"] = "first",
    ):
        self.n, self._key, self._tie = n, key, tie
        self.name = f"majority{'-raw' if key == 'raw' else ''}@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        choices, seed = view.question.choices, view.seed
        answers = view.answers(self.n)
        found = select.majority(answers, key=self._key, tie=self._tie, choices=choices, seed=seed)
        groups = found.groups if self._tie == "expected" else found.groups[:1]
        accuracy = sum(view.right(answers[group[0]]) for group in groups) / len(groups)
        return Outcome(found.answer, accuracy, self._sampled(view))


class BestOfN(_Strategy):
    """The sample of n that scores best, by the verifier or without one.

    `by="verifier"` is self-verification in the given mode, ties by log-probability; "logprob" takes the highest mean
    log-probability, "short" and "long" the length. `fallback`: see `select.best_of_n`.
    """

    def __init__(
        self,
        n: int,
        *,
        mode: str = DEFAULT_MODE,
        by: Literal["verifier", "logprob", "short", "long"] = "verifier",
        fallback: Literal["first", "majority"] = "first",
    ):
        if by not in ("verifier", "logprob", "short", "long"):
            raise ValueError(f"by: expected one of verifier, logprob, short, long, got {by!r}")
        self.n, self._by, self._fallback = n, by, fallback
        self.modes = (mode,) if by == "verifier" else ()
        self.name = f"best-of{_suffix(mode)}@{n}" if by == "verifier" else f"best-of-{by}@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        answers, samples = view.answers(self.n), view.samples[: self.n]
        logprobs = [sample.logprob for sample in samples]
        if self.modes:
            scores, tokens = view.scores(self.n, self.modes[0]), self._verified(view, self.modes[0])
        else:
            sign = -1.0 if self._by == "short" else 1.0
            scores = logprobs if self._by == "logprob" else [sign * sample.n_tokens for sample in samples]
            tokens = self._sampled(view)
        found = select.best_of_n(answers, scores, logprobs=logprobs, fallback=self._fallback)
        return Outcome(found.answer, float(view.right(found.answer)), tokens)


class WeightedVote(_Strategy):
    """The answer whose samples' scores add up to most."""

    def __init__(self, n: int, *, mode: str = DEFAULT_MODE):
        self.n, self.modes, self.name = n, (mode,), f"weighted{_suffix(mode)}@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        scores = view.scores(self.n, self.modes[0])
        found = select.weighted_vote(view.answers(self.n), scores, choices=view.question.choices)
        return Outcome(found.answer, float(view.right(found.answer)), self._verified(view, self.modes[0]))


class FilteredVote(_Strategy):
    """The majority among samples that score above `tau`, which belongs to be chosen on a dev split."""

    def __init__(self, n: int, *, tau: float = 0.5, mode: str = DEFAULT_MODE):
        self.n, self.modes, self._tau = n, (mode,), tau
        self.name = f"filtered{'' if tau == 0.5 else f'>{tau:g}'}{_suffix(mode)}@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        scores = view.scores(self.n, self.modes[0])
        found = select.filtered_vote(view.answers(self.n), scores, tau=self._tau, choices=view.question.choices)
        return Outcome(found.answer, float(view.right(found.answer)), self._verified(view, self.modes[0]))


class Oracle(_Strategy):
    """Right if any of n samples is: pass@n, the bound of all that select."""

    selectable = False

    def __init__(self, n: int):
        self.n, self.name = n, f"oracle@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        right = [answer for answer in view.answers(self.n) if view.right(answer)]
        return Outcome(right[0] if right else None, float(bool(right)), self._sampled(view))


class RandomOf(_Strategy):
    """Mean accuracy of n samples: what selecting at random gives."""

    selectable = False

    def __init__(self, n: int):
        self.n, self.name = n, f"random@{n}"
        self._check()

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        answers = view.answers(self.n)
        return Outcome(None, sum(map(view.right, answers)) / self.n, self._sampled(view))


_SELECT = "{question}\n\n{candidates}\n\nWhich of these solutions is correct? Answer with its number only."
_CRITIQUE = (
    "{question}\n\nProposed solution:\n{solution}\n\nCheck the proposed solution against the question and the image "
    "step by step, and say what is wrong with it, if anything."
)
_REVISE = (
    "{question}\n\nProposed solution:\n{solution}\n\nCritique:\n{critique}\n\n"
    "Write the full solution again, corrected where needed, with the final answer in \\boxed{}."
)


class SelfSelect(_Strategy):
    """The model names the best of n solutions: all at once, or pair by pair, the winner against the next.

    Candidates are shuffled with the study's seed, since models prefer places. Where no number can be read, all at once
    falls back to the majority, a pair to its first.
    """

    needs = ("ask",)

    def __init__(self, n: int, *, kind: Literal["listwise", "pairwise"] = "listwise"):
        if kind not in ("listwise", "pairwise"):
            raise ValueError(f"kind: expected one of listwise, pairwise, got {kind!r}")
        self.n, self._pairs = n, kind == "pairwise"
        self.name = f"select{'-pairwise' if self._pairs else ''}@{n}"
        self._check(least=2)

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        order = list(range(self.n))
        random.Random(view.seed).shuffle(order)
        tokens, answers = self._sampled(view), view.answers(self.n)
        best: int | None = order[0]
        for group in [order[at : at + 1] for at in range(1, self.n)] if self._pairs else [order[1:]]:
            shown = [best, *group] if best is not None else group
            named, cost = self._ask(view, shown)
            best, tokens = named if named is not None or not self._pairs else shown[0], tokens + cost
        answer = answers[best] if best is not None else select.majority(answers, choices=view.question.choices).answer
        return Outcome(answer, float(view.right(answer)), tokens)

    def _ask(self, view: View, shown: Sequence[int]) -> tuple[int | None, Tokens]:
        texts = [view.samples[index].text for index in shown]
        candidates = "\n\n".join(f"Solution {place}:\n{text}" for place, text in enumerate(texts, 1))
        prompt = filled(_SELECT, question=view.question.text, candidates=candidates)
        answer = view.ask(prompt)
        asked = self._asked(view, prompt, answer)
        tokens = Tokens(image=asked.image, verify_prompt=asked.prompt, verify_generated=asked.generated)
        number = extract(answer.text).value or ""
        place = int(number) if number.isdecimal() and len(number) < 6 else 0
        return (shown[place - 1] if 1 <= place <= len(shown) else None), tokens


class Refine(_Strategy):
    """Sequential refinement: the first sample, then `rounds` times a critique and a revised answer; the last counts."""

    n = 1
    needs = ("ask",)

    def __init__(self, rounds: int = 1):
        if rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {rounds}")
        self._rounds, self.name = rounds, f"refine@{rounds}"

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        question, solution, tokens = view.question, view.samples[0].text, self._sampled(view)
        first = answer = view.read(solution)
        for _ in range(self._rounds):
            prompt = filled(_CRITIQUE, question=question.text, solution=solution)
            critique = view.ask(prompt)
            tokens += self._asked(view, prompt, critique)
            prompt = filled(_REVISE, question=question.text, solution=solution, critique=critique.text)
            revised = view.ask(prompt)
            tokens += self._asked(view, prompt, revised)
            solution, answer = revised.text, view.read(revised.text)
        change = outcome(first, answer, question.answer, choices=question.choices)
        return Outcome(answer, float(view.right(answer)), tokens, change)


class BudgetForce(_Strategy):
    """Budget forcing (s1, arXiv 2501.19393): thinking is neither shorter nor longer than allowed.

    Where it ends before `minimum` tokens, the end is dropped and `word` put in its place, at most `waits` times; at
    `maximum` tokens it is ended. Then the answer is asked for by `answer_prefix`.
    """

    needs = ("extend",)

    def __init__(
        self,
        minimum: int = 0,
        maximum: int = 1024,
        *,
        waits: int = 2,
        word: str = "Wait",
        opening: str = "<think>",
        closing: str = "</think>",
        answer_prefix: str = "\nThe final answer is ",
        answer_tokens: int = 64,
    ):
        if not 0 <= minimum <= maximum or maximum < 1:
            raise ValueError(f"minimum and maximum: expected 0 <= minimum <= maximum, got {minimum} and {maximum}")
        if waits < 0 or not closing:
            raise ValueError(f"waits and closing: expected at least 0 and a text, got {waits} and {closing!r}")
        self._minimum, self._maximum, self._waits, self._word = minimum, maximum, waits, word
        self._opening, self._closing = opening, closing
        self._answer_prefix, self._answer_tokens = answer_prefix, answer_tokens
        self.name = f"budget@{minimum}-{maximum}"

    def run(self, view: View) -> Outcome:
        """Answers one question."""
        thinking, used, waits = self._opening, 0, 0
        while used < self._maximum:
            piece = view.extend(thinking, max_tokens=self._maximum - used, stop=self._closing)
            thinking, used = thinking + piece.text, used + piece.n_tokens
            if used >= self._minimum or waits == self._waits:
                break
            thinking, waits = f"{thinking.rstrip()} {self._word}", waits + 1
        end = f"{thinking}{self._closing}{self._answer_prefix}"
        last = view.extend(end, max_tokens=self._answer_tokens)
        answer = view.read(self._answer_prefix + last.text)
        drawn = Sample(end + last.text, used + last.n_tokens)
        return Outcome(answer, float(view.right(answer)), view.meter.sampling(view.question, [drawn]))
