"""PuzzleMoE's packed product on this CPU: against the loop over bfloat16 experts it replaces, and `lax.ragged_dot`.

Words of 16 bits, and the quantised forms of 8 and 6, which are compared to the words too.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness import Case, interleaved
from jaxlab.core.errors import MissingExtra
from jaxlab.puzzlemoe import PackedExperts, quantize_experts
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.packed_moe_matmul import packed_moe_matmul, unpack

SYSTEM = "puzzlemoe"

# One matrix of a layer of eight experts, and rows in all. The bars are those of the specification, section 7.
WIDTH, FFN, EXPERTS = 1024, 3584, 8
LOOP_BARS = {2: 1 / 1.8, 16: 1 / 1.3, 256: 1 / 1.3}
RAGGED_BARS = {2: 8.0, 256: 4.0}
TEMPORARY_MATRICES = 1.5
MIB = 2**20


def expert_loop(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The peer: one expert after the other, those without rows skipped, matrices cast to float32 as CPUs want them.

    Its tiles are as high as an even share of the rows, which is the best there is for rows that are spread evenly.
    """
    m, (experts, _, n) = x.shape[0], weights.shape
    rows = max(1, m // experts)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes

    def expert(e, out):
        def multiply(out):
            matrix = lax.dynamic_index_in_dim(weights, e, keepdims=False).astype(jnp.float32)

            def step(state):
                first, out = state
                at = jnp.minimum(first, m - rows)
                row = at + jnp.arange(rows)[:, None]
                made = lax.dynamic_slice_in_dim(x, at, rows).astype(jnp.float32) @ matrix
                before = lax.dynamic_slice_in_dim(out, at, rows)
                made = jnp.where((row >= first) & (row < ends[e]), made, before)
                return first + rows, lax.dynamic_update_slice_in_dim(out, made, at, 0)

            return lax.while_loop(lambda state: state[0] < ends[e], step, (starts[e], out))[1]

        return lax.cond(group_sizes[e] > 0, multiply, lambda out: out, out)

    return lax.fori_loop(0, experts, expert, jnp.zeros((m, n), jnp.float32)).astype(x.dtype)


def inputs(rows: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Rows, words, group sizes, slots and positions: spread evenly, or one row each for two experts of two slots."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, WIDTH)), dtype)
    # Random signs and masks over magnitudes in the range of trained weights.
    words = rng.integers(0, 2**16, (EXPERTS // 2, WIDTH, FFN), np.uint16) & 0xF7FF
    sizes = np.full(EXPERTS, rows // EXPERTS) if rows >= EXPERTS else np.isin(np.arange(EXPERTS), (1, 6))
    slot_of, pos_of = np.divmod(np.arange(EXPERTS), 2)
    return x, jnp.asarray(words), *(jnp.asarray(a, jnp.int32) for a in (sizes, slot_of, pos_of))


def cases(quick: bool) -> Iterator[Case]:
    """Time against both peers, and temporaries against the size of one decoded matrix."""
    repeats = 5 if quick else 15
    _, words, _, slot_of, pos_of = inputs(2, jnp.float32)
    decoded = unpack(words[slot_of], pos_of[:, None, None])
    for dtype in (jnp.float32, jnp.bfloat16):
        name = jnp.dtype(dtype).name
        for rows, bar in LOOP_BARS.items():
            x, _, sizes, _, _ = inputs(rows, dtype)
            ours = jax.jit(packed_moe_matmul).lower(x, words, sizes, slot_of, pos_of).compile()
            run = functools.partial(ours, x, words, sizes, slot_of, pos_of)
            loop = functools.partial(jax.jit(expert_loop), x, decoded, sizes)
            what = f"packed_moe_matmul, {rows} rows {name}, CPU"
            yield _timed(what, run, loop, "loop over bfloat16 experts", bar, repeats)
            if rows in RAGGED_BARS:
                # Weights in the rows' dtype, as `lax.ragged_dot` multiplies them.
                ragged = functools.partial(jax.jit(lax.ragged_dot), x, decoded.astype(dtype), sizes)
                yield _timed(what, run, ragged, "lax.ragged_dot", RAGGED_BARS[rows], 3 if quick else 5)
            mib = (ours.memory_analysis().temp_size_in_bytes / MIB, WIDTH * FFN * 2 / MIB)
            yield Case(SYSTEM, what, "temporary MiB", *mib, "one decoded bfloat16 matrix", 1 / TEMPORARY_MATRICES)
    yield from _quantised_cases(words, decoded, repeats)
    try:
        mib = [gpu_temporaries(program) / MIB for program in (packed_moe_matmul, decoded_matmul)]
    except MissingExtra:
        return
    yield Case(SYSTEM, "packed_moe_matmul, 256 rows bfloat16, H100", "temporary MiB", *mib, "all experts decoded")


def _quantised_cases(words: jax.Array, decoded: jax.Array, repeats: int) -> Iterator[Case]:
    """Time in 8 and 6 bits a position, and the bytes of an expert's weight."""
    for bits in (8, 6):
        codes, scales = quantised(words, bits)
        what = f"packed_moe_matmul, {bits} bits"
        stored = 8 * (codes.nbytes + scales.nbytes) / (2 * words.size)
        yield Case(SYSTEM, what, "bits a weight", stored, 16.0, "bfloat16")
        for rows, bar in LOOP_BARS.items():
            x, _, sizes, slot_of, pos_of = inputs(rows, jnp.float32)
            ours = jax.jit(packed_moe_matmul).lower(x, codes, sizes, slot_of, pos_of, scales=scales).compile()
            run = functools.partial(ours, x, codes, sizes, slot_of, pos_of, scales=scales)
            loop = functools.partial(jax.jit(expert_loop), x, decoded, sizes)
            of_words = functools.partial(jax.jit(packed_moe_matmul), x, words, sizes, slot_of, pos_of)
            title = f"{what}, {rows} rows float32, CPU"
            yield _timed(title, run, loop, "loop over bfloat16 experts", bar, repeats)
            # Few rows wait for memory, where half the bytes must be faster; 6 bits cost more to decode than they save.
            bar = 1.0 if bits == 8 and rows < 256 else None
            yield _timed(title, run, of_words, "words of 16 bits", bar, repeats)


def quantised(words: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The same pairs as codes and scales."""
    experts = jnp.arange(EXPERTS, dtype=jnp.int32)
    tall = jnp.swapaxes(words, 1, 2)
    packed = quantize_experts(PackedExperts(words, words, tall, experts // 2, experts % 2), bits=bits)
    return packed.gate, packed.scale_gate


def decoded_matmul(
    x: jax.Array, words: jax.Array, group_sizes: jax.Array, slot_of: jax.Array, pos_of: jax.Array
) -> jax.Array:
    """What one would write without a kernel: every expert decoded, then the grouped product."""
    return grouped_matmul(x, unpack(words[slot_of], pos_of[:, None, None], x.dtype), group_sizes)


def gpu_temporaries(program: Any) -> int:
    """Bytes of temporaries, compiled for an H100 that need not be there.

    Raises:
      MissingExtra: the GPU compiler is not installed.
    """
    from jaxlab.core import plan

    args = jax.eval_shape(lambda: inputs(256, jnp.bfloat16))
    return plan.compile(program, *args, target=plan.target("h100"), labels=["input"] * 5).bytes["temporaries"]


def _timed(what: str, ours: Any, peer: Any, peer_name: str, bar: float | None, repeats: int) -> Case:
    mine, theirs = interleaved(ours, peer, repeats=repeats, warmup=2)
    return Case(SYSTEM, what, "ms", mine * 1e3, theirs * 1e3, peer_name, bar)
