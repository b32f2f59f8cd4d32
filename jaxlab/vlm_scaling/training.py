"""Training of a `Qwen25VL` on questions with images: supervised batches, log-probabilities, rollouts for `jaxlab.rl`.

    from jaxlab.rl.loop import PolicyTrainer
    rollouts = VisualRollouts(model, tokenizer, questions, config)
    logps = functools.partial(visual_logps, model, grid=rollouts.grid, length=config.max_completion_length)
    params, history = PolicyTrainer(params, rollouts, logps, config).train()

All images of a run have one size, so that every batch is the same program.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from jaxlab.models.decoder import head_weight
from jaxlab.models.qwen2_5_vl import image_layout, mrope_index
from jaxlab.rl.config import GRPOConfig
from jaxlab.rl.logps import TextInputs, TokenLogps, completion_logps
from jaxlab.rl.rollout import Rollout, chosen_rows, text_inputs
from jaxlab.training.loss import LossOutput, chunked_cross_entropy
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.grade import correct
from jaxlab.vlm_scaling.local import Prompts
from jaxlab.vlm_scaling.samples import Question
from jaxlab.vlm_scaling.sampling import sample

ArrayLike = Array | np.ndarray
Grid = tuple[int, int, int]
"""Patches of an image along (time, height, width)."""


@struct.dataclass
class VisualBatch:
    """Rows of text, those with an image first.

    Attributes:
      tokens: `[B,T]` int32, as all but the last.
      targets: `[B,T]`.
      weights: `[B,T]` float32.
      pixel_values: `[R,P,1176]` patches of the images of the first R rows, one each.
    """

    tokens: Any
    targets: Any
    weights: Any
    pixel_values: Any


@struct.dataclass
class VisualInputs:
    """What a rollout's log-probabilities are computed from.

    Attributes:
      text: prompts with their completions.
      pixel_values: `[B,P,1176]` patches of each row's image.
    """

    text: TextInputs
    pixel_values: Any


def hidden_states(
    model: Any, params: PyTree, tokens: Int[ArrayLike, "b t"], pixel_values: Float[ArrayLike, "r p c"], grid: Grid
) -> Float[Array, "b t d"]:
    """Final hidden states of rows of which the first R begin with an image; differentiable in the parameters.

    Padding needs no mask: it lies behind everything that is read.

    Args:
      model: a `Qwen25VL`.
      params: its parameters.
      tokens: ids, placeholders in the first R rows.
      pixel_values: patches of the images.
      grid: patches of an image.
    """
    rows, patches, features = pixel_values.shape
    grids = np.tile(np.array(grid, np.int32), (rows, 1))
    pixels = jnp.asarray(pixel_values).reshape(rows * patches, features)
    variables, tokens = {"params": params}, jnp.asarray(tokens)
    layout = image_layout(grids, model.config.vision)
    images = model.apply(variables, pixels, layout, method="encode_patches")
    embeddings = model.apply(variables, tokens, images, method="embed")
    positions, _ = mrope_index(tokens, grids, config=model.config)
    language = {"params": params["language"]}
    return model.text_model().apply(language, None, None, embeddings=embeddings, rope_positions=positions).hidden


class VisualLoss(NamedTuple):
    """The `Loss` of `VisualBatch`es: next-token cross-entropy, `accuracy` beside it."""

    model: Any
    grid: Grid

    def __call__(self, params: PyTree, batch: VisualBatch, rng: Array | None) -> LossOutput:
        """Sums over the batch's weights."""
        hidden = hidden_states(self.model, params, batch.tokens, batch.pixel_values, self.grid)
        head = head_weight(params["language"]).astype(hidden.dtype)
        total, hits = chunked_cross_entropy(hidden, head, jnp.asarray(batch.targets), jnp.asarray(batch.weights))
        return LossOutput(total, jnp.sum(batch.weights), {"accuracy": hits})


