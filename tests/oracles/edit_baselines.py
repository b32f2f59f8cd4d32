"""The baselines of image editing in float64, step by step, from their papers.

`net(z, t, prompt)` is one prediction; `flow` (the schedule) has `velocity(e, t, z, window_at)` and `path(t)`, the
shares of clean latents and of noise at a time. Grids are lists of times from noise down, 0 last.
"""

import itertools

import numpy as np

from tests.oracles import instantedit_parts as parts


class Flow:
    def __init__(self, windows, kind):
        self.windows, self.kind = windows, kind

    def velocity(self, e, t, z, window_at=None):
        return parts.velocity(e, t, z, windows=self.windows, kind=self.kind, window_at=window_at)

    def path(self, t):
        """Straight between the ends of a window; (clean, noise) and their slopes."""
        start, end, alpha_s, alpha_e = parts.window_of(max(t, 0.2), self.windows)
        where = (t / 1000 - end) / (start - end)
        ends = np.array([[np.sqrt(alpha_e), np.sqrt(1 - alpha_e)], [np.sqrt(alpha_s), np.sqrt(1 - alpha_s)]])
        return (1 - where) * ends[0] + where * ends[1], (ends[1] - ends[0]) / (start - end)

    def grid(self, steps):
        return [*parts.timesteps(steps, self.windows), 0]

    def euler(self, predict, z, times):
        for t, low in itertools.pairwise(times):
            z = z + self.velocity(predict(z, t), t, z) * (low - t) / 1000
        return z


def guide(net, null, prompt, cfg):
    if cfg is None:
        return lambda z, t: net(z, t, prompt)
    return lambda z, t: (1 - cfg) * net(z, t, null) + cfg * net(z, t, prompt)


def climb(flow, predict, z, times, ask):
    """Up by Euler; `ask(low, t)` is the time the network is told."""
    way = [z]
    for low, t in zip(times[::-1], times[-2::-1]):
        z = z + flow.velocity(predict(z, ask(low, t)), low, z, window_at=t) * (t - low) / 1000
        way.append(z)
    return way


def plain_inversion(flow, net, p, steps, **_):
    times = flow.grid(steps)
    z = climb(flow, lambda z, t: net(z, t, p["null"]), p["z0"], times, lambda low, t: low)[-1]
    return flow.euler(guide(net, p["null"], p["target"], p["cfg"]), z, times)


def ddim_inversion(flow, net, p, steps, **_):
    times = flow.grid(steps)
    z = climb(flow, lambda z, t: net(z, t, p["source"]), p["z0"], times, lambda low, t: t)[-1]
    return flow.euler(guide(net, p["null"], p["target"], p["cfg"]), z, times)


def direct_inversion(flow, net, p, steps, **_):
    times = flow.grid(steps)
    way = climb(flow, lambda z, t: net(z, t, p["source"]), p["z0"], times, lambda low, t: t)[::-1]
    z = way[0]
    source, target = (guide(net, p["null"], p[name], p["cfg"]) for name in ("source", "target"))
    for i in range(steps):
        distance = way[i + 1] - flow.euler(source, way[i], times[i : i + 2])
        z = flow.euler(target, z, times[i : i + 2]) + distance
    return z


def renoise(flow, net, p, steps, iterations=2, averaged=1, **_):
    times = flow.grid(steps)
    z = p["z0"]
    for low, t in zip(times[::-1], times[-2::-1]):
        guesses, made = [z], []
        for _ in range(iterations):
            made.append(net(guesses[-1], t, p["source"]))
            guesses.append(z + flow.velocity(made[-1], low, z, window_at=t) * (t - low) / 1000)
        z = z + flow.velocity(sum(made[-averaged:]) / averaged, low, z, window_at=t) * (t - low) / 1000
    return flow.euler(guide(net, p["null"], p["target"], p["cfg"]), z, times)


def _taylor(flow, predict, z, begin, end, window):
    """z + dt v + dt^2/2 dv/dt, the derivative by a difference over half the step."""
    dt = (end - begin) / 1000
    v = flow.velocity(predict(z, begin), begin, z, window)
    middle = (begin + end) / 2
    ahead = z + dt / 2 * v
    dv = (flow.velocity(predict(ahead, middle), middle, ahead, window) - v) / (dt / 2)
    return z + dt * v + dt**2 / 2 * dv


def rf_solver(flow, net, p, steps, **_):
    times = flow.grid(steps)
    z = p["z0"]
    for low, t in zip(times[::-1], times[-2::-1]):
        z = _taylor(flow, lambda z, t: net(z, t, p["source"]), z, low, t, t)
    target = guide(net, p["null"], p["target"], p["cfg"])
    for t, low in itertools.pairwise(times):
        z = _taylor(flow, target, z, t, low, t)
    return z


def fire_flow(flow, net, p, steps, **_):
    times = flow.grid(steps)
    z = p["z0"]
    ways = (
        (lambda z, t: net(z, t, p["source"]), [(low, t, t) for low, t in zip(times[::-1], times[-2::-1])]),
        (guide(net, p["null"], p["target"], p["cfg"]), [(t, low, t) for t, low in itertools.pairwise(times)]),
    )
    for predict, way in ways:
        kept = None
        for begin, end, window in way:
            if kept is None:
                kept = flow.velocity(predict(z, begin), begin, z, window)
            dt, middle = (end - begin) / 1000, (begin + end) / 2
            ahead = z + dt / 2 * kept
            kept = flow.velocity(predict(ahead, middle), middle, ahead, window)
            z = z + dt * kept
    return z


def sdedit(flow, net, p, steps, strength=0.75, noise=None, **_):
    times = [t for t in flow.grid(steps) if t <= 1000 * strength]
    (clean, dirt), _ = flow.path(times[0])
    return flow.euler(guide(net, p["null"], p["target"], p["cfg"]), clean * p["z0"] + dirt * noise, times)


def virtual_inversion(flow, net, p, steps, noise=None, **_):
    target = guide(net, p["null"], p["target"], p["cfg"])

    def epsilon(e, z, t):
        """Solves z = a x + b n, velocity = a' x + b' n for n."""
        (a, b), (da, db) = flow.path(t)
        flat = np.stack([z.ravel(), flow.velocity(e, t, z).ravel()])
        return np.linalg.solve([[a, b], [da, db]], flat)[1].reshape(z.shape)

    clean = p["z0"]
    for t, drawn in zip(flow.grid(steps)[:-1], noise):
        (a, b), _ = flow.path(t)
        z_source, z_target = a * p["z0"] + b * drawn, a * clean + b * drawn
        consistent = (z_source - a * p["z0"]) / b
        e_target = epsilon(target(z_target, t), z_target, t)
        e_source = epsilon(net(z_source, t, p["source"]), z_source, t)
        clean = (z_target - b * (e_target - e_source + consistent)) / a
    return clean


def flow_edit(flow, net, p, steps, strength=1.0, noise=None, **_):
    times = [t for t in flow.grid(steps) if t <= 1000 * strength]
    target = guide(net, p["null"], p["target"], p["cfg"])
    z = p["z0"]
    for t, low, draws in zip(times, times[1:], noise):
        moves = []
        for drawn in draws:
            (a, b), _ = flow.path(t)
            z_source = a * p["z0"] + b * drawn
            z_target = z + z_source - p["z0"]
            v_target = flow.velocity(target(z_target, t), t, z_target)
            moves.append(v_target - flow.velocity(net(z_source, t, p["source"]), t, z_source))
        z = z + (low - t) / 1000 * sum(moves) / len(moves)
    return z
