"""Prompts of a data set, read and checked once, and the rewards of what a policy makes of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxlab.rl.rewards import RewardFn, function_name, reward_table

_TAKEN = ("prompts", "completions")  # what reward functions call their first two arguments


class PromptSet:
    """The rows of a data set whose prompts a decoder can continue.

    Attributes:
        ids: tokens of each row's prompt.
        longest: tokens of the longest.
    """

    def __init__(
        self,
        name: str,
        data: Sequence[Mapping[str, Any]],
        model: Any,
        tokenizer: Any,
        *,
        max_tokens: int,
        max_prompt_length: int | None = None,
        truncate: bool = False,
    ):
        """Reads all rows.

        Args:
            name: what errors call the data.
            data: dicts with "prompt", a text or a list of chat messages, and the columns that rewards read.
            model: a `Decoder`.
            tokenizer: reads the prompts.
            max_tokens: of a completion.
            max_prompt_length: tokens of a prompt at most; None: what the model has room for.
            truncate: cut longer prompts at their beginning.

        Raises:
            ValueError: no data, a row without a prompt, columns that differ, or a prompt that is empty, too long, or of
                ids that the model does not know.
        """
        self._rows = list(data)
        if not self._rows:
            raise ValueError(f"{name}: expected at least one row, got none")
        self._texts: list[str] = []
        self.ids: list[list[int]] = []
        for index, row in enumerate(self._rows):
            where = f"{name}[{index}]"
            self._check_columns(where, row)
            text, ids = read_prompt(where, tokenizer, row["prompt"])
            if truncate and max_prompt_length is not None:
                ids = ids[-max_prompt_length:]
            _check_ids(where, ids, text, model.config, max_tokens, max_prompt_length)
            self._texts.append(text)
            self.ids.append(ids)
        self.longest = max(map(len, self.ids))

    def __len__(self) -> int:
        return len(self._rows)

    def _check_columns(self, where: str, row: Any) -> None:
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise ValueError(f"{where}: expected a mapping with 'prompt', got {row!r:.80}")
        if row.keys() != self._rows[0].keys():
            raise ValueError(
                f"{where}: expected the columns {sorted(self._rows[0])} of the first row, got {sorted(row)}"
            )
        if taken := [name for name in _TAKEN if name in row]:
            raise ValueError(f"{where}: expected columns that are not {' or '.join(_TAKEN)}, got {taken[0]!r}")

    def rewards(
        self, reward_fns: Sequence[RewardFn], factors: np.ndarray, rows: Sequence[int], completions: Sequence[str]
    ) -> tuple[Float[np.ndarray, " B"], dict[str, float]]:
        """The weighted sum of what reward functions give completions of rows, float32, and the mean that each gave.

        Only the first process calls them, where there are several.

        Raises:
            RuntimeError, ValueError: as `combine_rewards`, in every process.
        """

        def score() -> np.ndarray:
            columns = {name: [self._rows[row][name] for row in rows] for name in self._rows[0] if name != "prompt"}
            return reward_table(reward_fns, [self._texts[row] for row in rows], list(completions), **columns)

        table = _by_first_process(score, (len(reward_fns), len(rows)))
        total = np.asarray(np.nansum(table * factors[:, None], axis=0), np.float32)
        given = [(function_name(fn), line[~np.isnan(line)]) for fn, line in zip(reward_fns, table)]
        means = {f"reward/{name}": float(line.mean()) for name, line in given if line.size}
        return total, means if len(table) > 1 else {}


def read_prompt(where: str, tokenizer: Any, prompt: Any) -> tuple[str, list[int]]:
    """A prompt as the model reads it, text and ids: text as it is, chat messages through the tokenizer's template.

    Raises:
        ValueError: neither of these, or messages for a tokenizer without a template; the message begins with `where`.
    """
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise ValueError(f"{where}: expected a prompt that is a text or a list of chat messages, got {prompt!r:.80}")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"{where}: expected a text, since {type(tokenizer).__name__} has no chat template")
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return text, tokenizer.encode(text, add_special_tokens=False)  # the template has its own


def _check_ids(where: str, ids: list[int], text: str, model: Any, max_tokens: int, limit: int | None) -> None:
    if not ids:
        raise ValueError(f"{where}: expected a prompt of at least one token, got {text!r}")
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"{where}: expected a prompt of at most max_prompt_length = {limit} tokens, got {len(ids)}; "
            "truncate_prompts=True cuts it at its beginning"
        )
    if len(ids) + max_tokens > model.max_position_embeddings:
        raise ValueError(
            f"{where}: expected prompt and completion within max_position_embeddings = "
            f"{model.max_position_embeddings}, got {len(ids)} + {max_tokens} tokens"
        )
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        raise ValueError(f"{where}: expected ids in [0, {model.vocab_size}), got {min(ids)} to {max(ids)}")


def _by_first_process(compute: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What `compute` gives in the first process, float32, in all of them; where it raises they all do."""
    if jax.process_count() == 1:
        return np.asarray(compute(), np.float32)
    from jax.experimental import multihost_utils

    value, error = np.zeros(shape, np.float32), None
    if jax.process_index() == 0:
        try:
            value = np.asarray(compute(), np.float32)
        except Exception as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process failed to compute the rewards; its own error says why")
    return np.asarray(multihost_utils.broadcast_one_to_all(value))
