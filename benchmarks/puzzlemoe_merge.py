"""Merging and packing a pair of experts on this CPU, against one streaming pass over the same bytes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.harness import Case, interleaved
from jaxlab.puzzlemoe import dual_mask_merge, pack_pair

SYSTEM = "puzzlemoe"

# The gate of a Mixtral expert; the bars are the spec's: 0.4 G positions a second, and at most 8 streaming adds.
K, N = 4096, 14336
POSITIONS_PER_S = 0.4e9
ADDS = 8.0


def cases(quick: bool) -> Iterator[Case]:
    """Time of `pack_pair(dual_mask_merge(...))`, compiled, beside a bfloat16 addition that moves the same bytes."""
    rows = K // 4 if quick else K
    keys = jax.random.split(jax.random.key(0), 4)
    w_i, w_j = (0.02 * jax.random.normal(key, (rows, N), jnp.bfloat16) for key in keys[:2])
    n_i, n_j = (jax.random.uniform(key, (rows,)) for key in keys[2:])

    def merge_and_pack(w_i, w_j, n_i, n_j):
        return pack_pair(dual_mask_merge(w_i, w_j, n_i, n_j), checked=False)

    ours = jax.jit(merge_and_pack).lower(w_i, w_j, n_i, n_j).compile()
    add = jax.jit(jnp.add).lower(w_i, w_j).compile()
    repeats = 5 if quick else 9
    seconds, add_s = interleaved(lambda: ours(w_i, w_j, n_i, n_j), lambda: add(w_i, w_j), repeats=repeats, warmup=2)
    shape = f"{rows} x {N}"
    rate = w_i.size / seconds
    yield Case(
        SYSTEM, f"merge and pack, {shape}", "positions/s", rate, POSITIONS_PER_S, "the bar", 1.0, higher_is_better=True
    )
    yield Case(SYSTEM, f"merge and pack, {shape}", "ms", seconds * 1e3, add_s * 1e3, "a bfloat16 addition", 1 / ADDS)
    # Merged, packed, and nothing of the weights' size beside them: one pass.
    extra = ours.memory_analysis().temp_size_in_bytes
    yield Case(SYSTEM, f"merge and pack, {shape}", "temporary bytes", extra, w_i.nbytes, "one expert's matrix", 8.0)
