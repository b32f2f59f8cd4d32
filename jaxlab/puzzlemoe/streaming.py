"""A checkpoint compressed from folder to folder, with one layer in memory at a time."""

import dataclasses
import functools
import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from jaxlab import core
from jaxlab.core.untrusted import read_object
from jaxlab.models import load
from jaxlab.models.decoder import Decoder, DecoderConfig
from jaxlab.models.decoder.config import LayerRun
from jaxlab.models.decoder.model import Block
from jaxlab.models.decoder.weights import decoder_table, ignorable
from jaxlab.models.load import Leaf, Tensors
from jaxlab.models.sources import find_model
from jaxlab.puzzlemoe.calibration import Recording, check_config, check_tokens
from jaxlab.puzzlemoe.compression import MATRICES
from jaxlab.puzzlemoe.config import PuzzleConfig
from jaxlab.puzzlemoe.statistics import ExpertStats
from jaxlab.puzzlemoe.storage import (
    Shards,
    expert_name,
    new_folder,
    replaceable,
    write_config,
    write_report,
)
from jaxlab.puzzlemoe.whole_model import CompressionReport, Planner, Summary, make_report
from pallas_kernels.flash_attention import flash_attention

ArrayLike = Array | np.ndarray

# Calibration tokens that go through a layer at a time.
_TOKENS = 1 << 11
# Files of a model folder that are not weights.
_COPIED = ("generation_config.json", "*token*", "*.jinja", "vocab.json", "merges.txt")


def compress_checkpoint(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    cfg: PuzzleConfig,
    *,
    calib: Integer[ArrayLike, "b t"] | None = None,
    pairs: Integer[ArrayLike, "*l p 2"] | None = None,
    bits: int = 16,
) -> CompressionReport:
    """Compresses a Hugging Face folder into a packed one (arXiv:2511.04805), layer after layer.

    Memory holds the experts of one layer and what becomes of them; with `calib`, before that, the layer in float32, and
    the activations between two layers. Calibration runs the layers as they are, each just before it is compressed: the
    same statistics, and the same words, as `collect_expert_stats` and `compress_moe` give. Everything but the experts
    is copied as it is stored, tokenizer files too.

    Args:
        model_dir: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek-MoE: `config.json` and safetensors.
        out_dir: a folder for `load_packed`; an existing one is replaced if it holds a packed model.
        cfg: how.
        calib: token ids; None = saliency by magnitude.
        pairs: `[P,2]` or `[L,P,2]`, in place of those of `cfg`.
        bits: of a position: 16 packs words, 8 and 6 quantise them (`quantize_experts`, groups of 128 inputs); the
            report's errors and bytes are then those of the quantised experts.

    Returns:
        The report, which is also kept in the folder; its warnings are issued.

    Raises:
        FileNotFoundError: no such folder.
        FileExistsError: `out_dir` holds something else.
        ValueError: no experts, packed already, an unknown number of bits, and as `compress_moe`.
        KeyError: missing or unexpected weights, by their names on disk.
    """
    source = find_model(model_dir)
    if not source.is_dir():
        raise ValueError(f"model_dir must be a folder with config.json and safetensors, got {source}")
    hf = read_object(source / "config.json")
    if "jaxlab_format" in hf:
        raise ValueError(f"{source} is packed already (jaxlab_format {hf['jaxlab_format']!r})")
    config = DecoderConfig.from_hf(hf)
    check_config(config)
    if not replaceable(Path(out_dir)):
        raise FileExistsError(f"{out_dir} exists and is no packed model")
    ids = None if calib is None else check_tokens(calib, config)
    stats: list[ExpertStats] | None = None if ids is None else []
    planner = Planner(config, stats, cfg, pairs, bits)
    summaries: list[Summary] = []
    with load.open_tensors(source) as tensors:
        table = decoder_table(config, tensors)
        load.check(tensors, table, lambda name: ignorable(config, name))
        hidden = None if ids is None else _embedded(tensors, table, ids)
    with new_folder(out_dir) as partial:
        shards, others = Shards(partial), _Copies(table, decoder_table(config))
        for layer, index, run in core.progress(list(_layers(config)), "layers"):
            block = _one_layer(table, index, layer - run.start)
            # Opened anew, so that what was read of the files before does not stay mapped.
            with load.open_tensors(source) as tensors:
                if hidden is not None:
                    hidden, seen = _through_layer(config, run, _float32(tensors, block), hidden)
                    if seen is not None and stats is not None:
                        stats.append(seen)
                    gc.collect()  # JAX lets go of host memory that it took over at a collection, not before
                if run.sparse:
                    words, summary = planner.compress(len(summaries), *_stored(tensors, block))
                    summaries.append(summary)
                    for field in dataclasses.fields(words):
                        if (value := getattr(words, field.name)) is not None:
                            shards.add(expert_name(layer, field.name), np.asarray(value))
                    del words
                    gc.collect()
                others.copy(tensors, block, shards)
            shards.flush()
        with load.open_tensors(source) as tensors:
            others.copy(tensors, [leaf for leaf in table if not leaf.path.startswith("blocks_")], shards)
        shards.close()
        report = make_report(summaries, other_bytes=others.bytes)
        dtype = jnp.result_type(*others.dtypes).name
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
        write_config(partial, hf, config, planner.policy, "safetensors")
        write_report(partial, report)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                shutil.copy(file, partial / file.name)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    return report


