"""Rules by which evaluation tools read answers, letter for letter: their conventions are part of their numbers.

`lmms_eval` and `closing_number` are lmms-eval 0.7's `extract_mcq_answer` and the end of `extract_anwser_tag`;
`vlmevalkit` is VLMEvalKit's `can_infer`, "" where that says "Z" (none of the options); `vlmevalkit_regex` is its
`extract_characters_regex`.
"""

import re
from collections.abc import Callable, Iterator, Mapping

# Longer forms of a lead are not superfluous: each counts from its own first occurrence.
_LEADS = (
    *(f"{lead}answer is" for lead in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
    *(f"{lead}option is" for lead in ("correct ", "the correct ", "best ", "the best ")),
    *(f"{lead}choice is" for lead in ("", "the ", "correct ", "the correct ", "my ")),
    *("i choose", "i select", "i pick"),
    *("\uc635\uc158", "\uc815\ub2f5\uc740", "\ub2f5\uc740", "\ub2f5:"),
    *("\u7b54\u6848\u662f", "\u7b54\u6848\u4e3a", "\u9009", "\u7b54\u3048\u306f"),
)
_FORMS = ("({})", "{}.", "{}:", "{})", "{} ")  # best first, after start, end and phrase

_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = ".()[],:;!*#{}"
_REGEX_LEADS = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def lmms_eval(text: str, choices: Mapping[str, str]) -> str:
    """The letter of the best format, of several the last."""
    bare = text.strip()
    if not bare:
        return ""
    for character in ",.!?;:'\"":
        bare = bare.strip(character)
    padded = f" {bare} "
    bare = padded.strip()
    for found in _candidates(bare, padded, choices):
        if found:
            return max(found, key=lambda candidate: candidate[0])[1]
    return ""


def _candidates(bare: str, padded: str, choices: Mapping[str, str]) -> Iterator[list[tuple[int, str]]]:
    """(position, letter) by format, the best format first."""
    yield [(0, letter) for letter in choices if bare.startswith(letter) and not bare[1:2].isalpha()]
    yield [(0, letter) for letter in choices if bare.endswith(letter) and not bare[-2:-1].isalpha()]
    lowered = padded.lower()
    starts = {place + len(lead) for lead in _LEADS if (place := lowered.find(lead)) >= 0}
    yield [(place, letter) for letter in choices for start in starts if (place := padded.find(letter, start)) >= 0]
    for form in (*_FORMS, "{}"):
        yield [(place, letter) for letter in choices if (place := padded.rfind(form.format(letter))) >= 0]


def vlmevalkit(text: str, choices: Mapping[str, str]) -> str:
    """The only letter among the last words, else a declared one, else the only option whose text occurs."""
    if any(refusal in text for refusal in _REFUSALS):
        return ""
    lowered = text.lower()
    if _FAILED not in text:
        words = _words(text)
        known = set(words)
        present = [letter for letter in choices if letter in known]
        if len(present) == 1 and words.index(present[0]) > len(words) - 5:
            return present[0]
        if not present and "Z" in known:
            return ""
        if "answer is" in lowered:
            letters = "|".join(map(re.escape, choices))
            declared = re.search(rf"answer is\s*+\**+\s*+({letters})", text, re.IGNORECASE | re.ASCII)
            if declared:
                return {letter.lower(): letter for letter in choices}[declared[1].lower()]
    if len(lowered) > 2 * sum(len(str(option)) for option in choices.values()):
        return ""
    present = [letter for letter, option in choices.items() if str(option).lower() in lowered]
    return present[0] if len(present) == 1 else ""


def _words(text: str) -> list[str]:
    for separator in _SEPARATORS:
        text = text.replace(separator, " ")
    return text.split()


def vlmevalkit_regex(text: str, choices: Mapping[str, str]) -> str:
    """The first capital A to E, "Answer" included; without one the first option whose "(L)" holds the text."""
    text = text.strip()
    for lead in _REGEX_LEADS:
        text = text.replace(lead, "")
    capital = re.search("[A-E]", text)
    if capital:
        return capital[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in choices if text.lower() in f"({letter})".lower()), "")


RULES: Mapping[str, Callable[[str, Mapping[str, str]], str]] = {
    "lmms-eval": lmms_eval,
    "vlmevalkit": vlmevalkit,
    "vlmevalkit-regex": vlmevalkit_regex,
}


def closing_number(text: str) -> tuple[int, int] | None:
    """Where the number is that ends the last line ending in one, but for a full stop and blanks; no sign, no comma."""
    stop = len(text.rstrip())
    while stop > 0:
        start = text.rfind("\n", 0, stop) + 1
        span = _number_at_end(text, start, stop)
        if span is not None:
            return span
        stop = start - 1
    return None


def _number_at_end(text: str, start: int, stop: int) -> tuple[int, int] | None:
    stop = _before_blanks(text, start, stop)
    if stop > start and text[stop - 1] == ".":
        stop = _before_blanks(text, start, stop - 1)
    first = _before_digits(text, start, stop)
    if first == stop:
        return None
    if first > start and text[first - 1] == ".":
        whole = _before_digits(text, start, first - 1)
        if whole < first - 1 and not _is_word(text, start, whole):
            return whole, stop
    return None if _is_word(text, start, first) else (first, stop)


def _before_blanks(text: str, start: int, stop: int) -> int:
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return stop


def _before_digits(text: str, start: int, stop: int) -> int:
    while stop > start and text[stop - 1].isdecimal():
        stop -= 1
    return stop


def _is_word(text: str, start: int, place: int) -> bool:
    """Whether a word goes on before a place."""
    return place > start and (text[place - 1].isalnum() or text[place - 1] == "_")
