"""The largest size that fits, found with few compilations."""

import math
from collections.abc import Callable


def search(total: Callable[[int], int], *, limit: int, start: int, least: int) -> int:
    """The largest n >= 0 with `total(n) <= limit`, by few calls where `total` is nearly linear.

    Args:
        total: grows with n; called for what is returned (unless that is 0) and for the n above it.
        limit: what total(n) may be.
        start: a lower bound of total(1).
        least: a lower bound of total(n + 1) - total(n).
    """
    low, low_total, high = 0, start, math.inf
    slope = 1.25 * least  # what comes with it, roughly: the first call should land below n, but not far
    while start <= limit and high - low > 1:
        guess = low + max(1, math.floor((limit - low_total) / slope))
        guess = guess if guess < high else int(high) - 1
        made = total(guess)
        slope = max(least, (made - low_total) / (guess - low))
        if made <= limit:
            low, low_total = guess, made
        else:
            high = guess
    return low
