"""Files of scenes changed below what protects them: planes under a compression, streams under checksums."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import CUT, Format, changed, edits, fuzz_files, json_of, text_of
from tests.fuzz.scene_files import jxfg, load_compressed, load_scene, spz, spz_4_of, spz_planes, stepped


def test_changed_planes_under_zstandard(folder):
    """Their lengths are told as they are: too long, too short, of other numbers."""
    planes = spz_planes()

    def made(drawn):
        place, changes = drawn
        return spz_4_of([changed(plane, changes) if place == i else plane for i, plane in enumerate(planes)])

    form = Format("a.spz", lambda: planes, load_scene)
    draws = st.tuples(st.integers(0, len(planes) - 1), edits(2))
    fuzz_files(form, folder, draws, made, spz_4_of(planes), (0, CUT))


def test_version_4_says_what_version_3_says(folder):
    (folder / "a.spz").write_bytes(spz_4_of(spz_planes()))
    (folder / "b.spz").write_bytes(spz())
    four, three = (dataclasses.asdict(load_scene(folder / name)) for name in ("a.spz", "b.spz"))
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


@pytest.mark.parametrize("make", [lambda: jxfg("zlib"), lambda: jxfg("none"), stepped], ids=["zlib", "none", "steps"])
def test_compressed_scenes_whose_checksums_fit(folder, make):
    """An enemy knows how to compute them."""
    version, header, streams = _parts(make())

    def made(drawn):
        other, place, changes = drawn
        bodies = list(streams)
        bodies[place] = changed(bodies[place], changes)
        return _reframed(version, json.loads(json.dumps(other)), bodies)

    form = Format("a.jxfg", make, load_compressed)
    headers = st.one_of(st.just(header), json_of(header))
    draws = st.tuples(headers, st.integers(0, len(streams) - 1), st.one_of(st.just([]), edits(2)))
    fuzz_files(form, folder, draws, made, _reframed(version, header, streams), (header, 0, CUT))
