"""Files of whole steps: one entropy coder for all codes, channel by channel, each with what helps to foresee it."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from jaxlab.flexgaussian.framing import check_end, framed, not_understood, stream_at
from jaxlab.flexgaussian.octree import MOST_BITS, decode_cells, encode_cells
from jaxlab.flexgaussian.range_coding import DamagedError, Decoder, Encoder, lanes_for
from jaxlab.flexgaussian.scene import SceneFormatError
from jaxlab.flexgaussian.stepped import CLASSES, StepConfig, SteppedScene

_ENERGIES = (1, 4)
_MOST_GAUSSIANS = 64
"""A byte's: more than any file has whose Gaussians are not all alike."""
_FEW = 1 << 12
_STREAMS = ("bases", "states", "words", "numbers")


def write_stepped(stepped: SteppedScene) -> bytes:
    """The content of the file."""
    states, words, numbers = _coded(stepped)
    bases = stepped.sh0_basis.astype("<f4").tobytes() + stepped.shN_basis.astype("<f2").tobytes()
    header = {
        "bits": stepped.bits,
        "center": stepped.center.tolist(),
        "config": dataclasses.asdict(stepped.config),
        "degree": stepped.degree,
        "lanes": len(states),
        "low": stepped.low.tolist(),
        "num_gaussians": stepped.num_gaussians,
        "radius": stepped.radius,
    }
    packed = zlib.compress(np.array(numbers, "<i4").tobytes(), 9)
    streams = (bases, states.tobytes(), words.tobytes(), packed)
    return framed(2, header, list(zip(_STREAMS, streams)))


def read_stepped(header: Any, content: bytes, offset: int, where: str) -> SteppedScene:
    """The scene of a file; `header` ends at byte `offset`.

    Raises:
      SceneFormatError: damaged.
    """
    config = _checked(header, len(content), where)
    streams = {}
    for entry in header["streams"]:
        streams[entry[0]], _ = stream_at(content, offset, entry, where)
        offset += len(streams[entry[0]])
    check_end(content, offset, where)
    channels = 3 * ((header["degree"] + 1) ** 2 - 1)
    try:
        numbers = zlib.decompressobj().decompress(streams["numbers"], 4 * (header["num_gaussians"] + _FEW) * 64)
        sh0_basis = np.frombuffer(streams["bases"][:36], "<f4").reshape(3, 3)
        shN_basis = np.frombuffer(streams["bases"][36:], "<f2").reshape(channels, channels)
        states = np.frombuffer(streams["states"], "<u4")
        if len(states) != header["lanes"] or not all(np.isfinite(b).all() for b in (sh0_basis, shN_basis)):
            raise DamagedError("states or bases that cannot be")
        decoder = Decoder(states, np.frombuffer(streams["words"], "<u2"), np.frombuffer(numbers, "<i4").tolist())
        codes = _decoded(decoder, header["num_gaussians"], header["bits"], channels)
    except (zlib.error, ValueError) as error:
        raise SceneFormatError(f"{where}: its streams are damaged ({error})") from error
    center, low = (np.array(header[key], np.float64) for key in ("center", "low"))
    fixed = {"config": config, "degree": header["degree"], "center": center, "radius": float(header["radius"])}
    return SteppedScene(**fixed, low=low, bits=header["bits"], sh0_basis=sh0_basis, shN_basis=shN_basis, **codes)


def _coded(stepped: SteppedScene) -> tuple[np.ndarray, np.ndarray, list[int]]:
    encoder, classes = Encoder(lanes_for(stepped.num_gaussians)), stepped.classes
    encode_cells(encoder, stepped.cells, stepped.bits)
    encoder.symbols(classes, CLASSES, None, np.arange(CLASSES))
    middle = int(np.median(stepped.scales[:, 0]))
    encoder.numbers.append(middle)
    shapes = (stepped.scales[:, :1] - middle, -np.diff(stepped.scales, axis=1), stepped.opacities[:, None])
    for column in np.concatenate([*shapes, stepped.rotations, stepped.sh0], axis=1).T:
        encoder.whole(column, classes)
    shaded = np.any(stepped.shN, axis=1)
    encoder.symbols(shaded.astype(np.int64), 2, classes, np.arange(2))
    energy = np.zeros(int(shaded.sum()), np.int64)
    for column in stepped.shN[shaded].T:
        encoder.whole(column, _context(classes[shaded], energy))
        energy = _passed_on(energy, column)
    return *encoder.finish(), encoder.numbers


def _decoded(decoder: Decoder, count: int, bits: int, channels: int) -> dict[str, np.ndarray]:
    cells = decode_cells(decoder, bits, count)
    classes = decoder.symbols(count, CLASSES, None, np.arange(CLASSES))
    middle = decoder.number()
    columns = np.stack([decoder.whole(count, classes) for _ in range(10)], axis=1)
    columns[:, :3] = middle + np.cumsum(columns[:, :3] * [1, -1, -1], axis=1)
    shaded = decoder.symbols(count, 2, classes, np.arange(2)).astype(bool)
    harmonics = np.zeros((count, channels), np.int64)
    energy = np.zeros(int(shaded.sum()), np.int64)
    for channel in range(channels):
        column = decoder.whole(len(energy), _context(classes[shaded], energy))
        harmonics[shaded, channel] = column
        energy = _passed_on(energy, column)
    parts = {"scales": columns[:, :3], "opacities": columns[:, 3], "rotations": columns[:, 4:7], "sh0": columns[:, 7:]}
    return {"cells": cells, "classes": classes, **parts, "shN": harmonics}


def _context(classes: np.ndarray, energy: np.ndarray) -> np.ndarray:
    return classes * (len(_ENERGIES) + 1) + np.searchsorted(_ENERGIES, energy, side="right")


def _passed_on(energy: np.ndarray, column: np.ndarray) -> np.ndarray:
    """How large the channels before were, the last ones above all."""
    return energy // 2 + 2 * np.abs(column)


def _checked(header: Any, size: int, where: str) -> StepConfig:
    """The settings, if all numbers are such as can be."""
    try:
        config = StepConfig(**header["config"])
        whole = [header[key] for key in ("num_gaussians", "degree", "bits", "lanes")]
        fits = all(type(number) is int and number >= 0 for number in [*whole, *(e[1] for e in header["streams"])])
        fits &= 0 < whole[0] <= _MOST_GAUSSIANS * size + _FEW and whole[1] <= 3 and 1 <= whole[2] <= MOST_BITS
        fits &= whole[3] == lanes_for(whole[0]) and [entry[0] for entry in header["streams"]] == list(_STREAMS)
        numbers = [*header["center"], *header["low"], header["radius"]]
        fits &= len(numbers) == 7 and all(type(number) is float for number in numbers) and np.isfinite(numbers).all()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise not_understood(where, error) from error
    if not fits:
        raise SceneFormatError(f"{where}: the header has numbers that cannot be: {str(header)[:200]}")
    return config
