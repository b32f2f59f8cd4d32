"""A small vision-language model and its training on rendered maths, stage by stage: what the protocol is run on here.

The classes are those of Qwen2.5-VL; sizes and vocabulary are small. Four stages, each from the one before: "solver"
learns worked solutions; "base" and "sft" go on with them and learn to judge the stage before by its own samples, as
many right as wrong of each question (the first for a short time, the second for a long one); "rl" is the second after
reinforcement by exact answers alone.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlab import core
from jaxlab.models import load_pretrained, load_tokenizer, save_pretrained, word_tokenizer
from jaxlab.models.qwen2_5_vl import Config, Qwen25VL, VisionConfig, init_params
from jaxlab.rl.config import GRPOConfig, check_choice
from jaxlab.rl.loop import PolicyTrainer
from jaxlab.training import SFTConfig, TrainingRun
from jaxlab.vlm_scaling import visual_math
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.grade import correct
from jaxlab.vlm_scaling.inputs import MODES, build
from jaxlab.vlm_scaling.local import ModelReader, ModelSampler, Prompts
from jaxlab.vlm_scaling.samples import Question, Sample
from jaxlab.vlm_scaling.training import Course, Lesson, VisualBatches, VisualLoss, VisualRollouts, visual_logps

STAGES = ("solver", "base", "sft", "rl")
JUDGED = ("image+solution", "image+answer", "blind+solution", "blind+answer")
"""The verifier's inputs that a model learns to judge."""

PACKAGED = {f"packaged-{name}": Path(__file__).with_name("packaged") / name for name in ("sft", "rl")}
"""Name -> folder of the models that come with the package; `configs/vlm_scaling/small.yaml` made them."""

