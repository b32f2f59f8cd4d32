"""The site of several versions: a folder each, a list of them, and a first page."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("sphinx", reason="the docs extra is not installed")


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_of_versions", ROOT / "docs" / "site.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def project(tmp_path):
    """Two releases and a working tree, each of which says what it is."""
    root = tmp_path / "project"
    (root / "docs").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "notebooks" / "00_a.py").write_text("")
    (root / "docs" / "conf.py").write_text('import os\nhtml_title = os.environ["JAXLAB_DOCS_SWITCHER"]\n')

    def git(*args):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *args], cwd=root, check=True)

    git("init", "-q")
    for version in ("0.9", "0.10"):
        (root / "docs" / "index.rst").write_text(f"Title\n=====\n\nText of {version}\n")
        git("add", ".")
        git("commit", "-qm", version)
        git("tag", f"v{version}")
    (root / "docs" / "index.rst").write_text("Title\n=====\n\nText of today\n")
    return root


def test_each_version_is_built_from_its_own_sources_once(site, project, tmp_path, unchecked):
    out = tmp_path / "site"
    assert site.build(out, base="/lab/", root=project) == ["dev", "0.10", "0.9"]
    for version, text in (("dev", "today"), ("0.10", "0.10"), ("0.9", "0.9")):
        page = (out / version / "index.html").read_text()
        assert f"Text of {text}" in page
        assert "/lab/switcher.json" in page
    listed = json.loads((out / "switcher.json").read_text())
    assert [(entry["name"], entry["url"]) for entry in listed] == [
        ("dev", "/lab/dev/"),
        ("0.10 (newest)", "/lab/0.10/"),
        ("0.9", "/lab/0.9/"),
    ]
    assert "url=/lab/0.10/" in (out / "index.html").read_text()

    built = (out / "0.9" / "index.html").stat().st_mtime_ns
    (project / "docs" / "index.rst").write_text("Title\n=====\n\n:doc:`nowhere`\n")
    with pytest.raises(subprocess.CalledProcessError):
        site.build(out, base="/lab/", root=project)
    assert "Text of today" in (out / "dev" / "index.html").read_text()
    assert (out / "0.9" / "index.html").stat().st_mtime_ns == built
    assert sorted(path.name for path in out.iterdir()) == ["0.10", "0.9", "dev", "index.html", "switcher.json"]
    with pytest.raises(ValueError, match="base: expected a path that begins and ends with a slash, got 'lab'"):
        site.build(out, base="lab", root=project)
