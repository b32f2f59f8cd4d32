"""What merging two independent Gaussian experts does, in closed form: the theory that trained layers are held against.

Arithmetic on the host, in float64. Saliency is the magnitude itself. With b / a = r for magnitudes a and b of equal
standard deviation, r is the ratio of two half-normal variables, whose density is 2 / (pi (1 + r^2)).
"""

import math

import numpy as np
from jaxtyping import Float

BEST_TAU = math.sqrt(2) - 1
"""Best for the squared error whatever the weights' distribution: the mean of a >= b costs (a - b)^2 / 2, the larger one
alone b^2, and the first is less where a / b < 1 + sqrt(2), which is (a - b) / (a + b) < sqrt(2) - 1. (Paper: 0.4.)"""


def similar_share(tau: float, sigma_ratio: float = 1.0) -> float:
    """Share of positions whose magnitudes differ by at most `tau` of their sum (arXiv:2511.04805, section 3.2)."""
    if tau >= 1:
        return 1.0
    wide, narrow = sigma_ratio * (1 + tau) / (1 - tau), sigma_ratio * (1 - tau) / (1 + tau)
    return 2 / math.pi * (math.atan(wide) - math.atan(narrow))


def merge_error(tau: float | Float[np.ndarray, " n"]) -> Float[np.ndarray, "..."]:
    """Squared error of the merged weights over their squared sum, equal standard deviations.

    Where magnitudes are similar both become the mean, an error of (a - b)^2 / 2 in all; elsewhere the smaller one is
    lost. In polar coordinates, a = R cos t and b = R sin t with t uniform on a quarter circle, and by symmetry b <= a:
    the boundary is tan t = (1 - tau) / (1 + tau).
    """
    tau = np.asarray(tau, np.float64)
    edge = np.arctan2(1 - tau, 1 + tau)
    # Integrals over t of sin^2 below the edge, and of (cos - sin)^2 / 2 = (1 - sin 2t) / 2 from there to pi / 4.
    lost = edge / 2 - np.sin(2 * edge) / 4
    averaged = (math.pi / 4 - edge) / 2 - np.cos(2 * edge) / 4
    return np.asarray((lost + averaged) / (math.pi / 4))
