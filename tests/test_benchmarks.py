"""The benchmark and evidence commands: records, missed bars, failing files, and going on after a kill."""

import json
import math
import re
import sys
import types

import pytest

from benchmarks import __main__ as command
from benchmarks import evidence, harness

KEYS = ["system", "case", "metric", "ours", "peer", "peer_name", "ratio", "bar", "holds", "versions", "threads", "date"]


@pytest.fixture
def made_up(monkeypatch):
    """A benchmark file with a bar that holds, one that is missed, one without bounds, and one without a bar."""

    def cases(quick):
        yield harness.Case("made-up", "fast", "ms", ours=1.0, peer=3.0, peer_name="a peer", bar=2.0)
        yield harness.Case("made-up", "slow", "tokens/s", 1.0, 2.0, "a peer", bar=1.0, higher_is_better=True)
        yield harness.Case("made-up", "empty", "bytes", 0.0, 5.0, "a peer", bar=8.0)
        yield harness.Case("made-up", "quick" if quick else "full", "ms", 2.0, 2.0, "a peer")

    monkeypatch.setitem(sys.modules, "benchmarks.made_up", types.SimpleNamespace(cases=cases))
    monkeypatch.setattr(command, "modules", lambda wanted=(): {"made_up": "made-up"})


def test_records_and_missed_bars(made_up, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    assert command.main(["--results", str(results)]) == 0
    out = capsys.readouterr().out
    assert "MISSED" in out
    assert "2 of 3 bars hold" in out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["ratio"] for row in rows] == [3.0, 0.5, None, 1.0]
    assert [row["holds"] for row in rows] == [True, False, True, True]
    assert rows[-1]["case"] == "full"
    assert rows[0]["versions"]["jax"]
    assert command.main(["--quick", "--strict", "--results", str(results)]) == 1
    assert len(results.read_text().splitlines()) == 8  # a history: nothing is overwritten


def test_a_failing_file_keeps_the_rest(made_up, tmp_path, monkeypatch, capsys):
    def broken(quick):
        raise RuntimeError("broken")
        yield

    monkeypatch.setitem(sys.modules, "benchmarks.broken", types.SimpleNamespace(cases=broken))
    monkeypatch.setattr(command, "modules", lambda wanted=(): {"broken": "made-up", "made_up": "made-up"})
    assert command.main(["--results", str(tmp_path / "results.jsonl")]) == 1
    assert "failed: broken" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_files_are_found_by_name_or_system(capsys):
    found = command.modules()
    assert "kernels" in found
    assert command.modules(["kernels"]) == {"kernels": "foundation"}
    assert command.modules(["foundation"]) == {stem: system for stem, system in found.items() if system == "foundation"}
    with pytest.raises(SystemExit) as end:
        command.main(["nonsense"])
    assert end.value.code == 2
    assert "kernels" in capsys.readouterr().err


def test_ratios_point_upwards():
    assert harness.Case("s", "c", "ms", 2.0, 6.0, "p").ratio == 3.0
    assert harness.Case("s", "c", "tokens/s", 6.0, 2.0, "p", higher_is_better=True).ratio == 3.0
    assert math.isinf(harness.Case("s", "c", "tokens/s", 6.0, 0.0, "p", higher_is_better=True).ratio)


def test_timing_takes_turns():
    calls = []
    ours, peer = harness.interleaved(lambda: calls.append("ours"), lambda: calls.append("peer"), repeats=5)
    assert calls == ["ours", "peer"] * 6
    assert 0 <= ours < 1
    assert 0 <= peer < 1


def test_evidence_goes_on_where_it_stopped(tmp_path, monkeypatch):
    runs = []
    settings = {"a": 1, "b": 2}

    def item(name):
        def run():
            runs.append(name)
            if name == "b" and len(runs) == 2:
                raise KeyboardInterrupt
            return {"name": name, "value": 1.5, "fits": True, "nothing": None}

        return evidence.Item(name, "A table", {"size": settings[name]}, run, seeds=(0,))

    monkeypatch.setattr(evidence, "_items", lambda system: iter([item("a"), item("b")]))
    with pytest.raises(KeyboardInterrupt):
        evidence.make("made-up", folder=tmp_path)
    content = evidence.make("made-up", folder=tmp_path)
    assert runs == ["a", "b", "b"]
    assert content["command"] == "python -m benchmarks.evidence made-up"
    assert {"seeds", "versions", "date", "settings", "row"} <= content["items"]["a"].keys()
    assert "| a | 1.5 | yes |  |" in (tmp_path / "made-up.md").read_text()
    settings["a"] = 3
    evidence.make("made-up", folder=tmp_path)
    assert runs == ["a", "b", "b", "a"]
    evidence.make("made-up", folder=tmp_path, fresh=True, limit=1)
    assert runs == ["a", "b", "b", "a", "a"]
    settings["b"] = str(evidence.FOLDER)
    with pytest.raises(ValueError, match="settings: expected those of 'b' to name no folder in"):
        evidence.make("made-up", folder=tmp_path)


def test_evidence_is_of_no_machine():
    for file in evidence.FOLDER.glob("*.json"):
        for item in json.loads(file.read_text())["items"].values():
            assert not re.search(r'"/(home|root|work|tmp|Users|mnt)/', json.dumps(item)), file
