"""Checkpoints of strangers: the manifest, and Orbax's files with checksums that fit."""

import json
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlab.core import Checkpointer, CheckpointError
from tests.fuzz.mutations import CUT, Format, bounded, changed, edits, fuzz, fuzz_json, json_of, text_of

WANTED = {"w": np.zeros(3, np.float32), "b": {"m": np.zeros((2, 2), np.int8)}, "step": 0, "name": ""}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    state = {"w": np.arange(3, dtype=np.float32), "b": {"m": np.ones((2, 2), np.int8)}, "step": 3, "name": "x"}
    Checkpointer(folder).save(0, state, {"position": 1})
    return folder


@pytest.fixture
def copy(saved, folder):
    shutil.copytree(saved / "0", folder / "0")
    return folder / "0"


def _restored(path):
    """A checkpoint by the path of one of its files; what comes is as wanted."""
    step = next(parent for parent in path.parents if parent.name == "0")
    restored, _ = Checkpointer(step.parent).restore(WANTED, 0)
    assert [(restored["w"].shape, restored["w"].dtype), restored["b"]["m"].shape] == [((3,), np.float32), (2, 2)]
    assert (type(restored["step"]), type(restored["name"])) == (int, str)


def _refitted(step):
    """Writes the checksums that its files have, as one who changes them would."""
    manifest = json.loads((step / "manifest.json").read_text())
    files = [file for file in (step / "arrays").rglob("*") if file.is_file()]
    manifest["files"] = {
        str(file.relative_to(step)): [file.stat().st_size, zlib.crc32(file.read_bytes())] for file in files
    }
    (step / "manifest.json").write_bytes(text_of(manifest))


def test_other_values_in_json(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    fuzz_json(Format("manifest.json", lambda: manifest, _restored, (CheckpointError,), native=True), copy)


def test_other_values_in_the_metadata_of_orbax(copy):
    """Its own errors name the folder."""
    metadata = json.loads((copy / "arrays" / "_METADATA").read_text())

    def read(path):
        _refitted(copy)
        _restored(path)

    fuzz_json(Format("_METADATA", lambda: metadata, read, (CheckpointError,), native=True), copy / "arrays")


def test_other_values_in_the_metadata_of_an_array(copy):
    """What Zarr keeps within Orbax's store, whose own checksums fit as well."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{copy / 'arrays'}/"}).result()
    metadata = json.loads(store["w/.zarray"])

    def check(other):
        store["w/.zarray"] = text_of(other)
        _refitted(copy)
        bounded(lambda: _restored(copy / "manifest.json"), (CheckpointError,), native=True)

    store["w/.zarray"] = b"{}"
    _refitted(copy)
    _refused(copy, r"the arrays cannot be read: .*w/\.zarray")
    fuzz(json_of(metadata), check)


def test_changed_bytes_of_arrays(copy):
    contents = {file: file.read_bytes() for file in sorted((copy / "arrays").rglob("*")) if file.is_file()}
    refit = st.booleans()

    def check(drawn):
        file, changes, fits = drawn
        for other, content in contents.items():
            other.write_bytes(changed(content, changes) if other == file else content)
        same = file.read_bytes() == contents[file]
        if fits or same:
            _refitted(copy)
            bounded(lambda: _restored(file), (CheckpointError,), native=True)
        else:
            with pytest.raises(CheckpointError, match=f"step 0: file .*{file.name}"):
                _restored(file)
        (copy / "manifest.json").write_bytes(manifest)

    manifest = (copy / "manifest.json").read_bytes()
    check((sorted(contents)[0], CUT, True))
    fuzz(st.tuples(st.sampled_from(sorted(contents)), edits(2), refit), check, examples=80)


def _refused(step, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(step.parent).restore(WANTED, 0)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../1/manifest.json", "arrays/../../x", "manifest.json", "arrays", "", "arrays\\x"]
)
def test_a_manifest_that_names_other_files(copy, name):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = [1, 2]
    (copy / "manifest.json").write_bytes(text_of(manifest))
    _refused(copy, r"manifest\.json: file: expected")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"arrays/_METADATA": [1 << 62, 0]}}, "file arrays/_METADATA is truncated or changed"),
        ({"files": {"arrays/_METADATA": [-1, 0]}}, "expected size and CRC-32"),
        ({"files": {"arrays/d": [4096, 0]}}, "file arrays/d is missing"),
        ({"leaves": {"w": {"kind": "array", "dtype": "float32", "shape": [1 << 40]}}}, "'w' was saved as float32"),
        ({"leaves": {"w": {"kind": "array", "dtype": "float32", "shape": ["x"]}}}, "leaf 'w': expected kind"),
        ({"leaves": {"step": {"kind": "scalar", "dtype": "int", "shape": [], "value": "x"}}}, "leaf 'step': expected"),
        ({"leaves": 3}, "expected leaves and files by name"),
    ],
)
def test_sizes_and_types_in_a_manifest(copy, change, message):
    manifest = json.loads((copy / "manifest.json").read_text())
    merged = {key: manifest[key] | new if isinstance(new, dict) else new for key, new in change.items()}
    (copy / "manifest.json").write_bytes(text_of(manifest | merged))
    _refused(copy, message)


@pytest.mark.parametrize(
    ("shape", "chunk", "message"),
    [
        ([1 << 44], [1 << 20], r"leaf 'w' is stored as float32\[17592186044416\], expected float32\[3\]"),
        ([3], [1 << 44], r"leaf 'w' of shape \(3,\) is stored in chunks of \(17592186044416,\)"),
    ],
    ids=["array", "chunk"],
)
def test_arrays_that_claim_64_tib(copy, shape, chunk, message):
    """A process that reads the first is killed by the allocator, which no error handler sees."""
    import tensorstore

    metadata = {"shape": shape, "chunks": chunk, "dtype": "<f4", "compressor": None, "fill_value": None}
    store = {"driver": "ocdbt", "base": f"file://{copy / 'arrays'}/", "path": "w/"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    tensorstore.open(spec, create=True, delete_existing=True).result()
    _refitted(copy)
    _refused(copy, message)


def test_an_integer_that_its_array_cannot_hold(tmp_path):
    import jax

    Checkpointer(tmp_path).save(0, {"step": 1 << 40})
    with pytest.raises(CheckpointError, match=r"leaf 'step' was saved as Python int 1099511627776, expected int32\[\]"):
        Checkpointer(tmp_path).restore({"step": jax.ShapeDtypeStruct((), np.int32)})
