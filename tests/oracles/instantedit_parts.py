"""InstantEdit's rules in float64 numpy, by loops, from arXiv 2508.06033 and the official code's formulas."""

import itertools

import numpy as np


def alpha_bars():
    out, product = [], 1.0
    for k in range(1000):
        root = np.sqrt(0.00085) + (np.sqrt(0.012) - np.sqrt(0.00085)) * k / 999
        product *= 1 - root**2
        out.append(product)
    return np.array(out)


def window_of(t, windows):
    """(t_s, t_e, alpha_s, alpha_e); by walking down the list of windows."""
    for k in range(windows):
        start, end = 1 - k / windows, 1 - (k + 1) / windows
        if t / 1000 - 0.1 / 1000 > end + 1e-12:
            bars = alpha_bars()
            return start, end, bars[int(1000 * start - 1 + 1e-9)], bars[max(int(1000 * end - 1 + 1e-9), 0)]
    raise ValueError("no window")


def velocity(output, t, z, windows=4, kind="diff_eps", window_at=None):
    """In the official form: predict the window's end, divide by the time to it."""
    if kind == "velocity":
        return output
    start, end, alpha_s, alpha_e = window_of(t if window_at is None else window_at, windows)
    c = t / 1000
    gamma = np.sqrt(alpha_s / alpha_e)
    lambda_s = 1 / gamma
    eta_s = -np.sqrt(1 - gamma**2) / gamma
    if kind == "ddim_eps":
        eta_s = np.sqrt(1 - alpha_e) - np.sqrt(alpha_e / alpha_s * (1 - alpha_s))
    if np.isclose(c, end):
        # The limit: of the path z(t_s) = (z(t_e) - eta e) / lambda.
        return (z - (z - eta_s * output) / lambda_s) / (end - start)
    lambda_t = lambda_s * (end - start) / (lambda_s * (c - start) + (end - c))
    eta_t = eta_s * (end - c) / (lambda_s * (c - start) + (end - c))
    return (lambda_t * z + eta_t * output - z) / (end - c)


def step(output, t, t_next, z, **options):
    return z + velocity(output, t, z, **options) * (t_next - t) / 1000


def official_inverse_velocity(output, t, z, windows=4):
    start, end, alpha_s, alpha_e = window_of(t, windows)
    gamma = np.sqrt(alpha_s / alpha_e)
    return ((1 - 1 / gamma) * z + np.sqrt(1 - gamma**2) / gamma * output) / ((start - end) / gamma)


def timesteps(steps, windows):
    out = []
    for k in range(windows):
        count = steps // windows + (k < steps % windows)
        start, end = 1 - k / windows, 1 - (k + 1) / windows
        out += [int(1000 * (start + (end - start) * j / count) + 1e-9) for j in range(count)]
    return out


def dpg(e0, et, es, w_cfg, w_dpg, per_channel=True):
    out = np.zeros(e0.shape)
    for b in range(len(e0)):
        groups = [np.s_[b, :, :, c] for c in range(e0.shape[3])] if per_channel else [np.s_[b]]
        for group in groups:
            source, target = (es - e0)[group], (et - e0)[group]
            square = np.sum(source**2)
            p = np.sum(source * target) / square if square > 1e-12 else 0.0
            out[group] = e0[group] + w_cfg * target + w_dpg * (target - p * source)
    return out


def alignments(source, target):
    """Every set of pairs of equal tokens in increasing order, as an array like `align_tokens` gives."""
    pairs = [(s, t) for s in range(len(source)) for t in range(len(target)) if source[s] == target[t]]
    for size in range(len(pairs) + 1):
        for chosen in itertools.combinations(pairs, size):
            if all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(chosen)):
                aligned = [-1] * len(target)
                for s, t in chosen:
                    aligned[t] = s
                yield aligned


def align(source, target):
    """Largest alignment; of several the first in the order of moves back from the end: target, source, both."""

    def moves(aligned):
        s, t, path = len(source), len(target), []
        while s or t:
            if t and aligned[t - 1] == s - 1 and s:
                path.append(2)
                s, t = s - 1, t - 1
            elif t and aligned[t - 1] < 0:
                path.append(0)
                t -= 1
            else:
                path.append(1)
                s -= 1
        return path

    every = list(alignments(source, target))
    most = max(sum(place >= 0 for place in aligned) for aligned in every)
    return min((a for a in every if sum(place >= 0 for place in a) == most), key=moves)


def blend_mask(probs, weights, length, alpha_bar, threshold, size):
    layers, tokens, _ = probs.shape
    factor = int(np.sqrt(size[0] * size[1] / tokens))
    height, width = size[0] // factor, size[1] // factor
    strength = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        strength[y, x] = max(
            sum(probs[layer, y * width + x, word] * weights[word] for layer in range(layers)) / layers
            for word in range(1, length - 1)
        )
    mask = np.zeros(size, bool)
    limit = max(threshold, 0.15 / np.sqrt(alpha_bar))
    for y, x in np.ndindex(*size):
        mask[y, x] = strength.max() > 0 and strength[y // factor, x // factor] / strength.max() > limit
    return mask


def canny(image, low, high, l2_gradient):
    """Pixel by pixel, hysteresis by a stack."""
    image = image.astype(int).reshape(*image.shape[:2], -1)
    height, width, channels = image.shape
    low, high = min(low, high), max(low, high)
    dx, dy, size = (np.zeros((height, width)) for _ in range(3))
    for y, x in np.ndindex(height, width):
        for c in range(channels):
            around = [
                [image[min(max(y + i, 0), height - 1), min(max(x + j, 0), width - 1), c] for j in (-1, 0, 1)]
                for i in (-1, 0, 1)
            ]
            gx = sum(w * (row[2] - row[0]) for w, row in zip((1, 2, 1), around))
            gy = sum(w * (around[2][j] - around[0][j]) for j, w in enumerate((1, 2, 1)))
            value = np.hypot(gx, gy) if l2_gradient else abs(gx) + abs(gy)
            if c == 0 or value > size[y, x]:
                dx[y, x], dy[y, x], size[y, x] = gx, gy, value

    def at(y, x):
        return size[y, x] if 0 <= y < height and 0 <= x < width else 0

    thin = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        here = size[y, x]
        angle = np.degrees(np.arctan2(abs(dy[y, x]), abs(dx[y, x])))
        if angle < 22.5:
            ridge = here > at(y, x - 1) and here >= at(y, x + 1)
        elif angle > 67.5:
            ridge = here > at(y - 1, x) and here >= at(y + 1, x)
        else:
            side = -1 if dx[y, x] * dy[y, x] < 0 else 1
            ridge = here > at(y - 1, x - side) and here > at(y + 1, x + side)
        thin[y, x] = ridge and here > low
    edges = thin & (size > high)
    stack = list(zip(*np.nonzero(edges)))
    while stack:
        y, x = stack.pop()
        for i, j in itertools.product(
            range(max(y - 1, 0), min(y + 2, height)), range(max(x - 1, 0), min(x + 2, width))
        ):
            if thin[i, j] and not edges[i, j]:
                edges[i, j] = True
                stack.append((i, j))
    return edges
