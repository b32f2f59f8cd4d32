"""The experts of one layer, compressed: pairs merged and packed one after the other, the rest kept."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Integer

from jaxlab.puzzlemoe.bit_packing import HIGHEST, LOWEST, exponents, pack_pair, unpack
from jaxlab.puzzlemoe.config import PuzzleConfig
from jaxlab.puzzlemoe.merging import check_weights, dual_mask_merge
from jaxlab.puzzlemoe.pairing import check_pairs, pair_norms
from jaxlab.puzzlemoe.statistics import ExpertStats
from pallas_kernels.packed_moe_matmul import unpack_codes

ArrayLike = Array | np.ndarray

MATRICES = ("gate", "up", "down")
# Share of merged values below 2^-15 from which on a layer is worth a warning.
_UNDERFLOW_LIMIT = 1e-3
# Weights that are merged at a time: their temporaries stay in the cache.
_BLOCK = 1 << 18
# Without the bits of position 1 (S_j, M_j).
ONLY_FIRST = 0xAFFF


@struct.dataclass
class PackedExperts:
    """The experts of one layer in packed words (in a decoder, stacked by layer).

    Expert e is member `pos_of[e]` of slot `slot_of[e]`. Slots are the words, pair p at p, and behind them the unmerged
    experts by ascending id: as words of their own, or, where there is a dense stack, as entry `slot - P` of that.

    Attributes:
        gate: `[P or S, d, f]` uint16; where there are scales, codes `[P or S, d bits / 8, f]` uint8.
        up: `[P or S, d, f]` uint16, or codes.
        down: `[P or S, f, d]` uint16, or codes.
        slot_of: `[N]` int32.
        pos_of: `[N]` int32, 0 or 1.
        dense_gate: `[N - 2P, d, f]` bfloat16 of the unmerged experts, None if there are none or they are packed.
        dense_up: `[N - 2P, d, f]` bfloat16.
        dense_down: `[N - 2P, f, d]` bfloat16.
        scale_gate: `[P or S, groups, f]` bfloat16, steps of the levels of `quantize_experts`; None of words.
        scale_up: `[P or S, groups, f]` bfloat16.
        scale_down: `[P or S, groups, d]` bfloat16.
    """

    gate: Any
    up: Any
    down: Any
    slot_of: Any
    pos_of: Any
    dense_gate: Any = None
    dense_up: Any = None
    dense_down: Any = None
    scale_gate: Any = None
    scale_up: Any = None
    scale_down: Any = None

    @property
    def bits(self) -> int:
        """Bits of a position: 16, 8 or 6."""
        return 16 if self.scale_gate is None else 8 * self.gate.shape[-2] // self.down.shape[-1]

    def over_layers(self) -> tuple[Any, Callable[[Any], "PackedExperts"]]:
        """What a scan over stacked layers cuts, and how a layer comes from its cut: all layers' slots, its addresses.

        So no layer's words are copied out of the stack before a kernel reads those of a few experts.
        """
        layers, words = self.gate.shape[:2]
        dense = 0 if self.dense_gate is None else self.dense_gate.shape[1]
        layer = jnp.arange(layers, dtype=self.slot_of.dtype)[:, None]
        slot = jnp.where(self.slot_of < words, layer * words, layers * words + layer * dense - words) + self.slot_of
        # An address that a layer does not have must not become that of another layer.
        slot = jnp.where((self.slot_of >= 0) & (self.slot_of < words + dense), slot, -1)
        arrays = dataclasses.replace(self, slot_of=None, pos_of=None)
        whole = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), arrays)
        return (slot, self.pos_of), lambda cut: dataclasses.replace(whole, slot_of=cut[0], pos_of=cut[1])


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What compressing one layer did; each array has an entry for gate, up and down, float64.

    Attributes:
        mask_density: share of the weights of paired experts that are not masked.
        sim_fraction: share of their positions where both use the mean.
        rel_mse: squared error of their decoded weights over their squared sum.
        exponent_coverage: share of their weights, as bfloat16, whose exponent a word can hold (112..143).
        underflow: share of their merged magnitudes that are not 0 and below 2^-15.
        warnings: sentences for the user.
    """

    mask_density: np.ndarray
    sim_fraction: np.ndarray
    rel_mse: np.ndarray
    exponent_coverage: np.ndarray
    underflow: np.ndarray
    warnings: tuple[str, ...] = ()


