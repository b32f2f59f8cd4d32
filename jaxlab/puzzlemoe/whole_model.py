"""Whole decoders, compressed in memory and decoded again."""

import dataclasses
import math
import operator
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxlab.core.untrusted import read_object
from jaxlab.models import load_pretrained
from jaxlab.models.decoder import DecoderConfig, default_mlp
from jaxlab.models.sources import find_model
from jaxlab.puzzlemoe.calibration import check_config, check_moe
from jaxlab.puzzlemoe.compression import MATRICES, LayerReport, PackedExperts, compress_layer, unpack_experts
from jaxlab.puzzlemoe.config import PuzzleConfig, num_pairs
from jaxlab.puzzlemoe.layer import MoELayer
from jaxlab.puzzlemoe.packed_moe import PackedPolicy
from jaxlab.puzzlemoe.pairing import random_pairs, search_pairs
from jaxlab.puzzlemoe.quantized_experts import (
    BITS,
    GROUP_SIZE,
    common_group,
    group_of,
    quantize_experts,
    relative_errors,
)
from jaxlab.puzzlemoe.statistics import ExpertStats

ArrayLike = Array | np.ndarray


class Summary(NamedTuple):
    """What is kept of a compressed layer beside its words.

    Attributes:
        figures: of the compression.
        pairs: `[P,2]`.
        bytes_before: of the experts in bfloat16.
        bytes_after: of words, or codes and scales, and unmerged experts.
    """

    figures: LayerReport
    pairs: np.ndarray
    bytes_before: int
    bytes_after: int


