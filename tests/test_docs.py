"""Pages written by hand: their verdicts, commands, pictures and links are those that exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import NAMES, evidence
from benchmarks.__main__ import modules
from jaxlab import recipes

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
VERDICTS = (
    "reproduced", "contradicted", "not seen", "compiled", "modelled", "not possible here", "not tried"
)  # fmt: skip


def rows():
    """Claim, paper, here, verdict, command: of every system's table, with its heading."""
    for section in (DOCS / "reproduction.md").read_text().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert table[:2] == ["| claim | the paper | here | verdict | command |", "|---|---|---|---|---|"], heading
        for line in table[2:]:
            yield heading, [cell.strip() for cell in line.strip("|").split("|")]


def test_every_paper_is_there():
    assert list(dict.fromkeys(heading for heading, _ in rows())) == [*NAMES.values()][1:]


@pytest.mark.parametrize(("heading", "cells"), [pytest.param(*row, id=f"{row[0]}: {row[1][0][:40]}") for row in rows()])
def test_verdicts_and_commands(heading, cells):
    assert len(cells) == 5
    claim, _, _, verdict, command = cells
    assert claim
    assert verdict.partition(",")[0] in VERDICTS
    if not command:
        assert verdict in ("not possible here", "not tried")
        return
    words = command.strip("`").split()
    if words[:3] == ["python", "-m", "benchmarks.evidence"]:
        assert words[3] in evidence.files()
    elif words[0] == "make":
        assert words[2].removeprefix("SYSTEM=") in {*modules(), *modules().values()}
    elif words[0] == "pytest":
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["jaxlab", "plan"]:
        assert (ROOT / words[2]).is_file()
    else:
        assert words[0] == "jaxlab"
        assert words[1] in recipes.SYSTEMS


def test_the_readme_shows_every_system_with_a_picture_and_a_command():
    table = [line.strip("|").split(" | ") for line in (ROOT / "README.md").read_text().splitlines() if "<img" in line]
    assert [re.search(r"\*\*(.+)\*\*", row[1])[1] for row in table] == [*NAMES.values(), "Pipeline"]
    titles = {
        line[3:].lower().replace(" ", "-")
        for line in (DOCS / "gallery.md").read_text().splitlines()
        if line[:2] == "##"
    }
    verbs = [*recipes.SYSTEMS, "train", "generate"]
    for picture, system, _, command in table:
        (image,), (title,) = re.findall(r'src="(.+?)"', picture), re.findall(r"gallery\.md#(.+)\)", picture)
        assert (ROOT / image).is_file()
        assert title in titles
        assert (ROOT / re.search(r"\((.+)\)", system)[1]).is_file()
        assert re.match(r" ?`jaxlab (\S+)", command)[1] in verbs


def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "notebooks" / "gallery.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_gallery_shows_every_system_and_pictures_that_exist():
    text = (DOCS / "gallery.md").read_text()
    sections = text.split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [*NAMES.values(), "Pipeline"]
    for section in sections:
        assert re.search(r"!\[[^]]+\]\(", section)
        (notebook,) = re.findall(r"\((notebooks/\w+)\)", section)
        assert (ROOT / f"{notebook}.ipynb").is_file()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert all((DOCS / name).is_file() for name in shown)
    assert {Path(name).stem for name in shown if name.startswith("gallery/")} == set(gallery().PICTURES)


@pytest.mark.parametrize("name", gallery().PICTURES)
def test_pictures_are_those_of_the_notebooks(name):
    kept = (DOCS / "gallery" / f"{name}.png").read_bytes()
    assert kept == gallery().picture(*gallery().PICTURES[name]), "python notebooks/gallery.py"


def test_a_picture_that_a_notebook_has_not():
    with pytest.raises(ValueError, match=r"expected less than \d+, the pictures of 01_xmoe"):
        gallery().picture("01_xmoe", 99)
