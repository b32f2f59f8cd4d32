"""The study of arXiv 2506.17417 on any model: what pays, whether verdicts look at the image, whether doubts help."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab import core
from jaxlab.core.statistics import Interval
from jaxlab.inference import Client
from jaxlab.rl.config import check_choice
from jaxlab.vlm_scaling import aha, tasks, visual_math
from jaxlab.vlm_scaling.cost import Meter
from jaxlab.vlm_scaling.endpoint import EndpointReader, EndpointSampler
from jaxlab.vlm_scaling.inputs import MODES, Controls, build
from jaxlab.vlm_scaling.local import Prompts
from jaxlab.vlm_scaling.report import Report
from jaxlab.vlm_scaling.samples import Question, Sample
from jaxlab.vlm_scaling.small_model import JUDGED, PACKAGED, STAGES, SmallModel, SmallModelConfig, Trained
from jaxlab.vlm_scaling.strategies import (
    BestOfN,
    FilteredVote,
    Greedy,
    Majority,
    Oracle,
    RandomOf,
    Strategy,
    WeightedVote,
)
from jaxlab.vlm_scaling.study import Grade, Study, grade_exactly
from jaxlab.vlm_scaling.verify import Verifier

_SETS = {"mathvista": tasks.mathvista, "mathverse": tasks.mathverse, "geoqa": tasks.geoqa}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """Models, questions, and what is asked of them; every default is ours.

    Attributes:
      models: stages of the small model ("base", "sft", "rl"), those that come with the package ("packaged-sft",
        "packaged-rl"), folders that `load_pretrained` opens, or OpenAI-compatible endpoints as MODEL@URL.
      data: "visual_math", rendered here and disjoint from what the small model was trained on, or a public data set.
      path: of a data set's copy.
      questions: how many, evenly over the families of "visual_math"; None: all of a data set.
      dev: share of the questions, by image, on which a strategy is chosen for a budget; the rest say what it is worth.
      n: samples a question.
      budgets: tokens a question, for which a strategy is chosen on the dev split; those that no strategy keeps are
        left out.
      temperature: of the samples.
      max_tokens: of a sample.
      instruction: put after each question, for models that were not trained here.
      verifier: another model that judges, named as in `models`; None: each judges itself.
      modes: of the verifier, see `verify.MODES`; the first is the strategies' own.
      doubts: questions on which the moments of doubt are looked into by further samples; 0: none.
      insertion: text of a doubt that is put in.
      answer_prefix: what asks for an early answer.
      small: the small model.
      seed: of the questions and of everything drawn.
      folder: keeps models and responses; none: a temporary one.
    """

    models: tuple[str, ...] = ("sft", "rl")
    data: str = "visual_math"
    path: str | None = None
    questions: int | None = 240
    dev: int | float = 0.5
    n: int = 16
    budgets: tuple[int | float, ...] = (75, 150, 300, 600, 1200, 2400)
    temperature: int | float = 1.0
    max_tokens: int = 64
    instruction: str = ""
    verifier: str | None = None
    modes: tuple[str, ...] = JUDGED
    doubts: int = 120
    insertion: str = "Wait ,"
    answer_prefix: str = " <answer>"
    small: SmallModelConfig = dataclasses.field(default_factory=SmallModelConfig)
    seed: int = 0
    folder: str | None = None

    def __post_init__(self):
        for name in ("models", "modes"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: expected at least one, none twice, got {given}")
        for mode in self.modes:
            check_choice("modes", mode, tuple(MODES))
        check_choice("data", self.data, ("visual_math", *_SETS))
        if self.data != "visual_math" and self.path is None:
            raise ValueError(f"path: expected that of a copy of {self.data}, got None")
        if self.data == "visual_math" and self.questions is None:
            raise ValueError("questions: expected a number, got None")
        for name, least in (("questions", 4), ("n", 2), ("max_tokens", 1), ("doubts", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.dev < 1:
            raise ValueError(f"dev: expected a value in (0, 1), got {self.dev}")


class Doubts(NamedTuple):
    """What is known of moments at which samples turn back on themselves.

    Attributes:
      contrast: accuracy of samples with and without one; None without samples.
      changes: what became of the answer that was given when stopped before one.
      inserted: accuracy with a doubt put in, minus without; None where none was.
      outcomes: what became of the answer where one was put in.
    """

    contrast: aha.Contrast | None
    changes: dict[str, int]
    inserted: Interval | None
    outcomes: dict[str, int]


class Findings(NamedTuple):
    """What the protocol found of one model."""

    report: Report
    doubts: Doubts


class Subject(NamedTuple):
    """A model as the protocol needs it."""

    sampler: Any
    reader: Any
    meter: Meter


def questions(config: ProtocolConfig) -> list[Question]:
    """The questions of a config.

    Raises:
      DataUnavailable: there is no such data set at `path`.
    """
    if config.data != "visual_math":
        return _SETS[config.data](config.path or "")[: config.questions]
    families = config.small.families
    count = -(-(config.questions or 0) // len(families))
    made = [
        visual_math.questions(family, count, split="test", seed=config.seed, noise=config.small.noise)
        for family in families
    ]
    return [question for each in zip(*made) for question in each][: config.questions]


def subject(config: ProtocolConfig, name: str, folder: Path) -> Subject:
    """The model of a name in `config.models`: trained, opened, or reached; with the verifier that another one is."""
    if config.verifier is not None:
        reader = subject(dataclasses.replace(config, verifier=None), config.verifier, folder).reader
        return subject(dataclasses.replace(config, verifier=None), name, folder)._replace(reader=reader)
    options: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    if "@" in name and "://" in name:
        model, _, url = name.partition("@")
        client = Client(url, model=model)
        sampler = EndpointSampler(client, **options, instruction=config.instruction, logprobs=True)
        return Subject(sampler, EndpointReader(client), Meter())
    if name in STAGES:
        trained = SmallModel(config.small, folder / "small").stage(name)
    else:
        trained = Trained.load(PACKAGED.get(name, name))
    sampler = trained.sampler(**options, instruction=config.instruction)
    return Subject(sampler, trained.reader(), meter(Prompts(trained.model, trained.tokenizer)))


def meter(prompts: Prompts) -> Meter:
    """Counts as the model reads: its own tokens of text and images."""
    known: dict[tuple[str, str], tuple[int, int]] = {}

    def counted(question: Question) -> tuple[int, int]:
        name = question.id, question.text
        if name not in known:
            image = sum(prompts.image_tokens(picture) for picture in question.images)
            known[name] = len(prompts.question(question).input_ids) - image, image
        return known[name]

    asked = build(Question("", "", ""), [Sample("")])[0].text
    return Meter(
        prompt=lambda question: counted(question)[0],
        image=lambda question: counted(question)[1],
        instruction=len(prompts.request("", asked).input_ids),
    )


def strategies(config: ProtocolConfig) -> list[Strategy]:
    """Votes and best-of-N by powers of two, every verifier's input at n, and the bounds."""
    powers = [2**power for power in range(int(math.log2(config.n)) + 1)]
    sizes = [*(size for size in powers if size < config.n), config.n]
    own, *others = config.modes
    return [
        Greedy(),
        *(Majority(size) for size in sizes),
        *(BestOfN(size, mode=own) for size in sizes if size > 1),
        *(BestOfN(config.n, mode=mode) for mode in others),
        WeightedVote(config.n, mode=own),
        FilteredVote(config.n, mode=own),
        BestOfN(config.n, by="logprob"),
        *(Oracle(size) for size in sizes),
        RandomOf(config.n),
    ]