def visual_logps(
    model: Any, params: PyTree, inputs: VisualInputs, *, grid: Grid, length: int, temperature: float | Array = 1.0
) -> TokenLogps:
    """`text_logps` of rows with an image each."""
    hidden = hidden_states(model, params, inputs.text.tokens, inputs.pixel_values, grid)
    return completion_logps(
        hidden, head_weight(params["language"]), inputs.text, length=length, temperature=temperature
    )


class Lesson(NamedTuple):
    """One prompt and what is to follow it.

    Attributes:
      prompt: ids.
      completion: ids.
      image: as in `Question.images`; None: text alone.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    image: Any = None


class Course(NamedTuple):
    """Lessons of one kind.

    Attributes:
      lessons: all with an image, or all without.
      rows: of each batch.
      weight: of each of their tokens in the loss.
    """

    lessons: Sequence[Lesson]
    rows: int
    weight: float = 1.0


class VisualBatches(Iterator[VisualBatch]):
    """Batches of so many rows of each course. Batch number `step` depends on courses, seed and `step` alone."""

    def __init__(self, courses: Sequence[Course], prompts: Prompts, *, seed: int, room: int | None = None):
        """Keeps the lessons; images become patches batch by batch.

        Args:
          courses: those with images before those without.
          prompts: makes patches.
          seed: of the order.
          room: tokens that the model has room for.

        Raises:
          ValueError: no lessons, a course without images before one with them, lessons of both kinds in one, images of
            different sizes, or a lesson longer than `room`.
        """
        courses = [course for course in courses if course.rows]
        if not courses or not all(course.lessons for course in courses):
            raise ValueError("courses: expected at least one lesson in each, got none")
        kinds = [{lesson.image is not None for lesson in course.lessons} for course in courses]
        if any(len(kind) > 1 for kind in kinds):
            raise ValueError("courses: expected lessons that all have an image or all have none, got both in one")
        seen = [kind.pop() for kind in kinds]
        if seen != sorted(seen, reverse=True) or not seen[0]:
            raise ValueError("courses: expected those with images first, and at least one of them")
        lessons = [lesson for course in courses for lesson in course.lessons]
        longest = max(len(lesson.prompt) + len(lesson.completion) for lesson in lessons)
        if room is not None and longest > room:
            raise ValueError(f"courses: expected prompt and completion of at most {room} tokens, got {longest}")
        self._courses, self._prompts, self._length = courses, prompts, -(-longest // 16) * 16
        self.grid = common_grid(prompts, [lesson.image for lesson in lessons if lesson.image is not None])
        state = hashlib.sha256()
        for course in courses:
            for lesson in course.lessons:
                state.update(repr((list(lesson.prompt), list(lesson.completion))).encode())
        self._identity = {
            "lessons": state.hexdigest()[:12],
            "rows": [course.rows for course in courses],
            "weights": [course.weight for course in courses],
            "seed": seed,
        }
        self._seed, self._step = seed, 0

    def __next__(self) -> VisualBatch:
        """The next batch."""
        drawn: list[tuple[Lesson, float]] = []
        for place, course in enumerate(self._courses):
            seed = self._seed * len(self._courses) + place
            rows = chosen_rows(self._step, course.rows, len(course.lessons), seed)
            drawn += [(course.lessons[row], course.weight) for row in rows]
        self._step += 1
        tokens = np.zeros((len(drawn), self._length + 1), np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        for line, counts, (lesson, weight) in zip(tokens, weights, drawn):
            whole = len(lesson.prompt) + len(lesson.completion)
            line[:whole] = [*lesson.prompt, *lesson.completion]
            counts[len(lesson.prompt) : whole] = weight
        pixels = [self._prompts.patches(lesson.image)[0] for lesson, _ in drawn if lesson.image is not None]
        return VisualBatch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:], np.stack(pixels))

    def state(self) -> dict[str, Any]:
        """The position, with what it is a position in."""
        return {"step": self._step, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
          ValueError: it is one in other lessons, or of other rows, weights or another seed.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(f"batches: expected a position with {name} = {ours}, got {state.get(name)}")
        self._step = int(state["step"])


Reward = Callable[[str, Question], float]


def exact_answer(text: str, question: Question) -> float:
    """1 where the answer in a text is right."""
    return float(correct(extract(text, choices=question.choices).value, question.answer, choices=question.choices))


class VisualRollouts:
    """Samples of questions with one image each, scored by a reward: a `RolloutFunction` of `jaxlab.rl`.

    Every draw takes the next `prompts_per_step` questions of an order that the seed decides.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Sequence[Question],
        config: GRPOConfig,
        *,
        reward: Reward = exact_answer,
        prompts: Prompts | None = None,
    ):
        """Reads all prompts.

        Args:
          model: a `Qwen25VL`.
          tokenizer: writes samples, and gives the id that ends them.
          questions: with an image each, all of one size.
          config: sizes and sampling.
          reward: of a sample's text.
          prompts: of the model; None: plain ones.

        Raises:
          ValueError: no questions, one without exactly one image, images of different sizes, or a prompt longer than
            `config.max_prompt_length`.
        """
        for question in questions:
            if len(question.images) != 1:
                raise ValueError(f"questions: expected one image each, got {len(question.images)} in {question.id!r}")
        if not questions:
            raise ValueError("questions: expected at least one, got none")
        self._model, self._tokenizer, self._questions = model, tokenizer, tuple(questions)
        self._config, self._reward = config, reward
        self._prompts = prompts or Prompts(model, tokenizer)
        self.grid = common_grid(self._prompts, [question.images[0] for question in questions])
        self._longest = max(len(self._prompts.question(question).input_ids) for question in questions)
        if self._longest > config.max_prompt_length:
            raise ValueError(
                f"questions: expected prompts of at most {config.max_prompt_length} tokens, got {self._longest}"
            )

    def __call__(self, params: PyTree, key: Array, draw: int) -> Rollout:
        """Samples and scores one batch."""
        config, count = self._config, self._config.num_generations
        rows = chosen_rows(draw, config.prompts_per_step, len(self._questions), config.seed)
        requests = [self._prompts.question(self._questions[row]) for row in rows]
        end = self._tokenizer.eos_token_id
        drawn = sample(
            self._model,
            params,
            requests,
            n=count,
            temperature=float(config.temperature),
            top_p=float(config.top_p),
            max_new_tokens=config.max_completion_length,
            eos_ids=[] if end is None else [end],
            key=key,
        )
        tokens, mask, logps = (
            np.concatenate([getattr(each, name) for each in drawn]) for name in ("tokens", "mask", "logps")
        )
        lengths = mask.sum(axis=1)
        asked = [self._questions[row] for row in rows for _ in range(count)]
        said = [
            self._tokenizer.decode([token for token in line[:length].tolist() if token != end])
            for line, length in zip(tokens, lengths)
        ]
        prompts = [request.input_ids.tolist() for request in requests for _ in range(count)]
        pixels = np.stack([request.pixel_values for request in requests])
        return Rollout(
            inputs=VisualInputs(text_inputs(prompts, self._longest, tokens, lengths), np.repeat(pixels, count, axis=0)),
            mask=mask.astype(np.float32),
            logps=logps,
            rewards=np.array([self._reward(*each) for each in zip(said, asked)], np.float32),
            truncated=np.array([reason == "length" for each in drawn for reason in each.finish_reason]),
            metrics={"completion_tokens": float(lengths.mean())},
        )


def common_grid(prompts: Prompts, pictures: Sequence[Any]) -> Grid:
    """The grid that all images have.

    Raises:
      ValueError: they differ.
    """
    grids = {tuple(prompts.grid(picture)) for picture in pictures}
    if len(grids) > 1:
        raise ValueError(f"images: expected one size, got grids {sorted(grids)}")
    return grids.pop()
