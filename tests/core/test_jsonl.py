import json
import multiprocessing
import os
import signal
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxlab.core import jsonl

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(values=st.lists(_json, max_size=5), cut=st.integers(0, 30))
def test_a_torn_last_line_is_dropped(values, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "deep" / "a.jsonl"
    for value in values:
        jsonl.append(path, value)
    assert jsonl.read(path) == values
    if not values:
        return
    whole = path.read_bytes()
    last = len(whole) - len(json.dumps(values[-1]).encode()) - 1
    os.truncate(path, max(last, len(whole) - cut))
    kept = values if cut == 0 else values[:-1]
    assert jsonl.read(path) == kept
    jsonl.append(path, "next")
    assert jsonl.read(path) == [*kept, "next"]


def test_long_torn_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    jsonl.append(path, "whole")
    with path.open("ab") as file:
        file.write(b'"' + b"x" * 200_000)
    jsonl.append(path, 2, sync=True)
    assert jsonl.read(path) == ["whole", 2]
    path.write_bytes(b"x" * 200_000)
    jsonl.append(path, 3)
    assert jsonl.read(path) == [3]


def test_damage_in_the_middle_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('1\n{"a"\n3\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected JSON"):
        jsonl.read(path)


def test_absent_located_rewritten(tmp_path):
    path = tmp_path / "a.jsonl"
    assert jsonl.read(path) == []
    jsonl.rewrite(path, [{"é": 1}, 2])
    (_, first), (offset, second) = jsonl.locate(path)
    assert (first, second, jsonl.read_at(path, offset)) == ({"é": 1}, 2, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def _append_for_ever(path):
    for number in range(10**9):
        jsonl.append(path, {"number": number, "text": "x" * 5000})


def test_a_killed_writer(tmp_path):
    path = tmp_path / "a.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=_append_for_ever, args=(path,), daemon=True)
    process.start()
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    rows = jsonl.read(path)
    assert [row["number"] for row in rows] == list(range(len(rows)))
    jsonl.append(path, "after")
    assert jsonl.read(path)[-1] == "after"