class _Kept:
    """Stands for a model whose answers are all known: draws nothing."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("expected all samples and verdicts in the folder, got fewer; run the study to its end first")

    sample = greedy = ask = extend = texts = yes_probabilities = _refuse


def kept(config: ProtocolConfig, name: str, folder: Path) -> Findings:
    """What a run found of one of its models, from its folder alone.

    Raises:
      RuntimeError: the run has not come to its end.
    """
    if name in STAGES and not (folder / "small" / name / "config.json").exists():
        raise RuntimeError(f"expected the model {name!r} in {folder}, got none; run the study to its end first")
    return investigate(config, name, Subject(_Kept(), _Kept(), subject(config, name, folder).meter), folder)


def investigate(config: ProtocolConfig, name: str, model: Subject, folder: Path) -> Findings:
    """Runs the protocol on one model; what was drawn is kept in the folder, and not drawn again."""
    asked = questions(config)
    judged = name if config.verifier is None else f"{name} by {config.verifier}"
    place = folder / "responses" / re.sub(r"[^\w.-]+", "-", judged)
    place.parent.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "n": config.n,
        "cache": place.with_name(f"{place.name}.jsonl"),
        "seed": config.seed,
        "meter": model.meter,
        "grade": _grade(config),
    }
    candidates = None
    if any(MODES[mode].shuffled for mode in config.modes):
        candidates = Study(asked, model.sampler, strategies=[Majority(config.n)], **common).samples()
    study = Study(
        asked,
        model.sampler,
        strategies=strategies(config),
        verifier=Verifier(model.reader, controls=Controls(asked, candidates, seed=config.seed)),
        baseline=f"majority@{config.n}",
        **common,
    )
    report = study.run()
    return Findings(report, _doubts(config, asked, study, model, place.with_name(f"{place.name}.doubts.json")))


def _grade(config: ProtocolConfig) -> Grade:
    return grade_exactly if config.data == "visual_math" else tasks.grade


def _doubts(config: ProtocolConfig, asked: Sequence[Question], study: Study, model: Subject, kept: Path) -> Doubts:
    samples, answers, chosen = study.samples(), study.answers(), asked[: config.doubts]
    of, marked, right = [], [], []
    for question in asked:
        for answer, sample in zip(answers[question.id], samples[question.id]):
            of.append(question.id)
            marked.append(bool(aha.find(sample.text)))
            right.append(_grade(config)(answer, question))
    contrast = aha.contrast(of, marked, right, seed=config.seed)
    if not chosen or not hasattr(model.sampler, "extend"):
        return Doubts(contrast, {}, None, {})
    decides = {"doubts": config.doubts, "insertion": config.insertion, "prefix": config.answer_prefix}
    if kept.exists() and (told := json.loads(kept.read_text()))["config"] == decides:
        inserted = None if told["inserted"] is None else Interval(*told["inserted"])
        return Doubts(contrast, told["changes"], inserted, told["outcomes"])
    changes = [
        change
        for question in core.progress(chosen, "answers before doubts")
        for change in aha.early_answers(
            question, samples[question.id], model.sampler, answer_prefix=config.answer_prefix, seed=config.seed
        )
    ]
    pairs = [(question, samples[question.id][0]) for question in chosen]
    found = aha.insert(pairs, model.sampler, text=config.insertion, max_tokens=config.max_tokens, seed=config.seed)
    table = aha.outcome_table([change.outcome for change in changes])
    interval = None if found.difference is None else list(dataclasses.astuple(found.difference))
    told = {"config": decides, "changes": table, "inserted": interval, "outcomes": found.outcomes}
    core.replace_file(kept, json.dumps(told, indent=1) + "\n")
    return Doubts(contrast, table, found.difference, found.outcomes)
