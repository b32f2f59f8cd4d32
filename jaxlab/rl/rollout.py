"""The seam between sampling and training: batches of completions with their rewards, from text or from anything else.

A rollout function is all that the trainer knows of where its data come from:

    rollout(params, key, draw) -> Rollout

`draw` counts the calls of a whole run, so that a function of it is a position in the data that survives a restart. A
log-prob function says what the policy thinks of a rollout's `inputs`, which the trainer itself never reads:

    token_logps(params, inputs) -> TokenLogps
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from jaxlab.inference import SamplingParams, generate
from jaxlab.rl.config import GRPOConfig
from jaxlab.rl.logps import TextInputs, TokenLogps
from jaxlab.rl.rewards import RewardFn, factors_of, function_name, reward_table


@struct.dataclass
class Rollout:
    """B sequences, the members of a group adjacent, on the host and the same in every process.

    Attributes:
        inputs: a pytree, axis 0 of every leaf the rows.
        mask: `[B,T]` float32, 1 at tokens that the policy chose.
        logps: `[B,T]` float32, the sampler's log-probabilities.
        rewards: `[B]` float32.
        truncated: `[B]`, True where a completion was cut off at its maximum length.
        metrics: numbers for the log.
    """

    inputs: PyTree
    mask: Float[np.ndarray, "B T"]
    logps: Float[np.ndarray, "B T"]
    rewards: Float[np.ndarray, " B"]
    truncated: Bool[np.ndarray, " B"]
    metrics: Mapping[str, float] = struct.field(pytree_node=False, default_factory=dict)


RolloutFunction = Callable[[PyTree, Array, int], Rollout]
LogpFunction = Callable[[PyTree, PyTree], TokenLogps]


class TextRollouts:
    """Completions of a data set's prompts by `generate`, scored by reward functions.

    Every draw takes the next `prompts_per_step` prompts of an order that a seed decides, shuffled anew each time the
    data is through. Rewards are computed by the first process, and shared.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reward_fns: Sequence[RewardFn],
        config: GRPOConfig,
        data: Sequence[Mapping[str, Any]],
        *,
        reward_weights: Sequence[float] | None = None,
        mesh: Mesh | None = None,
    ):
        """Reads and checks all prompts.

        Args:
            model: a `Decoder`.
            tokenizer: reads prompts, writes completions, and gives the id that ends them.
            reward_fns: as in `combine_rewards`.
            config: sizes and sampling.
            data: dicts with "prompt", a text or a list of chat messages, and the columns that rewards read.
            reward_weights: a factor for each reward function; None: 1 each.
            mesh: as for `generate`.

        Raises:
            ValueError: no data, no reward function, a row without a prompt, columns that differ, or a prompt that is
                empty or too long.
        """
        if not reward_fns:
            raise ValueError("reward_fns: expected at least one function, got none")
        self._model, self._tokenizer, self._reward_fns = model, tokenizer, tuple(reward_fns)
        self._weights = factors_of(reward_weights, len(reward_fns))
        self._config, self._mesh = config, mesh
        self._data = checked_data(data)
        self._prompts = [prompt_text(tokenizer, row["prompt"]) for row in self._data]
        self._ids = [self._read(index, prompt) for index, prompt in enumerate(self._prompts)]
        self._room = max(map(len, self._ids))

    def _read(self, index: int, prompt: str) -> np.ndarray:
        ids = np.asarray(self._tokenizer.encode(prompt), np.int32)
        limit = self._config.max_prompt_length
        if ids.size == 0:
            raise ValueError(f"train_data[{index}]: expected a prompt of at least one token, got {prompt!r}")
        if ids.size > limit and not self._config.truncate_prompts:
            raise ValueError(
                f"train_data[{index}]: expected a prompt of at most max_prompt_length = {limit} tokens, got "
                f"{ids.size}; truncate_prompts=True cuts it at its beginning"
            )
        return ids[-limit:]

    def chosen(self, draw: int) -> list[int]:
        """The rows of the data that a draw takes."""
        count, size = self._config.prompts_per_step, len(self._data)
        places = range(draw * count, (draw + 1) * count)
        orders = {
            epoch: np.random.default_rng([self._config.seed, epoch]).permutation(size)
            for epoch in {place // size for place in places}
        }
        return [int(orders[place // size][place % size]) for place in places]

    def __call__(self, params: PyTree, key: Array, draw: int) -> Rollout:
        """Samples and scores one batch."""
        config, rows = self._config, self.chosen(draw)
        sampling = SamplingParams(
            max_tokens=config.max_completion_length, temperature=config.temperature, top_p=config.top_p
        )
        started = time.perf_counter()
        out = generate(
            self._model,
            params,
            [self._ids[row] for row in rows],
            sampling,
            n=config.num_generations,
            rng=key,
            tokenizer=self._tokenizer,
            mesh=self._mesh,
            prompt_length=self._room,
        )
        tokens, logps, lengths = (np.asarray(x) for x in jax.device_get((out.tokens, out.logps, out.lengths)))
        sampled = time.perf_counter()
        sources = [row for row in rows for _ in range(config.num_generations)]
        rewards, metrics = self._rewards(sources, out.text)
        mask = np.asarray(np.arange(tokens.shape[1]) < lengths[:, None], np.float32)
        return Rollout(
            inputs=self._inputs(sources, tokens, lengths),
            mask=mask,
            logps=logps * mask,
            rewards=rewards,
            truncated=np.array([reason == "length" for reason in out.finish_reason]),
            metrics={
                **metrics,
                "sampling_seconds": sampled - started,
                "reward_seconds": time.perf_counter() - sampled,
            },
        )

    def _inputs(self, sources: Sequence[int], tokens: np.ndarray, lengths: np.ndarray) -> TextInputs:
        starts = np.array([len(self._ids[row]) for row in sources], np.int32)
        whole = np.zeros((len(sources), self._room + tokens.shape[1]), np.int32)
        for line, row, start, new, length in zip(whole, sources, starts, tokens, lengths):
            line[:start] = self._ids[row]
            line[start : start + length] = new[:length]
        return TextInputs(whole, starts)

    def _rewards(self, sources: Sequence[int], texts: Sequence[str]) -> tuple[np.ndarray, dict[str, float]]:
        def score() -> np.ndarray:
            columns = {name: [self._data[row][name] for row in sources] for name in self._data[0] if name != "prompt"}
            prompts = [self._prompts[row] for row in sources]
            return reward_table(self._reward_fns, prompts, list(texts), **columns)

        table = shared_by_first(score, (len(self._reward_fns), len(sources)))
        rewards = np.asarray(np.nansum(table * self._weights[:, None], axis=0), np.float32)
        if len(table) == 1:
            return rewards, {}
        given = [(function_name(fn), row[~np.isnan(row)]) for fn, row in zip(self._reward_fns, table)]
        return rewards, {f"reward/{name}": float(row.mean()) for name, row in given if row.size}


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """A prompt as the model reads it: text as it is, chat messages through the tokenizer's template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def checked_data(data: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a data set.

    Raises:
        ValueError: none, one without "prompt", or rows of different columns.
    """
    rows = list(data)
    if not rows:
        raise ValueError("train_data: expected at least one row, got none")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise ValueError(f"train_data[{index}]: expected a mapping with 'prompt', got {row!r:.80}")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"train_data[{index}]: expected the columns {sorted(rows[0])} of the first row, got {sorted(row)}"
            )
    return rows


def shared_by_first(compute: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What `compute` gives in the first process, in all of them; its error as well."""
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


def with_signal(
    rollout: RolloutFunction, params: PyTree, key: Array, draw: int, *, group_size: int, rounds: int
) -> tuple[Rollout, int]:
    """Draws until a batch is full of groups whose rewards differ: dynamic sampling (DAPO, arXiv 2503.14476, 3.2).

    Args:
        rollout: draws a batch.
        params: of the policy.
        key: of the run; a draw has its own.
        draw: the next one.
        group_size: G.
        rounds: draws at most; what is missing then are groups whose rewards are equal. 0 takes the first batch whole.

    Returns:
        The batch, and the draw after it.
    """
    kept: list[Rollout] = []
    spare: list[Rollout] = []
    for _ in range(max(rounds, 1)):
        drawn = rollout(params, jax.random.fold_in(key, draw), draw)
        draw += 1
        if not rounds:
            return drawn, draw
        rewards = drawn.rewards.reshape(-1, group_size)
        differ = rewards.max(axis=1) > rewards.min(axis=1)
        kept.append(_groups(drawn, differ, group_size))
        spare.append(_groups(drawn, ~differ, group_size))
        if sum(len(part.rewards) for part in kept) >= len(drawn.rewards):
            break
    metrics = {name: float(np.mean([part.metrics[name] for part in kept])) for name in kept[0].metrics}
    metrics |= {name: sum(part.metrics[name] for part in kept) for name in metrics if name.endswith("_seconds")}
    metrics["sampling_rounds"] = float(len(kept))
    bare = [dataclasses.replace(part, metrics={}) for part in (*kept, *spare)]
    size = len(drawn.rewards)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *bare)
    return dataclasses.replace(whole, metrics=metrics), draw


def _groups(rollout: Rollout, chosen: np.ndarray, group_size: int) -> Rollout:
    rows = np.repeat(chosen, group_size)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], rollout)
