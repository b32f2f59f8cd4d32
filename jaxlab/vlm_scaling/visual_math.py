"""Rendered problems of visual maths with worked solutions: what a small vision-language model is trained on here.

    from jaxlab.vlm_scaling import visual_math
    questions = visual_math.questions("digits", 4, split="test", seed=0)
    visual_math.solution(questions[0])  # "<think> read 8 , 3 , 0 . 0 + 8 = 8 . 8 - 3 = 5 . </think> ..."

Three families. "digits": three scans of handwritten digits (scikit-learn's copy of the UCI set, 1797 real ones) to be
added and subtracted in an order that the question says; "bars": four bars, two of which are to be compared; "shapes":
six cells of shapes, one kind of which is to be counted. What is seen has to be read off first, so that a solution is
wrong where one reading is. Splits share no scan.
"""

import functools
import gzip
import importlib.metadata
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlab.core.errors import MissingExtra
from jaxlab.vlm_scaling.samples import Question

HEIGHT, WIDTH = 56, 84
"""Pixels of every image: two rows of three tokens."""

SPLITS = ("train", "test")
_CELL = 28
_HELD_OUT = 5  # one scan in so many
_PLACES = ("first", "second", "third", "fourth")
_SHAPES = ("circle", "square", "cross", "none")
_PLURALS = {"circle": "circles", "square": "squares", "cross": "crosses"}


class Problem(NamedTuple):
    """What a family makes: image, question, what is to be read in it, and the working from readings to the answer."""

    image: np.ndarray
    text: str
    readings: tuple[str, ...]
    working: Callable[[Sequence[str]], tuple[str, str]]


