"""Packed models on disk: a folder that `jaxlab.models.load_pretrained` opens by path.

`config.json` is the Hugging Face one of the model (where its family can say it) with `jaxlab_format: "puzzlemoe"` and,
under "puzzlemoe", what a reader needs. Weights are safetensors, under Hugging Face's names but for the experts of layer
n, which are `model.layers.n.puzzlemoe.{gate,up,down,slot_of,pos_of,dense_gate,dense_up,dense_down}` (quantised ones
also `scale_{gate,up,down}`) in our layout; or an Orbax checkpoint of the parameter tree. What is loaded is as large as
what was stored.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jaxlab.core import Checkpointer, to_dict
from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.core.untrusted import read_object
from jaxlab.models import load
from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, RopeConfig
from jaxlab.models.decoder.model import abstract_params
from jaxlab.models.decoder.weights import decoder_table, ignorable
from jaxlab.models.load import Leaf, Part
from jaxlab.puzzlemoe.compression import MATRICES, PackedExperts
from jaxlab.puzzlemoe.config import check_name
from jaxlab.puzzlemoe.packed_moe import PackedPolicy
from jaxlab.puzzlemoe.quantized_experts import BITS
from jaxlab.puzzlemoe.whole_model import CompressionReport, is_packed, policy_of

FORMAT = "puzzlemoe"
"""`jaxlab_format` in `config.json`."""
FORMATS = ("safetensors", "orbax")
REPORT = "compression_report.json"
_CHECKPOINT = "checkpoint"
_VERSION = 1
_SHARD_BYTES = 5_000_000_000
_FIELDS = tuple(field.name for field in dataclasses.fields(PackedExperts))


def save_packed(
    path: str | os.PathLike[str],
    model: Any,
    params: Any,
    report: CompressionReport | None = None,
    *,
    format: str = "safetensors",
) -> None:
    """Writes a packed model as a folder, which appears by one rename when all of it is written.

    Args:
        path: the folder; an existing one is replaced if it holds a packed model.
        model: of `compress_moe`.
        params: its parameters.
        report: of `compress_moe`, kept beside the weights.
        format: "safetensors" or "orbax"; a folder has one of them.

    Raises:
        ValueError: the model is not packed, or the format is unknown.
        FileExistsError: the folder holds something else.
    """
    check_name("format", format, FORMATS)
    if not isinstance(model, Decoder) or not is_packed(params):
        raise ValueError("model must have packed experts, as compress_moe gives it")
    params = nn.meta.unbox(params)
    flat = _flat(params)
    others = [leaf.dtype for name, leaf in flat.items() if "/mlp/experts/" not in name]
    dtype = jnp.result_type(*others).name
    first = next(tree["mlp"]["experts"] for tree in params.values() if "experts" in tree.get("mlp", {}))
    policy = policy_of(jax.tree.map(lambda leaf: leaf[0], first))
    config = dataclasses.replace(model.config, param_dtype=dtype)
    with new_folder(path) as partial:
        write_config(partial, _hugging_face(config), config, policy, format)
        write_report(partial, report)
        if format == "orbax":
            cast = {name: leaf if "/mlp/experts/" in name else leaf.astype(dtype) for name, leaf in flat.items()}
            Checkpointer(partial / _CHECKPOINT).save(0, cast)
            return
        shards = Shards(partial)
        for leaf in _table(config, flat):
            values = np.asarray(flat[leaf.path])
            for part in leaf.parts:
                shards.add(part.name, leaf.theirs(values[part.index]))
        shards.close()


def load_packed(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] = DEFAULT_RULES,
    mlp: Callable[[DecoderConfig, bool], nn.Module] | None = None,
    **config_overrides: Any,
) -> tuple[Any, Any]:
    """Opens a folder of `save_packed` or `compress_checkpoint`; `load_pretrained` comes here, too.

    Words stay words (codes codes) and unmerged experts bfloat16, whatever `dtype` is.

    Args:
        path: the folder.
        dtype: of the computation and of all other parameters; None = as stored.
        mesh: places parameters by `rules`; None = the default device.
        rules: logical axis -> mesh axis.
        mlp: makes the MLP of a layer, over these parameters; None = `PackedMoE`.
        **config_overrides: fields of `DecoderConfig` to replace.

    Raises:
        FileNotFoundError: no such folder, or files of it are absent.
        ValueError: not a packed model, a damaged file, wrong shapes, an unknown configuration field.
        KeyError: missing or unexpected weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"packed model: {folder} is no folder")
    config, stored, policy, weights = _read_config(folder)
    changes: dict[str, Any] = ({} if dtype is None else {"dtype": dtype, "param_dtype": dtype}) | config_overrides
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(config)})
    if unknown:
        raise ValueError(f"unknown configuration fields {unknown}")
    config = dataclasses.replace(config, **changes)
    boxed = abstract_params(Decoder(config, mlp=policy))
    abstract = _flat(nn.meta.unbox(boxed))
    places = _flat(shardings(boxed, mesh, rules)) if mesh is not None else {}
    read = _read_checkpoint if weights == "orbax" else _read_safetensors
    flat = read(folder, config, stored, abstract, places)
    return Decoder(config, mlp=mlp or policy), _unflat(flat)


