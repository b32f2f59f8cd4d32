"""Samples to and from other tools: lmms-eval's logs, recorded samples as a sampler, and a sampler as lmms-eval's model.

    from jaxlab.vlm_scaling import adapters
    adapters.jsonl_samples_out("samples.jsonl", questions, study.samples())
    sampler = adapters.Replay(adapters.jsonl_samples_in("samples.jsonl"))
    model = adapters.lmms_eval_model(sampler)     # for lmms_eval.evaluator.simple_evaluate(model=model, tasks=[...])

The file has the lines of lmms-eval's `--log_samples` (`doc_id`, `target`, `input`, `resps`, `filtered_resps`), with
counts and log-probabilities added.
"""

import collections
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core import jsonl
from jaxlab.core.errors import MissingExtra
from jaxlab.core.untrusted import understood
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.samples import GreedySampler, Question, Sample, Sampler


def jsonl_samples_out(
    path: str | os.PathLike, questions: Sequence[Question], samples: Mapping[str, Sequence[Sample]]
) -> None:
    """Writes samples, a line a question, over what was in the file.

    Args:
      path: the file.
      questions: in the order of the lines.
      samples: question id -> its samples.

    Raises:
      KeyError: a question without samples.
    """
    if missing := [question.id for question in questions if question.id not in samples]:
        raise KeyError(f"samples: expected some of {missing[0]!r}, got none")
    rows = []
    for number, question in enumerate(questions):
        drawn = samples[question.id]
        texts = [sample.text for sample in drawn]
        answers = [extract(text, choices=question.choices).value or "" for text in texts]
        rows.append(
            {
                **{"id": question.id, "doc_id": number, "target": question.answer, "input": question.text},
                **{"resps": [texts], "filtered_resps": answers},
                **{"n_tokens": [sample.n_tokens for sample in drawn], "logprobs": [sample.logprob for sample in drawn]},
            }
        )
    jsonl.rewrite(path, rows)


@understood("path: a line of samples")
def jsonl_samples_in(path: str | os.PathLike) -> dict[str, list[Sample]]:
    """Question id -> samples, from what `jsonl_samples_out` wrote or lmms-eval logged, where the id is the `doc_id`.

    Lines of the same question add up. Tokens that were not counted are 0.

    Raises:
      FileNotFoundError: no such file.
      ValueError: lines without `resps`, or with counts that do not fit.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"path: expected a file of samples, got {os.fspath(path)!r}")
    found: dict[str, list[Sample]] = collections.defaultdict(list)
    for number, row in enumerate(jsonl.read(path), 1):
        if not isinstance(row, dict) or "resps" not in row or not {"id", "doc_id"} & row.keys():
            raise ValueError(f"{path}, line {number}: expected doc_id and resps, got {str(row)[:80]}")
        texts = [text for group in row["resps"] for text in (group if isinstance(group, list) else [group])]
        counts, logprobs = row.get("n_tokens", [0] * len(texts)), row.get("logprobs", [0.0] * len(texts))
        if not len(texts) == len(counts) == len(logprobs):
            raise ValueError(f"{path}, line {number}: expected {len(texts)} counts, got {len(counts)}, {len(logprobs)}")
        name = str(row["id"] if "id" in row else row["doc_id"])
        found[name] += [Sample(str(text), int(count), float(p)) for text, count, p in zip(texts, counts, logprobs)]
    return dict(found)


class Replay:
    """A sampler of recorded samples: strategies compared on what another tool drew."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]]):
        """Takes question id -> samples."""
        self._samples = samples

    def sample(self, question: Question, indices: Sequence[int], *, seed: int) -> list[Sample]:
        """The recorded samples of these indices, whatever the seed.

        Raises:
          KeyError: a question or an index that was not recorded.
        """
        recorded = self._samples.get(question.id, ())
        if missing := [index for index in indices if not 0 <= index < len(recorded)]:
            raise KeyError(
                f"{question.id!r}: expected sample {missing[0]} among the recorded, got {len(recorded)} of them"
            )
        return [recorded[index] for index in indices]


def lmms_eval_model(sampler: Sampler, *, seed: int = 0) -> Any:
    """A sampler as a model of lmms-eval (0.7): a subclass of its `lmms` that generates texts.

    A request at temperature 0 (or with `do_sample` false) takes the sampler's `greedy` where it has one; the k-th other
    request for the same document takes its sample k. Texts are cut at the request's `until`.

    Args:
      sampler: draws; a question's id is "task/split/document".
      seed: of the samples.

    Raises:
      MissingExtra: lmms-eval is not installed.
    """
    try:
        base = importlib.import_module("lmms_eval.api.model").lmms
    except ImportError as error:
        raise MissingExtra("lmms_eval is not installed or incomplete: pip install lmms-eval") from error

    class Model(base):
        """Generates by the sampler."""

        def __init__(self):
            super().__init__()
            self._drawn: collections.Counter[str] = collections.Counter()

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """One text a request."""
            return [self._one(*request.args) for request in requests]

        def _one(self, context: str, options: Any, visuals: Any, document: Any, task: str, split: str) -> str:
            pictures = visuals(self.task_dict[task][split][document]) or []
            pictures = pictures if isinstance(pictures, list) else [pictures]
            shown = tuple(np.asarray(each.convert("RGB")) if hasattr(each, "convert") else each for each in pictures)
            question = Question(f"{task}/{split}/{document}", context, "", shown)
            greedy = not options.get("temperature", 0) or options.get("do_sample") is False
            if greedy and isinstance(sampler, GreedySampler):
                text = sampler.greedy(question).text
            else:
                text = sampler.sample(question, [self._drawn[question.id]], seed=seed)[0].text
                self._drawn[question.id] += 1
            until = options.get("until") or ()
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            return text

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            """Not what a sampler can tell."""
            raise NotImplementedError("lmms_eval_model: a sampler generates texts and gives no likelihoods of others")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Not what a sampler takes."""
            raise NotImplementedError("lmms_eval_model: a sampler takes one prompt, not several rounds")

    return Model()