def compress_experts(
    gate: Float[ArrayLike, "n d f"],
    up: Float[ArrayLike, "n d f"],
    down: Float[ArrayLike, "n f d"],
    layer_stats: ExpertStats | None,
    pairs: Integer[ArrayLike, "p 2"],
    cfg: PuzzleConfig,
) -> PackedExperts:
    """Merges and packs the experts of one layer (arXiv:2511.04805, sections 3.2 and 3.3).

    One pair is merged at a time: beside the weights and the words nothing of their size exists.

    Args:
        gate: gate projections, any floating dtype of 16 bits or more.
        up: up projections.
        down: down projections.
        layer_stats: calibration statistics of the layer; None = saliency by magnitude.
        pairs: which experts share a slot, see `random_pairs`.
        cfg: tau, norm, underflow, unmerged and min_tokens are used; the ratio is that of `pairs`.

    Raises:
        ValueError: shapes disagree, bad pairs, statistics of another model, a weight that is not finite, or a packed
            magnitude of 2^17 or more (the message names matrix, experts and count).
        TypeError: weights of integers or of 8 bits.
    """
    packed, report = compress_layer(gate, up, down, layer_stats, pairs, cfg)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return packed


def compress_layer(
    gate: Float[ArrayLike, "n d f"],
    up: Float[ArrayLike, "n d f"],
    down: Float[ArrayLike, "n f d"],
    layer_stats: ExpertStats | None,
    pairs: Integer[ArrayLike, "p 2"],
    cfg: PuzzleConfig,
    *,
    layer: int | None = None,
) -> tuple[PackedExperts, LayerReport]:
    """`compress_experts` with its figures; warnings are in the report. `layer` is the number that messages give."""
    where = "" if layer is None else f"layer {layer}: "
    weights = {"gate": gate, "up": up, "down": down}
    for name, w in weights.items():
        check_weights(name, w)
    shape = gate.shape
    if gate.ndim != 3 or up.shape != shape or down.shape != (shape[0], *shape[:0:-1]):
        raise ValueError(
            f"{where}expected gate and up [N, d, f] and down [N, f, d], got {shape}, {up.shape} and {down.shape}"
        )
    pairs = check_pairs(pairs, shape[0])
    n_in, n_mid, weak = pair_norms(layer_stats, shape, cfg)
    rest = np.setdiff1d(np.arange(shape[0]), pairs)
    singles = np.stack([rest, rest], axis=1) if cfg.unmerged == "packed" else np.zeros((0, 2), int)
    slots = np.concatenate([pairs, singles]).astype(np.int32)
    by_magnitude = weak[pairs].any(axis=1)

    arrays: dict[str, Any] = {}
    counted = []
    for name, w in weights.items():
        norms = _slot_norms(n_mid if name == "down" else n_in, slots, np.flatnonzero(by_magnitude))
        words, counts = _merge_slots(
            *(_bits(w), norms, slots, jnp.float32(cfg.tau)),
            dtype=jnp.dtype(w.dtype),
            num_pairs=len(pairs),
            underflow=cfg.underflow,
        )
        counts: dict[str, np.ndarray] = jax.tree.map(lambda count: np.asarray(count, np.float64), counts)
        _check_counts(where + name, counts, slots)
        arrays[name] = words
        counted.append({key: value[: len(pairs)].sum() for key, value in counts.items()} | {"size": words[0].size})
        if cfg.unmerged == "bf16" and rest.size:
            arrays[f"dense_{name}"] = _dense(where + name, w, rest)
    slot_of, pos_of = np.zeros((2, shape[0]), np.int32)
    slot_of[pairs], pos_of[pairs] = np.arange(len(pairs))[:, None], np.arange(2)
    slot_of[rest] = len(pairs) + np.arange(rest.size)
    packed = PackedExperts(slot_of=jnp.asarray(slot_of), pos_of=jnp.asarray(pos_of), **arrays)
    return packed, _report(where, counted, len(pairs), np.flatnonzero(weak), pairs[by_magnitude], cfg)


