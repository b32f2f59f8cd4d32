"""What was drawn for each question, in memory and in a file of lines: a killed study asks for nothing twice."""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

from jaxlab.core import jsonl
from jaxlab.core.untrusted import understood
from jaxlab.vlm_scaling import images
from jaxlab.vlm_scaling.samples import Question


class Responses:
    """Samples, verdicts by mode, and further calls of each question.

    Attributes:
      kept: question id -> "samples": index -> sample; "verdicts": mode -> index -> score; "calls": name -> sample.
    """

    def __init__(self, path: str | os.PathLike | None, questions: Sequence[Question], seed: int):
        """Reads what the file has of these questions.

        Raises:
          ValueError: it has another seed, another question of the same id, or lines of something else.
        """
        self._path, self._seed = path, seed
        self._digests = {question.id: _digest(question) for question in questions}
        self.kept: dict[str, dict[str, Any]] = {
            question.id: {"samples": {}, "verdicts": {}, "calls": {}} for question in questions
        }
        for line in jsonl.read(path) if path is not None else ():
            if not isinstance(line, dict) or not {"question", "digest", "seed"} <= line.keys():
                raise ValueError(f"cache: expected lines of a study in {path}, got {str(line)[:80]}")
            if line["seed"] != seed:
                raise ValueError(f"cache: {path} was made with seed {line['seed']}, got {seed}; use another file")
            if not isinstance(line["question"], str):
                raise ValueError(f"cache: expected the name of a question in {path}, got {str(line)[:80]}")
            if line["question"] in self.kept:
                if line["digest"] != self._digests[line["question"]]:
                    raise ValueError(f"cache: {path} has another question {line['question']!r}; use another file")
                with understood(f"cache: a line of {path}"):
                    self._merge(line)

    def seed_of(self, question: str, purpose: str) -> int:
        """A seed of 31 bits."""
        return zlib.crc32(f"{self._seed} {purpose} {question}".encode(errors="surrogatepass")) >> 1

    def keep(self, question: str, **found: dict[str, Any]) -> None:
        """Adds to what is known, and appends it to the file."""
        line = {"question": question, "digest": self._digests[question], "seed": self._seed, **found}
        if self._path is not None:
            jsonl.append(self._path, line)
        self._merge(line)

    def _merge(self, line: dict[str, Any]) -> None:
        kept = self.kept[line["question"]]
        for kind in ("samples", "calls"):
            kept[kind].update(dict(line.get(kind, {})))
        for mode, scores in line.get("verdicts", {}).items():
            kept["verdicts"].setdefault(mode, {}).update(dict(scores))


def _digest(question: Question) -> str:
    """Of what a sampler sees of a question."""
    parts = [question.text, sorted((question.choices or {}).items()), images.label(question.images)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
