"""Builds a site of all released versions: `python docs/site.py OUT [--base /]`, or `make site`.

Every tag `v*` and the working tree, called "dev", is built from its own sources and with its own saved notebooks, so
that pages show the pictures and figures of their version. What is there already is not built again, "dev" excepted.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEV = "dev"


def build(out: Path, *, base: str = "/", root: Path = ROOT) -> list[str]:
    """Builds what is missing and writes the list of versions, and a first page that leads to the newest release.

    Args:
      out: folder of the site; versions are folders in it.
      base: path under which a server shows `out`.
      root: checkout whose tags and files are built.

    Returns:
      The versions, newest first.

    Raises:
      ValueError: base does not begin and end with a slash.
      CalledProcessError: Sphinx failed; what it wrote is not kept.
    """
    if not (base.startswith("/") and base.endswith("/")):
        raise ValueError(f"base: expected a path that begins and ends with a slash, got {base!r}")
    releases = _releases(root)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    _build(root, DEV, out, base)
    for version in releases:
        if not (out / version).exists():
            with tempfile.TemporaryDirectory() as scratch:
                _build(_checkout(root, version, Path(scratch)), version, out, base)
    known = [DEV, *releases]
    names = {version: f"{version} (newest)" if version in releases[:1] else version for version in known}
    entries = [{"name": names[version], "version": version, "url": f"{base}{version}/"} for version in known]
    (out / "switcher.json").write_text(json.dumps(entries, indent=1) + "\n")
    first = html.escape(f"{base}{(releases or known)[0]}/")
    page = f'<!doctype html><title>jaxlab</title><meta http-equiv="refresh" content="0; url={first}">'
    (out / "index.html").write_text(f'{page}<a href="{first}">jaxlab</a>\n')
    return known


def _releases(root: Path) -> list[str]:
    """Versions with a tag, newest first."""
    tags = subprocess.run(["git", "tag", "--list", "v*"], cwd=root, capture_output=True, text=True, check=True)
    found = [tag[1:] for tag in tags.stdout.split() if re.fullmatch(r"v\d+(\.\d+)*", tag)]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def _checkout(root: Path, version: str, folder: Path) -> Path:
    packed = subprocess.run(["git", "archive", f"v{version}"], cwd=root, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def _build(source: Path, version: str, out: Path, base: str) -> None:
    """One version; its folder appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tree, made = Path(scratch) / "tree", Path(scratch) / "html"
        shutil.copytree(
            source / "docs", tree / "docs", ignore=shutil.ignore_patterns("_build", "notebooks", "generated")
        )
        shutil.copytree(source / "notebooks", tree / "docs" / "notebooks", ignore=shutil.ignore_patterns("*.py"))
        for entry in source.iterdir():
            if entry.is_file():  # an included page's links count from where it lies
                shutil.copy(entry, tree)
            elif entry.name != "docs":
                (tree / entry.name).symlink_to(entry)
        told = {"JAXLAB_DOCS_VERSION": version, "JAXLAB_DOCS_SWITCHER": f"{base}switcher.json"}
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(made)]
        subprocess.run(command, env={**os.environ, **told, "PYTHONPATH": str(tree)}, cwd=tree, check=True)
        shutil.rmtree(out / version, ignore_errors=True)
        made.rename(out / version)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python docs/site.py", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the site")
    parser.add_argument("--base", default="/", help="path under which a server shows it; default /")
    options = parser.parse_args(args)
    try:
        print(", ".join(build(options.out, base=options.base)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
