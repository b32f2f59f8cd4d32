"""Questions of public data sets, from copies on this machine; nothing is downloaded, and images stay paths.

    from jaxlab.vlm_scaling import Study, tasks
    questions = tasks.mathvista("data/MathVista")
    Study(questions, sampler, grade=tasks.grade, ...)

Files that are not there raise `core.DataUnavailable`, with where they come from.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab.core import jsonl
from jaxlab.core.errors import DataUnavailable
from jaxlab.core.untrusted import inside, read_json, understood
from jaxlab.vlm_scaling import grade as grading
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.samples import Question

_SOURCES = {
    "MathVista": "https://huggingface.co/datasets/AI4Math/MathVista (testmini.json and images/)",
    "MathVerse": "https://huggingface.co/datasets/AI4Math/MathVerse (testmini.json and images/)",
    "GeoQA": "https://huggingface.co/datasets/Luckyjhg/Geo170K (qa_tuning.json and images/), or R1-V's "
    "geoqa_test_prompts.jsonl",
}
_OPTION = re.compile(r"^\s*\(?([A-H])\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)
_CHOICES = re.compile(r"\bchoices?\s*:", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"<image>\s*")


@understood("MathVista: a problem")
def mathvista(path: str | os.PathLike, *, images: str | os.PathLike | None = None) -> list[Question]:
    """MathVista's testmini (arXiv 2310.02255): `testmini.json`, an object of problems by pid.

    Args:
      path: the file, or the folder that has it.
      images: folder that image paths are relative to; None: the file's.

    Returns:
      Questions with the hint of the official prompt left to the sampler; `meta` has `question_type`, `answer_type`,
      `answer_option`, `precision`, `unit` and the file's `metadata`.

    Raises:
      DataUnavailable: no such file.
      ValueError: it has another form.
    """
    file = _file(path, "testmini.json", "MathVista")
    content = _load(file, "MathVista")
    rows = content.values() if isinstance(content, dict) else content
    questions = []
    for row in rows:
        _need(file, row, "pid", "question", "image", "answer", "question_type", "answer_type")
        options = [str(option) for option in row.get("choices") or ()]
        choices = {chr(ord("A") + place): option for place, option in enumerate(options)} or None
        letter = next((letter for letter, option in (choices or {}).items() if option == row["answer"]), "")
        text = row["question"] + (f" (Unit: {row['unit']})" if row.get("unit") else "")
        if choices:
            text += "\nChoices:\n" + "\n".join(f"({letter}) {option}" for letter, option in choices.items())
        meta = {name: row.get(name) for name in ("question_type", "answer_type", "precision", "unit", "metadata")}
        questions.append(
            Question(
                id=f"mathvista/{row['pid']}",
                text=text,
                answer=letter or str(row["answer"]),
                images=(_image(file, images, row["image"]),),
                choices=choices,
                meta={**meta, "answer_option": letter},
            )
        )
    return questions


@understood("MathVerse: a problem")
def mathverse(
    path: str | os.PathLike, *, images: str | os.PathLike | None = None, versions: Sequence[str] | None = None
) -> list[Question]:
    """MathVerse's testmini (arXiv 2403.14624): `testmini.json`, a list of problems in six versions.

    Args:
      path: the file, or the folder that has it.
      images: folder that image paths are relative to; None: `images` beside the file.
      versions: such as "Vision Only"; None: all.

    Returns:
      Questions in the words of `query_cot`, options read from them; `meta` has `problem_index`, `problem_version`,
      `question_type` and the file's `metadata`.

    Raises:
      DataUnavailable: no such file.
      ValueError: it has another form, or no problem of a version asked for.
    """
    file = _file(path, "testmini.json", "MathVerse")
    rows = _load(file, "MathVerse")
    for row in rows:
        _need(file, row, "sample_index", "problem_version", "question", "answer", "question_type")
    known = sorted({row["problem_version"] for row in rows})
    if unknown := [version for version in versions or () if version not in known]:
        raise ValueError(f"versions: expected some of {', '.join(known)}, got {unknown[0]!r}")
    questions = []
    for row in rows:
        if versions is not None and row["problem_version"] not in versions:
            continue
        text = row.get("query_cot") or row["question"]
        choices = _options(row["question"] or text) if row["question_type"] == "multi-choice" else None
        image = row.get("image") or ""  # the text-only version has none
        meta = {name: row.get(name) for name in ("problem_index", "problem_version", "question_type", "metadata")}
        questions.append(
            Question(
                id=f"mathverse/{row['sample_index']}",
                text=text,
                answer=str(row["answer"]),
                images=(_image(file, images or file.parent / "images", image),) if image else (),
                choices=choices,
                meta=meta,
            )
        )
    return questions


@understood("GeoQA: a problem")
def geoqa(path: str | os.PathLike, *, images: str | os.PathLike | None = None) -> list[Question]:
    """GeoQA problems (arXiv 2105.14517) in the form of Geo170K's `qa_tuning.json` or R1-V's `geoqa_test_prompts.jsonl`.

    The first is a list of conversations ("Question: ... Choices: ...", "... Answer: B"), the second lines with
    `image_path`, `question` and `ground_truth`. GeoQA's own `.pk` files are pickles, which run code when read, and are
    refused.

    Args:
      path: the file, or a folder that has one of the two.
      images: folder that image paths are relative to; None: the file's, of conversations `images` beside it.

    Raises:
      DataUnavailable: no such file.
      ValueError: it has another form.
    """
    names = ("qa_tuning.json", "geoqa_test_prompts.jsonl")
    file = next((Path(path) / name for name in names if (Path(path) / name).exists()), Path(path))
    if file.suffix in (".pk", ".pkl"):
        raise ValueError(f"path: expected JSON or JSON lines, got the pickle {file}, which would run code")
    file = _file(file, names[0], "GeoQA")
    if file.suffix == ".jsonl":
        return list(_prompts(file, images))
    return list(_conversations(file, images or file.parent / "images"))


def _prompts(file: Path, images: str | os.PathLike | None) -> Iterator[Question]:
    for number, row in enumerate(jsonl.read(file)):
        _need(file, row, "image_path", "question", "ground_truth")
        options = _options(row["question"])
        picture = _image(file, images, row["image_path"])
        yield Question(f"geoqa/{number}", row["question"], str(row["ground_truth"]), (picture,), options)


def _conversations(file: Path, images: str | os.PathLike) -> Iterator[Question]:
    for number, row in enumerate(_load(file, "GeoQA")):
        _need(file, row, "image", "conversations")
        said = {turn.get("from"): str(turn.get("value", "")) for turn in row["conversations"][:2]}
        if not {"human", "gpt"} <= said.keys():
            raise ValueError(f"{file}: expected a conversation of human and gpt, got {sorted(map(str, said))}")
        choices = _options(said["human"])
        gold = extract(said["gpt"], choices=choices).value
        if gold is None:
            raise ValueError(f"{file}: expected an answer in problem {number}, got {said['gpt'][-80:]!r}")
        text = _PLACEHOLDER.sub("", said["human"])
        yield Question(f"geoqa/{number}", text, gold, (_image(file, images, row["image"]),), choices)


def grade(answer: str | None, question: Question) -> bool:
    """The `grade` of a `Study`: MathVista's own rule for its questions, `grade.correct` for the others."""
    meta = question.meta
    if answer is not None and question.id.startswith("mathvista/") and question.choices is None:
        return grading.mathvista(
            answer, question_type="free_form", answer=question.answer, answer_type=str(meta["answer_type"])
        )
    return grading.correct(answer, question.answer, choices=question.choices)


def _file(path: str | os.PathLike, name: str, data: str) -> Path:
    file = Path(path)
    file = file / name if file.is_dir() else file
    if not file.exists():
        raise DataUnavailable(f"{data}: expected {file}; it comes from {_SOURCES[data]}")
    return file


def _load(file: Path, data: str) -> Any:
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{data}: expected JSON in {file}, got damaged text ({error})") from error
    if not isinstance(content, list | dict):
        raise ValueError(f"{data}: expected problems in {file}, got {type(content).__name__}")
    return content


def _need(file: Path, row: Any, *names: str) -> None:
    missing = [name for name in names if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise ValueError(f"{file}: expected problems with {', '.join(names)}, got one without {missing[0]}")


def _options(text: str) -> dict[str, str] | None:
    """Options in lines "A:40", in the part after "Choices:" where there is one; None without two of them in order."""
    found = _CHOICES.search(text)
    options = dict(_OPTION.findall(text[found.end() :] if found else text))
    in_order = list(options) == [chr(ord("A") + place) for place in range(len(options))]
    return options if len(options) > 1 and in_order else None


def _image(file: Path, folder: str | os.PathLike | None, name: object) -> str:
    return str(inside(folder or file.parent, name, f"{file}: image"))
