r"""One form for all the ways an answer is written, so that equal answers are one vote: "1/2", "0.5", "50%", "\frac12".

Constants are computed and rounded to 6 significant digits. Expressions in single letters are compared by their values
at fixed points, as equal polynomials are equal everywhere and others almost nowhere. What is neither is its text.
This is a small grammar of its own, not a computer algebra system: it neither loads one nor hangs on hostile input.
"""

import functools
import math
import re
from collections.abc import Callable, Hashable

_LONGEST = 300  # characters that are read as mathematics
_DEEPEST = 24

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[-+]?\.\d+")
_TOKEN = re.compile(
    r"(?P<mixed>\d+\s+\d+/\d+)|(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)"
    r"|\\?(?P<name>[A-Za-z]+)|(?P<symbol>\*\*|[-+*/^(){}\[\]|%!=])|(?P<blank>\s+|\\[,;:! ])",
)
_REWRITTEN = (
    *((sign, "-") for sign in "\u2212\u2013"),
    *((sign, "*") for sign in ("\u00d7", "\u00b7", "\\times", "\\cdot")),
    *((sign, "/") for sign in ("\u00f7", "\\div")),
    *(("\u03c0", "\\pi "), ("\u221a", "\\sqrt "), ("\u00b2", "^2 "), ("\u00b3", "^3 ")),
    *((noise, "") for noise in ("\\left", "\\right", "^\\circ", "^{\\circ}", "\\degree", "\u00b0", "$")),
    *((name, "\\frac") for name in ("\\dfrac", "\\tfrac")),
    *((name, " ") for name in ("\\(", "\\)", "\\displaystyle", "\\quad", "~")),
    ("\\%", "%"),
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed)\s*\{([^{}]*)\}")
_ASSIGNED = re.compile(r"\\?[A-Za-z]\s*=(?!=)\s*")
_OPENING, _CLOSING = "([{", ")]}"
_CONSTANTS = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "exp", "sqrt", "sinh", "cosh", "tanh")},
    **{f"arc{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan")},
    **{"ln": math.log, "log": math.log10},
}


@functools.lru_cache(maxsize=16384)
def canonical(answer: str) -> Hashable:
    r"""The form that equal answers share.

    Args:
      answer: a number (thousands separators, %, degrees), fraction, expression, tuple or list of such, or any text.
        LaTeX delimiters, `\text{}`, a final full stop, and `x =` before one value are left out.

    Returns:
      A float for a constant, a tuple for an expression or a list, else the case-folded text with single blanks.
    """
    bare = answer.strip().removesuffix(".").strip()
    if len(bare) <= _LONGEST:
        if _NUMBER.fullmatch(bare):
            return _rounded(float(bare.replace(",", "")))
        value = _read(bare)
        if value is not None:
            return value
        bare = _TEXT.sub(r"\1", bare)
    return " ".join(bare.strip("$").casefold().split())


def _read(text: str) -> Hashable | None:
    for found, replacement in _REWRITTEN:
        text = text.replace(found, replacement)
    text = _TEXT.sub(r"\1", text).strip().replace("\\{", "{").replace("\\}", "}")
    if assigned := _ASSIGNED.match(text):
        text = text[assigned.end() :]
    parts = _parts(text)
    if parts is not None:
        values = [_value(part) for part in parts[1]]
        return None if any(value is None for value in values) else (parts[0], *values)
    return _value(text)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """Kind of brackets and the parts of a list; None where there is no comma between parts."""
    kind, inside = "", text
    if len(text) >= 2 and text[0] in _OPENING and text[-1] in _CLOSING:
        kind, inside = text[0] + text[-1], text[1:-1]
    elif _NUMBER.fullmatch(text):
        return None
    depth, start, parts = 0, 0, []
    for place, character in enumerate(inside):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth < 0:
            return None  # the outer brackets are no pair
        if character == "," and depth == 0:
            parts.append(inside[start:place])
            start = place + 1
    return (kind, [*parts, inside[start:]]) if parts and depth == 0 else None


