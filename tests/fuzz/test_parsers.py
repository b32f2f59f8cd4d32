"""Every parser of a file that a stranger may have written: whatever it holds, a valid object or a documented error.

Three tables, by what is changed: the bytes of a file, what its packing hides (a mutated zip is seldom a zip), or the
values of a JSON document.
"""

import dataclasses
import functools
import gzip
import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import bounded, changed, edits, fuzz, json_of, npy, text_of, zipped

REFUSED = (ValueError, NotImplementedError, FileNotFoundError)
"""What readers say of a file that they do not take; ImportErrors of extras are told as such by a skip."""


class Format(NamedTuple):
    """A file to change: its name in its folder, the content, the reader of its path, what that may raise."""

    name: str
    content: Callable[[], Any]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = REFUSED
    beside: Callable[[Path], None] = lambda folder: None


@pytest.fixture
def folder(tmp_path, unchecked, monkeypatch):
    """Where files are written; what transformers would read is not ours, and takes seconds to import."""

    def others(folder, **options):
        raise NotImplementedError

    monkeypatch.setattr("jaxlab.models.tokenizer._by_transformers", others)
    return tmp_path


# -- what files hold ---------------------------------------------------------------------------------------------------


@functools.cache
def _scene():
    from tests.flexgaussian.scenes import random_scene

    return random_scene(count=12, degree=1)


def _ply():
    from jaxlab.flexgaussian.formats import ply

    return ply.write(_scene())


def _splat():
    from jaxlab.flexgaussian.formats import splat

    return splat.write(dataclasses.replace(_scene(), shN=_scene().shN[:, :0]))


def _spz():
    from jaxlab.flexgaussian.formats import spz

    return gzip.decompress(spz.write(_scene()))


def _compressed_ply():
    sides = [f"{side}_{kind}{axis}" for kind in ("", "scale_") for side in ("min", "max") for axis in "xyz"]
    lines = ["ply", "format binary_little_endian 1.0", "element chunk 1", *(f"property float {p}" for p in sides)]
    lines += ["element vertex 2", *(f"property uint packed_{p}" for p in ("position", "rotation", "scale", "color"))]
    lines += ["element sh 2", *(f"property uchar f_rest_{i}" for i in range(9)), "end_header", ""]
    words = np.uint32([[0, 0x20080200, 0, 0x80FF00FF], [0xFFFFFFFF, 0xE0080200, 0xFFFFFFFF, 0x00000080]])
    bounds = np.float32([-1, -2, -3, 1, 2, 3, -8, -8, -8, -4, -4, -4])
    return "\n".join(lines).encode() + bounds.tobytes() + words.tobytes() + bytes(range(18))