_SPECIAL = {
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": "<|video_pad|>",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A small Qwen2.5-VL.

    Attributes:
      hidden_size: width of the decoder.
      layers: of the decoder.
      heads: of the decoder; half as many of keys and values.
      vision_size: width of the encoder.
      vision_layers: of the encoder; the last attends over the whole image.
      vision_heads: of the encoder.
      context: tokens at most.
    """

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    vision_size: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    context: int = 256

    def model(self, tokenizer: Any) -> Qwen25VL:
        """The network over a tokenizer's words."""
        half = self.hidden_size // self.heads // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # as 16, 24 and 24 of 64
        text = {
            "model_type": "qwen2_5_vl",
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(1, self.heads // 2),
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            **{name: tokenizer.encode(token)[0] for name, token in _SPECIAL.items()},
        }
        vision = VisionConfig(
            depth=self.vision_layers,
            hidden_size=self.vision_size,
            intermediate_size=2 * self.vision_size,
            num_heads=self.vision_heads,
            fullatt_block_indexes=(self.vision_layers - 1,),
        )
        return Qwen25VL(Config.from_hf({**text, "vision_config": dataclasses.asdict(vision)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModelConfig:
    """A small model and its training; every default is ours.

    Attributes:
      sizes: of the network.
      families: of `visual_math.FAMILIES`, mixed evenly.
      problems: for training, of each family.
      noise: of `visual_math.questions`.
      waits: share of the solutions to learn from that misread once, notice it and read again.
      solver: its training; every step has `batch_size` solutions.
      base: further steps, with verdicts.
      sft: further steps, with verdicts.
      judged: problems whose samples are judged for the verdicts to learn from.
      samples: drawn of each of those.
      verdict_rows: verdicts of a step with images, and as many without, beside its solutions.
      verdict_weight: of a verdict's tokens, for each of a solution's.
      rl: the last stage.
      seed: of parameters, order and samples.
    """

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    families: tuple[str, ...] = tuple(visual_math.FAMILIES)
    problems: int = 8000
    noise: int | float = 0.3
    waits: int | float = 0.2
    solver: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(steps=1000, batch_size=64))
    base: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(steps=200, batch_size=48))
    sft: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(steps=1000, batch_size=48))
    judged: int = 1000
    samples: int = 4
    verdict_rows: int = 16
    verdict_weight: int | float = 8
    rl: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    seed: int = 0

    def __post_init__(self):
        if not self.families or len(set(self.families)) < len(self.families):
            raise ValueError(f"families: expected at least one, none twice, got {self.families}")
        for family in self.families:
            check_choice("families", family, tuple(visual_math.FAMILIES))
        for name in ("problems", "judged", "samples", "verdict_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.waits <= 1:
            raise ValueError(f"waits: expected a value in [0, 1], got {self.waits}")
        if not self.verdict_weight > 0:
            raise ValueError(f"verdict_weight: expected a value > 0, got {self.verdict_weight}")


class Trained(NamedTuple):
    """A model with its parameters and its tokenizer."""

    model: Any
    params: Any
    tokenizer: Any

    @property
    def prompts(self) -> Prompts:
        """Its prompts."""
        return Prompts(self.model, self.tokenizer)

    def sampler(self, **options: Any) -> ModelSampler:
        """Draws samples; takes the options of `ModelSampler`."""
        return ModelSampler(self.model, self.params, self.tokenizer, **options)

    def reader(self, **options: Any) -> ModelReader:
        """Reads verifiers' requests; takes the options of `ModelReader`."""
        return ModelReader(self.model, self.params, self.tokenizer, **options)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a Hugging Face folder."""
        save_pretrained(folder, self.model, self.params, tokenizer=self.tokenizer)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Trained":
        """Opens what `save` wrote, or any Qwen2.5-VL that `load_pretrained` knows."""
        return cls(*load_pretrained(folder), load_tokenizer(folder))


class SmallModel:
    """The stages of a small model in a folder; each is trained when it is first asked for, and can be killed."""

    def __init__(self, config: SmallModelConfig, folder: str | os.PathLike):
        """Trains nothing yet."""
        self.config, self.folder = config, Path(folder)

    @functools.cached_property
    def questions(self) -> list[Question]:
        """For training: the families in turn."""
        config = self.config
        made = [
            visual_math.questions(family, config.problems, seed=config.seed, noise=config.noise)
            for family in config.families
        ]
        return [question for each in zip(*made) for question in each]

    def stage(self, name: str) -> Trained:
        """A stage of `STAGES`, from its folder; trained first where it is not there.

        Raises:
          ValueError: an unknown stage.
        """
        check_choice("stage", name, STAGES)
        place = self.folder / name
        if not (place / "config.json").exists():  # the last thing that is written
            self._train(name).save(place)
        return Trained.load(place)

    def history(self, name: str) -> list[dict[str, Any]]:
        """The numbers of a stage's steps."""
        return core.jsonl.read(self.folder / "runs" / name / "metrics.jsonl")

    def _train(self, name: str) -> Trained:
        if name == "solver":
            tokenizer = tokenizer_of_words()
            model = self.config.sizes.model(tokenizer)
            key = core.named_key(jax.random.key(self.config.seed), "parameters")
            start = Trained(model, init_params(model, key), tokenizer)
            return self._supervised(name, start, [Course(self._solutions(start), self.config.solver.batch_size)])
        before = self.stage(STAGES[STAGES.index(name) - 1])
        return self._reinforced(before) if name == "rl" else self._judging(name, before)

    def _judging(self, name: str, before: Trained) -> Trained:
        config, run = self.config, getattr(self.config, name)
        verdicts = self._verdicts(before, name)
        rows = dict.fromkeys((True, False), config.verdict_rows)
        courses = [
            Course(self._solutions(before), run.batch_size),
            *(Course(verdicts[seen], rows[seen], float(config.verdict_weight)) for seen in rows),
        ]
        return self._supervised(name, before, courses)

    def _supervised(self, name: str, start: Trained, courses: Sequence[Course]) -> Trained:
        config: SFTConfig = getattr(self.config, name)
        room = start.model.config.text.max_position_embeddings
        batches = VisualBatches(courses, start.prompts, seed=config.seed, room=room)
        loss = VisualLoss(start.model, batches.grid)
        run = TrainingRun(start.params, loss, batches, config, folder=self.folder / "runs" / name)
        return start._replace(params=run.until(config.steps))

    def _reinforced(self, start: Trained) -> Trained:
        config = self.config.rl
        rollouts = VisualRollouts(start.model, start.tokenizer, self.questions, config, prompts=start.prompts)
        logps = functools.partial(
            visual_logps,
            start.model,
            grid=rollouts.grid,
            length=config.max_completion_length,
            temperature=config.temperature,
        )
        trainer = PolicyTrainer(start.params, rollouts, logps, config, folder=self.folder / "runs" / "rl")
        return start._replace(params=trainer.train().params)

    def _solutions(self, start: Trained) -> list[Lesson]:
        random = np.random.default_rng((self.config.seed, 1))
        lessons = []
        for question in self.questions:
            waits = random.random() < self.config.waits
            mistaken = visual_math.misreading(question, random) if waits else None
            said = visual_math.solution(question, mistaken=mistaken)
            lessons.append(_lesson(start, start.prompts.question(question), said, question.images[0]))
        return lessons

    def _verdicts(self, judged: Trained, name: str) -> dict[bool, list[Lesson]]:
        """Verdicts on samples of a model, as many yes as no on each question: with images, and without."""
        config, sampler = self.config, judged.sampler(max_tokens=longest_solution(judged.tokenizer))
        seed = config.seed * len(STAGES) + STAGES.index(name)
        lessons: dict[bool, list[Lesson]] = {True: [], False: []}
        for question in core.progress(self.questions[-config.judged :], f"samples to judge, {name}"):
            kinds: dict[bool, list[Sample]] = {True: [], False: []}
            for sample in sampler.sample(question, range(config.samples), seed=seed):
                kinds[correct(extract(sample.text).value, question.answer)].append(sample)
            # Were there more yes than no for a kind of question, the kind would be what is learnt.
            for yes, no in zip(kinds[True], kinds[False]):
                for sample, said in ((yes, "Yes"), (no, "No")):
                    for mode in JUDGED:
                        made = judged.prompts.verification(build(question, [sample], mode=mode)[0])
                        seen = MODES[mode].image == "own"
                        lessons[seen].append(_lesson(judged, made, said, question.images[0] if seen else None))
        if not lessons[True]:
            raise ValueError(f"samples: expected right and wrong ones of some question to judge, got none for {name!r}")
        return lessons


def _lesson(trained: Trained, request: Any, said: str, image: Any) -> Lesson:
    completion = [*trained.tokenizer.encode(said), trained.tokenizer.eos_token_id]
    return Lesson(request.input_ids.tolist(), completion, image)


def tokenizer_of_words() -> Any:
    """The words of questions, solutions and verdicts, and the tokens around images."""
    nothing = Question("", "", "")
    asked = [request.text for mode in JUDGED for request in build(nothing, [Sample("")], mode=mode)]
    return word_tokenizer([*visual_math.texts(), *asked, "Yes No"], special=tuple(_SPECIAL.values()))


def longest_solution(tokenizer: Any) -> int:
    """Tokens that a sample may take: more than any worked solution has."""
    question = visual_math.questions("shapes", 1)[0]
    waiting = visual_math.solution(question, mistaken=(0, "none"))
    return 2 * len(tokenizer.encode(waiting))
