"""The table of all paper-scale plans: nothing left out, nothing out of date, numbers those of the evidence."""

import json
from pathlib import Path

import pytest

from benchmarks import NAMES, evidence, plan_table

ROOT = Path(plan_table.__file__).resolve().parent.parent


def source(system):
    return next(each for each in plan_table.SOURCES if each.system == system)


def test_every_plan_of_the_evidence_is_in_the_table():
    assert {each.system for each in plan_table.SOURCES} == set(NAMES)
    files = {each.file for each in plan_table.SOURCES}
    assert files >= {path.stem for path in plan_table.FOLDER.glob("*_plans.json")}
    assert files - {None} <= set(evidence.files())
    for each in plan_table.SOURCES:
        config = each.command.split()[2]
        assert (ROOT / config).is_file(), config
        path = plan_table.FOLDER / f"{each.file}.json"
        if not path.exists():
            continue
        rows = [item["row"] for item in json.loads(path.read_text())["items"].values()]
        # Super's rows stand in two tables of X-MoE's evidence and are told once.
        told = [row for row in rows if any("fits" in column for column in row) and row.get("size") != "super"]
        assert told, each.file
        assert all(list(each.read(row)) for row in told), each.file


def test_the_page_is_that_of_the_evidence():
    assert plan_table.FILE.read_text() == "\n".join(plan_table.lines()) + "\n"


def test_numbers_and_phrases(tmp_path):
    row = {"machine": "1x8x8 h100", "layout": "fsdp 64", "changes": "model.remat=none", "fits": False}
    sizes = {"parameters": 1.0, "optimizer": 18.4, "temporaries": 80.0, "total": 100.0}
    (made,) = source("foundation").read({**row, **sizes})
    assert (made.what, made.gpu, made.devices) == ("8 B parameters, AdamW, fsdp 64, model.remat=none", ("h100",), 64)
    assert made.total == pytest.approx(107.3741824)
    items = {"a": {"row": {**row, **sizes}}, "b": {"row": {**row, **sizes, "fits": True, "total": 80.0, "changes": ""}}}
    (tmp_path / "foundation.json").write_text(json.dumps({"items": items}))
    text = "\n".join(plan_table.lines(tmp_path))
    assert "| H100 | 64 | 107 | **no** | temporaries 80%, optimizer 18% |" in text
    assert "| H100 | 64 | 85.9 | yes | temporaries 100%, optimizer 23% |" in text
    assert "| Foundation | Training steps of Llama 3.1 8B's shape | 2 | 1 |" in text
    assert "| SFPO | Rollouts and updates of Qwen2.5-Math | not made yet |  |" in text
    assert "no table kept" in text


def test_policies_have_two_phases():
    row = {"model": "7B", "devices": 8, "policy": 4.0, "reference": 4.0, "optimiser": 8.0, "cache": 30.0}
    phases = {"rollout": 40.0, "rollout fits": True, "update": 90.0, "update fits": False, "update without SFPO": 86.0}
    rollout, update = source("sfpo").read({**row, **phases})
    assert (rollout.what, rollout.total, rollout.fits) == ("7B, rollout", 40.0, (True,))
    assert (update.what, update.total, update.fits) == ("7B, update", 90.0, (False,))
    assert update.where == {"policy": 4.0, "reference": 4.0, "optimiser": 8.0, "all else": 74.0}


def test_hosts_and_longest_crops():
    (made,) = source("superoffload").read(
        {"tokens, K": 1024, "method": "m", "device": 24.0, "host": 101.4, "fits": True}
    )
    assert (made.what, made.devices, made.beside) == ("13B, 1,024K tokens, m", 8, "beside 101.4 GB on each host")
    (made,) = source("megafold").read(
        {"GPUs": "8 h100", "fused": "all", "longest crop": 4416, "total": 9.0, "room": 8.0}
    )
    assert (made.devices, made.fits) == (8, (False,))