def _png(width, height, seed=0):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(252, 256, (height, width, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


_SOG = {
    "version": 2,
    "count": 12,
    "means": {"mins": [-1, -1, -1], "maxs": [1.0, 1, 1], "files": ["a.png", "b.png"]},
    "scales": {"codebook": [0.5] * 256, "files": ["a.png"]},
    "quats": {"files": ["b.png"]},
    "sh0": {"codebook": [0.25] * 256, "files": ["a.png"]},
    "shN": {"count": 1, "bands": 1, "codebook": [0.1] * 256, "files": ["c.png", "d.png"]},
}


def _sog_images():
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGBA", (4, 3)).save(buffer, "PNG")
    return {"a.png": _png(4, 3), "b.png": _png(4, 3, 1), "c.png": _png(64 * 3, 1), "d.png": buffer.getvalue()}


@functools.cache
def _jxfg(codec):
    from jaxlab.flexgaussian.compressed import quantize
    from jaxlab.flexgaussian.container import to_bytes

    return to_bytes(quantize(_scene()), codec=codec)


@functools.cache
def _stepped():
    from jaxlab.flexgaussian.container import to_bytes
    from jaxlab.flexgaussian.stepped import quantize_steps

    return to_bytes(quantize_steps(_scene()))


def _load_scene(path):
    from jaxlab.flexgaussian.formats import load_scene

    return load_scene(path)


def _load_compressed(path):
    from jaxlab.flexgaussian.compressed import dequantize
    from jaxlab.flexgaussian.container import load_compressed

    loaded = load_compressed(path)
    return dequantize(loaded) if hasattr(loaded, "codes") else loaded


def _colmap(path):
    from jaxlab.flexgaussian import cameras_from_colmap

    return cameras_from_colmap(path.parent)


_COLMAP_CAMERAS = struct.pack("<Q", 1) + struct.pack("<iiQQ4d", 1, 1, 64, 48, 50.0, 50.0, 32.0, 24.0)
_COLMAP_IMAGES = (
    struct.pack("<Q", 1) + struct.pack("<i7di", 1, 1, 0, 0, 0, 0.0, 0.0, 1.0, 1) + b"a.png\0" + struct.pack("<Q", 0)
)
_COLMAP_LENS = b"# camera\n1 PINHOLE 64 48 50 50 32 24\n"
_COLMAP_TEXT = b"# images\n1 1 0 0 0 0.5 0.25 1 1 a.png\n\n2 1 0 0 0 0.5 0.25 1 1 b.png\n\n"


def _beside(name, content):
    return lambda folder: (folder / name).write_bytes(content) and None


def _safetensors():
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    return save({"a": rng.random((3, 4), np.float32), "b": np.arange(5), "c": np.float16([[1]])})


def _tensors(path):
    from jaxlab.models import load

    with load.open_tensors(path) as tensors:
        for name in tensors:
            tensors.shape(name), tensors.dtype(name), tensors[name], tensors.read(name, (slice(0, 1),))


@functools.cache
def _gguf(kind):
    import tempfile

    from benchmarks.parity import write_gguf
    from tests.models.checkpoints import golden

    made = golden("llama")
    few = {name: value[:64] if value.ndim == 1 else value[:8] for name, value in list(made["weights"].items())[:4]}
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "x.gguf", "llama", made["config"], few, kind)
        return (Path(folder) / "x.gguf").read_bytes()


def _decoder_gguf(path):
    from jaxlab.models.gguf import GgufDecoder, GgufFile, hf_config

    file = GgufFile(path)
    hf_config(file)
    decoder = GgufDecoder(file)
    for name in decoder:
        decoder[name]


@functools.cache
def _tokens_gguf():
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(str(Path(folder) / "x.gguf"), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "x"])
        writer.add_token_types([3, 3, 1, 1, 1, 4])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return (Path(folder) / "x.gguf").read_bytes()


def _tokenizer(path):
    from jaxlab.models import load_tokenizer

    tokenizer = load_tokenizer(path if path.suffix == ".gguf" else path.parent)
    return tokenizer.decode(tokenizer.encode("ab a")), tokenizer.eos_token_id


@functools.cache
def _tokenizer_json():
    import tempfile

    from jaxlab.models import ByteTokenizer

    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save_pretrained(folder)
        return json.loads((Path(folder) / "tokenizer.json").read_text())


def _beside_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(text_of(_tokenizer_json()))


_TOKENIZER_CONFIG = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>", "special": True},
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
}


@functools.cache
def _mmcif():
    from tests.megafold.test_mmcif import ATOMS

    return ATOMS.encode() + _ATOM_ROWS


_ATOM_ROWS = b"""C CA . ALA A 1 1 1 A 1.0 2.0 3.0 1.0 1
C CB A ALA A 1 1 1 A 1.5 2.0 3.0 0.5 1
C CB B ALA A 1 1 1 A 1.6 2.0 3.0 0.5 1
O O . HOH B 3 . 2 B 4.0 5.0 6.0 1.0 1
loop_
_pdbx_poly_seq_scheme.asym_id
_pdbx_poly_seq_scheme.seq_id
_pdbx_poly_seq_scheme.mon_id
A 1 ALA
A 2 GLY
"""


def _parse_mmcif(path):
    pytest.importorskip("gemmi")
    from jaxlab.megafold.data import read_mmcif

    return read_mmcif(path)


_A3M = b">query\nACDEF-\n>hit one\nAC--F-a\n>hit\nacAC\nDEF-\n"


def _a3m(path):
    from jaxlab.megafold.data.a3m import parse_a3m

    return parse_a3m(path.read_text(encoding="utf-8", errors="replace"), file=path).letters()


def _job(path):
    from jaxlab.megafold.data.jobs import read_job

    return read_job(path)


_JOB = {
    "name": "job",
    "modelSeeds": [1, 2],
    "sequences": [
        {"protein": {"id": ["A", "B"], "sequence": "MKV", "modifications": [{"ptmType": "SEP", "ptmPosition": 2}]}},
        {"rna": {"id": "C", "sequence": "ACGU", "modifications": [{"modificationType": "2MG", "basePosition": 1}]}},
        {"ligand": {"id": "D", "ccdCodes": ["ATP"]}},
    ],
    "bondedAtomPairs": [[["A", 1, "CA"], ["D", 1, "PA"]]],
    "dialect": "alphafold3",
    "version": 1,
}


