"""Configurations, tables and lines of text, each with its reader."""

import dataclasses

from tests.fuzz.mutations import REFUSED, Format, beside

_YAML = b"""system: foundation
model: &m {vocab_size: 64, hidden_size: 16}
list: [1, 2.5, "x", null]
other: {copy: *m}
name: ${model.vocab_size}
"""


def _system_of(path):
    from jaxlab import recipes

    return recipes.system_of(path)


def _config(path):
    from jaxlab import recipes
    from jaxlab.foundation import recipe

    return recipes.load(recipe.run, path)


def _laptop():
    from jaxlab.core import find_config

    return find_config("configs/foundation/laptop.yaml").read_bytes()


def _jsonl(path):
    from jaxlab.core import jsonl

    return jsonl.read(path)


def _trace(path):
    from jaxlab.voltanallm.sim.traces import Trace, read_lengths

    read_lengths(path)
    return Trace.azure(path)


_TRACE = b"""TIMESTAMP,ContextTokens,GeneratedTokens,num_prefill_tokens,num_decode_tokens
2023-11-16 18:15:46.6805900,374,44,374,44
2023-11-16 18:15:50.9951690,396,109,396,109
"""
_TABLE = (
    b"freq,bs_start,bs_end,coef_bs,coef_tokens,coef_intercept,r_2\n900,1,4,0.1,0.001,5.0,0.9\n990,1,4,0.1,0.1,4,1\n"
)


def _table(path):
    from jaxlab.voltanallm.predictor import LatencyTable

    return LatencyTable.from_csv(path)


def _tasks(name):
    def read(path):
        from jaxlab.vlm_scaling import tasks

        return getattr(tasks, name)(path)

    return read


_MATHVISTA = {
    "1": {
        **{"pid": "1", "question": "How many?", "image": "images/1.png", "answer": "4", "unit": "cm", "precision": 1.0},
        **{"question_type": "multi_choice", "answer_type": "integer", "choices": ["3", "4"], "metadata": {"a": 1}},
    }
}
_MATHVERSE = [
    {
        **{"sample_index": "1", "problem_version": "Text Dominant", "question": "Find x.\nChoices:\nA:1\nB:2"},
        **{"answer": "A", "question_type": "multi-choice", "image": "a.png", "query_cot": "Find x. Choices:\nA:1\nB:2"},
    }
]
_GEOQA = [
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nFind x.\nChoices:\nA:1\nB:2"},
            {"from": "gpt", "value": "It is so. Answer: B"},
        ],
    }
]
_PROMPT_ROW = {"image_path": "a.png", "question": "Find x. Choices:\nA:1\nB:2", "ground_truth": "A"}
_SAMPLES = {"doc_id": 3, "resps": [["a", "b"]], "n_tokens": [1, 2], "logprobs": [-0.5, -1.0]}
_REPORT = {
    "format": 1,
    "system": "xmoe",
    "title": "T",
    "synthetic": False,
    "metrics": {"a": 1.5, "b": "NaN"},
    "tables": [{"title": "t", "columns": ["x"], "rows": [[1]]}],
    "plots": [{"title": "p", "file": "p.png"}],
    "notes": ["n"],
}


def _report(path):
    from jaxlab.core import Report

    return Report.load(path.parent)


def _report_content():
    from jaxlab.core import report

    return _REPORT | {"format": report._FORMAT}


def _samples(path):
    from jaxlab.vlm_scaling.adapters import jsonl_samples_in

    return jsonl_samples_in(path)


def _answers(path):
    from jaxlab.voltanallm.load import LoadResult

    return LoadResult.load(path)


def _answers_row():
    from jaxlab.voltanallm.load import Answer

    told = dict.fromkeys((field.name for field in dataclasses.fields(Answer)), 1.0)
    return told | {"piece_s": [0.6, 0.7], "error": ""}


def _rollouts(path):
    from jaxlab.eaglet import RolloutCache

    return RolloutCache(path)


def _rollouts_row():
    from jaxlab.eaglet import Rollout

    told = dict.fromkeys((field.name for field in dataclasses.fields(Rollout)), "")
    return told | {"seed": 0, "reward": 0.5, "done": True, "actions": ["a"], "observations": ["b"]}


def _study_row():
    from jaxlab.vlm_scaling.responses import _digest
    from jaxlab.vlm_scaling.samples import Question

    question = Question("q", "?", "1")
    return {
        "question": "q",
        "digest": _digest(question),
        "seed": 0,
        "samples": {"0": ["a", 1, 0.5]},
        "verdicts": {"m": {"a": 1}},
    }


def _study(path):
    from jaxlab.vlm_scaling.responses import Responses
    from jaxlab.vlm_scaling.samples import Question

    return Responses(path, [Question("q", "?", "1")], 0)


BYTES = {
    "yaml": Format("a.yaml", lambda: _YAML, _system_of),
    "config": Format("a.yaml", _laptop, _config, (*REFUSED, TypeError)),
    "json lines": Format("a.jsonl", lambda: b'{"a": [1, 2.5], "b": "x"}\n[null, true]\n{"torn', _jsonl),
    "trace": Format("a.csv", lambda: _TRACE, _trace),
    "latency table": Format("a.csv", lambda: _TABLE, _table),
}


DOCUMENTS = {
    "mathvista": Format("testmini.json", lambda: _MATHVISTA, _tasks("mathvista")),
    "mathverse": Format("testmini.json", lambda: _MATHVERSE, _tasks("mathverse")),
    "geoqa": Format("qa_tuning.json", lambda: _GEOQA, _tasks("geoqa")),
    "report": Format("report.json", _report_content, _report, beside=beside("p.png", b"x")),
}


LINES = {
    "geoqa": Format("geoqa_test_prompts.jsonl", lambda: _PROMPT_ROW, _tasks("geoqa")),
    "samples": Format("a.jsonl", lambda: _SAMPLES, _samples),
    "answers": Format("a.jsonl", _answers_row, _answers),
    "rollouts": Format("a.jsonl", _rollouts_row, _rollouts),
    "study": Format("a.jsonl", _study_row, _study),
}
