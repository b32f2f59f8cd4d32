"""The planner: a decoder that reads a task once and writes one global plan; and its cold start (arXiv 2510.05608)."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.prompts import continuation_ids, planner_prompt, text_end
from jaxlab.inference import Generation, SamplingParams, generate
from jaxlab.models import load_pretrained, load_tokenizer, save_pretrained
from jaxlab.training import SFTConfig, Supervised

PLAN_END = "</plan>"
_PACKAGED = Path(__file__).resolve().parent / "grid_planner"
_PACKAGED_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Planner:
    """Writes plans; called with a task it is a `PlanSource` of its likeliest ones.

    Example:
        planner = Planner.load()
        plans = planner.plan("Brew the amber tonic.", rng=jax.random.key(0), n=4)

    Attributes:
      model: a `Decoder`.
      params: its parameters.
      tokenizer: reads instructions and writes plans.
      max_tokens: of an output, thinking and plan.
      max_plan_tokens: of a plan; a longer one is cut, and its format counts as wrong. None: no limit.
    """

    model: Any
    params: Any
    tokenizer: Any
    max_tokens: int = 256
    max_plan_tokens: int | None = None

    def plan(self, instruction: str, *, rng: Array | None = None, temperature: float = 1.0, n: int = 1) -> list[Plan]:
        """Draws n plans of one task.

        Args:
          instruction: of the task.
          rng: PRNG key; None only at temperature 0.
          temperature: of the draws; 0 is the likeliest plan.
          n: how many.

        Raises:
          ValueError: no key at a temperature above 0, n below 1, or an instruction that does not fit.
        """
        return self.plan_all([instruction], rng=rng, temperature=temperature, n=n)[0]

    def plan_all(
        self, instructions: Sequence[str], *, rng: Array | None = None, temperature: float = 1.0, n: int = 1
    ) -> list[list[Plan]]:
        """N plans of each of several tasks, all drawn together; takes and raises what `plan` does."""
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=temperature, stop=PLAN_END)
        prompts = [self.prompt_ids(instruction) for instruction in instructions]
        out = generate(self.model, self.params, prompts, sampling, n=n, rng=rng, tokenizer=self.tokenizer)
        plans = self.read(out)
        return [plans[start : start + n] for start in range(0, len(plans), n)]

    def __call__(self, task: Task) -> Plan:
        """The likeliest plan of a task."""
        return self.plan(task.instruction, temperature=0.0)[0]

    def prompt_ids(self, instruction: str) -> list[int]:
        """What the model continues."""
        prompt = planner_prompt(self.tokenizer, instruction)
        if getattr(self.tokenizer, "chat_template", None) is not None:
            return self.tokenizer.encode(prompt, add_special_tokens=False)  # the template has its own
        return self.tokenizer.encode(prompt)

    def written_ids(self, plan: Plan) -> list[int]:
        """What the model would have written for an output, with the end of the text."""
        return [*continuation_ids(self.tokenizer, plan.text), *text_end(self.tokenizer)]

    def completion_ids(self, task: Task, plan: Plan, name: str) -> list[int]:
        """The same for a plan that it is to write.

        Raises:
          ValueError: it is of broken format, or of more than `max_tokens`; `name` is where it comes from.
        """
        if not plan.ok:
            raise ValueError(f"{name}: expected a plan of the right format, got {plan.reason!r} of {task.id!r}")
        ids = self.written_ids(plan)
        if len(ids) > self.max_tokens:
            raise ValueError(f"{name}: expected at most max_tokens = {self.max_tokens}, got {len(ids)}")
        return ids

    def read(self, out: Generation) -> list[Plan]:
        """The plans in outputs that were stopped at `PLAN_END`, which their tokens hold and their text leaves out."""
        plans = []
        for ids, length in zip(*jax.device_get((out.tokens, out.lengths))):
            text, end, _ = self.tokenizer.decode(ids[:length].tolist()).partition(PLAN_END)
            plans.append(Plan.parse(text + end, max_plan_tokens=self.max_plan_tokens, tokenizer=self.tokenizer))
        return plans

    def save(self, folder: str | os.PathLike, *, dtype: str | None = None) -> Path:
        """Writes a Hugging Face folder of model and tokenizer; `dtype` is that of the stored numbers."""
        save_pretrained(folder, self.model, self.params, tokenizer=self.tokenizer, dtype=dtype)
        return Path(folder)

    @classmethod
    def load(cls, source: str | os.PathLike | None = None, **limits: Any) -> "Planner":
        """Opens what `save` wrote, or any model that `load_pretrained` knows.

        Args:
          source: as in `load_pretrained`. None: the planner that comes with the package, 0.1 M parameters for
            `GridQuestEnv` of seed 0, whatever its size; `configs/eaglet/study.yaml` tells how it was made.
          **limits: `max_tokens`, `max_plan_tokens`.
        """
        if source is None:
            source, limits = _PACKAGED, {"max_tokens": _PACKAGED_TOKENS, **limits}
        return cls(*load_pretrained(source), load_tokenizer(source), **limits)


class TrainResult(NamedTuple):
    """A trained planner, and one dict of numbers for each step of this run."""

    planner: Planner
    history: list[dict[str, float]]


def train_sft(
    planner: Planner,
    pairs: Sequence[tuple[Task, Plan]],
    config: SFTConfig | None = None,
    *,
    folder: str | os.PathLike | None = None,
) -> TrainResult:
    """The cold start: cross-entropy of thinking and plan given the task, whose tokens do not count.

    Args:
      planner: where it starts.
      pairs: tasks with plans for them, such as those that `hcf_filter` kept.
      config: of the run; None: the defaults.
      folder: for metrics and checkpoints; a run found there goes on.

    Raises:
      ValueError: no pairs, a plan of broken format, or one that does not fit into the model's context or `max_tokens`.
    """
    config = config or SFTConfig()
    rows = [
        (planner.prompt_ids(task.instruction), planner.completion_ids(task, plan, f"pairs[{index}]"))
        for index, (task, plan) in enumerate(pairs)
    ]
    run = Supervised(planner.model, planner.params, rows, config, folder=folder)
    params = run.until(config.steps)
    return TrainResult(dataclasses.replace(planner, params=params), run.history)