def questions(
    family: str, count: int, *, split: str = "train", seed: int = 0, noise: int | float = 0.3
) -> list[Question]:
    """Questions with images; `meta` holds the family, the readings, and what `solution` needs.

    Question i depends on family, split, seed and i alone.

    Args:
      family: of `FAMILIES`.
      count: how many.
      split: "train" or "test".
      seed: of everything drawn.
      noise: standard deviation of the noise on each pixel, of a range of 1.

    Raises:
      ValueError: an unknown family or split, a count below 1 or a noise below 0.
      MissingExtra: scikit-learn is absent, whose digits are read ("digits" alone).
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not noise >= 0:
        raise ValueError(f"noise: expected at least 0, got {noise}")
    made = []
    for index in range(count):
        random = np.random.default_rng([seed, zlib.crc32(f"{family} {split} {index}".encode())])
        problem = FAMILIES[family](random, split)
        shade = problem.image + noise * random.standard_normal(problem.image.shape)
        pixels = np.repeat(np.round(255 * np.clip(shade, 0, 1)).astype(np.uint8)[..., None], 3, axis=2)
        answer = problem.working(problem.readings)[1]
        meta = {"family": family, "readings": problem.readings, "working": problem.working}
        made.append(Question(f"{family}-{split}-{seed}-{index}", problem.text, answer, (pixels,), meta=meta))
    return made


def solution(question: Question, *, mistaken: tuple[int, str] | None = None, noticed: bool = True) -> str:
    """The worked solution of a question that `questions` made.

    Args:
      question: one of theirs.
      mistaken: (place of a reading, what is read there instead).
      noticed: the mistake is: the solution waits, reads again, and comes out right. Else it goes on to its own answer.
    """
    readings: list[str] = list(question.meta["readings"])
    said = list(readings)
    if mistaken is not None:
        said[mistaken[0]] = mistaken[1]
    lines = f"read {' , '.join(said)} ."
    if mistaken is not None and noticed:
        lines += f" Wait , the {_ORDER[mistaken[0]]} is {readings[mistaken[0]]} ."
        said = readings
    working, answer = question.meta["working"](said)
    return f"<think> {lines} {working} </think> <answer> {answer} </answer>"


def misreading(question: Question, random: np.random.Generator) -> tuple[int, str]:
    """A place, and another value that could stand there: for `solution`."""
    readings = question.meta["readings"]
    values = _SHAPES if question.meta["family"] == "shapes" else tuple(map(str, range(10)))
    place = int(random.integers(len(readings)))
    others = [value for value in values if value != readings[place]]
    return place, others[int(random.integers(len(others)))]


def texts() -> list[str]:
    """Whatever may be asked, read or written, for a tokenizer of words."""
    numbers = " ".join(map(str, range(28)))
    shown = " ".join(itertools.chain(_PLACES, _ORDER, _SHAPES, _PLURALS.values()))
    asked = [_digits_text((0, 1, 2), signs) for signs in itertools.product("+-", repeat=2)]
    asked += [_bars_text(0, 1), *map(_shapes_text, _PLURALS)]
    return [numbers, shown, *asked, "<think> read 1 , 2 . Wait , the fifth is 1 + 2 - 3 = 0 . </think> <answer>"
            " 0 </answer> circles : 2 ."]  # fmt: skip


_ORDER = (*_PLACES, "fifth", "sixth")


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Images `[1797,8,8]` in 0..1 and their digits."""
    try:
        place = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(
            "scikit-learn is not installed, whose digits are read; it comes with the extra 'vlm': "
            "pip install 'jaxlab[vlm]'"
        ) from error
    with gzip.open(str(place), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return rows[:, :-1].reshape(-1, 8, 8) / 16.0, rows[:, -1]


def _digits(random: np.random.Generator, split: str) -> Problem:
    scans, labels = _scans()
    held_out = np.arange(len(labels)) % _HELD_OUT == 0
    pool = np.flatnonzero(held_out == (split == "test"))
    while True:
        chosen = random.choice(pool, 3, replace=False)
        order = tuple(int(place) for place in random.permutation(3))
        signs = tuple(str(sign) for sign in random.choice(["+", "-"], 2))
        readings = tuple(str(labels[index]) for index in chosen)
        if _fold(readings, order, signs)[1] is not None:
            break
    image = np.zeros((HEIGHT, WIDTH))
    for column, index in enumerate(chosen):
        drawn = np.kron(scans[index], np.ones((3, 3)))
        top, left = random.integers(HEIGHT - 24), column * _CELL + random.integers(_CELL - 24)
        image[top : top + 24, left : left + 24] = drawn
    return Problem(image, _digits_text(order, signs), readings, functools.partial(_digits_working, order, signs))


def _digits_text(order: Sequence[int], signs: Sequence[str]) -> str:
    words = {"+": "plus", "-": "minus"}
    first, *rest = (_PLACES[place] for place in order)
    terms = "".join(f" {words[sign]} the {place}" for sign, place in zip(signs, rest))
    return f"Three digits : what is the {first}{terms} ?"


def _fold(readings: Sequence[str], order: Sequence[int], signs: Sequence[str]) -> tuple[str, int | None]:
    """The working, and the result; None where it falls below 0 on the way."""
    first, *rest = (int(readings[place]) for place in order)
    steps, value = [], first
    for sign, number in zip(signs, rest):
        result = value + number if sign == "+" else value - number
        steps.append(f"{value} {sign} {number} = {result} .")
        value = result
        if value < 0:
            return "", None
    return " ".join(steps), value


def _digits_working(order: Sequence[int], signs: Sequence[str], readings: Sequence[str]) -> tuple[str, str]:
    working, value = _fold(readings, order, signs)
    return (working, str(value)) if value is not None else ("", "0")


def _bars(random: np.random.Generator, split: str) -> Problem:
    heights = random.integers(1, 10, 4)
    first, second = (int(place) for place in random.choice(4, 2, replace=False))
    if heights[first] < heights[second]:
        first, second = second, first
    image = np.zeros((HEIGHT, WIDTH))
    for column, height in enumerate(heights):
        left, width = 21 * column + random.integers(2, 7), random.integers(8, 13)
        image[HEIGHT - 5 * height - 4 : HEIGHT - 4, left : left + width] = random.uniform(0.6, 1)
    image[HEIGHT - 4 :] = 1
    readings = tuple(str(height) for height in heights)
    return Problem(image, _bars_text(first, second), readings, functools.partial(_bars_working, first, second))


def _bars_text(first: int, second: int) -> str:
    return f"Four bars : how much higher is the {_PLACES[first]} than the {_PLACES[second]} ?"


def _bars_working(first: int, second: int, readings: Sequence[str]) -> tuple[str, str]:
    high, low = int(readings[first]), int(readings[second])
    result = max(high - low, 0)
    return f"{high} - {low} = {result} .", str(result)


def _shapes(random: np.random.Generator, split: str) -> Problem:
    kinds = [str(kind) for kind in random.choice(_SHAPES, 6)]
    image = np.zeros((HEIGHT, WIDTH))
    rows, columns = np.indices((_CELL, _CELL)) - (_CELL - 1) / 2
    for cell, kind in enumerate(kinds):
        size, shade = random.uniform(5, 9), random.uniform(0.6, 1)
        y, x = rows - random.uniform(-4, 4), columns - random.uniform(-4, 4)
        drawn = {
            "circle": y**2 + x**2 <= size**2,
            "square": np.maximum(abs(y), abs(x)) <= 0.85 * size,
            "cross": (np.minimum(abs(y), abs(x)) <= 0.3 * size) & (np.maximum(abs(y), abs(x)) <= size),
            "none": np.zeros_like(y, bool),
        }[kind]
        top, left = _CELL * (cell // 3), _CELL * (cell % 3)
        image[top : top + _CELL, left : left + _CELL] = shade * drawn
    asked = str(random.choice(list(_PLURALS)))
    return Problem(image, _shapes_text(asked), tuple(kinds), functools.partial(_shapes_working, asked))


def _shapes_text(asked: str) -> str:
    return f"Six cells : how many {_PLURALS[asked]} are there ?"


def _shapes_working(asked: str, readings: Sequence[str]) -> tuple[str, str]:
    count = str(sum(reading == asked for reading in readings))
    return f"{_PLURALS[asked]} : {count} .", count


FAMILIES: dict[str, Callable[[np.random.Generator, str], Problem]] = {
    "digits": _digits,
    "bars": _bars,
    "shapes": _shapes,
}
