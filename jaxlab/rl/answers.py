r"""The final answer in a text, and whether two answers are the same mathematics.

    from jaxlab.rl import answers
    answers.extract(r"... so \boxed{\frac{1}{2}}.")                  # "\frac{1}{2}"
    answers.compare([r"\frac{1}{2}", "9^{9^{9^9}}"], ["0.5", "3"])   # equal; not equal: "time limit of 5 s exceeded"

Equal texts and plain numbers are compared on the spot. The rest goes to math-verify (extra `rl`), in worker processes
that stay warm: on hostile input it computes for ever, and its own limits are signals, for the main thread alone.
"""

import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from jaxlab.core import tasks
from jaxlab.core.errors import require

_WORKERS = 8  # at most; a pair takes some milliseconds

_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_WRAPPED = re.compile(r"\$([^$]+)\$|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]|\\text\s*\{([^{}]*)\}", re.DOTALL)
_NUMBER = re.compile(r"(?:\\?\$)?([-+]?(?:(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))")
_DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed")
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}")
_NAMES = "sqrt|(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|pi|and|or"
_WORD = re.compile(rf"(?<![A-Za-z0-9\\])(?!(?:{_NAMES})(?![A-Za-z]))[A-Za-z]{{2,}}")


@dataclass(frozen=True)
class Verdict:
    """What became of one comparison.

    Attributes:
      equal: whether the answers are the same.
      error: None, or why they could not be compared and count as different: a time limit, a crash.
    """

    equal: bool
    error: str | None = None


def find_boxed(text: str) -> tuple[int, int] | None:
    r"""Where the content of the last balanced `\boxed{}` begins and ends; None when there is none.

    Escaped braces do not count; of nested boxes the inner one is the last; one left open is no box.
    """
    last, opened = None, []
    for token in _BRACES.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(-1)
        elif token["close"] and opened:
            start = opened.pop()
            if start > (-1 if last is None else last[0]):
                last = start, token.start()
    return last


def boxed(text: str) -> str:
    r"""The content of the last balanced `\boxed{}`; "" when there is none."""
    span = find_boxed(text)
    return "" if span is None else text[slice(*span)].strip()


def extract(text: str) -> str:
    r"""The final answer: the last `\boxed{}`, else the first line after the last `####`, else the whole text."""
    if find_boxed(text) is not None:
        return boxed(text)
    _, mark, answer = text.rpartition("####")
    return answer.strip().partition("\n")[0].strip() if mark else text.strip()


def compare(predictions: Sequence[str], golds: Sequence[str], *, timeout_s: float = 5.0) -> list[Verdict]:
    """Compares answers pair by pair; one call for a batch, from any thread.

    Equal texts are equal, also where they are no mathematics; an empty answer equals nothing. Numbers may hold
    thousands separators and a currency sign. Everything else is math-verify's `verify(parse(gold), parse(prediction))`,
    which is not symmetric. A text without math delimiters is read as a formula, or where it holds words, as prose: its
    last number counts, and prose without a number equals only itself.

    Args:
      predictions: answers, as `extract` gives them.
      golds: the right ones.
      timeout_s: limit for one pair, after which its worker is killed.

    Raises:
      ValueError: different lengths, or `timeout_s` not above 0.
      MissingExtra: math-verify is not installed.
      RuntimeError: worker processes cannot be started.
    """
    if len(predictions) != len(golds):
        raise ValueError(f"golds: expected one for each of {len(predictions)} predictions, got {len(golds)}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s}")
    require("math_verify", "rl")
    pairs = [(_bare(prediction), _bare(gold)) for prediction, gold in zip(predictions, golds)]
    verdicts, rest = {}, {}
    for pair in pairs:
        known = _at_once(*pair)
        if known is None:
            rest[pair] = (_reading(pair[0]), _reading(pair[1]))
        else:
            verdicts[pair] = Verdict(known)
    if rest:
        workers = min(_WORKERS, len(os.sched_getaffinity(0)))
        results = list(tasks.map(_Verifier(), rest.values(), workers=workers, timeout_s=timeout_s, retries=0))
        for pair, result in zip(rest, results):
            error = None if result.error is None else result.error.strip().splitlines()[-1]
            verdicts[pair] = Verdict(result.value is True, error)
    return [verdicts[pair] for pair in pairs]


def equal(prediction: str, gold: str, *, timeout_s: float = 5.0) -> bool:
    """Whether one answer equals the right one, by `compare`; warns where they could not be compared."""
    verdicts = compare([prediction], [gold], timeout_s=timeout_s)
    warn_of_errors("equal", verdicts)
    return verdicts[0].equal


def warn_of_errors(name: str, verdicts: Sequence[Verdict]) -> None:
    """Warns how many answers could not be compared, if any, on behalf of the function `name`."""
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if errors:
        warnings.warn(
            f"{name}: {len(errors)} of {len(verdicts)} answers could not be compared and count as wrong: {errors[0]}",
            RuntimeWarning,
            stacklevel=3,
        )


def _bare(answer: str) -> str:
    """An answer without what says nothing: outer spaces and delimiters, a full stop, the typographic minus."""
    bare = answer.strip().removesuffix(".").strip()
    if wrapped := _WRAPPED.fullmatch(bare):
        bare = wrapped[wrapped.lastindex or 0].strip()
    return bare.replace("\N{MINUS SIGN}", "-")


def _at_once(prediction: str, gold: str) -> bool | None:
    """Whether they are equal where that takes no verifier; None: it does."""
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    a, b = _number(prediction), _number(gold)
    if a and b:
        difference = abs(Decimal(a) - Decimal(b))
        # In between it depends on how math-verify rounds, to six decimals.
        return difference == 0 if difference == 0 or difference > Decimal("1e-6") else None
    return None if _reading(prediction) and _reading(gold) else False


def _number(answer: str) -> str:
    """A plain number in the form Python reads; "" for anything else."""
    number = _NUMBER.fullmatch(answer) if len(answer) <= 100 else None
    return re.sub("[ ,]", "", number[1]) if number else ""


def _reading(answer: str) -> str:
    """What math-verify is given for an answer; "" where it would find no mathematics in it."""
    if number := _number(answer):
        return number
    if _DELIMITED.search(answer):
        return answer
    formula = _LATEX_WORDS.sub("", answer).strip()
    if formula and not _WORD.search(formula):
        return f"\\boxed{{{answer}}}"
    return answer if re.search("[0-9]", answer) else ""


class _Verifier:
    """Compares one pair in a worker. Unpickling it imports math-verify, which so takes no part of a pair's time."""

    def __reduce__(self):
        return _verifier, ()

    def __call__(self, readings: tuple[str, str]) -> bool:
        from math_verify import parse, verify

        prediction, gold = (parse(reading, parsing_timeout=0) for reading in readings)
        return verify(gold, prediction, timeout_seconds=0)


def _verifier() -> _Verifier:
    require("math_verify", "rl")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off
    return _Verifier()
