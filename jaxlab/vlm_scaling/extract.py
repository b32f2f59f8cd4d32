r"""The final answer in a text, by our rules or by those of the common evaluation tools.

    from jaxlab.vlm_scaling import extract
    extract.extract(r"<think>5?</think> It is \boxed{7}.")                # value "7", method "boxed"
    extract.extract("So (B).", choices={"A": "red", "B": "blue"})         # value "B", method "letter"

Styles: "jaxlab" (ours), "lmms-eval" (lmms-eval 0.7: `reasoning_utils`, `mcq_extract`), "vlmevalkit" (VLMEvalKit:
`can_infer`) and "vlmevalkit-regex" (its older letter search). No text raises, and every rule takes linear time.
"""

import array
import collections
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxlab.rl import answers
from jaxlab.vlm_scaling import peer_choices
from jaxlab.vlm_scaling.canonical import canonical

Style = Literal["jaxlab", "lmms-eval", "vlmevalkit", "vlmevalkit-regex"]
Span = tuple[int, int]

_TAGS = ("think", "analysis")  # what lmms-eval strips unless told otherwise
_OPEN, _CLOSE = "<answer>", "</answer>"
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-+\u2212])?(?:\d{1,3}(?!\d)(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?"
    r"(?:[eE][-+]?\d{1,3}(?!\w)|/\d+(?![\d/.]))?(?:\s?\\?%)?"
)
_WRAPPED = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{|[\s$*_`\"'(\[{])*+([A-Za-z])[\s$*_`\"')\]}.:,;]*")
_LABELLED = re.compile(r"[\s$*_`\"'(\[{]{0,8}([A-Z])[)\].:]")


@dataclass(frozen=True)
class Extraction:
    """An answer and where it was found.

    Attributes:
      value: the answer, an option's letter where there are choices; None: there is none ("" is an answer).
      method: "answer_tag", "boxed", "declaration", "letter", "option_text", "choice" (a tool's letter rule), "number",
        "text" (all of it), or "none".
      span: first and last + 1 character in the given text; None where a tool's rule names none.
    """

    value: str | None
    method: str
    span: Span | None


def extract(text: str, *, choices: Mapping[str, str] | None = None, style: Style = "jaxlab") -> Extraction:
    r"""The final answer.

    Ours, in this order: thinking is taken out; the first answer tag with something in it; the last balanced `\boxed{}`;
    with choices a declaration ("the answer is B"), else the only letter of an option, else the only text of one; the
    last number, thousands separators removed. With choices, what a tag, a box or the last number holds is read as an
    option where it can be.

    Args:
      text: of a sample.
      choices: letter -> text of the option; None: no multiple choice.
      style: whose rules. "lmms-eval": first answer tag, even an empty one, else box, else a number that ends the last
        line ending in one, and its letter rule on what was found. "vlmevalkit": its letter rule, or all of the text.

    Raises:
      ValueError: an unknown style.
    """
    _check_style(style)
    if style.startswith("vlmevalkit"):
        if choices is None and style == "vlmevalkit":
            return Extraction(text.strip(), "text", _trimmed(text, (0, len(text))))
        letter = choice_letter(text, choices or dict.fromkeys("ABCDE", ""), style=style)
        return Extraction(letter or None, "choice" if letter else "none", None)
    kept = _Kept(text)
    found = _lmms_eval(kept.text, choices) if style == "lmms-eval" else _ours(kept.text, choices)
    value, method, span = found.value, found.method, found.span
    return Extraction(value, method, None if span is None else kept.original(span))


def strip_thinking(text: str) -> str:
    """A text without its `<think>` and `<analysis>` blocks, trimmed, as lmms-eval strips them.

    Only closed blocks go; without an opening tag all up to the last closing one goes too (the prompt may have opened
    it); an opening tag that is never closed stays with what follows it.
    """
    return _Kept(text).text


def boxed(text: str) -> str:
    r"""The content of the last balanced `\boxed{}`; "" when absent."""
    return answers.boxed(text)


def answer_tag(text: str) -> str:
    """The content of the first `<answer>` block, trimmed; "" when absent."""
    span = _first_tag(text)
    return "" if span is None else text[slice(*span)].strip()


def choice_letter(text: str, choices: Mapping[str, str], *, style: Style) -> str:
    """The option that a text chooses, by a tool's rule for multiple choice; "" when there is none.

    Args:
      text: an answer, thinking stripped.
      choices: letter -> text of the option.
      style: whose rule; "jaxlab": declaration, else only letter, else only text.

    Raises:
      ValueError: an unknown style, or no choices.
    """
    _check_style(style)
    if not choices:
        raise ValueError("choices: expected at least one option, got none")
    if style == "jaxlab":
        return _choice(text, choices).value or ""
    return peer_choices.RULES[style](text, choices)


def as_option(answer: str, choices: Mapping[str, str]) -> str:
    """The letter of the option that an answer is: "(B)", "B. red", "red", or any text equal to it; "" for none."""
    bare = _WRAPPED.fullmatch(answer) if len(answer) <= 64 else None
    if bare and bare[1].upper() in choices:
        return bare[1].upper()
    key = canonical(answer)
    same = [letter for letter, option in choices.items() if canonical(option) == key]
    if len(same) == 1:
        return same[0]
    labelled = _LABELLED.match(answer)
    return labelled[1] if labelled and labelled[1] in choices else ""


class _Kept:
    """A text without its thinking, trimmed, which knows where its characters come from."""

    def __init__(self, text: str):
        self._origin: Sequence[int] = range(len(text))
        for tag in _TAGS:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if closing in text:
                text = self._without(text, opening, closing)
        start, stop = _trimmed(text, (0, len(text)))
        self.text, self._origin = text[start:stop], self._origin[start:stop]

    def original(self, span: Span) -> Span:
        """Where a span of the kept text begins and ends in the whole."""
        start, stop = span
        if start < stop:
            return self._origin[start], self._origin[stop - 1] + 1
        place = self._origin[start - 1] + 1 if start else 0
        return place, place

    def _without(self, text: str, opening: str, closing: str) -> str:
        pieces, start = [], 0
        while (begin := text.find(opening, start)) >= 0 and (end := text.find(closing, begin)) >= 0:
            pieces.append(slice(start, begin))
            start = end + len(closing)
        pieces.append(slice(start, len(text)))
        rest = "".join(text[piece] for piece in pieces)
        stray = rest.rfind(closing) + len(closing) if closing in rest and opening not in rest else 0
        self._origin = array.array("q", itertools.chain.from_iterable(self._origin[piece] for piece in pieces))[stray:]
        return rest[stray:]


def _first_tag(text: str, start: int = 0) -> Span | None:
    opened = text.find(_OPEN, start)
    closed = text.find(_CLOSE, opened + len(_OPEN)) if opened >= 0 else -1
    return (opened + len(_OPEN), closed) if closed >= 0 else None


def _ours(text: str, choices: Mapping[str, str] | None) -> Extraction:
    tag = _first_tag(text)
    while tag is not None and not text[slice(*tag)].strip():
        tag = _first_tag(text, tag[1])
    for method, span in (("answer_tag", tag), ("boxed", None if tag else answers.find_boxed(text))):
        if span is not None and text[slice(*span)].strip():
            span = _trimmed(text, span)
            content = text[slice(*span)]
            if choices:
                content = as_option(content, choices) or _choice(content, choices).value or content
            return Extraction(content, method, span)
    if choices and (found := _choice(text, choices)).value:
        return found
    if (number := _last_number(text)) is None:
        return Extraction(None, "none", None)
    value = number[0].replace(",", "").replace("\N{MINUS SIGN}", "-")
    letter = as_option(value, choices) if choices else ""
    return Extraction(letter or value, "number", number.span())


def _lmms_eval(text: str, choices: Mapping[str, str] | None) -> Extraction:
    found = _lmms_eval_answer(text)
    if not choices:
        return found
    content = text if found.method in ("number", "none") else found.value or ""
    letter = peer_choices.lmms_eval(content, choices)
    return Extraction(letter or None, "choice" if letter else "none", None)


def _lmms_eval_answer(text: str) -> Extraction:
    if (tag := _first_tag(text)) is not None:
        span = _trimmed(text, tag)
        return Extraction(text[slice(*span)], "answer_tag", span)
    if (box := answers.find_boxed(text)) is not None and box[0] < box[1]:
        span = _trimmed(text, box)
        return Extraction(text[slice(*span)], "boxed", span)
    if (span := peer_choices.closing_number(text)) is not None:
        return Extraction(text[slice(*span)], "number", span)
    return Extraction(None, "none", None)


def _last_number(text: str) -> re.Match[str] | None:
    return _last(_NUMBER.finditer(text))


_DECLARED = re.compile(
    r"(?:\b(?i:answer|option|choice|solution)(?i:\s{1,4}is\b|\s{0,4}[:=])|\b(?i:choose|select|pick)\b)"
    r"(?i:\s{0,4}:|\s{1,4}(?:option|choice|letter|answer)\b)?+[\s$*_`\"'(\[{]{0,12}+"
    r"(?:\\(?:boxed|text|textbf|mathrm|mathbf)\s{0,4}\{[\s(]{0,4}+){0,2}+"
    r"(?:([A-Z])(?![A-Za-z0-9'\u2019])|([a-z])(?=[*_)\]}.,;:!]|\s{0,4}+\Z|[ \t]{0,4}+\n))"
)
_LETTER = re.compile(  # "A triangle" and "I think" name no option, "A is" does
    r"(?<![A-Za-z0-9\\])([A-Z])(?![A-Za-z0-9'\u2019])(?!(?<=[AI])\s{1,4}+(?!(?:is|or|and|but|since|because)\b)[a-z])"
)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")


def _choice(text: str, choices: Mapping[str, str]) -> Extraction:
    """Declaration, else the only letter, letters in brackets first, else the only option text."""
    declared = None
    for match in _DECLARED.finditer(text):
        letter = (match[1] or match[2]).upper()
        if letter in choices:
            declared = letter, match.span(match.lastindex or 0)
    if declared:
        return Extraction(declared[0], "declaration", declared[1])
    for pattern in (_IN_BRACKETS, _LETTER):
        places = {match[1]: match.span(1) for match in pattern.finditer(text) if match[1] in choices}
        if len(places) == 1:
            letter, span = places.popitem()
            return Extraction(letter, "letter", span)
    places = {letter: span for letter, option in choices.items() if (span := _last_place(option.strip(), text))}
    longest = {
        letter: span
        for letter, span in places.items()
        if not any(
            len(choices[other]) > len(choices[letter]) and choices[letter].strip().lower() in choices[other].lower()
            for other in places
        )
    }
    if len(longest) == 1:
        letter, span = longest.popitem()
        return Extraction(letter, "option_text", span)
    return Extraction(None, "none", None)


def _last_place(option: str, text: str) -> Span | None:
    """Where an option's text stands last as words and numbers of its own, upper and lower case alike."""
    if not option:
        return None
    before, after = r"(?<![\w.])" if option[0].isalnum() else "", r"(?!\w|\.\d)" if option[-1].isalnum() else ""
    last = _last(re.finditer(f"{before}{re.escape(option)}{after}", text, re.IGNORECASE))
    return None if last is None else last.span()


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(collections.deque(matches, maxlen=1)), None)


def _trimmed(text: str, span: Span) -> Span:
    start, stop = span
    content = text[start:stop]
    start += len(content) - len(content.lstrip())
    return start, max(start, stop - (len(content) - len(content.rstrip())))


def _check_style(style: str) -> None:
    if style not in get_args(Style):
        raise ValueError(f"style: expected one of {', '.join(get_args(Style))}, got {style!r}")