# Rows on which a search of pairs judges them.
_SEARCH_ROWS = 512


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What compressing a model did; arrays have a row for each sparse layer, columns gate, up and down.

    Attributes:
        bytes_before: of all weights, experts in bfloat16, the rest as it is stored.
        bytes_after: of all weights, experts as they are stored.
        expert_bytes_before: of the routed experts in bfloat16.
        expert_bytes_after: words, or codes and scales, and unmerged experts (bfloat16, or in slots of their own).
        pairs: `[L,P,2]` experts that share a slot.
        mask_density: `[L,3]` share of the weights of paired experts that are not masked.
        sim_fraction: `[L,3]` share of their positions where both use the mean.
        rel_mse: `[L,3]` squared error of their decoded weights over their squared sum.
        exponent_coverage: `[L,3]` share of their weights whose bfloat16 exponent a word can hold.
        warnings: sentences for the user.
    """

    bytes_before: int
    bytes_after: int
    expert_bytes_before: int
    expert_bytes_after: int
    pairs: np.ndarray
    mask_density: np.ndarray
    sim_fraction: np.ndarray
    rel_mse: np.ndarray
    exponent_coverage: np.ndarray
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return plain | {"warnings": list(self.warnings)}


def load_hf_moe(path: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[Any, Any]:
    """`jaxlab.models.load_pretrained` of a model that has experts.

    Raises:
        ValueError: it has none; else as `load_pretrained`.
    """
    folder = find_model(path)
    if folder.is_dir():  # before a weight is read
        hf = read_object(folder / "config.json")
        if "jaxlab_format" not in hf:
            check_config(DecoderConfig.from_hf(hf))
    model, params = load_pretrained(folder, dtype=dtype)
    check_config(getattr(model, "config", None))
    return model, params


def compress_moe(
    model: Any,
    params: Any,
    stats: ExpertStats | None,
    cfg: PuzzleConfig,
    *,
    pairs: Integer[ArrayLike, "*l p 2"] | None = None,
) -> tuple[Any, Any, CompressionReport]:
    """Pairs, merges and packs the experts of every sparse layer (arXiv:2511.04805); everything else stays as it is.

    Args:
        model: a `Decoder` with experts.
        params: its parameters.
        stats: of `collect_expert_stats`; None = saliency by magnitude.
        cfg: how. With pairing "search" pairs are judged on Gaussian inputs whose channels have the calibrated scale;
            for real inputs, give `search_pairs` those and its result as `pairs`.
        pairs: `[P,2]` for all layers or `[L,P,2]`, in place of those of `cfg`.

    Returns:
        The model with packed layers, its parameters, and a report, whose warnings are also issued.

    Raises:
        ValueError: no experts, packed already, statistics of another model, bad pairs, weights that are not finite or
            too large (the message names layer, matrix and experts).
        TypeError: weights of integers or of 8 bits.
    """
    check_moe(model, params)
    planner = Planner(model.config, stats, cfg, pairs)
    summaries: list[Summary] = []
    new = dict(params)
    for index, run in enumerate(model.config.layer_runs()):
        if not run.sparse:
            continue
        name = f"blocks_{index}"
        mlp = params[name]["mlp"]
        layers = []
        for at in range(run.stop - run.start):
            matrices = (mlp[matrix][at] for matrix in MATRICES)
            packed, summary = planner.compress(len(summaries), mlp["router"]["kernel"][at], *matrices)
            layers.append(packed)
            summaries.append(summary)
        kept = {key: leaf for key, leaf in mlp.items() if key not in MATRICES}
        experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        new[name] = {**params[name], "mlp": {**kept, "experts": experts}}
    report = make_report(summaries, other_bytes=_other_bytes(new))
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return model.clone(mlp=planner.policy), new, report


def unpack_moe(model: Any, params: Any) -> tuple[Any, Any]:
    """The ordinary decoder with the decoded weights, in the model's parameter dtype.

    Raises:
        ValueError: the model is not packed.
    """
    if not is_packed(params):
        raise ValueError("the model has no packed experts to decode")
    dtype = jnp.dtype(model.config.param_dtype)
    new = dict(params)
    for name, tree in params.items():
        if not (name.startswith("blocks_") and "experts" in tree["mlp"]):
            continue
        mlp = dict(tree["mlp"])
        stacked = mlp.pop("experts")
        layers = [
            unpack_experts(jax.tree.map(operator.itemgetter(at), stacked)) for at in range(stacked.slot_of.shape[0])
        ]
        matrices = (jnp.stack([matrix.astype(dtype) for matrix in of_layers]) for of_layers in zip(*layers))
        new[name] = {**tree, "mlp": {**mlp, **dict(zip(MATRICES, matrices))}}
    return model.clone(mlp=default_mlp), new


def quantize_moe(model: Any, params: Any, *, bits: int = 8, group_size: int = GROUP_SIZE) -> tuple[Any, Any]:
    """A packed decoder with its pairs in 8 or 6 bits a position: `quantize_experts` of every layer.

    Args:
        model: of `compress_moe` or `load_packed`.
        params: its parameters.
        bits: of a position, 8 or 6.
        group_size: inputs that share a scale; see `quantize_experts`.

    Raises:
        ValueError: the model is not packed, or quantised already; as `quantize_experts`.
    """
    if not is_packed(params):
        raise ValueError("the model has no packed experts to quantise")
    new, policy = dict(params), model.mlp
    for name, tree in params.items():
        if name.startswith("blocks_") and "experts" in tree["mlp"]:
            experts = quantize_experts(tree["mlp"]["experts"], bits=bits, group_size=group_size)
            new[name] = {**tree, "mlp": {**tree["mlp"], "experts": experts}}
            policy = policy_of(jax.tree.map(operator.itemgetter(0), experts))
    policy = dataclasses.replace(policy, implementation=getattr(model.mlp, "implementation", None))
    return model.clone(mlp=policy), new


class Planner:
    """Compresses one sparse layer after the other; in memory and streaming alike, so that both give the same words.

    `policy` is the MLP protocol that runs the result.

    Args:
        config: of the decoder.
        stats: of all its sparse layers, None, or a list that grows while layers are calibrated.
        cfg: how.
        pairs: in place of those of `cfg`.
        bits: of a position, 16, 8 or 6.

    Raises:
        ValueError: an unknown number of bits; statistics or pairs of another number of layers; no pair comes out.
    """

    def __init__(
        self,
        config: DecoderConfig,
        stats: ExpertStats | list[ExpertStats] | None,
        cfg: PuzzleConfig,
        pairs: ArrayLike | None,
        bits: int = 16,
    ):
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
        self.layers = check_config(config)
        assert config.moe is not None  # check_config saw it
        self.spec, self.stats, self.cfg = config.moe, stats, cfg
        count = len(self.layers)
        if isinstance(stats, ExpertStats) and (stats.tokens.ndim != 2 or len(stats.tokens) != count):
            raise ValueError(
                f"statistics of another model: tokens have shape {stats.tokens.shape}, expected [{count}, "
                f"{self.spec.num_experts}] for {count} sparse layers"
            )
        self.pairs = None if pairs is None else np.asarray(pairs)
        if self.pairs is not None:
            if self.pairs.ndim not in (2, 3) or (self.pairs.ndim == 3 and len(self.pairs) != count):
                raise ValueError(f"pairs must be [P, 2] or [L={count}, P, 2], got shape {self.pairs.shape}")
            self.pairs = np.broadcast_to(self.pairs, (count, *self.pairs.shape[-2:]))
        paired = num_pairs(self.spec.num_experts, cfg.ratio) if self.pairs is None else self.pairs.shape[1]
        unmerged = cfg.unmerged if self.spec.num_experts > 2 * paired else "bf16"
        widths = () if bits == 16 else (config.hidden_size, self.spec.ffn_size)
        group_size = math.lcm(*(group_of(width, GROUP_SIZE) for width in widths)) if widths else GROUP_SIZE
        self.policy = PackedPolicy(paired, unmerged, bits=bits, group_size=group_size)

    def compress(
        self, index: int, router: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike
    ) -> tuple[PackedExperts, Summary]:
        """The `index`-th sparse layer."""
        if self.stats is None:
            stats = None
        else:
            stats = self.stats.layer(index) if isinstance(self.stats, ExpertStats) else self.stats[index]
        pairs = self._pairs(index, router, (gate, up, down), stats)
        packed, figures = compress_layer(gate, up, down, stats, pairs, self.cfg, layer=self.layers[index])
        if self.policy.bits != 16:
            packed = quantize_experts(packed, bits=self.policy.bits, group_size=self.policy.group_size)
            errors = relative_errors(packed, dict(zip(MATRICES, (gate, up, down))), pairs)
            figures = dataclasses.replace(figures, rel_mse=errors)
        after = sum(leaf.nbytes for leaf in jax.tree.leaves(dataclasses.replace(packed, slot_of=None, pos_of=None)))
        return packed, Summary(figures, pairs, 2 * (gate.size + up.size + down.size), after)

    def _pairs(
        self, index: int, router: ArrayLike, matrices: Sequence[ArrayLike], stats: ExpertStats | None
    ) -> np.ndarray:
        if self.pairs is not None:
            return self.pairs[index]
        key = jax.random.fold_in(jax.random.key(self.cfg.seed), index)
        if self.cfg.pairing == "random":
            return np.asarray(random_pairs(key, self.spec.num_experts, self.cfg.ratio))
        router, *weights = (jnp.asarray(w).astype(jnp.float32) for w in (router, *matrices))
        layer = MoELayer(router, *weights, top_k=self.spec.top_k, norm_topk_prob=self.spec.renormalise, act="silu")
        return np.asarray(search_pairs(key, layer, _typical_rows(key, router.shape[0], stats), stats, self.cfg))


def _typical_rows(key: Array, width: int, stats: ExpertStats | None) -> Float[Array, "s d"]:
    """Gaussian inputs of a layer, each channel with the root mean square that calibration saw."""
    rows = jax.random.normal(jax.random.fold_in(key, 1), (_SEARCH_ROWS, width))
    if stats is None:
        return rows
    tokens = jnp.maximum(jnp.sum(jnp.asarray(stats.tokens)), 1)
    return rows * jnp.sqrt(jnp.sum(jnp.asarray(stats.sum_sq_in), axis=0) / tokens)


def policy_of(experts: PackedExperts) -> PackedPolicy:
    """The MLP protocol that runs layers like this one."""
    pairs = int(np.sum(np.asarray(experts.pos_of)))  # the slots that have a second member
    group_size = GROUP_SIZE if experts.bits == 16 else common_group(experts)
    unmerged = "packed" if experts.gate.shape[0] > pairs else "bf16"
    return PackedPolicy(pairs, unmerged, bits=experts.bits, group_size=group_size)


def is_packed(params: Any) -> bool:
    """Whether some layer of a decoder's parameters is packed."""
    blocks = (tree for name, tree in params.items() if name.startswith("blocks_"))
    return any("experts" in tree.get("mlp", {}) for tree in blocks)


def _other_bytes(params: Any) -> int:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedExperts))
    return sum(leaf.nbytes for leaf in leaves if not isinstance(leaf, PackedExperts))


def make_report(summaries: Sequence[Summary], *, other_bytes: int) -> CompressionReport:
    """The report over all sparse layers."""
    before, after = (sum(getattr(one, name) for one in summaries) for name in ("bytes_before", "bytes_after"))
    columns = ("mask_density", "sim_fraction", "rel_mse", "exponent_coverage")
    return CompressionReport(
        bytes_before=other_bytes + before,
        bytes_after=other_bytes + after,
        expert_bytes_before=before,
        expert_bytes_after=after,
        pairs=np.stack([one.pairs for one in summaries]),
        **{name: np.stack([getattr(one.figures, name) for one in summaries]) for name in columns},
        warnings=tuple(warning for one in summaries for warning in one.figures.warnings),
    )