def _read_safetensors(
    folder: Path, config: DecoderConfig, stored: str, abstract: Mapping[str, Any], places: Mapping[str, Any]
) -> dict[str, Any]:
    with load.open_tensors(folder) as tensors:
        table = _table(config, abstract)
        load.check(tensors, table, lambda name: ignorable(config, name))
        for leaf in table:
            kind = tensors.dtype(leaf.parts[0].name)
            if "/mlp/experts/" in leaf.path and kind != abstract[leaf.path].dtype:
                raise ValueError(f"{folder}: {leaf.parts[0].name} must be {abstract[leaf.path].dtype}, got {kind}")
        return {leaf.path: load.fill(tensors, leaf, abstract[leaf.path].dtype, places.get(leaf.path)) for leaf in table}


def _read_checkpoint(
    folder: Path, config: DecoderConfig, stored: str, abstract: Mapping[str, Any], places: Mapping[str, Any]
) -> dict[str, Any]:
    like = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if "/mlp/experts/" in name else jnp.dtype(stored), sharding=places.get(name)
        )
        for name, leaf in abstract.items()
    }
    restored, _ = Checkpointer(folder / _CHECKPOINT).restore(like, 0)
    return {name: leaf.astype(abstract[name].dtype) for name, leaf in restored.items()}


def write_config(
    folder: Path, hf: Mapping[str, Any], config: DecoderConfig, policy: PackedPolicy, weights: str
) -> None:
    """Writes `config.json`: `hf`, and what `load_packed` reads."""
    packed = {
        "version": _VERSION,
        "weights": weights,
        "num_pairs": policy.num_pairs,
        "unmerged": policy.unmerged,
        "bits": policy.bits,
        "group_size": policy.group_size,
        "decoder": to_dict(config),
    }
    content = {**hf, "torch_dtype": config.param_dtype, "jaxlab_format": FORMAT, "puzzlemoe": packed}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_report(folder: Path, report: CompressionReport | None) -> None:
    """Keeps a report beside the weights."""
    if report is not None:
        (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _hugging_face(config: DecoderConfig) -> dict[str, Any]:
    try:
        return config.to_hf()
    except (ValueError, NotImplementedError):  # no family has such a model; "decoder" says it all
        return {"model_type": config.model_type}


def _read_config(folder: Path) -> tuple[DecoderConfig, str, PackedPolicy, str]:
    """The decoder, the dtype of its stored parameters, how its experts are packed, the format of the weights."""
    file = folder / "config.json"
    content = read_object(file)
    if content.get("jaxlab_format") != FORMAT:
        raise ValueError(f"{folder} holds no packed model: config.json has no jaxlab_format {FORMAT!r}")
    try:
        packed = content["puzzlemoe"]
        if packed["version"] != _VERSION:
            raise ValueError(f"version {packed['version']}, expected {_VERSION}")
        check_name("weights", packed["weights"], FORMATS)
        fields = _tuples(packed["decoder"])
        fields |= {"rope": RopeConfig(**_tuples(fields["rope"])), "moe": MoESpec(**_tuples(fields["moe"]))}
        config = DecoderConfig(**fields)
        if packed["bits"] not in BITS:
            raise ValueError(f"bits {packed['bits']}, expected one of {BITS}")
        forms = {name: packed[name] for name in ("bits", "group_size")}
        pairs, experts = packed["num_pairs"], 0 if config.moe is None else config.moe.num_experts
        if not all(type(number) is int for number in (pairs, forms["group_size"])) or forms["group_size"] < 1:
            raise ValueError(f"num_pairs and group_size {pairs!r}, {forms['group_size']!r}, expected whole numbers")
        if not 0 <= 2 * pairs <= experts:
            raise ValueError(f"num_pairs {pairs}, expected at most half of {experts} experts")
        policy = PackedPolicy(pairs, packed["unmerged"], **forms)
        return config, config.param_dtype, policy, packed["weights"]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} does not describe a packed model: {error!r}") from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config, whose tuples JSON has made lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Paths of all arrays, those of packed experts among them: `blocks_0/mlp/experts/gate`."""
    flat = {}
    for name, leaf in load.flatten(tree).items():
        if isinstance(leaf, PackedExperts):
            fields = {field: getattr(leaf, field) for field in _FIELDS}
            flat |= {f"{name}/{field}": value for field, value in fields.items() if value is not None}
        else:
            flat[name] = leaf
    return flat


