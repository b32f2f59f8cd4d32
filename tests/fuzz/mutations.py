"""Small valid files, changed as accidents and enemies change them.

Runs are short and always the same; `JAXLAB_FUZZ_MINUTES=10` makes them long and different each time, and divides the
minutes among the cases.
"""

import contextlib
import json
import os
import re
import secrets
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("JAXLAB_FUZZ_MINUTES", "0"))
CASES = 60
"""About how many share the minutes."""
SECONDS, BYTES = 3.0, 400 << 20
"""What one small file may take of the processor and of memory; formats that pack their content have bounds of that."""

_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    -(1 << 63),
)
_WORDS = (
    *(b"0", b"-1", b"7", b"1e999", b"-1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b"9" * 30),
    *(b"9" * 5000, b"[" * 3000, b"\x00", b"\xff\xfe", b"../../etc/passwd", b"/etc/passwd", b"%s%n", b"'", b"\n", b","),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 63, 10**30, 1.5, -1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "9" * 50, [], {}, [[]], [None], {"": None}),
    *(["x"], [1, 2, 3], {"a": {"b": [1]}}, [[1, 2], [3]]),
)
"""What may stand where JSON has something else."""


@st.composite
def _edit(draw: Any) -> tuple[str, float, Any]:
    kind = draw(st.sampled_from(("flip", "set", "number", "cut", "drop", "repeat", "insert", "digits", "zeros")))
    # The start of a file tells about the rest: half of all changes go there.
    place = draw(st.one_of(st.floats(0, 1), st.integers(0, 200).map(float).map(lambda at: -1.0 - at)))
    detail = {
        "flip": st.integers(0, 7),
        "set": st.integers(0, 255),
        "number": st.tuples(st.sampled_from(_NUMBERS), st.sampled_from((2, 4, 8)), st.sampled_from("<>")),
        "cut": st.none(),
        "drop": st.integers(1, 64),
        "repeat": st.integers(1, 300),
        "insert": st.one_of(st.sampled_from(_WORDS), st.binary(min_size=1, max_size=16)),
        "digits": st.sampled_from(_WORDS),
        "zeros": st.integers(1, 200),
    }[kind]
    return kind, place, draw(detail)


def edits(most: int = 4) -> st.SearchStrategy[list[tuple[str, float, Any]]]:
    """Changes to make to bytes, one after the other."""
    return st.lists(_edit(), min_size=1, max_size=most)