def _value(text: str) -> Hashable | None:
    """Rounded values at two points, one where there are no letters; None: no mathematics."""
    tokens: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        if match.lastgroup and match.lastgroup != "blank":
            tokens.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    names = {token for kind, token in tokens if kind == "name"} - {"frac", *_FUNCTIONS, *_CONSTANTS}
    if not tokens or any(len(name) > 1 for name in names) or (len(tokens) == 1 and names):
        return None
    try:
        values = [_Reader(tokens, seed).all() for seed in ((1, 2) if names else (1,))]
    except (ValueError, ArithmeticError, IndexError):
        return None
    return _rounded(values[0]) if not names else ("".join(sorted(names)), *map(_rounded, values))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") + 0.0  # no negative zero


class _Reader:
    """Evaluates tokens by recursive descent.

    Raises:
      ValueError: they are no expression, or its value is none.
    """

    def __init__(self, tokens: list[tuple[str, str]], seed: int):
        self._tokens, self._at, self._depth, self._seed = [*tokens, ("end", "")], 0, 0, seed

    def all(self) -> float:
        value = self._sum()
        if self._tokens[self._at][0] != "end" or isinstance(value, complex) or not math.isfinite(value):
            raise ValueError("no value")
        return value

    def _next(self, *symbols: str) -> str:
        token = self._tokens[self._at][1]
        if not token or token not in symbols:
            return ""
        self._at += 1
        return token

    def _sum(self) -> float:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        value = self._product()
        while sign := self._next("+", "-"):
            value += self._product() if sign == "+" else -self._product()
        self._depth -= 1
        return value

    def _product(self) -> float:
        value = self._signed()
        while True:
            if sign := self._next("*", "/"):
                factor = self._signed()
                value = value * factor if sign == "*" else value / factor
            elif self._tokens[self._at][0] == "name" or self._tokens[self._at][1] == "(":
                value *= self._power()
            else:
                return value

    def _signed(self) -> float:
        sign = 1.0
        while found := self._next("+", "-"):
            sign = -sign if found == "-" else sign
        return sign * self._power()

    def _power(self) -> float:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("too deep")
        value = self._atom()
        while self._next("%"):
            value /= 100
        if self._next("^", "**"):
            value **= self._signed()
            if isinstance(value, complex):
                raise ValueError("not real")
        self._depth -= 1
        return value

    def _atom(self) -> float:
        kind, token = self._tokens[self._at]
        self._at += 1
        if kind == "mixed":
            whole, over, under = re.split(r"\s+|/", token)
            return float(whole) + float(over) / float(under)
        if kind == "number":
            value = float(token.replace(",", ""))
            if self._tokens[self._at] == ("name", "frac") and value.is_integer():
                return value + self._atom()  # 2\frac{1}{2}
            return value
        if kind == "name":
            return self._named(token)
        if token in ("(", "{", "["):
            value = self._sum()
            if not self._next(_CLOSING[_OPENING.index(token)]):
                raise ValueError("open bracket")
            return value
        raise ValueError("no value")

    def _named(self, name: str) -> float:
        if name == "frac":
            over = self._argument(digit=True)
            return over / self._argument(digit=True)
        if name in _FUNCTIONS:
            if self._next("["):
                root = self._sum()
                if name != "sqrt" or not self._next("]"):
                    raise ValueError("no root")
                return self._argument() ** (1 / root)
            return _FUNCTIONS[name](self._argument())
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        return 0.3 + (self._seed * ord(name) * 0.6180339887498949) % 1.0  # positive, between 0.3 and 1.3

    def _argument(self, digit: bool = False) -> float:
        r"""What follows a command; with `digit` of a plain number its first digit alone, as LaTeX reads `\frac12`."""
        kind, token = self._tokens[self._at]
        if digit and kind == "number" and len(token) > 1 and token.isdecimal():
            self._tokens[self._at : self._at + 1] = [("number", token[0]), ("number", token[1:])]
        return self._power()