def _bits(w: ArrayLike) -> Array:
    """The weights as unsigned integers; in a host's memory the same memory, of which XLA would make a copy."""
    kind = f"uint{8 * w.dtype.itemsize}"
    if isinstance(w, np.ndarray):
        return jax.device_put(w.view(kind))
    if len(w.devices()) == 1 and (device := next(iter(w.devices()))).platform == "cpu":
        return jax.device_put(np.asarray(w).view(kind), device)
    return jax.lax.bitcast_convert_type(w, jnp.dtype(kind))


@functools.partial(jax.jit, static_argnames=("dtype", "num_pairs", "underflow"))
def _merge_slots(bits, norms, slots, tau, *, dtype, num_pairs, underflow):
    """Words `[S,K,M]` and counts by slot and row; slots from `num_pairs` on hold one expert, given twice.

    A block of rows at a time: what the counts need beside the words is never larger than a block. Slices are taken of
    the weights' bits, for XLA on a CPU slices bfloat16 as float32, and converts all experts for it.
    """
    _, rows, columns = bits.shape
    block = max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * columns <= _BLOCK))

    def one_slot(slot):
        members, norm, single = slot

        def one_block(part):
            start, norm_i, norm_j = part
            w_i, w_j = (
                jax.lax.bitcast_convert_type(jax.lax.dynamic_slice(bits, (e, start, 0), (1, block, columns))[0], dtype)
                for e in members
            )
            return _merge_block(w_i, w_j, norm_i, norm_j, single, tau, underflow)

        blocks = (jnp.arange(0, rows, block), *norm.reshape(2, -1, block))
        words, counts = jax.lax.map(one_block, blocks)
        return words.reshape(rows, columns), jax.tree.map(lambda count: count.reshape(rows), counts)

    return jax.lax.map(one_slot, (slots, norms, jnp.arange(slots.shape[0]) >= num_pairs))


def _merge_block(w_i, w_j, norm_i, norm_j, single, tau, underflow):
    # An expert merged with itself is similar everywhere, and its magnitude the mean of two equal numbers: exact.
    merged = dual_mask_merge(w_i, w_j, norm_i, norm_j, tau=tau)
    words = pack_pair(merged, underflow=underflow, checked=False)
    words = words & jnp.where(single, jnp.uint16(ONLY_FIRST), jnp.uint16(0xFFFF))
    exponent = exponents(merged.mag)
    error = squares = covered = 0
    for pos, member in enumerate((w_i, w_j)):
        raw = exponents(member.astype(jnp.bfloat16))
        covered = covered + _count((raw >= LOWEST) & (raw <= HIGHEST))
        member = member.astype(jnp.float32)
        error = error + jnp.sum(jnp.square(unpack(words, pos, jnp.float32) - member), axis=-1)
        squares = squares + jnp.sum(jnp.square(member), axis=-1)
    return words, {
        "bad_i": _count(~jnp.isfinite(w_i)),
        "bad_j": _count(~jnp.isfinite(w_j)),
        "large": _count(exponent > HIGHEST),
        "similar": _count(merged.mask_i & merged.mask_j),
        "low": _count((exponent < LOWEST) & (merged.mag != 0)),
        "covered": covered,
        "error": error,
        "squares": squares,
    }


def _count(flags: Array) -> Array:
    return jnp.sum(flags, axis=-1, dtype=jnp.int32)


