"""Every parser, given changed files: a valid object or a documented error, within bounded time and memory."""

import gzip

import pytest

from tests.fuzz import data_files, model_files, scene_files, text_files
from tests.fuzz.model_files import MERGES, TRANSFORMERS, load_tokenizer
from tests.fuzz.mutations import Format, fuzz_bytes, fuzz_json, fuzz_members, text_of

_FILES = (scene_files, model_files, data_files, text_files)


def _all(table):
    """A table of all kinds of files, whose names differ."""
    tables = [getattr(files, table) for files in _FILES if hasattr(files, table)]
    joined = {name: form for forms in tables for name, form in forms.items()}
    assert len(joined) == sum(map(len, tables))
    return joined


BYTES, DOCUMENTS, MEMBERS = _all("BYTES"), _all("DOCUMENTS"), _all("MEMBERS")


@pytest.mark.parametrize("name", BYTES)
def test_changed_bytes(folder, name):
    fuzz_bytes(BYTES[name], folder)


@pytest.mark.parametrize("name", ["spz", "mmcif"])
def test_changed_bytes_under_gzip(folder, name):
    fuzz_bytes(BYTES[name], folder, lambda raw: gzip.compress(raw, mtime=0))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_other_values_in_json(folder, name):
    fuzz_json(DOCUMENTS[name], folder)


@pytest.mark.parametrize("name", text_files.LINES)
def test_other_values_in_json_lines(folder, name):
    fuzz_json(text_files.LINES[name], folder)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_changed_members_of_archives(folder, name, packed):
    fuzz_members(MEMBERS[name], folder, packed=packed)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_other_values_in_json_for_transformers(tmp_path, unchecked, name):
    """What it reads and we do not: its errors are ours, and name the folder."""
    pytest.importorskip("transformers")
    for other, content in TRANSFORMERS.items():
        (tmp_path / other).write_bytes(text_of(content))
    (tmp_path / "config.json").write_bytes(text_of({"model_type": "gpt2"}))
    (tmp_path / "merges.txt").write_bytes(MERGES)
    fuzz_json(Format(name, lambda: TRANSFORMERS[name], load_tokenizer, native=True), tmp_path)