@functools.cache
def _features():
    from jaxlab.megafold.data import featurize
    from jaxlab.megafold.data.jobs import from_sequences

    return featurize(from_sequences({"A": "MKVA"}))


@functools.cache
def _record():
    import tempfile

    from jaxlab.megafold.data.record import write_record

    with tempfile.TemporaryDirectory() as folder:
        manifest = write_record(Path(folder) / "x.npz", _features())
        return manifest, (Path(folder) / "x.npz").read_bytes()


def _read_record(path):
    """With a checksum that fits, as one who writes such a file would give it."""
    from jaxlab.core.untrusted import read_json
    from jaxlab.megafold.data.cache import CacheCorruptionError, FeatureCache
    from jaxlab.megafold.data.record import checksum

    manifest = read_json(path) if path.suffix == ".json" else dict(_record()[0])
    data = path.read_bytes() if path.suffix == ".npz" else _record()[1]
    try:
        manifest["checksum"] = checksum(np.frombuffer(data, np.uint8), manifest["arrays"])
        manifest["key"] = "ab"
    except (TypeError, KeyError, AttributeError):
        pass
    cache = FeatureCache(path.parent / "cache", strict=True)
    (path.parent / "cache" / "ab").mkdir(exist_ok=True)
    (path.parent / "cache" / "ab" / "ab.json").write_bytes(text_of(manifest))
    (path.parent / "cache" / "ab" / "ab.npz").write_bytes(data)
    try:
        return cache._read("ab")
    except CacheCorruptionError:
        return None


_PIE = {
    "000": {
        "image_path": "a.png",
        "original_prompt": "a [cat]",
        "editing_prompt": "a [dog]",
        "editing_instruction": "a dog",
        "editing_type_id": "1",
        "blended_word": "cat dog",
        "mask": [513, 3, 1024, 2],
    }
}


def _beside_pie(folder):
    (folder / "annotation_images").mkdir()
    (folder / "annotation_images" / "a.png").write_bytes(_png(8, 8))


def _pie(path):
    from jaxlab.instantedit import read_pie_bench

    return [edit.mask() for edit in read_pie_bench(path.parent)]


def _inversion_members():
    arrays = {
        "trajectory": np.zeros((3, 2, 2, 4), np.float32),
        "edges": np.zeros((16, 16), bool),
        "num_steps": np.int64(2),
        "mode": np.array("exact"),
        "control_scale": np.float64(0.5),
    }
    return {f"{name}.npy": npy(value) for name, value in arrays.items()}


def _inversion(path):
    from jaxlab.instantedit import Inversion

    return Inversion.load(path)


def _image(path):
    from jaxlab.instantedit.image_io import prepare_image, read_image

    return prepare_image(read_image(path))


def _photo(path):
    from jaxlab.flexgaussian.photos import read_image

    return read_image(path, 4, 3)


def _vlm_image(path):
    from jaxlab.vlm_scaling import images

    images.pixels(path)
    return images.pixels(path.read_bytes()), images.data_url(path)


def _transforms(path):
    from jaxlab.flexgaussian.photos import load_photographs

    return load_photographs(path, 4, 3)


_TRANSFORMS = {
    "camera_angle_x": 0.7,
    "w": 8,
    "h": 8,
    "k1": 0.1,
    "frames": [
        {"file_path": "a.png", "transform_matrix": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1.0, 4], [0, 0, 0, 1]]},
        {"file_path": "./a.png", "fl_x": 5.0, "cx": 4, "transform_matrix": np.eye(4).tolist()},
    ],
}


def _beside_image(folder):
    (folder / "a.png").write_bytes(_png(8, 8))


_YAML = b"""system: foundation
model: &m {vocab_size: 64, hidden_size: 16}
list: [1, 2.5, "x", null]
other: {copy: *m}
name: ${model.vocab_size}
"""


def _system_of(path):
    from jaxlab import recipes

    return recipes.system_of(path)


def _config(path):
    from jaxlab import recipes
    from jaxlab.foundation import recipe

    return recipes.load(recipe.run, path)


def _laptop():
    from jaxlab.core import find_config

    return find_config("configs/foundation/laptop.yaml").read_bytes()