def _unflat(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flat`."""
    tree = load.nest(flat)
    for name, block in tree.items():
        if name.startswith("blocks_") and "experts" in block["mlp"]:
            block["mlp"]["experts"] = PackedExperts(**block["mlp"]["experts"])
    return tree


def expert_leaf(config: DecoderConfig, leaf: Leaf) -> bool:
    """Whether a leaf of `decoder_table` is one of the three stacks of a layer's experts."""
    return len(leaf.parts[0].index) == 2 and leaf.path.split("/")[-1] in MATRICES


def expert_name(layer: int, field: str) -> str:
    """On-disk name of a field of a layer's `PackedExperts`."""
    return f"model.layers.{layer}.puzzlemoe.{field}"


def _table(config: DecoderConfig, shapes: Mapping[str, Any], stored: Container[str] = ()) -> list[Leaf]:
    """The key table of a packed model; `shapes` are the arrays of its tree by path."""
    table = [leaf for leaf in decoder_table(config, stored) if not expert_leaf(config, leaf)]
    for index, run in enumerate(config.layer_runs()):
        for field in _FIELDS if run.sparse else ():
            path = f"blocks_{index}/mlp/experts/{field}"
            if path not in shapes:
                continue
            shape = tuple(shapes[path].shape)
            parts = tuple(Part(expert_name(layer, field), (layer - run.start,)) for layer in range(run.start, run.stop))
            table.append(Leaf(path, shape, parts, shape[1:]))
    return table


class Shards:
    """Writes tensors into safetensors files of bounded size, as they come.

    Args:
        folder: where `model.safetensors`, or several files and an index, will lie.
        limit: bytes of one file; what is waiting is held in memory.
    """

    def __init__(self, folder: Path, limit: int = _SHARD_BYTES):
        self._folder, self._limit = folder, limit
        self._pending: dict[str, np.ndarray] = {}
        self._written: list[list[str]] = []
        self.bytes = 0

    def add(self, name: str, value: np.ndarray) -> None:
        """Takes one tensor."""
        value = np.ascontiguousarray(value)
        if self._pending and sum(v.nbytes for v in self._pending.values()) + value.nbytes > self._limit:
            self.flush()
        self._pending[name] = value
        self.bytes += value.nbytes

    def flush(self) -> None:
        """Writes what is waiting as one file."""
        from safetensors.numpy import save_file

        if self._pending:
            self._written.append(list(self._pending))
            save_file(self._pending, str(self._folder / f"{len(self._written)}.part"), metadata={"format": "pt"})
            self._pending = {}

    def close(self) -> None:
        """Writes the rest, and gives the files their names."""
        self.flush()
        count = len(self._written)
        if count == 1:
            (self._folder / "1.part").rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._written, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / f"{number}.part").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `path` at the end; after an error nothing is left of it.

    Raises:
        FileExistsError: `path` holds something that is not a packed model.
    """
    folder = Path(path)
    if folder.exists() and not replaceable(folder):
        raise FileExistsError(f"{folder} exists and is no packed model")
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        old = folder.parent / f".{folder.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replaceable(folder: Path) -> bool:
    """Whether a path holds nothing, or a packed model."""
    if not folder.is_dir():
        return not folder.exists()
    if not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("jaxlab_format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False
