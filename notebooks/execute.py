"""Executes the notebooks: `python notebooks/execute.py [NAME ...] [--fresh] [--save]`.

The source of a notebook is its `.py` file (jupytext, percent format), which is what is edited, linted and reviewed. The
`.ipynb` beside it is the same cells with pictures, for readers on the web. It is written by `--save`, with the pictures
of the gallery (`gallery.py`), and a run fails when the two have drifted apart. The executed copy goes to
`docs/notebooks`, where the site shows it; it is reused until the notebook or the library's code changes.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import gallery

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
EXECUTED = ROOT / "docs" / "notebooks"
LIMIT_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="stems such as 00_foundation; default all")
    parser.add_argument("--fresh", action="store_true", help="execute even what has not changed")
    parser.add_argument("--save", action="store_true", help="write the .ipynb beside each source, pictures included")
    options = parser.parse_args()
    sources = [HERE / f"{name}.py" for name in options.names] or sorted(HERE.glob("[0-9]*.py"))
    prefer_cpu()
    failed = [source.stem for source in sources if not process(source, options.fresh, options.save)]
    if options.save:
        gallery.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def process(source: Path, fresh: bool, save: bool) -> bool:
    """Executes one notebook, or finds it executed; says how it went."""
    import jupytext
    import nbformat
    from nbclient.exceptions import CellExecutionError

    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    target, pair = EXECUTED / f"{source.stem}.ipynb", source.with_suffix(".ipynb")
    key = fingerprint(source)
    if not fresh and target.exists() and nbformat.read(target, 4).metadata.get("jaxlab_key") == key:
        print(f"{source.stem}: unchanged")
        notebook = nbformat.read(target, 4)
    else:
        started = time.perf_counter()
        try:
            execute(notebook)
        except CellExecutionError as error:
            print(f"{source.stem}: {error}", file=sys.stderr)
            return False
        notebook.metadata["jaxlab_key"] = key
        EXECUTED.mkdir(parents=True, exist_ok=True)
        nbformat.write(tidy(notebook), target)
        print(f"{source.stem}: executed in {time.perf_counter() - started:.0f} s")
    if save:
        nbformat.write(notebook, pair)
    elif not pair.exists() or cells(nbformat.read(pair, 4)) != cells(notebook):
        print(f"{pair.name} differs from {source.name}: python notebooks/execute.py --save", file=sys.stderr)
        return False
    return True


def execute(notebook) -> None:
    """Runs the cells in the notebooks' folder, with this interpreter."""
    from nbclient import NotebookClient

    NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    ).execute()


def tidy(notebook):
    """Without what differs between two runs of the same thing: ids and times of cells."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("jupytext", None)
    return notebook


def cells(notebook) -> list[tuple[str, str]]:
    """What a notebook says, without what came out."""
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def fingerprint(source: Path) -> str:
    """What decides a notebook's outcome: its text, the library's code and configs."""
    digest = hashlib.sha256(source.read_bytes())
    for folder, pattern in (("jaxlab", "*.py"), ("pallas_kernels", "*.py"), ("configs", "*.yaml")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def prefer_cpu() -> None:
    """As the command line does: no search for a GPU driver where there is no GPU."""
    sys.path.insert(0, str(ROOT))
    from jaxlab import _platform

    _platform.prefer_cpu_without_gpu()
    _platform.quiet_compiler()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))


if __name__ == "__main__":
    main()
