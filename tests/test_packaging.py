"""Wheel and sdist: what is in them, that one gives the other, and (`make package`) that they work in empty places."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxlab

pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
CLEAN = {
    name: os.environ[name] for name in ("PATH", "HOME", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") if name in os.environ
}


def build(kind: str, source: Path, folder: Path) -> Path:
    """Builds "wheel" or "sdist" of a source tree; without isolation, so without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked(*folders: str) -> set[str]:
    """Files under version control; in a source tree without it, all that are no by-products."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def test_the_wheel_has_the_packages_and_the_configs(wheel):
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    wanted = tracked("jaxlab", "pallas_kernels") | {f"jaxlab/{name}" for name in tracked("configs")}
    assert wanted - held == set(), "not in the wheel"
    # What is new and not yet added to version control may be there; by-products and other folders may not.
    assert not [name for name in held if "__pycache__" in name or name.endswith((".pyc", ".so", ".o"))]
    assert {name.split("/")[0] for name in held} == {"jaxlab", "pallas_kernels"}
    assert {"jaxlab/py.typed", "pallas_kernels/py.typed"} <= held


def test_metadata(wheel):
    files = contents(wheel)
    stem = f"jaxlab-{jaxlab.__version__}.dist-info"
    told = email.message_from_bytes(files[f"{stem}/METADATA"])
    assert told["Version"] == jaxlab.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert f"{stem}/licenses/LICENSE" in files
    assert told["Requires-Python"] == ">=3.11"
    classifiers = told.get_all("Classifier")
    assert {f"Programming Language :: Python :: {each}" for each in PYTHONS} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    assert told["Summary"]
    assert told["Description-Content-Type"] == "text/markdown"
    assert len(told.get_all("Project-URL")) >= 10
    entries = files[f"{stem}/entry_points.txt"].decode()
    assert "jaxlab = jaxlab.cli:main" in entries
    assert "puzzlemoe = jaxlab.puzzlemoe.storage:load_packed" in entries


def test_the_version_is_written_once_and_cited():
    assert "version" not in re.search(r"\[project\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1].replace(
        'dynamic = ["version"]', ""
    )
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", cited, re.M)[1] == jaxlab.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(re.findall(r"^([\w-]+):", cited, re.M))


def test_the_sdist_gives_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    kept = {name.partition("/")[2] for name in names}
    assert {"CITATION.cff", "CHANGELOG.md", "LICENSE", "Makefile", "tests/test_packaging.py", "README.md"} <= kept
    known = tracked(".") if (ROOT / ".git").exists() else set()
    assert not [name for name in kept if name.split("/")[0].startswith(".venv") or name.startswith(("out/", "dist/"))]
    assert not [name for name in known if name not in kept], "not in the sdist"
    (source,) = tmp_path.iterdir()
    again = contents(build("wheel", source, tmp_path / "wheel"))
    first = contents(wheel)
    assert again.keys() == first.keys()
    assert not [name for name in first if first[name] != again[name]]


def interpreter(version: str) -> str | None:
    """A Python of this version: on the path, or pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in filter(None, [shutil.which(f"python{version}"), *map(str, reversed(pyenv))]):
        asked = [python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        told = subprocess.run(asked, capture_output=True, text=True)
        if told.returncode == 0 and told.stdout.strip() == version:
            return python
    return None


@pytest.mark.package
@pytest.mark.parametrize("version", PYTHONS)
def test_an_empty_environment(wheel, version, tmp_path):
    """The newest of everything that the wheel asks for, and no extra."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    environment = tmp_path / "environment"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    own = environment / "bin" / "python"
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)]
    subprocess.run(pip, check=True, env=CLEAN)
    subprocess.run([own, "-m", "pip", "check"], check=True)
    shutil.copy(ROOT / "tests" / "installed.py", tmp_path)
    # Not the tests' environment: eight devices, a compile cache and a checkout on the path would hide what is missing.
    clean = CLEAN | {"JAX_PLATFORMS": "cpu", "JAXLAB_DATA": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}

    def runs(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    out = runs(own, "-I", "installed.py")
    assert out.count("ok:") == 8, out
    command = environment / "bin" / "jaxlab"
    assert runs(command, "--version").strip() == f"jaxlab {jaxlab.__version__}"
    assert "flexgaussian" in runs(command, "--help")
    assert version in runs(command, "doctor")
    assert "run" in runs(command, "voltanallm", "--help")
    assert "run" in runs(own, "-I", "-m", "jaxlab", "megafold", "--help")