def _slot_norms(norms: ArrayLike, slots: np.ndarray, by_magnitude: np.ndarray) -> Float[Array, "s 2 k"]:
    chosen = np.array(norms, np.float32)[slots]
    chosen[by_magnitude] = 1.0
    return jnp.asarray(chosen)


def _check_counts(where: str, counts: dict[str, np.ndarray], slots: np.ndarray) -> None:
    bad = {
        int(expert): int(count)
        for side, key in enumerate(("bad_i", "bad_j"))
        for expert, count in zip(slots[:, side], counts[key].sum(axis=-1))
        if count
    }
    if bad:
        raise ValueError(f"{where}: weights must be finite, got {sum(bad.values())} that are not, by expert {bad}")
    large = {
        tuple(sorted(set(slots[index].tolist()))): int(count)
        for index, count in enumerate(counts["large"].sum(axis=-1))
        if count
    }
    if large:
        raise ValueError(
            f"{where}: packed magnitudes must be below 2^17 (biased exponent at most {HIGHEST}), "
            f"got {sum(large.values())} that are not, by experts {large}"
        )


def _dense(where: str, w: ArrayLike, rest: np.ndarray) -> Float[Array, "r k m"]:
    kept = jnp.asarray(w[rest]).astype(jnp.bfloat16)
    bad = {int(e): int(count) for e, count in zip(rest, jnp.sum(~jnp.isfinite(kept), axis=(1, 2))) if count}
    if bad:
        raise ValueError(f"{where}: weights must be finite, got {sum(bad.values())} that are not, by expert {bad}")
    return kept


def _report(
    where: str,
    counted: Sequence[dict[str, Any]],
    num_pairs: int,
    weak: np.ndarray,
    by_magnitude: np.ndarray,
    cfg: PuzzleConfig,
) -> LayerReport:
    def share(key: str, of: int) -> np.ndarray:
        return np.array([matrix[key] / (of * num_pairs * matrix["size"]) for matrix in counted])

    similar, underflow = share("similar", 1), share("low", 1)
    squares = np.array([matrix["squares"] for matrix in counted])
    errors = np.array([matrix["error"] for matrix in counted])
    said = []
    starved = sorted(set(by_magnitude.reshape(-1).tolist()) & set(weak.tolist()))
    if starved:
        said.append(
            f"{where}experts {starved} saw fewer than {cfg.min_tokens} calibration tokens; "
            f"pairs {by_magnitude.tolist()} are merged by magnitude"
        )
    if (underflow > _UNDERFLOW_LIMIT).any():
        shares = ", ".join(f"{name} {value:.2%}" for name, value in zip(MATRICES, underflow))
        said.append(f"{where}merged values below 2^-15 do not keep their magnitude in packed words: {shares}")
    return LayerReport(
        mask_density=(1 + similar) / 2,
        sim_fraction=similar,
        rel_mse=np.divide(errors, squares, out=np.zeros_like(errors), where=squares > 0),
        exponent_coverage=share("covered", 2),
        underflow=underflow,
        warnings=tuple(said),
    )


def unpack_experts(
    packed: PackedExperts,
) -> tuple[Float[Array, "n d f"], Float[Array, "n d f"], Float[Array, "n f d"]]:
    """Gate, up and down of all experts of a layer, decoded to bfloat16."""
    gate, up, down = (
        _decode(
            *(getattr(packed, prefix + name) for prefix in ("", "dense_", "scale_")),
            packed.slot_of,
            packed.pos_of,
            packed.bits,
        )
        for name in MATRICES
    )
    return gate, up, down


@functools.partial(jax.jit, static_argnums=5)
def _decode(words, dense, scales, slot_of, pos_of, bits):
    pairs = words.shape[0]
    own, pos = jnp.minimum(slot_of, pairs - 1), pos_of[:, None, None]
    decoded = unpack(words[own], pos) if scales is None else unpack_codes(words[own], scales[own], pos, bits=bits)
    if dense is None:
        return decoded
    return jnp.where((slot_of < pairs)[:, None, None], decoded, dense[jnp.maximum(slot_of - pairs, 0)])
