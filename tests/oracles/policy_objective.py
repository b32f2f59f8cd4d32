"""Group-relative advantages, the clipped policy loss and the entropy stop rule, token by token in float64."""

import math

import numpy as np


def advantages(rewards, groups, kind="grpo", eps=1e-6, ddof=1):
    rewards = [float(r) for r in rewards]
    out = []
    for reward, group in zip(rewards, groups):
        members = [r for r, g in zip(rewards, groups) if g == group]
        if len(members) == 1:
            mean, std = 0.0, 1.0
        else:
            mean, std = np.mean(members), np.std(members, ddof=ddof)
        if kind == "rloo":
            others = sum(members) - reward
            out.append(reward - (others / (len(members) - 1) if len(members) > 1 else 0.0))
        elif len(members) > 1 and len(set(members)) == 1:
            out.append(0.0)
        else:
            out.append((reward - mean) / (std + eps) if kind == "grpo" else reward - mean)
    return np.array(out)


def kl(logp, ref, kind):
    d = ref - logp
    if kind == "k1":
        return logp - ref
    if kind == "k2":
        return 0.5 * (logp - ref) ** 2
    d = max(-20.0, min(20.0, d))
    return max(-10.0, min(10.0, math.exp(d) - d - 1))


def aggregate(values, mask, mode, max_length=None):
    """Values under mask 0 are never looked at."""
    rows = [[v for v, m in zip(*row) if m] for row in zip(values, mask)]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    per_row = {
        "seq-mean-token-mean": lambda row: sum(row) / len(row),
        "seq-mean-token-sum": sum,
        "seq-mean-token-sum-norm": lambda row: sum(row) / max_length,
    }[mode]
    return sum(map(per_row, rows)) / len(rows)


def policy_loss(
    logp,
    old,
    advantages,
    mask,
    *,
    epsilon=0.2,
    epsilon_high=None,
    dual_clip=None,
    aggregation="token-mean",
    max_length=None,
    ref_logp=None,
    beta=0.0,
    kl_kind="k3",
    weights=None,
    entropy=None,
    entropy_coef=0.0,
):
    """Loss and metrics."""
    high = epsilon if epsilon_high is None else epsilon_high
    values, low_hits, high_hits, gaps = (np.zeros(np.shape(logp)) for _ in range(4))
    for b, t in np.argwhere(np.asarray(mask)):
        a = float(advantages[b] if np.ndim(advantages) == 1 else advantages[b, t])
        difference = float(logp[b, t]) - float(old[b, t])
        ratio = math.exp(max(-20.0, min(20.0, difference)))
        plain, clipped = -a * ratio, -a * max(1 - epsilon, min(1 + high, ratio))
        value = max(plain, clipped)
        if dual_clip is not None and a < 0:
            value = min(value, -dual_clip * a)
        value *= 1.0 if weights is None else float(weights[b, t])
        if beta:
            value += beta * kl(float(logp[b, t]), float(ref_logp[b, t]), kl_kind)
        if entropy is not None:
            value -= entropy_coef * float(entropy[b, t])
        values[b, t], gaps[b, t] = value, -difference
        low_hits[b, t], high_hits[b, t] = clipped > plain and ratio < 1, clipped > plain and ratio > 1
    metrics = {
        "clip_fraction": low_hits + high_hits,
        "clip_fraction_low": low_hits,
        "clip_fraction_high": high_hits,
        "approx_kl": gaps,
    }
    means = {name: aggregate(value, mask, "token-mean") for name, value in metrics.items()}
    return aggregate(values, mask, aggregation, max_length), means


def gradient(loss, logp, step=1e-6):
    """Central differences of `loss(logp)` in every element."""
    out = np.zeros(np.shape(logp))
    for index in np.ndindex(out.shape):
        shift = np.zeros(out.shape)
        shift[index] = step
        out[index] = (loss(logp + shift) - loss(logp - shift)) / (2 * step)
    return out


def slow_fast_phase(entropies, window, threshold, two_sided=False):
    """Whether each step makes fast passes: the list, and the question before the entropy of the step is appended."""
    seen, off, answers = [], False, []
    for entropy in entropies:
        if len(seen) >= window:
            last = np.array(seen[-window:], np.float64)
            z = (last[-1] - last.mean()) / (last.std() + 1e-9)
            off = off or bool((abs(z) if two_sided else z) >= threshold)
        answers.append(not off)
        seen.append(entropy)
    return answers