def changed(content: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    """The bytes after the changes."""
    for kind, place, detail in changes:
        at = min(int(-1 - place), len(content)) if place < 0 else int(place * len(content))
        before, after = content[:at], content[at:]
        if kind == "flip" and after:
            content = before + bytes([after[0] ^ 1 << detail]) + after[1:]
        elif kind == "set" and after:
            content = before + bytes([detail]) + after[1:]
        elif kind == "number":
            value, size, order = detail
            content = (
                before + (value % (1 << 8 * size)).to_bytes(size, "little" if order == "<" else "big") + after[size:]
            )
        elif kind == "cut":
            content = before
        elif kind == "drop":
            content = before + after[detail:]
        elif kind == "repeat":
            content = before + after[:64] * detail + after
        elif kind == "insert":
            content = before + detail + after
        elif kind == "digits":  # a number that is written out becomes another word
            found = re.compile(rb"-?\d[\d.eE+-]*").search(content, at)
            if found:
                content = content[: found.start()] + detail + content[found.end() :]
        elif kind == "zeros":
            content = before + bytes(min(detail, len(after))) + after[detail:]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path; `...` takes the one there out."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
    elif new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


@st.composite
def _other_json(draw: Any, value: Any) -> Any:
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        new = draw(st.sampled_from((..., *VALUES)))
        value = replaced(value, path, new)
    return value


def json_of(value: Any) -> st.SearchStrategy[Any]:
    """The value with others in some of its places, or without them."""
    return _other_json(value)


def text_of(value: Any) -> bytes:
    """JSON as Python's own writer would have it, which knows NaN."""
    return json.dumps(value).encode()


def npy(array: Any) -> bytes:
    """An array as a `.npy` file."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], *, packed: bool = False) -> bytes:
    """A zip archive."""
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def u64(value: int) -> bytes:
    """Eight bytes, little-endian."""
    return struct.pack("<Q", value)


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int = 40) -> None:
    """Calls `check` with what is drawn: so many, the same in every run; or others for a share of the minutes."""

    def run(number: int | None) -> None:
        wanted = settings(
            max_examples=examples if number is None else 100,
            derandomize=number is None,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        test = wanted(given(strategy)(check))
        (test if number is None else seed(number)(test))()

    run(None)
    end = time.monotonic() + MINUTES * 60 / CASES
    while time.monotonic() < end:
        run(secrets.randbits(32))


def bounded(read: Callable[[], Any], errors: tuple[type[Exception], ...], *, native: bool = False) -> Any:
    """What `read` gives, or None after an error that it may raise; fails where it takes long or much memory.

    Args:
      read: reads a file.
      errors: what it may raise.
      native: it has threads that are not Python's, beside which tracemalloc crashes as it stops; the growth of resident
        memory is measured instead.
    """
    started = time.process_time()  # of this process, which a busy machine does not lengthen
    with _resident() if native else _traced() as peak:
        outcome = outcome_of(read, errors)
    taken = time.process_time() - started
    assert taken < SECONDS, f"{taken:.1f} s for a small file"
    assert peak[0] < BYTES, f"{peak[0] >> 20} MiB for a small file"
    return outcome


@contextlib.contextmanager
def _traced() -> Iterator[list[int]]:
    """Bytes that Python and NumPy took at most, told at the end."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def _resident() -> Iterator[list[int]]:
    """Bytes by which the process grew at most, told at the end; 0 where that is not told."""
    peak = [0]
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def told(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
        return int(found[1]) << 10 if found else 0

    if not forget.exists():
        yield peak
        return
    forget.write_text("5")  # the peak begins anew
    before = told("VmRSS")
    yield peak
    peak[0] = told("VmHWM") - before


def outcome_of(read: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
    """What `read` gives, or None after an error that it may raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(*errors):
            return read()
    return None


REFUSED = (ValueError, NotImplementedError, FileNotFoundError)
"""What readers say of a file that they do not take; ImportErrors of extras are told as such by a skip."""
KEYS = (*REFUSED, KeyError)
"""Readers of weights name a missing one so."""


class Format(NamedTuple):
    """A file to change: its name in its folder, the content, the reader of its path, what that may raise."""

    name: str
    content: Callable[[], Any]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = REFUSED
    beside: Callable[[Path], None] = lambda folder: None
    itself: type[Exception] | None = None
    """What the content raises unchanged, where the files beside it belong to others."""
    native: bool = False
    """As `bounded` has it."""


def beside(name: str, content: bytes) -> Callable[[Path], None]:
    """Writes another file first."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def fuzz_files(
    form: Format,
    folder: Path,
    strategy: st.SearchStrategy[Any],
    made: Callable[[Any], bytes],
    whole: bytes,
    broken: Any,
    also: Sequence[bytes] = (),
) -> None:
    """Reads the files that `made` makes of what is drawn, each within bounds.

    Args:
      form: what they are.
      folder: where they are written.
      strategy: what is drawn.
      made: of a draw.
      whole: the file unchanged.
      broken: a draw; its file and the whole one are read first, unmeasured, for they import what reading and telling of
        errors take.
      also: files that are read, too.
    """
    path = folder / form.name
    form.beside(folder)
    path.write_bytes(whole)
    if form.itself is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form.read(path)
    else:
        with pytest.raises(form.itself):
            form.read(path)
    path.write_bytes(made(broken))
    outcome_of(lambda: form.read(path), form.errors)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        bounded(lambda: form.read(path), form.errors, native=form.native)

    for content in also:
        check(content)
    fuzz(strategy, lambda drawn: check(made(drawn)))


CUT = [("cut", 0.5, None)]
"""The change that leaves half of a file."""
_NO_JSON = (b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b"1" * 10_000, b"[]", b"null", b"3", b'"x"', b"{}")


def fuzz_bytes(form: Format, folder: Path, pack: Callable[[bytes], bytes] = bytes) -> None:
    """Flipped bits, cut ends, repeated and inserted bytes, other numbers; `pack` hides them."""
    content = form.content()
    fuzz_files(form, folder, edits(), lambda changes: pack(changed(content, changes)), pack(content), CUT)


def fuzz_members(form: Format, folder: Path, *, packed: bool) -> None:
    """The same within one member of a zip archive, which the content gives by name."""
    members = form.content()

    def made(drawn: Any) -> bytes:
        member, changes = drawn
        return zipped(members | {member: changed(members[member], changes)}, packed=packed)

    names = sorted(members)
    draws = st.tuples(st.sampled_from(names), edits(2))
    fuzz_files(form, folder, draws, made, zipped(members, packed=packed), (names[0], CUT))


def fuzz_json(form: Format, folder: Path) -> None:
    """Values of other types and sizes, deep ones, absent ones, names that lead out of the folder; files of no JSON.

    A name that ends in `.jsonl` makes them one line each.
    """
    end = b"\n" if form.name.endswith(".jsonl") else b""
    value = form.content()
    whole = text_of(value) + end
    also = [content + end for content in _NO_JSON]
    fuzz_files(form, folder, json_of(value), lambda other: text_of(other) + end, whole, [None], also)
