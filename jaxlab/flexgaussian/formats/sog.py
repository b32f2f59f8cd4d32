"""PlayCanvas' .sog, version 2: a zip of lossless WebP planes and `meta.json`, with codebooks of 256 entries."""

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.errors import require
from jaxlab.flexgaussian.formats.quaternions import from_smallest_three
from jaxlab.flexgaussian.formats.values import logit
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError

_META_LIMIT = 1 << 22
_PIXEL_LIMIT = 1 << 28
_PALETTE_WIDTH = 64
_ROTATION_TAG = 252
"""The alpha of a rotation's pixel, less the index of the part left out."""


def read(content: bytes, where: str) -> GaussianScene:
    """The scene of a .sog file.

    Raises:
      SceneFormatError: not such a zip; another version; planes that are missing, damaged or too small.
      MissingExtra: without Pillow (extra `splats`).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _scene(_Planes(archive, where))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise SceneFormatError(f"{where}: damaged zip ({error})") from error


class _Planes:
    """The members of the zip, none of which is unpacked beyond what a plane of its size can need."""

    def __init__(self, archive: zipfile.ZipFile, where: str):
        self.archive, self.where = archive, where
        self.meta = self._json()
        count = self.meta.get("count")
        if self.meta.get("version") != 2 or not isinstance(count, int) or not 0 < count <= _PIXEL_LIMIT:
            raise SceneFormatError(f"{where}: meta.json: expected version 2 and a count, got {str(self.meta)[:80]}")
        self.count = count

    def table(self, *path: str) -> np.ndarray:
        """A list of numbers in `meta.json`."""
        value: Any = self.meta
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        try:
            return np.asarray(value, np.float64).reshape(-1)
        except (TypeError, ValueError):
            raise self.wrong(f"meta.json: expected numbers at {'.'.join(path)}") from None

    def pixels(self, attribute: str, index: int, needed: int) -> np.ndarray:
        """A plane's pixels in reading order, [at least `needed`, 4] bytes."""
        part = self.meta.get(attribute)
        files = part.get("files") if isinstance(part, Mapping) else None
        if not isinstance(files, Sequence) or len(files) <= index or not isinstance(files[index], str):
            raise self.wrong(f"meta.json: expected file {index} of {attribute!r}")
        image = require("PIL.Image", "splats")
        try:
            with image.open(io.BytesIO(self._member(files[index], 4 * _PIXEL_LIMIT)), formats=["WEBP", "PNG"]) as plane:
                width, height = plane.size
                if width * height < needed or width * height > _PIXEL_LIMIT:
                    raise self.wrong(f"{files[index]}: expected at least {needed} pixels, got {width} x {height}")
                return np.asarray(plane.convert("RGBA")).reshape(-1, 4)
        except (OSError, SyntaxError, image.DecompressionBombError) as error:
            raise self.wrong(f"{files[index]}: damaged image ({error})") from error

    def wrong(self, problem: str) -> SceneFormatError:
        return SceneFormatError(f"{self.where}: {problem}")

    def _member(self, name: str, limit: int) -> bytes:
        try:
            info = self.archive.getinfo(name)
        except KeyError:
            raise self.wrong(f"no member {name!r}") from None
        if info.file_size > limit:
            raise self.wrong(f"{name}: {info.file_size} bytes are more than the {limit} that are read")
        with self.archive.open(info) as member:
            return member.read(limit + 1)[:limit]

    def _json(self) -> dict[str, Any]:
        try:
            meta = json.loads(self._member("meta.json", _META_LIMIT))
        except (ValueError, RecursionError) as error:
            raise self.wrong(f"meta.json: {error}") from error
        if not isinstance(meta, dict):
            raise self.wrong(f"meta.json: expected an object, got {type(meta).__name__}")
        return meta


def _scene(planes: _Planes) -> GaussianScene:
    count = planes.count
    low, high = (planes.pixels("means", i, count)[:count, :3].astype(np.float64) for i in (0, 1))
    floor, ceiling = planes.table("means", "mins"), planes.table("means", "maxs")
    if floor.shape != (3,) or ceiling.shape != (3,):
        raise planes.wrong("meta.json: expected three numbers in means.mins and means.maxs")
    logged = floor + (ceiling - floor) * ((high * 256 + low) / 65535)
    means = np.sign(logged) * np.expm1(np.minimum(np.abs(logged), math.log(np.finfo(np.float32).max)))

    quats = planes.pixels("quats", 0, count)[:count]
    largest = quats[:, 3].astype(np.intp) - _ROTATION_TAG
    if largest.min() < 0:
        raise planes.wrong(f"quats: expected alphas of {_ROTATION_TAG} to 255, got {quats[:, 3].min()}")
    color = planes.pixels("sh0", 0, count)[:count]
    return GaussianScene(
        means=means.astype(np.float32),
        log_scales=_coded(planes, "scales", planes.pixels("scales", 0, count)[:count, :3]),
        quats=from_smallest_three((quats[:, :3] / 255 - 0.5) * math.sqrt(2), largest),
        opacity_logit=logit(color[:, 3] / 255),
        sh0=_coded(planes, "sh0", color[:, :3]),
        shN=_harmonics(planes),
    )


def _coded(planes: _Planes, attribute: str, codes: np.ndarray) -> np.ndarray:
    book = planes.table(attribute, "codebook")
    if len(book) <= codes.max(initial=0):
        raise planes.wrong(
            f"meta.json: the codebook of {attribute!r} has {len(book)} entries, a plane asks for {codes.max()}"
        )
    return book.astype(np.float32)[codes]


def _harmonics(planes: _Planes) -> np.ndarray:
    part = planes.meta.get("shN")
    if part is None:
        return np.zeros((planes.count, 0, 3), np.float32)
    degree, entries = (part.get(key) if isinstance(part, Mapping) else None for key in ("bands", "count"))
    if degree not in (1, 2, 3) or not isinstance(entries, int) or not 0 < entries <= 1 << 16:
        raise planes.wrong(
            f"meta.json: shN: expected 1 to 3 bands and a palette of at most 65536, got {degree}, {entries}"
        )
    terms = (degree + 1) ** 2 - 1
    labels = planes.pixels("shN", 1, planes.count)[: planes.count, :2].astype(np.intp) @ [1, 256]
    if labels.max() >= entries:
        raise planes.wrong(f"shN: a label asks for entry {labels.max()} of a palette of {entries}")
    rows = math.ceil(entries / _PALETTE_WIDTH) * _PALETTE_WIDTH
    palette = planes.pixels("shN", 0, rows * terms)[: rows * terms, :3].reshape(rows, terms, 3)
    return _coded(planes, "shN", palette)[labels]
