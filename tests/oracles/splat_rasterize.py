"""Gaussians blended front to back, float64 numpy, one Gaussian at a time over all pixels; nothing is culled by tiles.

The gradient composes from the back with the "over" operator: what lies behind a Gaussian is an image of its own.
"""

import numpy as np


def blend(means2d, conics, opacities, colors, depths, radii, width, height):
    """Image [H,W,3], transmittance [H,W], pixels of each Gaussian [N], and the alphas used: {Gaussian: [H,W]} in order.

    An alpha is 0 in pixels where its Gaussian was skipped or came too late.
    """
    rows = [np.asarray(x, np.float64) for x in (means2d, conics, opacities, colors)]
    there = np.asarray(radii) > 0
    for x in (*rows, np.asarray(depths)):
        there &= np.isfinite(x).reshape(len(there), -1).all(axis=1)
    image, light = np.zeros((height, width, 3)), np.ones((height, width))
    open_pixels, used = np.ones((height, width), bool), {}
    for i in sorted(np.flatnonzero(there), key=lambda i: depths[i]):  # stable
        alpha = _alpha(*(x[i] for x in rows[:3]), width, height)
        open_pixels &= ~((alpha > 0) & (light * (1 - alpha) < 1e-4))
        used[i] = alpha = np.where(open_pixels, alpha, 0)
        image += (alpha * light)[..., None] * rows[3][i]
        light *= 1 - alpha
    counts = np.array([np.count_nonzero(used[i]) if i in used else 0 for i in range(len(there))])
    return image, light, counts, used


def gradients(means2d, conics, opacities, colors, depths, radii, width, height, d_image, d_light):
    """Of means2d, conics, opacities and colors, float64; which Gaussians a pixel has does not change."""
    rows = [np.asarray(x, np.float64) for x in (means2d, conics, opacities, colors)]
    _, light, _, used = blend(*rows, depths, radii, width, height)
    out = [np.zeros(x.shape) for x in rows]
    total, behind = light.copy(), np.zeros((height, width, 3))
    for i, alpha in reversed(used.items()):
        light = light / (1 - alpha)
        color = rows[3][i]
        d_alpha = light * np.sum(d_image * (color - behind), axis=2) - d_light * total / (1 - alpha)
        behind = alpha[..., None] * color + (1 - alpha)[..., None] * behind
        out[3][i] = np.sum((alpha * light)[..., None] * d_image, axis=(0, 1))
        d_power = np.where(alpha < 0.99, alpha * d_alpha, 0)
        dx, dy = _offsets(rows[0][i], width, height)
        a, b, c = rows[1][i]
        out[0][i] = np.sum(d_power * (a * dx + b * dy)), np.sum(d_power * (c * dy + b * dx))
        out[1][i] = [np.sum(d_power * z) for z in (-dx * dx / 2, -dx * dy, -dy * dy / 2)]
        out[2][i] = np.sum(d_power) / rows[2][i] if rows[2][i] else 0
    return out


def pairs(means2d, conics, opacities, colors, depths, radii, width, height):
    """How many 16 x 16 tiles the boxes around the ellipses of alpha 1/255 touch, pixel centres counted."""
    total = 0
    for mean, (a, b, c), opacity, color, depth, radius in zip(means2d, conics, opacities, colors, depths, radii):
        if radius > 0 and np.isfinite([*mean, a, b, c, opacity, *color, depth]).all() and opacity >= 1 / 255:
            covariance = np.linalg.inv(np.array([[a, b], [b, c]], np.float64))
            half = np.sqrt(2 * np.log(255.0 * opacity) * np.diag(covariance))
            tiles = 1
            for middle, reach, size in zip(mean, half, (width, height)):
                centres = np.arange(size) + 0.5
                tiles *= len({int(x // 16) for x in centres[abs(centres - middle) <= reach]})
            total += tiles
    return total


def _offsets(mean, width, height):
    return np.meshgrid(np.arange(width) + 0.5 - mean[0], np.arange(height) + 0.5 - mean[1])


def _alpha(mean, conic, opacity, width, height):
    dx, dy = _offsets(mean, width, height)
    power = -(conic[0] * dx**2 + conic[2] * dy**2) / 2 - conic[1] * dx * dy
    alpha = np.minimum(0.99, opacity * np.exp(np.minimum(power, 0)))
    return np.where((power > 0) | (alpha < 1 / 255), 0, alpha)
