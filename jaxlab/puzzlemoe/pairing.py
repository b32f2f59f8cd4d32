"""Which experts share a slot: at random, as in the paper, or searched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.keys import named_key
from jaxlab.puzzlemoe.config import PuzzleConfig, num_pairs
from jaxlab.puzzlemoe.layer import MoELayer, expert_outputs, route_rows
from jaxlab.puzzlemoe.merging import dual_mask_merge, reconstruct
from jaxlab.puzzlemoe.statistics import ExpertStats, expert_norms

ArrayLike = Array | np.ndarray

# Contributions of pairs that the search remembers, each as large as the calibration input in float32.
_REMEMBERED = 64


def random_pairs(key: Array, num_experts: int, ratio: float) -> Int[Array, "p 2"]:
    """Disjoint pairs of experts in random order (arXiv:2511.04805: the spread between seeds is tiny).

    Args:
        key: of one layer: `jax.random.fold_in(key, layer)`.
        num_experts: N.
        ratio: fraction of the expert slots that is removed; P = floor(ratio * N + 1/2), at most N // 2.

    Returns:
        int32; the first member of a pair has position 0. Experts that do not occur stay unmerged.

    Raises:
        ValueError: ratio outside (0, 0.5], or no pair comes out.
    """
    pairs = num_pairs(num_experts, ratio)
    return jax.random.permutation(key, num_experts)[: 2 * pairs].reshape(pairs, 2).astype(jnp.int32)


def search_pairs(
    key: Array,
    layer: MoELayer,
    x: Float[ArrayLike, "*batch d"],
    layer_stats: ExpertStats | None,
    cfg: PuzzleConfig,
    *,
    steps: int = 200,
) -> Int[Array, "p 2"]:
    """Pairs whose merging changes the layer's output least, by random swaps (ours; the paper names no algorithm).

    Starts at `random_pairs(key, N, cfg.ratio)`. A step exchanges two experts of different pairs, or one of a pair with
    an unmerged one, and stays if the squared output error on `x` falls; so the result is never worse than the start.
    Only the pairs that a step changes are merged and evaluated.

    Args:
        key: of one layer.
        layer: as trained.
        x: calibration input of the layer.
        layer_stats: of the layer, None = merge by magnitude.
        cfg: ratio, tau, norm and min_tokens are used.
        steps: how many swaps are tried.

    Raises:
        ValueError: as `random_pairs`; x or the statistics do not fit the layer.
    """
    total = layer.num_experts
    start = np.asarray(random_pairs(key, total, cfg.ratio))
    used = start.size
    rows = jnp.asarray(x).reshape(-1, x.shape[-1])
    if rows.shape[1] != layer.router.shape[0]:
        raise ValueError(f"x must end in d={layer.router.shape[0]}, the rows of the router, got shape {x.shape}")
    norms = pair_norms(layer_stats, (total, *layer.gate.shape[1:]), cfg)
    ids, weights = route_rows(layer, rows)
    share = jnp.sum(jnp.where(ids == jnp.arange(total)[:, None, None], weights, 0.0), axis=-1)

    @functools.lru_cache(maxsize=_REMEMBERED)
    def change(i: int, j: int) -> Array:
        return _change(layer, rows, share, norms, jnp.array([i, j]), jnp.float32(cfg.tau))

    # One row of experts: the pairs, then the unmerged ones; a swap is a pair of places that are not already together.
    order = [*start.reshape(-1).tolist(), *np.setdiff1d(np.arange(total), start).tolist()]
    swaps = [(a, b) for a in range(used) for b in range(a + 1, total) if b >= used or a // 2 != b // 2]
    if not swaps or not rows.shape[0]:
        return jnp.asarray(start)
    drawn = np.asarray(jax.random.randint(named_key(key, "search"), (steps,), 0, len(swaps)))
    error = sum(change(*order[a : a + 2]) for a in range(0, used, 2))
    best = float(jnp.sum(jnp.square(error)))
    for a, b in (swaps[index] for index in drawn):
        changed = order.copy()
        changed[a], changed[b] = order[b], order[a]
        places = sorted({2 * (place // 2) for place in (a, b) if place < used})
        moved = sum(change(*changed[p : p + 2]) - change(*order[p : p + 2]) for p in places)
        candidate = error + moved
        loss = float(jnp.sum(jnp.square(candidate)))
        if loss < best:
            order, error, best = changed, candidate, loss
    return jnp.asarray(np.array(order[:used], np.int32).reshape(-1, 2))


@jax.jit
def _change(layer, rows, share, norms, pair, tau):
    """What merging one pair adds to the output of the layer, `[s, d]` float32."""
    n_in, n_mid, weak = norms
    by_magnitude = jnp.any(weak[pair])
    n_in, n_mid = (jnp.where(by_magnitude, 1.0, n[pair]) for n in (n_in, n_mid))
    originals = [w[pair] for w in (layer.gate, layer.up, layer.down)]
    merged = []
    for w, n in zip(originals, (n_in, n_in, n_mid)):
        both = dual_mask_merge(w[0], w[1], n[0], n[1], tau=tau)
        merged.append(jnp.stack([reconstruct(both, pos).astype(w.dtype) for pos in (0, 1)]))
    new, old = (expert_outputs(rows, *weights, layer.act) for weights in (merged, originals))
    return jnp.sum((new - old) * share[pair][..., None], axis=0)


def pair_norms(
    layer_stats: ExpertStats | None, shape: tuple[int, ...], cfg: PuzzleConfig
) -> tuple[Float[Array, "n d"], Float[Array, "n f"], np.ndarray]:
    """n_in, n_mid, and which experts saw fewer than `cfg.min_tokens` tokens: their pairs go by magnitude.

    Args:
        layer_stats: of the layer, None = ones.
        shape: (N, d, f) of the layer.
        cfg: norm and min_tokens are used.

    Raises:
        ValueError: statistics of another model, or negative or non-finite ones.
    """
    n, d, f = shape
    if layer_stats is None:
        return jnp.ones((n, d)), jnp.ones((n, f)), np.zeros(n, bool)
    got = tuple(leaf.shape for leaf in (layer_stats.sum_sq_in, layer_stats.sum_sq_mid, layer_stats.tokens))
    if got != ((n, d), (n, f), (n,)):
        raise ValueError(
            f"statistics of another model (or not of one layer): sum_sq_in, sum_sq_mid and tokens have shapes {got}, "
            f"expected {((n, d), (n, f), (n,))}"
        )
    for name in ("sum_sq_in", "sum_sq_mid"):
        values = np.asarray(getattr(layer_stats, name))
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            experts = np.flatnonzero(bad.any(axis=1)).tolist()
            raise ValueError(f"statistics {name} must be finite and not negative, got {bad.sum()} in experts {experts}")
    weak = np.asarray(layer_stats.tokens) < cfg.min_tokens
    return *expert_norms(layer_stats, cfg.norm), weak if cfg.norm != "magnitude" else np.zeros(n, bool)


def check_pairs(pairs: ArrayLike, num_experts: int) -> np.ndarray:
    """A pair list as int32 `[P,2]` on the host.

    Raises:
        ValueError: not pairs, none at all, or experts that are out of range, repeated, or paired with themselves.
    """
    listed = np.asarray(pairs)
    if listed.ndim != 2 or listed.shape[1] != 2 or not listed.size or not np.issubdtype(listed.dtype, np.integer):
        raise ValueError(f"pairs must be integers [P, 2] with P >= 1, got {listed.dtype} {listed.shape}")
    outside = [pair for pair in listed.tolist() if min(pair) < 0 or max(pair) >= num_experts]
    if outside:
        raise ValueError(f"pairs must hold experts 0..{num_experts - 1}, got {outside}")
    alone = [pair for pair in listed.tolist() if pair[0] == pair[1]]
    if alone:
        raise ValueError(f"pairs must join two different experts, got {alone}")
    experts, counts = np.unique(listed, return_counts=True)
    repeated = set(experts[counts > 1].tolist())
    if repeated:
        at = [pair for pair in listed.tolist() if repeated & set(pair)]
        raise ValueError(f"pairs must not share experts, got {sorted(repeated)} more than once, in {at}")
    return listed.astype(np.int32)