def _jsonl(path):
    from jaxlab.core import jsonl

    return jsonl.read(path)


def _trace(path):
    from jaxlab.voltanallm.sim.traces import Trace, read_lengths

    read_lengths(path)
    return Trace.azure(path)


_TRACE = b"""TIMESTAMP,ContextTokens,GeneratedTokens,num_prefill_tokens,num_decode_tokens
2023-11-16 18:15:46.6805900,374,44,374,44
2023-11-16 18:15:50.9951690,396,109,396,109
"""
_TABLE = (
    b"freq,bs_start,bs_end,coef_bs,coef_tokens,coef_intercept,r_2\n900,1,4,0.1,0.001,5.0,0.9\n990,1,4,0.1,0.1,4,1\n"
)


def _table(path):
    from jaxlab.voltanallm.predictor import LatencyTable

    return LatencyTable.from_csv(path)


_ANSWERS = {"request": 0, "sent_s": 0.5, "piece_s": [0.6, 0.7], "tokens": 2, "error": ""}


def _decoder_config(path):
    from jaxlab.models.decoder import DecoderConfig

    return DecoderConfig.from_hf(path).layer_runs()


def _golden(name):
    from tests.models.checkpoints import golden

    return golden(name)["config"]


def _pretrained(path):
    from jaxlab.models import load_pretrained

    return load_pretrained(path.parent)


def _beside_weights(folder):
    (folder / "model.safetensors").write_bytes(_safetensors())


def _index(path):
    from jaxlab.models import load

    return list(load.open_tensors(path.parent))


def _beside_shard(folder):
    (folder / "shard.safetensors").write_bytes(_safetensors())


def _from_hf(module, kind):
    def read(path):
        import importlib

        cls = getattr(importlib.import_module(f"jaxlab.models.{module}"), kind)
        reader = getattr(cls, "from_hf", None) or cls.from_dict
        return reader(path)

    return read


@functools.cache
def _packed_config():
    import tempfile

    from jaxlab.puzzlemoe.packed_moe import PackedPolicy
    from jaxlab.puzzlemoe.storage import write_config
    from tests.puzzlemoe.decoders import CONFIG

    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), CONFIG.to_hf(), CONFIG, PackedPolicy(2), "safetensors")
        return json.loads((Path(folder) / "config.json").read_text())


def _packed(path):
    from jaxlab.puzzlemoe.storage import _read_config

    return _read_config(path.parent)


def _tasks(name):
    def read(path):
        from jaxlab.vlm_scaling import tasks

        return getattr(tasks, name)(path)

    return read


_MATHVISTA = {
    "1": {
        **{"pid": "1", "question": "How many?", "image": "images/1.png", "answer": "4", "unit": "cm", "precision": 1.0},
        **{"question_type": "multi_choice", "answer_type": "integer", "choices": ["3", "4"], "metadata": {"a": 1}},
    }
}
_MATHVERSE = [
    {
        **{"sample_index": "1", "problem_version": "Text Dominant", "question": "Find x.\nChoices:\nA:1\nB:2"},
        **{"answer": "A", "question_type": "multi-choice", "image": "a.png", "query_cot": "Find x. Choices:\nA:1\nB:2"},
    }
]
_GEOQA = [
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nFind x.\nChoices:\nA:1\nB:2"},
            {"from": "gpt", "value": "It is so. Answer: B"},
        ],
    }
]
_PROMPT_ROW = {"image_path": "a.png", "question": "Find x. Choices:\nA:1\nB:2", "ground_truth": "A"}
_SAMPLES = {"doc_id": 3, "resps": [["a", "b"]], "n_tokens": [1, 2], "logprobs": [-0.5, -1.0]}
_ROLLOUT = {
    **{"task_id": "t", "executor": "e", "seed": 0, "reward": 0.5, "steps": 2, "done": True, "plan": ""},
    **{"actions": ["a"], "observations": ["b", "c"]},
}
_REPORT = {
    "format": 1,
    "system": "xmoe",
    "title": "T",
    "synthetic": False,
    "metrics": {"a": 1.5, "b": "NaN"},
    "tables": [{"title": "t", "columns": ["x"], "rows": [[1]]}],
    "plots": [{"title": "p", "file": "p.png"}],
    "notes": ["n"],
}


def _report(path):
    from jaxlab.core import Report

    return Report.load(path.parent)


def _report_content():
    from jaxlab.core import report

    return _REPORT | {"format": report._FORMAT}


