"""InstantEdit's whole loop in float64, one sample after another, as its official code runs it.

A network is a function `net(z [h,w,C], time, text [S,D], *, control_time, scale) -> (eps [h,w,C], maps [L,T,S])`.
"""

import numpy as np

ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def timesteps(steps: int, windows: int = 4) -> list[int]:
    """Descending times; the first windows get the steps that are left over."""
    times = []
    for k in range(windows):
        count = steps // windows + (1 if k < steps % windows else 0)
        start, end = 1 - k / windows, 1 - (k + 1) / windows
        times += [int(1000 * (start + (end - start) * j / count)) for j in range(count)]
    return times


def window(t: float, windows: int = 4) -> tuple[float, float, float]:
    """(t_s, t_e, gamma) of a time above 0."""
    for k in range(windows):
        start, end = 1 - k / windows, 1 - (k + 1) / windows
        if t / 1000 - 1e-4 > end:
            return start, end, float(np.sqrt(_alpha(start) / _alpha(end)))
    raise IndexError(t)


def _alpha(fraction: float) -> float:
    return ALPHAS[max(round(1000 * fraction) - 1, 0)]


def step(eps, t, t_next, z, windows: int = 4):
    """Down, from the point that a window's clean end is predicted to be."""
    start, end, gamma = window(t, windows)
    a = (t / 1000 - end) / (start - end)
    clean = (z - a * np.sqrt(1 - gamma**2) * eps) / (1 - a + a * gamma)
    return z + (z - clean) / (t / 1000 - end) * (t_next - t) / 1000


def invert(net, z, null, *, steps=4, scale=0.4, mode="official", windows: int = 4):
    """`[N + 1, h, w, C]`."""
    times, trajectory = timesteps(steps, windows), [z]
    for i in reversed(range(len(times))):
        t, below = times[i], times[i + 1] if i + 1 < len(times) else 0
        start, end, gamma = window(t, windows)
        noise = np.sqrt(1 - gamma**2)
        if mode == "official":
            at, low, control = 0.0, t - 1000 / len(times), t
        else:
            at, low, control = (below / 1000 - end) / (start - end), below, below
        eps, _ = net(z, low, null, control_time=control, scale=scale)
        clean = (z - at * noise * eps) / (1 - at + at * gamma)
        noisy = gamma * clean + noise * eps
        z = z + (noisy - clean) / (start - end) * (t - below) / 1000
        trajectory.append(z)
    return np.array(trajectory)


def guide(null, target, source, cfg, dpg):
    """DPG's prediction; a channel without a source direction is projected on nothing."""
    d_src, d_tgt = source - null, target - null
    norm = (d_src**2).sum((0, 1))
    p = np.where(norm > 1e-12, (d_src * d_tgt).sum((0, 1)) / np.maximum(norm, 1e-300), 0)
    return null + cfg * d_tgt + dpg * (d_tgt - p * d_src)


def strengths(maps, weights, length, size):
    """The attention of the edited words over its maximum, `[h, w]`; NaN where no word is edited."""
    words = (maps * weights)[:, :, 1 : length - 1].mean(0)
    side = size[0] // 4
    picture = words.max(-1).reshape(side, -1).repeat(4, 0).repeat(4, 1)
    with np.errstate(invalid="ignore"):
        return picture / picture.max()


def edit(
    net, trajectory, null, source, target, weights, length, *,
    cfg=1.1, dpg=3.0, threshold=0.4, scale=0.4, compat="official", windows: int = 4,
):  # fmt: skip
    """Regeneration with all four branches in every step.

    Returns:
      latents, masks `[N-1]`, steps `[N]`, guided_first, attention `[L,2,T,S]`, and `margin [N-1, h, w]`: how far each
      pixel is from its threshold.
    """
    steps = len(trajectory) - 1
    times = timesteps(steps, windows)
    z = z_src = trajectory[steps]
    masks, stepped, margins, guided_first, attention = [], [], [], None, None
    for i, t in enumerate(times):
        t_next = times[i + 1] if i + 1 < steps else 0
        calls = [(z, null), (z_src, source), (z, target), (z, source)]
        (e0, _), (es, _), (et, maps_tgt), (ec, maps_src) = [
            net(at, t, text, control_time=t, scale=scale) for at, text in calls
        ]
        guided = guide(e0, et, ec, cfg, dpg)
        if i == 0:
            guided_first, attention = guided, np.stack([maps_tgt, maps_src], axis=1)
        plain = e0 + cfg * (es - e0)
        z_inv = trajectory[steps - 1 - i]
        moved = step(guided, t, t_next, z, windows) - step(plain, t, t_next, z_src, windows)
        z_new = z_inv + moved
        stepped.append(z_new)
        z = z_new
        if i > 0:
            limit = max(threshold, 0.15 / np.sqrt(ALPHAS[t - 1]))
            flat = attention.reshape(-1, *attention.shape[2:])
            strength = strengths(flat, weights, length, z.shape[:2])
            mask = strength > limit
            masks.append(mask)
            margins.append(np.abs(strength - limit))
            if mask.any():
                z = np.where(mask[..., None], z_new, z_inv)
        z_src = z_inv
    return {
        "latents": stepped[-1] if compat == "official" else z,
        "masks": np.array(masks),
        "margins": np.array(margins),
        "steps": np.array(stepped),
        "guided_first": guided_first,
        "attention": attention,
    }


def toy(weights, hint):
    """The toy networks of tests/instantedit/toys.py; `hint [H,W,3]` or None."""
    unet, control = weights["unet"], weights["controlnet"]
    pool = lambda x, n: x.reshape(x.shape[0] // n, n, x.shape[1] // n, n, -1).mean((1, 3))  # noqa: E731

    def net(z, time, text, *, control_time, scale):
        eps = z @ unet["mix"] + time / 1000 * unet["time"]
        maps = []
        for query, key, value in zip(unet["query"], unet["key"], unet["value"]):
            patches = pool(z, 4)
            logits = patches @ query @ (text @ key).T
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            eps = eps + (probs @ text @ value).repeat(4, 0).repeat(4, 1)
            maps.append(probs.reshape(-1, text.shape[0]))
        if hint is not None:
            added = pool(hint, 8) @ control["hint"] + z @ control["mix"] + control_time / 1000 * control["time"]
            added = scale * (added + text.mean(0) @ control["text"])
            eps = eps + added + added.mean((0, 1))
        return eps, np.array(maps)

    return net
