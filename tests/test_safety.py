"""What the library's code may not do: run what it reads, or unpack it without bounds; and what no message may tell."""

import ast
import gzip
import io
import json
import logging
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxlab.core import untrusted

ROOT = Path(__file__).resolve().parent.parent

# Pickles go from a process to the workers that it started, through pipes or Ray, and back. `models.lpips` reads one
# file whose SHA-256 it knows, with an unpickler that makes arrays alone. No other file is unpickled.
PICKLES = {
    "jaxlab/core/tasks.py",
    "jaxlab/core/workers.py",
    "jaxlab/eaglet/rollouts.py",
    "jaxlab/inference/worker.py",
    "jaxlab/models/lpips.py",
    "jaxlab/rl/rewards.py",
}
CALLS = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("np.load", "numpy.load", "jnp.load", "tempfile.mktemp", "shutil.unpack_archive", "gzip.decompress"),
    *("zlib.decompress", "bz2.decompress", "lzma.decompress", "extractall"),
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FLAGS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("verify", False)}


def unsafe(source: str) -> list[str]:
    """What a source file does that it may not; imports of picklers as "import NAME"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(f"import {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.rpartition(".")[2] in ("extractall", "mktemp"):
                found.append(f"line {node.lineno}: {name}")
            for word in node.keywords:
                if isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in FLAGS:
                    found.append(f"line {node.lineno}: {word.arg}={word.value.value}")
    return found


def test_no_code_from_data():
    wrong, pickles = [], set()
    for package in ("jaxlab", "pallas_kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            for problem in unsafe(file.read_text()):
                if problem.startswith("import "):
                    pickles.add(name)
                else:
                    wrong.append(f"{name}, {problem}")
    assert not wrong, "\n".join(wrong)
    assert pickles == PICKLES


def test_what_is_unsafe_is_found():
    assert unsafe("import pickle as p") == ["import pickle"]
    assert unsafe("from dill import loads") == ["import dill"]
    assert unsafe("np.load(x)\neval(y)\narchive.extractall()") == [
        "line 1: np.load",
        "line 2: eval",
        "line 3: archive.extractall",
    ]
    assert unsafe("f(allow_pickle=True, shell=False)") == ["line 1: allow_pickle=True"]


def peak(call) -> int:
    """Bytes that a call takes at most; its ValueError is expected."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_gzip_hides_is_bounded():
    bomb = gzip.compress(bytes(50 << 20))
    assert peak(lambda: untrusted.gunzipped(bomb, "x", 1 << 20)) < 8 << 20
    two = gzip.compress(b"one") + gzip.compress(b"two")
    assert untrusted.gunzipped(two, "x") == b"onetwo"
    for damaged in (two[:-12], b"\x1f\x8b" + bytes(20), two + b"rest"):
        with pytest.raises(ValueError, match="gzip data"):
            untrusted.gunzipped(damaged, "x")


def _npz(folder, name="a.npz", **members):
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(f"{member}.npy", content)
    return folder / name


def _header(descr, shape):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


def test_arrays(tmp_path):
    arrays = {"a": np.float32([[1, 2, 3], [4, 5, 6]]), "b": np.asfortranarray(np.eye(3)), "c": np.array("text")}
    np.savez(tmp_path / "good.npz", **arrays, empty=np.zeros((0, 4)))
    read = untrusted.read_npz(tmp_path / "good.npz")
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)
    assert read["empty"].shape == (0, 4)
    content = io.BytesIO()
    np.save(content, np.array([{}]), allow_pickle=True)
    for member, message in [
        (content.getvalue(), "expected an array of numbers"),
        (_header("<f8", (1 << 60,)), "in 0 bytes"),
        (_header("<f8", (-1,)), "got"),
        (_header("|O", (0,)), "got"),
        (b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, "a header of 65535 bytes"),
        (b"rubbish", "NumPy's format"),
    ]:
        with pytest.raises(ValueError, match=message):
            untrusted.read_npz(_npz(tmp_path, a=member))
    bomb = _npz(tmp_path, a=_header("|u1", (100 << 20,)) + bytes(100 << 20))
    assert bomb.stat().st_size < 1 << 20
    assert peak(lambda: untrusted.read_npz(bomb, most=10 << 20)) < 8 << 20
    (tmp_path / "b.npz").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        untrusted.read_npz(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError):
        untrusted.read_npz(tmp_path / "none.npz")


def test_yaml_aliases_are_bounded(tmp_path):
    """A billion values in ten lines."""
    from jaxlab.core import load_config
    from jaxlab.training import TrainConfig

    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(lines))
    assert peak(lambda: untrusted.read_yaml(path)) < 8 << 20
    with pytest.raises(ValueError, match="all aliases written out"):
        load_config(TrainConfig, path)
    for text, message in [
        ("a: &a [*a]", "contain itself"),
        ("a: " + "[" * 100, "nested more than 64 deep"),
        ("a: !!python/object/apply:os.system [id]", "is not YAML"),
        ("a: 1\n" * 100_000, "expected at most"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            untrusted.read_yaml(path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", "", "a\0b", "a\\..\\b", "a\nb", None, 3, ["a"]]
)
def test_names_stay_in_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match="file: expected"):
        untrusted.inside(tmp_path, name, "file")


def test_names_in_a_folder(tmp_path):
    assert untrusted.inside(tmp_path, "./a/b.png") == tmp_path / "a" / "b.png"
    assert untrusted.inside(tmp_path, "..a..") == tmp_path / "..a.."


def test_files_that_name_files_elsewhere(tmp_path):
    """A report, photographs and questions cannot have a file from outside of their folder."""
    from jaxlab.core import Report
    from jaxlab.flexgaussian import cameras_from_transforms
    from jaxlab.vlm_scaling import tasks

    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "in"
    Report(system="x", title="t", metrics={}).save(folder)
    content = json.loads((folder / "report.json").read_text()) | {"plots": [{"title": "p", "file": "../secret.png"}]}
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected a path below"):
        Report.load(folder)
    frame = {"file_path": "../secret.png", "transform_matrix": np.eye(4).tolist()}
    (folder / "transforms.json").write_text(json.dumps({"w": 4, "h": 4, "fl_x": 4, "frames": [frame]}))
    with pytest.raises(ValueError, match="expected a path below"):
        cameras_from_transforms(folder / "transforms.json")
    row = {"image_path": "../secret.png", "question": "?", "ground_truth": "1"}
    (folder / "geoqa_test_prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="expected a path below"):
        tasks.geoqa(folder)


def test_secrets_are_not_told(caplog):
    """Not in a repr, an error or a log, whatever goes wrong."""
    pytest.importorskip("httpx", reason="the extra 'agents' is not installed")
    from jaxlab.inference import Client, EndpointError

    key, password = "sk-0123456789", "hunter2hunter2"
    with (
        caplog.at_level(logging.DEBUG),
        Client(f"http://me:{password}@127.0.0.1:9/v1", model="m", api_key=key, max_retries=0) as client,
        pytest.raises(EndpointError) as caught,
    ):
        client.chat([{"role": "user", "content": "Hi"}])
    told = f"{client!r} {client._client!r} {caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert "127.0.0.1" in told
    assert key not in told
    assert password not in told
    with pytest.raises(ValueError, match="base_url: expected") as refused:
        Client(f"ftp://me:{password}@x")
    assert password not in str(refused.value)


def test_the_secret_of_workers_is_not_told():
    import dataclasses

    from jaxlab.inference import worker

    (field,) = (
        field
        for kind in vars(worker).values()
        if dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
        if field.name == "token"
    )
    assert not field.repr
