"""Samples from and to other tools, and questions from files in the forms that are published."""

import json
import sys
import types

import numpy as np
import pytest

from jaxlab.core.errors import DataUnavailable, MissingExtra
from jaxlab.vlm_scaling import Majority, Question, Sample, Study, adapters, tasks
from jaxlab.vlm_scaling.simulation import Simulation


def test_samples_go_out_and_come_in(tmp_path):
    model, path = Simulation(p=0.5), tmp_path / "samples.jsonl"
    questions = model.questions(3)
    study = Study(questions, model, strategies=[Majority(3)], n=3, n_resamples=50)
    adapters.jsonl_samples_out(path, questions, study.samples())
    assert adapters.jsonl_samples_in(path) == study.samples()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    assert rows[0]["filtered_resps"] == [text.split("{")[1][0] for text in rows[0]["resps"][0]]
    again = Study(questions, adapters.Replay(adapters.jsonl_samples_in(path)), strategies=[Majority(3)], n=3)
    assert again.run().outcomes["majority@3"].tolist() == study.run().outcomes["majority@3"].tolist()
    with pytest.raises(KeyError, match="expected sample 3 among the recorded, got 3"):
        adapters.Replay(study.samples()).sample(questions[0], [0, 3], seed=0)
    with pytest.raises(KeyError, match="samples: expected some of 'q00000'"):
        adapters.jsonl_samples_out(path, questions, {})


def test_logs_of_lmms_eval_come_in(tmp_path):
    path = tmp_path / "log.jsonl"
    logged = [{"doc_id": 0, "resps": [["a"], ["b"]], "filtered_resps": ["a", "b"]}, {"doc_id": 0, "resps": ["c"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in logged))
    assert adapters.jsonl_samples_in(path) == {"0": [Sample("a"), Sample("b"), Sample("c")]}
    for row, message in (({"doc_id": 1}, "expected doc_id and resps"), ({**logged[0], "n_tokens": [1]}, "2 counts")):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            adapters.jsonl_samples_in(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file of samples"):
        adapters.jsonl_samples_in(tmp_path / "none")


class Picture:
    def convert(self, mode):
        assert mode == "RGB"
        return np.full((1, 2, 3), 9, np.uint8)


class Told:
    def __init__(self):
        self.questions = []

    def sample(self, question, indices, *, seed):
        self.questions.append(question)
        return [Sample(f"{index} then STOP more") for index in indices]

    def greedy(self, question):
        return Sample("greedy\n\nmore")


def test_a_model_for_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MissingExtra, match="pip install lmms-eval"):
        adapters.lmms_eval_model(Told())

    class Base:
        def __init__(self):
            self.task_dict = {}

    modules = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Base}}
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    sampler = Told()
    model = adapters.lmms_eval_model(sampler)
    assert isinstance(model, Base)
    model.task_dict = {"task": {"test": [{"pictures": [Picture()]}, {"pictures": None}]}}

    def request(document, **options):
        arguments = ("What?", options, lambda doc: doc["pictures"], document, "task", "test")
        return types.SimpleNamespace(args=arguments)

    warm = {"temperature": 1.0, "until": ["STOP", ""]}
    requests = [request(0, until="\n\n"), request(0, **warm), request(0, **warm), request(1, **warm)]
    assert model.generate_until(requests) == ["greedy", "0 then ", "1 then ", "0 then "]
    assert model.generate_until([request(1, do_sample=False, temperature=1.0)]) == ["greedy\n\nmore"]
    assert [question.id for question in sampler.questions] == ["task/test/0", "task/test/0", "task/test/1"]
    assert sampler.questions[0].images[0].shape == (1, 2, 3)
    assert sampler.questions[2].images == ()
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="lmms_eval_model"):
            method([])


VISTA = {
    "1": {
        **{"pid": "1", "question": "How far?", "image": "images/1.jpg", "choices": None, "unit": "m", "precision": 1.0},
        **{"answer": "1.2", "question_type": "free_form", "answer_type": "float", "metadata": {"grade": "college"}},
    },
    "2": {
        **{"pid": "2", "question": "Which?", "image": "images/2.jpg", "choices": ["3/11", "8/11"], "unit": None},
        **{"answer": "8/11", "question_type": "multi_choice", "answer_type": "text", "precision": None},
    },
}
VERSE = [
    {
        **{"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant", "image": "v1/image_1.png"},
        **{
            "question": "The size is ()\nChoices:\nA:40\u00b0\nB:60\u00b0",
            "answer": "B",
            "question_type": "multi-choice",
        },
        **{"query_cot": "Please first conduct reasoning.\nQuestion: The size is ()\nChoices:\nA:40\u00b0\nB:60\u00b0"},
    },
    {
        **{"sample_index": "2", "problem_index": "1", "problem_version": "Vision Only", "image": "v6/image_1.png"},
        **{
            "question": "",
            "answer": "14",
            "question_type": "free-form",
            "query_cot": "According to the image, reason.",
        },
    },
]
GEO = [
    {
        "image": "geoqa_plus/1.png",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nAnswer: xxx.\nQuestion: The angle is\nChoices:\nA:80\u00b0\nB:100\u00b0",
            },
            {"from": "gpt", "value": "By the theorem it is 100\u00b0.\nAnswer:B"},
        ],
    }
]


