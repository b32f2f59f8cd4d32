"""The benchmark and evidence commands: records, missed bars, failing files, and going on after a kill."""

import json
import math
import os
import re
import sys
import time
import types

import pytest

from benchmarks import NAMES, evidence, harness, history, page
from benchmarks import __main__ as command
from jaxlab import recipes

KEYS = [
    "system",
    "case",
    "metric",
    "ours",
    "peer",
    "peer_name",
    "ratio",
    "bar",
    "holds",
    "quick",
    "versions",
    "threads",
]


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
    told = ["--results", str(results), "--docs", str(tmp_path / "docs")]
    assert command.main(told) == 0
    out = capsys.readouterr().out
    assert "MISSED" in out
    assert "2 of 3 bars hold" in out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [list(row) for row in rows] == [[*KEYS, "date"]] * 4
    assert [row["ratio"] for row in rows] == [3.0, 0.5, None, 1.0]
    assert [row["holds"] for row in rows] == [True, False, True, True]
    assert rows[-1]["case"] == "full"
    assert rows[0]["versions"]["jax"]
    assert command.main(["--quick", "--strict", *told]) == 1
    assert len(results.read_text().splitlines()) == 8  # nothing is overwritten
    (kept,) = history.read(tmp_path / "docs" / history.FILE)  # of the full run: a quick one never replaces it
    assert (kept.file, kept.system, kept.quick) == ("made_up", "made-up", False)
    assert [case["case"] for case in kept.cases] == ["fast", "slow", "empty", "full"]
    assert kept.versions["jax"] == rows[0]["versions"]["jax"]
    shown = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| fast | ms | 1 | 3 | a peer | 3x | 2x | yes |" in shown
    assert "| slow | tokens/s | 1 | 2 | a peer | 0.5x | 1x | **missed** |" in shown
    assert "| empty | bytes | 0 | 5 | a peer | ∞ | 8x | yes |" in shown
    assert (tmp_path / "docs" / page.OVERVIEW).stat().st_size > 1000
    assert not (tmp_path / "docs" / page.OVER_TIME).exists()


def test_a_failing_file_keeps_the_rest(made_up, tmp_path, monkeypatch, capsys):
    def broken(quick):
        raise RuntimeError("broken")
        yield

    monkeypatch.setitem(sys.modules, "benchmarks.broken", types.SimpleNamespace(cases=broken))
    monkeypatch.setattr(command, "modules", lambda wanted=(): {"broken": "made-up", "made_up": "made-up"})
    assert command.main(["--results", str(tmp_path / "results.jsonl"), "--docs", str(tmp_path)]) == 1
    assert "failed: broken" in capsys.readouterr().out
    assert [run.file for run in history.read(tmp_path / history.FILE)] == ["made_up"]  # only what came to its end
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def run(date, *, quick=False, cpu="a", elsewhere=0.0, jax="1", ratio=2.0, bar=1.0, file="made_up"):
    case = {"case": "fast", "metric": "ms", "ours": 1.0, "peer": ratio, "peer_name": "a | peer", "ratio": ratio}
    cases = [{**case, "bar": bar, "holds": bar is None or ratio >= bar}]
    return history.Run(file, "made-up", date, quick, 1.0, 2, cpu, elsewhere, {"jax": jax}, cases)


def test_history_is_thin(tmp_path):
    path = tmp_path / "docs" / "kept.jsonl"
    for each in (run("2026-01-01T08", quick=True), run("2026-01-01T09", quick=True, ratio=3.0)):
        history.keep(path, each)
    assert [each.date for each in history.read(path)] == ["2026-01-01T09"]  # the later of the quick ones
    history.keep(path, run("2026-01-02T08"))
    history.keep(path, run("2026-01-02T09", quick=True))
    history.keep(path, run("2026-01-02T10", quick=True, file="other"))
    assert [each.date for each in history.read(path)] == ["2026-01-02T08", "2026-01-02T10"]
    history.keep(path, run("2026-01-02T11"))
    others = [run("2026-01-02T12", jax="2"), run("2026-01-02T13", cpu="b"), run("2026-01-02T14", elsewhere=1.0)]
    for each in (*others, run("2026-01-03T08")):
        history.keep(path, each)
    kept = history.read(path)
    assert [each.date[8:] for each in kept] == ["02T11", "02T12", "02T13", "02T14", "03T08", "02T10"]
    assert [each.date[8:] for each in history.current(kept)] == ["03T08", "02T10"]
    assert history.case({**kept[0].cases[0], "ours": 1.23456789})["ours"] == 1.2346


def test_page_tells_quick_and_busy_runs():
    known = {"made_up": "made-up", "other": "made-up"}
    text = "\n".join(page.lines([run("2026-01-02", quick=True, elsewhere=1.26)], known))
    assert "| fast | ms | 1 | 2 | a \\| peer | 2x | 1x | yes | 2026-01-02, quick, busy |" in text
    assert "1.3 cores busy with other work" in text
    assert "Not in this history yet: `other`." in text
    assert "| 1 of 1 | 0 | 1 | 1 | 2026-01-02 | up to 1.3 cores |" in text
    quiet = "\n".join(page.lines([run("2026-01-02", ratio=0.5)], known))
    assert "| 0.5x | 1x | **missed** | 2026-01-02 |" in quiet
    assert "| 0 of 1 | 1 | 0 | 1 | 2026-01-02 | no |" in quiet


def test_page_over_dates(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "modules", lambda wanted=(): {"made_up": "made-up"})
    path = tmp_path / history.FILE
    history.keep(path, run("2026-01-01"))
    history.keep(path, run("2026-01-02", cpu="b"))
    page.write(tmp_path)
    assert not (tmp_path / page.OVER_TIME).exists()  # two machines are no line
    history.keep(path, run("2026-01-03", ratio=3.0))
    page.write(tmp_path)
    assert (tmp_path / page.OVER_TIME).stat().st_size > 1000
    assert page.OVER_TIME.name in (tmp_path / "benchmarks.md").read_text()
    (line,) = page.over_dates(history.read(path)).axes[0].lines[:-1]
    assert list(line.get_ydata()) == [2.0, 3.0]


def test_the_page_is_that_of_the_history():
    runs = history.current(history.read(page.DOCS / history.FILE))
    text = (page.DOCS / "benchmarks.md").read_text()
    assert all(f"- `{each.file}`: {each.day}, " in text for each in runs)
    assert set(NAMES) == set(recipes.SYSTEMS) - {"pipeline"}  # which has no peer


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_what_others_take_of_the_machine():
    neighbours = history.Neighbours()
    ended = time.perf_counter() + 0.3
    while time.perf_counter() < ended:
        pass
    assert 0 <= neighbours.cores() < os.cpu_count()


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
