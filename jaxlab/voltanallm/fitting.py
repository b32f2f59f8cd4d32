"""Tables of planes from measured iterations: random sample consensus around non-negative least squares.

After the official code of arXiv 2509.04827, with two additions of ours: thin segments are merged with their neighbours,
and a fit is done once more on the points within three median deviations of the first one's residuals.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.voltanallm.predictor import LatencyTable, Plane

BOUNDARIES = (4, *range(8, 129, 8), *range(256, 2049, 128))
"""Last batch sizes of the official segments: CUDA graphs' up to 128, tiles of matrix products above."""

MIN_POINTS = 8
DECODE_TRIALS = 10_000
PREFILL_TRIALS = 100_000
_SURE = 1e-9
"""Trials end early when the odds of having missed every sample free of outliers are below this (ours)."""
_CELLS = 1 << 19


def fit_decode(
    freq: ArrayLike,
    batch: ArrayLike,
    tokens: ArrayLike,
    itl_ms: ArrayLike,
    *,
    boundaries: Sequence[int] | None = None,
    seed: int = 1,
) -> LatencyTable:
    """A plane for every clock and segment of batch sizes.

    A segment with fewer than `MIN_POINTS` points is joined to the next one that has enough; behind the last such one,
    empty ones are left out and thin ones joined to it. The first segment starts at 1.

    Args:
      freq: [N] MHz.
      batch: [N] running requests.
      tokens: [N] tokens in their caches.
      itl_ms: [N] measured ms. The paper keeps 3 to 300 ms of its A100's; what to leave out is the caller's to say.
      boundaries: last batch size of every segment, ascending; None: `BOUNDARIES`. An engine that pads batches to
        buckets has its own staircase: give those.
      seed: of the trials.

    Raises:
      ValueError: unequal lengths, values that are not finite or batch sizes below 1 or above the last boundary,
        boundaries that do not ascend, or a clock without a segment of enough points.
    """
    freq, batch, tokens, itl_ms = _columns(freq=freq, batch=batch, tokens=tokens, itl_ms=itl_ms)
    ends = np.asarray(BOUNDARIES if boundaries is None else boundaries)
    if ends.ndim != 1 or not len(ends) or ends[0] < 1 or (np.diff(ends) <= 0).any() or (ends != ends.astype(int)).any():
        raise ValueError(f"boundaries: expected ascending whole numbers from 1 on, got {boundaries}")
    for wrong, expected in ((batch < 1, "at least 1"), (batch > ends[-1], f"at most the last boundary, {ends[-1]}")):
        if wrong.any():
            raise ValueError(f"batch: expected {expected}, got {batch[wrong][0]:g} in row {int(np.argmax(wrong))}")
    planes = []
    for clock in np.unique(freq):
        ours = freq == clock
        for start, end in _merged(batch[ours], ends.astype(int), clock):
            chosen = ours & (batch > start - 1) & (batch <= end)
            features = np.stack([batch[chosen], tokens[chosen]], axis=1)
            (alpha, beta), gamma, r2 = _consensus(
                features, itl_ms[chosen], trials=DECODE_TRIALS, squared=True, rng=np.random.default_rng(seed)
            )
            planes.append(Plane(int(clock), beta, gamma, alpha, start, end, r2))
    return LatencyTable("decode", planes)


def fit_prefill(freq: ArrayLike, tokens: ArrayLike, ttft_ms: ArrayLike, *, seed: int = 1) -> LatencyTable:
    """A line for every clock.

    Args:
      freq: [N] MHz.
      tokens: [N] prompt tokens computed in a batch. The paper fits 2000 to 20000 of them; what to leave out is the
        caller's to say.
      ttft_ms: [N] measured ms of execution.
      seed: of the trials.

    Raises:
      ValueError: unequal lengths, values that are not finite, or a clock with fewer than two points.
    """
    freq, tokens, ttft_ms = _columns(freq=freq, tokens=tokens, ttft_ms=ttft_ms)
    planes = []
    for clock in np.unique(freq):
        ours = freq == clock
        if ours.sum() < 2:
            raise ValueError(f"freq: expected at least 2 points of every clock, got 1 at {clock:g} MHz")
        (slope,), intercept, r2 = _consensus(
            tokens[ours, None], ttft_ms[ours], trials=PREFILL_TRIALS, squared=False, rng=np.random.default_rng(seed)
        )
        planes.append(Plane(int(clock), slope, intercept, r2=r2))
    return LatencyTable("prefill", planes)


def _columns(**columns: ArrayLike) -> list[np.ndarray]:
    arrays = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
        shown = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"{', '.join(arrays)}: expected columns of one length, at least 1, got {shown}")
    for name, array in arrays.items():
        wrong = ~np.isfinite(array)
        if name == "freq":
            wrong |= (array <= 0) | (array != np.floor(array))
        if wrong.any():
            at = int(np.argmax(wrong))
            expected = "positive whole numbers" if name == "freq" else "finite numbers"
            raise ValueError(f"{name}: expected {expected}, got {array[at]} in row {at}")
    return list(arrays.values())


def _merged(batch: np.ndarray, ends: np.ndarray, clock: float) -> list[tuple[int, int]]:
    """(first, last) batch size of the segments that have enough points."""
    counts = np.bincount(np.searchsorted(ends, batch), minlength=len(ends))
    enough = np.flatnonzero(counts >= MIN_POINTS)
    if not len(enough):
        raise ValueError(
            f"batch: expected a segment with at least {MIN_POINTS} points, got {counts.max()} at most at {clock:g} MHz"
        )
    lasts = [int(ends[index]) for index in enough[:-1]]
    lasts.append(int(ends[np.flatnonzero(counts)[-1]]))
    return list(zip((1, *(last + 1 for last in lasts)), lasts))