def test_mathvista(tmp_path):
    (tmp_path / "testmini.json").write_text(json.dumps(VISTA))
    first, second = tasks.mathvista(tmp_path)
    assert (first.id, first.answer, first.choices) == ("mathvista/1", "1.2", None)
    assert first.text == "How far? (Unit: m)"
    assert first.images == (str(tmp_path / "images" / "1.jpg"),)
    assert first.meta["metadata"] == {"grade": "college"}
    assert (second.answer, second.choices) == ("B", {"A": "3/11", "B": "8/11"})
    assert second.text.endswith("(A) 3/11\n(B) 8/11")
    assert tasks.grade("1.20", first)
    assert not tasks.grade("1.21", first)
    assert not tasks.grade("6/5", first)  # the rule of MathVista parses no fraction
    assert tasks.grade("(B)", second)
    assert not tasks.grade(None, first)


def test_mathverse(tmp_path):
    (tmp_path / "testmini.json").write_text(json.dumps(VERSE))
    first, second = tasks.mathverse(tmp_path / "testmini.json")
    assert first.choices == {"A": "40\u00b0", "B": "60\u00b0"}
    assert first.text.startswith("Please first conduct")
    assert first.images == (str(tmp_path / "images" / "v1" / "image_1.png"),)
    assert (second.choices, second.answer, second.meta["problem_version"]) == (None, "14", "Vision Only")
    assert tasks.grade("60", first)
    assert [each.id for each in tasks.mathverse(tmp_path, versions=["Vision Only"])] == ["mathverse/2"]
    with pytest.raises(ValueError, match="versions: expected some of Text Dominant, Vision Only, got 'Blind'"):
        tasks.mathverse(tmp_path, versions=["Blind"])


def test_geoqa(tmp_path):
    prompts = tmp_path / "geoqa_test_prompts.jsonl"
    prompts.write_text(
        json.dumps({"image_path": "images/test/0.png", "question": "Angle?", "ground_truth": "145"}) + "\n"
    )
    (row,) = tasks.geoqa(tmp_path, images="/data")
    assert row == Question("geoqa/0", "Angle?", "145", ("/data/images/test/0.png",))
    (tmp_path / "qa_tuning.json").write_text(json.dumps(GEO))
    (row,) = tasks.geoqa(tmp_path)
    assert (row.answer, row.choices) == ("B", {"A": "80\u00b0", "B": "100\u00b0"})
    assert row.text.startswith("Answer: xxx")
    assert row.images == (str(tmp_path / "images" / "geoqa_plus" / "1.png"),)
    with pytest.raises(ValueError, match="got the pickle"):
        tasks.geoqa("train.pk")


def test_files_that_are_not_there_or_not_theirs(tmp_path):
    for load, name in ((tasks.mathvista, "MathVista"), (tasks.mathverse, "MathVerse"), (tasks.geoqa, "GeoQA")):
        with pytest.raises(DataUnavailable, match=f"{name}: expected .*json; it comes from https"):
            load(tmp_path)
    for name in ("testmini.json", "qa_tuning.json"):
        (tmp_path / name).write_text("[")
    for load in (tasks.mathvista, tasks.mathverse, tasks.geoqa):
        with pytest.raises(ValueError, match="expected JSON in"):
            load(tmp_path)
    for name in ("testmini.json", "qa_tuning.json"):
        (tmp_path / name).write_text('[{"pid": 1}]')
    for load in (tasks.mathvista, tasks.mathverse, tasks.geoqa):
        with pytest.raises(ValueError, match=r"expected problems with .*, got one without"):
            load(tmp_path)
    for talk, message in (
        ([], "human and gpt"),
        (GEO[0]["conversations"][:1] + [{"from": "gpt"}], "expected an answer"),
    ):
        (tmp_path / "qa_tuning.json").write_text(json.dumps([{"image": "a", "conversations": talk}]))
        with pytest.raises(ValueError, match=message):
            tasks.geoqa(tmp_path)
