"""Files of scenes and cameras, changed: a valid object or a documented error."""

import dataclasses
import functools
import gzip
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import (
    CUT,
    Format,
    beside,
    changed,
    edits,
    fuzz_bytes,
    fuzz_files,
    fuzz_json,
    fuzz_members,
    json_of,
    text_of,
    zipped,
)
from tests.fuzz.samples import COLMAP_CAMERAS, COLMAP_IMAGES, TRANSFORMS, png


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


def _spz_4_of(planes):
    """Version 4: the header of version 3, a table of lengths, and every plane packed by itself."""
    zstandard = pytest.importorskip("zstandard")
    header = bytearray(_spz()[:16])
    header[4], header[15] = 4, len(planes)
    packed = [zstandard.compress(plane) for plane in planes]
    table = b"".join(struct.pack("<QQ", len(pack), len(plane)) for pack, plane in zip(packed, planes))
    return bytes(header) + struct.pack("<I12x", 32) + table + b"".join(packed)


def _spz_planes():
    """Positions, alphas, colours, scales, rotations and harmonics."""
    content, at, planes = _spz(), 16, []
    for width in (9, 1, 3, 3, 4, 9):
        planes.append(content[at : at + 12 * width])
        at += 12 * width
    return planes


def _compressed_ply():
    sides = [f"{side}_{kind}{axis}" for kind in ("", "scale_") for side in ("min", "max") for axis in "xyz"]
    lines = ["ply", "format binary_little_endian 1.0", "element chunk 1", *(f"property float {p}" for p in sides)]
    lines += ["element vertex 2", *(f"property uint packed_{p}" for p in ("position", "rotation", "scale", "color"))]
    lines += ["element sh 2", *(f"property uchar f_rest_{i}" for i in range(9)), "end_header", ""]
    words = np.uint32([[0, 0x20080200, 0, 0x80FF00FF], [0xFFFFFFFF, 0xE0080200, 0xFFFFFFFF, 0x00000080]])
    bounds = np.float32([-1, -2, -3, 1, 2, 3, -8, -8, -8, -4, -4, -4])
    return "\n".join(lines).encode() + bounds.tobytes() + words.tobytes() + bytes(range(18))


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
    return {"a.png": png(4, 3), "b.png": png(4, 3, 1), "c.png": png(64 * 3, 1), "d.png": buffer.getvalue()}


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


_COLMAP_LENS = b"# camera\n1 PINHOLE 64 48 50 50 32 24\n"
_COLMAP_TEXT = b"# images\n1 1 0 0 0 0.5 0.25 1 1 a.png\n\n2 1 0 0 0 0.5 0.25 1 1 b.png\n\n"


def _transforms(path):
    from jaxlab.flexgaussian.photos import load_photographs

    return load_photographs(path, 4, 3)


def _beside_image(folder):
    (folder / "a.png").write_bytes(png(8, 8))


def _sog_json(path):
    path.with_suffix(".sog").write_bytes(zipped({"meta.json": path.read_bytes(), **_sog_images()}))
    return _load_scene(path.with_suffix(".sog"))


BYTES = {
    "ply": Format("a.ply", _ply, _load_scene),
    "compressed ply": Format("a.ply", _compressed_ply, _load_scene),
    "splat": Format("a.splat", _splat, _load_scene),
    "spz": Format("a.spz", _spz, _load_scene),
    "spz, version 4": Format("a.spz", lambda: _spz_4_of(_spz_planes()), _load_scene),
    "spz, packed": Format("a.spz", lambda: gzip.compress(_spz(), mtime=0), _load_scene),
    "sog": Format("a.sog", lambda: zipped({"meta.json": text_of(_SOG), **_sog_images()}), _load_scene),
    "compressed scene": Format("a.jxfg", lambda: _jxfg("zlib"), _load_compressed),
    "compressed scene, whole steps": Format("a.jxfg", _stepped, _load_compressed),
    "colmap cameras": Format(
        "cameras.bin", lambda: COLMAP_CAMERAS, _colmap, beside=beside("images.bin", COLMAP_IMAGES)
    ),
    "colmap images": Format("images.bin", lambda: COLMAP_IMAGES, _colmap, beside=beside("cameras.bin", COLMAP_CAMERAS)),
    "colmap cameras, text": Format(
        "cameras.txt", lambda: _COLMAP_LENS, _colmap, beside=beside("images.txt", _COLMAP_TEXT)
    ),
    "colmap images, text": Format(
        "images.txt", lambda: _COLMAP_TEXT, _colmap, beside=beside("cameras.txt", _COLMAP_LENS)
    ),
}


DOCUMENTS = {
    "sog": Format("meta.json", lambda: _SOG, _sog_json),
    "transforms": Format("transforms.json", lambda: TRANSFORMS, _transforms, beside=_beside_image),
}


@pytest.mark.parametrize("name", BYTES)
def test_changed_bytes(folder, name):
    fuzz_bytes(BYTES[name], folder)


@pytest.mark.parametrize("name", ["spz"])
def test_changed_bytes_under_gzip(folder, name):
    fuzz_bytes(BYTES[name], folder, lambda raw: gzip.compress(raw, mtime=0))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_other_values_in_json(folder, name):
    fuzz_json(DOCUMENTS[name], folder)


MEMBERS = {"sog": Format("a.sog", lambda: {"meta.json": text_of(_SOG), **_sog_images()}, _load_scene)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_changed_members_of_archives(folder, name, packed):
    fuzz_members(MEMBERS[name], folder, packed=packed)


def test_changed_planes_under_zstandard(folder):
    """Their lengths are told as they are: too long, too short, of other numbers."""
    planes = _spz_planes()

    def made(drawn):
        place, changes = drawn
        return _spz_4_of([changed(plane, changes) if place == i else plane for i, plane in enumerate(planes)])

    form = Format("a.spz", lambda: planes, _load_scene)
    draws = st.tuples(st.integers(0, len(planes) - 1), edits(2))
    fuzz_files(form, folder, draws, made, _spz_4_of(planes), (0, CUT))


def test_version_4_says_what_version_3_says(folder):
    (folder / "a.spz").write_bytes(_spz_4_of(_spz_planes()))
    (folder / "b.spz").write_bytes(_spz())
    four, three = (dataclasses.asdict(_load_scene(folder / name)) for name in ("a.spz", "b.spz"))
    for name, value in three.items():
        np.testing.assert_array_equal(four[name], value)


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

    def made(drawn):
        other, place, changes = drawn
        bodies = list(streams)
        bodies[place] = changed(bodies[place], changes)
        return _reframed(version, json.loads(json.dumps(other)), bodies)

    form = Format("a.jxfg", make, _load_compressed)
    headers = st.one_of(st.just(header), json_of(header))
    draws = st.tuples(headers, st.integers(0, len(streams) - 1), st.one_of(st.just([]), edits(2)))
    fuzz_files(form, folder, draws, made, _reframed(version, header, streams), (header, 0, CUT))
