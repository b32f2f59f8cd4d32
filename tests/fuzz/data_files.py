"""Files of structures, features and images, each with its reader."""

import functools
import gzip
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.mutations import Format, npy, text_of, zipped
from tests.fuzz.samples import picture, png


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
    (folder / "annotation_images" / "a.png").write_bytes(png(8, 8))


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


BYTES = {
    "mmcif": Format("a.cif", _mmcif, _parse_mmcif),
    "mmcif, packed": Format("a.cif.gz", lambda: gzip.compress(_mmcif(), mtime=0), _parse_mmcif),
    "a3m": Format("a.a3m", lambda: _A3M, _a3m),
    "fasta": Format("a.fasta", lambda: b">A\nMKV\n>lig|ligand\nATP,MG\n>R|rna\nACGU\n", _job),
    "feature record": Format("a.npz", lambda: _record()[1], _read_record),
    "inversion": Format("a.npz", lambda: zipped(_inversion_members()), _inversion),
    "image": Format("a.png", lambda: png(8, 8), _image),
    "photograph": Format("a.png", lambda: png(8, 8), _photo),
    "image of a question": Format("a.png", lambda: png(8, 8), _vlm_image),
    **{
        f"{name}, {kind}": Format(f"a.{kind}", functools.partial(picture, kind), read)
        for kind in ("jpeg", "webp", "gif")
        for name, read in (("image", _image), ("photograph", _photo), ("image of a question", _vlm_image))
    },
}


DOCUMENTS = {
    "job": Format("job.json", lambda: _JOB, _job),
    "feature record": Format("a.json", lambda: _record()[0], _read_record),
    "pie bench": Format("mapping_file.json", lambda: _PIE, _pie, beside=_beside_pie),
}

MEMBERS = {"inversion": Format("a.npz", _inversion_members, _inversion)}