def _lines(read):
    return lambda path: read(path)


def _samples(path):
    from jaxlab.vlm_scaling.adapters import jsonl_samples_in

    return jsonl_samples_in(path)


def _answers(path):
    from jaxlab.voltanallm.load import LoadResult

    return LoadResult.load(path)


def _answers_row():
    from jaxlab.voltanallm.load import Answer

    told = dict.fromkeys((field.name for field in dataclasses.fields(Answer)), 1.0)
    return told | {"piece_s": [0.6, 0.7], "error": ""}


def _rollouts(path):
    from jaxlab.eaglet import RolloutCache

    return RolloutCache(path)


def _rollouts_row():
    from jaxlab.eaglet import Rollout

    told = dict.fromkeys((field.name for field in dataclasses.fields(Rollout)), "")
    return told | {"seed": 0, "reward": 0.5, "done": True, "actions": ["a"], "observations": ["b"]}


def _study(path):
    from jaxlab.vlm_scaling.responses import Responses
    from jaxlab.vlm_scaling.samples import Question

    return Responses(path, [Question("q", "?", "1")], 0)


def _checkpoint(path):
    from jaxlab.core import Checkpointer

    return Checkpointer(path.parents[1]).restore({"w": np.zeros(3, np.float32)}, 0)


def _scheduler(path):
    from jaxlab.instantedit.checkpoint import _check_scheduler

    return _check_scheduler(path.parent)


def _prompt_tokenizer(path):
    from jaxlab.instantedit.tokens import PromptTokenizer

    return PromptTokenizer.from_folder(path.parent).ids("a")


def _beside_merges(folder):
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


_SCHEDULER = {"beta_start": 0.00085, "prediction_type": "epsilon"}
_VOCAB = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "a</w>": 4, "ab": 5}

# -- the tables --------------------------------------------------------------------------------------------------------

