"""PSNR and SSIM by their formulas, in float64, one pixel and one window at a time."""

import math

import numpy as np


def psnr(a, b, data_range=1.0):
    """Of whole images, unclamped."""
    error = sum((float(x) - float(y)) ** 2 for x, y in zip(np.ravel(a), np.ravel(b))) / np.size(a)
    return 10 * math.log10(data_range**2 / error)


def ssim(a, b, data_range=1.0, border="zero"):
    """Wang et al. 2004, equation 13, with the weighted statistics of section III.C, averaged over map and channels."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    if border != "valid":
        widths = [(5, 5), (5, 5), (0, 0)]
        mode = {"zero": "constant", "reflect": "reflect"}[border]
        a, b = np.pad(a, widths, mode=mode), np.pad(b, widths, mode=mode)
    values = []
    for channel in range(a.shape[2]):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                x = a[row : row + 11, column : column + 11, channel]
                y = b[row : row + 11, column : column + 11, channel]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))