def nnls(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with one or two coefficients >= 0 and a free intercept, for many problems at once.

    The centred problem is convex, so its solution is the one without bounds if that has no negative coefficient, else
    the best of those with one coefficient at 0.

    Args:
      features: [..., N, 1 or 2].
      targets: [..., N].

    Returns:
      Coefficients [..., 1 or 2] and intercepts [...].
    """
    mean_x, mean_y = features.mean(axis=-2), targets.mean(axis=-1)
    x, y = features - mean_x[..., None, :], targets - mean_y[..., None]
    gram = np.einsum("...ni,...nj->...ij", x, x)
    moment = np.einsum("...ni,...n->...i", x, y)
    diagonal = np.einsum("...ii->...i", gram)
    # Spread that is only rounding is none: a constant feature gets no weight.
    varies = diagonal > 1e-24 * features.shape[-2] * np.square(mean_x)
    alone = np.where(varies, np.maximum(moment, 0) / np.where(varies, diagonal, 1), 0.0)
    if features.shape[-1] == 1:
        return alone, np.asarray(mean_y - (alone * mean_x).sum(axis=-1))
    determinant = diagonal[..., 0] * diagonal[..., 1] - np.square(gram[..., 0, 1])
    regular = varies.all(axis=-1) & (determinant > 1e-12 * diagonal[..., 0] * diagonal[..., 1])
    cross = np.stack(
        [
            diagonal[..., 1] * moment[..., 0] - gram[..., 0, 1] * moment[..., 1],
            diagonal[..., 0] * moment[..., 1] - gram[..., 0, 1] * moment[..., 0],
        ],
        axis=-1,
    )
    both = cross / np.where(regular, determinant, 1)[..., None]
    gain = alone * moment  # by which one coefficient alone reduces the sum of squares
    first = gain[..., :1] >= gain[..., 1:]
    single = np.where(np.concatenate([first, ~first], axis=-1), alone, 0.0)
    coefficients = np.where((regular & (both >= 0).all(axis=-1))[..., None], both, single)
    return coefficients, np.asarray(mean_y - (coefficients * mean_x).sum(axis=-1))


def _consensus(
    features: np.ndarray, targets: np.ndarray, *, trials: int, squared: bool, rng: np.random.Generator
) -> tuple[tuple[float, ...], float, float]:
    """Coefficients, intercept and R^2 over all points, of the largest set that agrees with a fit to a small sample.

    An inlier's loss, the residual's square or absolute value, is at most the targets' median absolute deviation.
    """
    scale = np.abs(targets).max()
    threshold = max(_deviation(targets), 1e-12 * max(scale, scale**2 if squared else 0.0))
    size = 1 + int((np.ptp(features, axis=0) > 0).sum())  # a constant feature needs no point of its own
    kept = np.ones(len(targets), bool)
    if len(targets) > size:
        kept = _best_inliers(features, targets, size, threshold, trials, squared, rng)
    coefficients, intercept = nnls(features[kept], targets[kept])
    residuals = targets - features @ coefficients - intercept
    centred = np.abs(residuals - np.median(residuals))
    near = centred <= max(3 * _deviation(residuals), 1e-9 * scale)
    if near.sum() > size:
        coefficients, intercept = nnls(features[near], targets[near])
        residuals = targets - features @ coefficients - intercept
    lost, spread = float(residuals @ residuals), float(np.square(targets - targets.mean()).sum())
    r2 = 1 - lost / spread if spread > 0 else float(math.isclose(lost, 0, abs_tol=1e-18 * scale**2))
    return tuple(float(value) for value in coefficients), float(intercept), r2


def _best_inliers(
    features: np.ndarray,
    targets: np.ndarray,
    size: int,
    threshold: float,
    trials: int,
    squared: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Most inliers win, then least loss over them. At most `trials` samples, in blocks."""
    count, done = len(targets), 0
    best, best_key = np.ones(count, bool), (size - 1, 0.0)
    for block in itertools.repeat(max(16, min(1024, _CELLS // count))):
        block = min(block, trials - done)
        sample = _distinct(rng, block, size, count)
        coefficients, intercepts = nnls(features[sample], targets[sample])
        loss = np.abs(coefficients @ features.T + intercepts[:, None] - targets)
        if squared:
            loss *= loss
        inliers = loss <= threshold
        numbers = inliers.sum(axis=1)
        most = np.flatnonzero(numbers == numbers.max())
        lost = np.where(inliers[most], loss[most], 0).sum(axis=1)
        winner, key = most[np.argmin(lost)], (int(numbers.max()), -float(lost.min()))
        if key > best_key:
            best, best_key = inliers[winner].copy(), key
        done += block
        missed = done * math.log1p(-((best_key[0] / count) ** size)) if best_key[0] < count else -math.inf
        if done >= trials or missed < math.log(_SURE):
            return best
    return best


def _distinct(rng: np.random.Generator, rows: int, size: int, count: int) -> np.ndarray:
    """[rows, size] indices below `count`, no two alike in a row, every such row equally likely."""
    drawn = np.empty((rows, size), np.intp)
    for column in range(size):
        value = rng.integers(count - column, size=rows)
        for taken in np.sort(drawn[:, :column], axis=1).T:  # skip the ones already drawn, smallest first
            value += value >= taken
        drawn[:, column] = value
    return drawn


def _deviation(values: np.ndarray) -> float:
    """Median absolute deviation from the median."""
    return float(np.median(np.abs(values - np.median(values))))