BYTES = {
    "ply": Format("a.ply", _ply, _load_scene),
    "compressed ply": Format("a.ply", _compressed_ply, _load_scene),
    "splat": Format("a.splat", _splat, _load_scene),
    "spz": Format("a.spz", _spz, _load_scene),
    "spz, packed": Format("a.spz", lambda: gzip.compress(_spz(), mtime=0), _load_scene),
    "sog": Format("a.sog", lambda: zipped({"meta.json": text_of(_SOG), **_sog_images()}), _load_scene),
    "compressed scene": Format("a.jxfg", lambda: _jxfg("zlib"), _load_compressed),
    "compressed scene, whole steps": Format("a.jxfg", _stepped, _load_compressed),
    "colmap cameras": Format(
        "cameras.bin", lambda: _COLMAP_CAMERAS, _colmap, beside=_beside("images.bin", _COLMAP_IMAGES)
    ),
    "colmap images": Format(
        "images.bin", lambda: _COLMAP_IMAGES, _colmap, beside=_beside("cameras.bin", _COLMAP_CAMERAS)
    ),
    "colmap cameras, text": Format(
        "cameras.txt", lambda: _COLMAP_LENS, _colmap, beside=_beside("images.txt", _COLMAP_TEXT)
    ),
    "colmap images, text": Format(
        "images.txt", lambda: _COLMAP_TEXT, _colmap, beside=_beside("cameras.txt", _COLMAP_LENS)
    ),
    "safetensors": Format("a.safetensors", _safetensors, _tensors),
    "gguf": Format("a.gguf", lambda: _gguf("F32"), _tensors),
    "gguf, quantised": Format("a.gguf", lambda: _gguf("Q4_0"), _decoder_gguf),
    "gguf, tokens": Format("a.gguf", _tokens_gguf, _tokenizer),
    "mmcif": Format("a.cif", _mmcif, _parse_mmcif),
    "mmcif, packed": Format("a.cif.gz", lambda: gzip.compress(_mmcif(), mtime=0), _parse_mmcif),
    "a3m": Format("a.a3m", lambda: _A3M, _a3m),
    "fasta": Format("a.fasta", lambda: b">A\nMKV\n>lig|ligand\nATP,MG\n>R|rna\nACGU\n", _job),
    "feature record": Format("a.npz", lambda: _record()[1], _read_record),
    "inversion": Format("a.npz", lambda: zipped(_inversion_members()), _inversion),
    "image": Format("a.png", lambda: _png(8, 8), _image),
    "photograph": Format("a.png", lambda: _png(8, 8), _photo),
    "image of a question": Format("a.png", lambda: _png(8, 8), _vlm_image),
    "yaml": Format("a.yaml", lambda: _YAML, _system_of),
    "config": Format("a.yaml", _laptop, _config, (*REFUSED, TypeError)),
    "json lines": Format("a.jsonl", lambda: b'{"a": [1, 2.5], "b": "x"}\n[null, true]\n{"torn', _jsonl),
    "trace": Format("a.csv", lambda: _TRACE, _trace),
    "latency table": Format("a.csv", lambda: _TABLE, _table),
    "scheduler": Format("scheduler_config.json", lambda: text_of(_SCHEDULER), _scheduler),
    "merges": Format(
        "merges.txt", lambda: b"#version: 0.2\na b\n", _prompt_tokenizer,
        beside=lambda folder: (folder / "vocab.json").write_bytes(text_of(_VOCAB)) and None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_changed_bytes(folder, name):
    """Flipped bits, cut ends, repeated and inserted bytes, other numbers."""
    form = BYTES[name]
    form.beside(folder)
    content = form.content()
    path = folder / form.name
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form.read(path)  # which also imports what it takes: that is not measured

    def check(changes):
        path.write_bytes(changed(content, changes))
        bounded(lambda: form.read(path), form.errors)

    fuzz(edits(), check)


def _reframed(version, header, streams):
    """The file of these parts, checksums right."""
    entries = header.get("streams") if isinstance(header, dict) else None
    if isinstance(entries, list) and len(entries) == len(streams):
        for place, data in enumerate(streams):
            entry = entries[place]
            if isinstance(entry, list) and len(entry) == 3:
                entries[place] = [
                    entry[0],
                    entry[1],
                    zlib.crc32(data[: entry[1]] if isinstance(entry[1], int) and 0 <= entry[1] < 1 << 40 else data),
                ]
    text = text_of(header)
    return struct.pack("<4sHII", b"JXFG", version, len(text), zlib.crc32(text)) + text + b"".join(streams)


def _parts(content):
    _, version, length, _ = struct.unpack_from("<4sHII", content)
    at = struct.calcsize("<4sHII")
    header = json.loads(content[at : at + length])
    streams, at = [], at + length
    for _, size, _ in header["streams"]:
        streams.append(content[at : at + size])
        at += size
    return version, header, streams


@pytest.mark.parametrize(
    "make", [lambda: _jxfg("zlib"), lambda: _jxfg("none"), _stepped], ids=["zlib", "none", "steps"]
)
def test_compressed_scenes_whose_checksums_fit(folder, make):
    """An enemy knows how to compute them."""
    version, header, streams = _parts(make())
    path = folder / "a.jxfg"
    path.write_bytes(_reframed(version, header, streams))
    _load_compressed(path)

    def check(drawn):
        other, place, changes = drawn
        bodies = list(streams)
        bodies[place] = changed(bodies[place], changes)
        path.write_bytes(_reframed(version, json.loads(json.dumps(other)), bodies))
        bounded(lambda: _load_compressed(path), REFUSED)

    headers = st.one_of(st.just(header), json_of(header))
    fuzz(st.tuples(headers, st.integers(0, len(streams) - 1), st.one_of(st.just([]), edits(2))), check)


HIDDEN: dict[str, tuple[Format, Callable[[bytes], bytes]]] = {
    "spz": (Format("a.spz", _spz, _load_scene), lambda raw: gzip.compress(raw, mtime=0)),
    "mmcif": (Format("a.cif", _mmcif, _parse_mmcif), lambda raw: gzip.compress(raw, mtime=0)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_changed_bytes_under_gzip(folder, name):
    form, pack = HIDDEN[name]
    content = form.content()

    def check(changes):
        path = folder / form.name
        path.write_bytes(pack(changed(content, changes)))
        bounded(lambda: form.read(path), form.errors)

    fuzz(edits(), check)


MEMBERS = {
    "sog": Format("a.sog", lambda: {"meta.json": text_of(_SOG), **_sog_images()}, _load_scene),
    "inversion": Format("a.npz", _inversion_members, _inversion),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_changed_members_of_archives(folder, name, packed):
    form = MEMBERS[name]
    members = form.content()

    def check(drawn):
        member, changes = drawn
        path = folder / form.name
        path.write_bytes(zipped(members | {member: changed(members[member], changes)}, packed=packed))
        bounded(lambda: form.read(path), form.errors)

    fuzz(st.tuples(st.sampled_from(sorted(members)), edits(2)), check)


def _sog_json(path):
    path.with_suffix(".sog").write_bytes(zipped({"meta.json": path.read_bytes(), **_sog_images()}))
    return _load_scene(path.with_suffix(".sog"))


KEYS = (*REFUSED, KeyError)
NO_JSON = (b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b"1" * 10_000, b"[]", b"null", b"3", b'"x"', b"{}")
DOCUMENTS = {
    "sog": Format("meta.json", lambda: _SOG, _sog_json),
    "transforms": Format("transforms.json", lambda: _TRANSFORMS, _transforms, beside=_beside_image),
    "safetensors index": Format(
        "model.safetensors.index.json",
        lambda: {"weight_map": dict.fromkeys("abc", "shard.safetensors")},
        _index,
        beside=_beside_shard,
    ),
    "decoder": Format("config.json", lambda: _golden("llama"), _decoder_config, KEYS),
    "decoder with experts": Format("config.json", lambda: _golden("qwen3-moe"), _decoder_config, KEYS),
    "pretrained": Format("config.json", lambda: _golden("qwen2"), _pretrained, KEYS, _beside_weights),
    "packed experts": Format("config.json", _packed_config, _packed, KEYS, _beside_weights),
    "tokenizer": Format("tokenizer.json", _tokenizer_json, _tokenizer),
    "tokenizer config": Format(
        "tokenizer_config.json", lambda: _TOKENIZER_CONFIG, _tokenizer, beside=_beside_tokenizer
    ),
    "vocabulary": Format("vocab.json", lambda: _VOCAB, _prompt_tokenizer, beside=_beside_merges),
    "scheduler": Format("scheduler_config.json", lambda: _SCHEDULER, _scheduler),
    "job": Format("job.json", lambda: _JOB, _job),
    "feature record": Format("a.json", lambda: _record()[0], _read_record),
    "pie bench": Format("mapping_file.json", lambda: _PIE, _pie, beside=_beside_pie),
    "mathvista": Format("testmini.json", lambda: _MATHVISTA, _tasks("mathvista")),
    "mathverse": Format("testmini.json", lambda: _MATHVERSE, _tasks("mathverse")),
    "geoqa": Format("qa_tuning.json", lambda: _GEOQA, _tasks("geoqa")),
    "report": Format(
        "report.json", _report_content, _report, beside=lambda folder: (folder / "p.png").write_bytes(b"x") and None
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_other_values_in_json(folder, name):
    """Values of other types and sizes, deep ones, absent ones, names that lead out of the folder."""
    form = DOCUMENTS[name]
    form.beside(folder)
    path = folder / form.name
    value = form.content()
    path.write_bytes(text_of(value))
    try:
        form.read(path)
    except KeyError:
        assert form.beside is _beside_weights  # which are others

    def check(other):
        path.write_bytes(other if isinstance(other, bytes) else text_of(other))
        bounded(lambda: form.read(path), form.errors)

    for content in NO_JSON:
        check(content)
    fuzz(json_of(value), check)


LINES = {
    "geoqa": Format("geoqa_test_prompts.jsonl", lambda: _PROMPT_ROW, _tasks("geoqa")),
    "samples": Format("a.jsonl", lambda: _SAMPLES, _samples),
    "answers": Format("a.jsonl", _answers_row, _answers),
    "rollouts": Format("a.jsonl", _rollouts_row, _rollouts),
    "study": Format("a.jsonl", lambda: _study_row(), _study),
}


def _study_row():
    from jaxlab.vlm_scaling.responses import _digest
    from jaxlab.vlm_scaling.samples import Question

    question = Question("q", "?", "1")
    return {
        "question": "q",
        "digest": _digest(question),
        "seed": 0,
        "samples": {"0": ["a", 1, 0.5]},
        "verdicts": {"m": {"a": 1}},
    }


@pytest.mark.parametrize("name", LINES)
def test_other_values_in_json_lines(folder, name):
    form = LINES[name]
    path = folder / form.name
    value = form.content()
    path.write_bytes(text_of(value) + b"\n")
    form.read(path)

    def check(other):
        path.write_bytes((other if isinstance(other, bytes) else text_of(other)) + b"\n")
        bounded(lambda: form.read(path), form.errors)

    for content in NO_JSON:
        check(content)
    fuzz(json_of(value), check)
