"""Files of scenes and cameras, each with its reader."""

import dataclasses
import functools
import gzip
import io
import struct

import numpy as np
import pytest

from tests.fuzz.mutations import (
    Format,
    beside,
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


def spz():
    from jaxlab.flexgaussian.formats import spz

    return gzip.decompress(spz.write(_scene()))


def spz_4_of(planes):
    """Version 4: the header of version 3, a table of lengths, and every plane packed by itself."""
    zstandard = pytest.importorskip("zstandard")
    header = bytearray(spz()[:16])
    header[4], header[15] = 4, len(planes)
    packed = [zstandard.compress(plane) for plane in planes]
    table = b"".join(struct.pack("<QQ", len(pack), len(plane)) for pack, plane in zip(packed, planes))
    return bytes(header) + struct.pack("<I12x", 32) + table + b"".join(packed)


def spz_planes():
    """Positions, alphas, colours, scales, rotations and harmonics."""
    content, at, planes = spz(), 16, []
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
def jxfg(codec):
    from jaxlab.flexgaussian.compressed import quantize
    from jaxlab.flexgaussian.container import to_bytes

    return to_bytes(quantize(_scene()), codec=codec)


@functools.cache
def stepped():
    from jaxlab.flexgaussian.container import to_bytes
    from jaxlab.flexgaussian.stepped import quantize_steps

    return to_bytes(quantize_steps(_scene()))


def load_scene(path):
    from jaxlab.flexgaussian.formats import load_scene

    return load_scene(path)


def load_compressed(path):
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
    return load_scene(path.with_suffix(".sog"))


BYTES = {
    "ply": Format("a.ply", _ply, load_scene),
    "compressed ply": Format("a.ply", _compressed_ply, load_scene),
    "splat": Format("a.splat", _splat, load_scene),
    "spz": Format("a.spz", spz, load_scene),
    "spz, version 4": Format("a.spz", lambda: spz_4_of(spz_planes()), load_scene),
    "spz, packed": Format("a.spz", lambda: gzip.compress(spz(), mtime=0), load_scene),
    "sog": Format("a.sog", lambda: zipped({"meta.json": text_of(_SOG), **_sog_images()}), load_scene),
    "compressed scene": Format("a.jxfg", lambda: jxfg("zlib"), load_compressed),
    "compressed scene, whole steps": Format("a.jxfg", stepped, load_compressed),
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

MEMBERS = {"sog": Format("a.sog", lambda: {"meta.json": text_of(_SOG), **_sog_images()}, load_scene)}
