"""PeRFlow's training (arXiv 2405.07510) and what its teacher learns, in float64, one picture at a time."""

import itertools

import numpy as np

from tests.oracles.instantedit_parts import alpha_bars


def level(t):
    """The cumulated alpha of time t, 0 to 1000."""
    return alpha_bars()[max(int(t) - 1, 0)]


def ddim(z, noise, start, end, clip=None):
    """One DDIM step between cumulated alphas."""
    clean = (z - (1 - start) ** 0.5 * noise) / start**0.5
    if clip is not None:
        clean = np.clip(clean, -clip, clip)
        noise = (z - start**0.5 * clean) / (1 - start) ** 0.5
    return end**0.5 * clean + (1 - end) ** 0.5 * noise


def solve(teacher, z, t_start, t_end, steps, clip=None):
    """DDIM down a window in equal steps; `teacher(z, t)` is the noise."""
    times = [t_start + (t_end - t_start) * k / steps for k in range(steps + 1)]
    for t, low in itertools.pairwise(times):
        z = ddim(z, teacher(z, t), level(round(t)), level(round(low)), clip)
    return z


def min_snr(t, gamma=5.0):
    """The weight of an error of the noise at a time (arXiv 2303.09556, equation 8)."""
    ratio = level(t) / (1 - level(t))
    return min(ratio, gamma) / ratio


def moving_average(first, values, decay):
    """The average after each of the values, the decay at most (1 + n) / (10 + n)."""
    mean = first
    for n, value in enumerate(values):
        rate = min(decay, (1 + n) / (10 + n))
        mean = rate * mean + (1 - rate) * value
    return mean
