"""EAGLET's formulas (arXiv 2510.05608) one number at a time, in Python's float64."""

import itertools
import math


def gain(r1, r0, n, m, alpha=0.01, max_decay=None, tie_bonus=False):
    """One executor's gain, section 2.3."""
    factor = (1.0 + alpha) ** (n - m)
    if max_decay is not None and factor > max_decay:
        factor = max_decay
    if r1 > r0:
        return factor
    if tie_bonus and r1 == r0 and r1 > 0 and m < n:
        return max(0.0, factor - 1.0)
    return 0.0


def keep(with_plan, without, strict=False):
    """Section 2.2: no executor is harmed."""
    harmed = [r1 < r0 or (strict and r1 == r0) for r1, r0 in itertools.zip_longest(with_plan, without)]
    return not any(harmed)


def advantages(group, eps=1e-6):
    """Section 2.3: group normalisation with the population's deviation."""
    mean = math.fsum(group) / len(group)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
    return [0.0 if len(set(group)) == 1 else (r - mean) / (deviation + eps) for r in group]


def preference(policy, reference, beta):
    """DPO (arXiv 2305.18290), equation 7: the loss of one pair (better, worse), its slope in either one."""
    z = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    loss = math.log1p(math.exp(-abs(z))) + max(-z, 0.0)
    away = beta * (1.0 / (1.0 + math.exp(z)) if z < 700 else 0.0)
    return loss, (-away, away)
