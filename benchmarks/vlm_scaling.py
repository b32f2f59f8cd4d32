"""VLM scaling without a model: extraction, votes and intervals against their time limits, and against peers.

Texts are made up: some 1 900 characters of thinking each, then an answer. The limits are those of the specification; a
ratio of 1 meets them. math-verify decides which answers are equal by computer algebra, a voting key by a small grammar.
"""

import functools
import random
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.core.errors import MissingExtra, require
from jaxlab.vlm_scaling import extract, stats
from jaxlab.vlm_scaling.canonical import canonical

SYSTEM = "vlm-scaling"
LIMIT_S = 2.0
TEXTS = 10_000
RESAMPLES, QUESTIONS = 10_000, 2_000
CHOICES = {"A": "10", "B": "20", "C": "30", "D": "40"}
WORDS = (
    "the",
    "angle",
    "of",
    "this",
    "triangle",
    "is",
    "equal",
    "to",
    "so",
    "we",
    "have",
    "and",
    "then",
    "because",
    "side",
)


def texts(count: int, *, options: bool) -> list[str]:
    """Answers after some thinking."""
    stream = random.Random(0)
    made = []
    for _ in range(count):
        thought = " ".join(stream.choice(WORDS) for _ in range(360))
        answer = (
            f"So the answer is ({stream.choice('ABCD')})." if options else f"It is \\boxed{{{stream.randrange(99)}}}."
        )
        made.append(f"<think>{thought} {stream.randrange(99)}</think> {answer}")
    return made


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median CPU time of one call, not the clock's: the machine may be busy. The first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return float(np.median(times[1:]))


def _each(function: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        function(text)


def answers(count: int) -> list[str]:
    """Different ways to write numbers."""
    stream = random.Random(1)
    forms = ("{}/{}", r"\frac{{{}}}{{{}}}", "{}.{}", r"{}\sqrt{{{}}}")
    return [stream.choice(forms).format(stream.randrange(1, 99), stream.randrange(1, 99)) for _ in range(count)]


def cases(quick: bool) -> Iterator[Case]:
    """Bars of the specification's section 7 that need no model."""
    repeats = 3 if quick else 5
    for options, style in ((False, "jaxlab"), (True, "jaxlab"), (True, "lmms-eval"), (True, "vlmevalkit")):
        drawn, choices = texts(TEXTS, options=options), CHOICES if options else None
        read = functools.partial(extract.extract, choices=choices, style=style)
        taken = seconds(functools.partial(_each, read, drawn), repeats)
        what = f"extraction of {TEXTS} texts, {'multiple choice' if options else 'numbers'}, style {style}"
        yield Case(SYSTEM, what, "CPU s", taken, LIMIT_S, f"limit of {LIMIT_S:g} s", 1.0)
    right = (np.random.default_rng(0).random(QUESTIONS) < 0.5).astype(float)
    for method in ("percentile", "bca"):
        taken = seconds(functools.partial(stats.bootstrap_ci, right, n_resamples=RESAMPLES, method=method), repeats)
        what = f"bootstrap, {RESAMPLES} of {QUESTIONS} questions, {method}"
        yield Case(SYSTEM, what, "CPU s", taken, LIMIT_S, f"limit of {LIMIT_S:g} s", 1.0)
    scipy = require("scipy.stats", "test")

    def theirs():
        return scipy.bootstrap(
            (right,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=500,
            method="percentile",
            random_state=np.random.default_rng(0),
        )

    ours, peer = interleaved(lambda: stats.bootstrap_ci(right, n_resamples=RESAMPLES), theirs, repeats=repeats)
    yield Case(SYSTEM, f"bootstrap, {RESAMPLES} of {QUESTIONS} questions, percentile", "s", ours, peer, "scipy")
    try:
        parse = require("math_verify", "rl").parse
    except MissingExtra as error:
        print(f"math-verify is left out: {error}")
        return
    written = answers(50 if quick else 300)

    def keys():
        canonical.cache_clear()
        return [canonical(answer) for answer in written]

    ours, peer = interleaved(
        keys, lambda: [parse(f"${answer}$", parsing_timeout=0) for answer in written], repeats=repeats
    )
    yield Case(
        SYSTEM, "form of an answer", "us", ours / len(written) * 1e6, peer / len(written) * 1e6, "math-verify's parse"
    )