def _layers(config: DecoderConfig) -> Iterator[tuple[int, str, LayerRun]]:
    """Every layer: its number, the name of its run in the parameter tree, the run."""
    for index, run in enumerate(config.layer_runs()):
        for layer in range(run.start, run.stop):
            yield layer, f"blocks_{index}", run


def _one_layer(table: list[Leaf], block: str, at: int) -> list[Leaf]:
    """The leaves of one layer of a run, without the axis of layers; paths are inside the block."""
    leaves = []
    for leaf in table:
        if not leaf.path.startswith(f"{block}/"):
            continue
        parts = tuple(dataclasses.replace(part, index=part.index[1:]) for part in leaf.parts if part.index[0] == at)
        path = leaf.path.removeprefix(f"{block}/")
        leaves.append(dataclasses.replace(leaf, path=path, shape=leaf.shape[1:], parts=parts))
    return leaves


def _float32(tensors: Tensors, block: list[Leaf]) -> dict[str, Any]:
    """The parameters of one layer for calibration."""
    return load.nest({leaf.path: load.fill(tensors, leaf, "float32") for leaf in block})


def _stored(tensors: Tensors, block: list[Leaf]) -> tuple[Array, Array, Array, Array]:
    """Router, gate, up and down of one layer as they are stored."""
    leaves = {leaf.path: leaf for leaf in block}
    router, gate, up, down = (
        load.fill(tensors, leaf, tensors.dtype(leaf.parts[0].name))
        for leaf in (leaves[f"mlp/{name}"] for name in ("router/kernel", *MATRICES))
    )
    return router, gate, up, down


class _Copies:
    """Copies what is no expert into the new folder as it is stored, under the names that the new folder's table has.

    Args:
        table: of the source.
        names: the table of a folder whose experts are not fused (fused ones may come with another router's name).
    """

    def __init__(self, table: list[Leaf], names: list[Leaf]):
        self._names = {
            part.name: wanted.name for leaf, ours in zip(table, names) for part, wanted in zip(leaf.parts, ours.parts)
        }
        self.bytes = 0
        self.dtypes: set[np.dtype] = set()

    def copy(self, tensors: Tensors, leaves: list[Leaf], shards: Shards) -> None:
        """Copies the tensors of these leaves; experts are passed over."""
        for leaf in leaves:
            for part in leaf.parts:
                if part.index:
                    continue
                value = tensors[part.name]
                self.bytes += value.nbytes
                self.dtypes.add(value.dtype)
                shards.add(self._names[part.name], value)


def _embedded(tensors: Tensors, table: list[Leaf], ids: Array) -> list[Array]:
    """The residual stream before the first layer, in groups of rows."""
    leaf = next(leaf for leaf in table if leaf.path == "embed/embedding")
    embedding = load.fill(tensors, leaf, "float32")
    rows = max(1, _TOKENS // ids.shape[1])
    return [embedding[ids[start : start + rows]] for start in range(0, len(ids), rows)]


def _through_layer(
    config: DecoderConfig, run: LayerRun, params: Any, hidden: list[Array]
) -> tuple[list[Array], ExpertStats | None]:
    """The residual stream behind a layer, and the statistics of its experts, if it has any."""
    after, total = [], None
    for x in hidden:
        x, seen = _block(config, run.sparse, run.window, params, x)
        after.append(jax.block_until_ready(x))  # programs side by side would each hold their activations
        total = seen if total is None or seen is None else total + seen
    return after, total


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block(config: DecoderConfig, sparse: bool, window: int | None, params: Any, x: Array) -> tuple[Array, Any]:
    batch, length, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    cos, sin = _rope(config, positions)

    def attend(q, k, v):
        return flash_attention(q, k, v, scale=q.shape[-1] ** -0.5, window=window), None

    block: Any = Block(config, sparse, Recording(), parent=None)
    y, _, seen = block.apply({"params": params}, x, cos, sin, attend)
    return y, seen


def _rope(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """The decoder's rotary tables."""
    tables: Any = Decoder(config).apply({}, positions, method="_rope")
    return tables
