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
from jaxlab.rl.prompts import PromptSet
from jaxlab.rl.rewards import RewardFn, factors_of

_TAKEN = ("step", "time")  # by the log


@struct.dataclass
class Rollout:
    """B sequences, the members of a group adjacent, on the host and the same in every process.

    Attributes:
        inputs: a pytree of arrays, axis 0 of every leaf the rows.
        mask: `[B,T]` float32, 1 at tokens that the policy chose.
        logps: `[B,T]` float32, the sampler's log-probabilities; what lies under mask 0 never matters.
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
    data are through. Rewards are computed by the first process, and shared.
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
            ValueError: no reward function, weights that do not fit, or data that `PromptSet` refuses.
        """
        if not reward_fns:
            raise ValueError("reward_fns: expected at least one function, got none")
        self._model, self._tokenizer, self._reward_fns = model, tokenizer, tuple(reward_fns)
        self._factors = factors_of(reward_weights, len(reward_fns))
        self._config, self._mesh = config, mesh
        self._prompts = PromptSet(
            "train_data",
            data,
            model,
            tokenizer,
            max_tokens=config.max_completion_length,
            max_prompt_length=config.max_prompt_length,
            truncate=config.truncate_prompts,
        )

    def chosen(self, draw: int) -> list[int]:
        """The rows of the data that a draw takes."""
        return chosen_rows(draw, self._config.prompts_per_step, len(self._prompts), self._config.seed)

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
            [self._prompts.ids[row] for row in rows],
            sampling,
            n=config.num_generations,
            rng=key,
            tokenizer=self._tokenizer,
            mesh=self._mesh,
            prompt_length=self._prompts.longest,
        )
        tokens, mask, logps, lengths = (
            np.asarray(x) for x in jax.device_get((out.tokens, out.mask, out.logps, out.lengths))
        )
        sampled = time.perf_counter()
        assert out.text is not None  # there is a tokenizer
        sources = [row for row in rows for _ in range(config.num_generations)]
        rewards, means = self._prompts.rewards(self._reward_fns, self._factors, sources, out.text)
        seconds = {"sampling_seconds": sampled - started, "reward_seconds": time.perf_counter() - sampled}
        return Rollout(
            inputs=text_inputs([self._prompts.ids[row] for row in sources], self._prompts.longest, tokens, lengths),
            mask=mask.astype(np.float32),
            logps=logps,
            rewards=rewards,
            truncated=np.array([reason == "length" for reason in out.finish_reason]),
            metrics={**means, **seconds},
        )


def chosen_rows(draw: int, count: int, size: int, seed: int) -> list[int]:
    """Which `count` of `size` rows a draw takes: each once before any twice, in an order of each epoch's own."""
    places = range(draw * count, (draw + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch in {place // size for place in places}
    }
    return [int(orders[place // size][place % size]) for place in places]


def text_inputs(
    prompts: Sequence[Sequence[int]], longest: int, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray
) -> TextInputs:
    """Prompt and completion of each row; what follows is 0, an id like any other, and masked.

    Args:
        prompts: ids, one a row.
        longest: room for a prompt, the same in every batch so that nothing compiles anew.
        tokens: `[B,T]` completions.
        lengths: `[B]` tokens of each.
    """
    whole = np.zeros((len(prompts), longest + tokens.shape[1]), np.int32)
    for line, prompt, new, length in zip(whole, prompts, tokens, lengths):
        line[: len(prompt)] = prompt
        line[len(prompt) : len(prompt) + length] = new[:length]
    return TextInputs(whole, np.array([len(prompt) for prompt in prompts], np.int32))


def next_batch(
    rollout: RolloutFunction, params: PyTree, key: Array, draw: int, config: GRPOConfig
) -> tuple[Rollout, int]:
    """The batch of a step, and the draw after it.

    With `config.dynamic_sampling` it draws until the batch is full of groups whose rewards differ (DAPO, arXiv
    2503.14476, section 3.2), for at most so many rounds; what is missing then are groups whose rewards are equal. Such
    a batch says little of the policy, so `drawn_reward` and `drawn_zero_variance_fraction` are those of all groups
    drawn, and seconds are summed over the rounds.

    Args:
        rollout: draws a batch.
        params: of the policy.
        key: of the run; a draw has its own.
        draw: the next one.
        config: of the run.

    Raises:
        ValueError: the rollout does not fit the config, or has rewards that are not finite.
    """
    groups = (config.prompts_per_step, config.num_generations)
    drawn: list[Rollout] = []
    differ: list[np.ndarray] = []
    for _ in range(max(config.dynamic_sampling, 1)):
        drawn.append(_checked(rollout(params, jax.random.fold_in(key, draw), draw), config))
        rewards = drawn[-1].rewards.reshape(groups)
        differ.append(rewards.max(axis=1) > rewards.min(axis=1))
        draw += 1
        if np.sum(differ) >= config.prompts_per_step:
            break
    if not config.dynamic_sampling:
        return drawn[0], draw
    useful = np.repeat(np.concatenate(differ), config.num_generations)
    order = np.argsort(~useful, kind="stable")[: config.batch_size]
    bare = [dataclasses.replace(part, metrics={}) for part in drawn]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *bare)
    metrics = _over_rounds([part.metrics for part in drawn]) | {
        "sampling_rounds": float(len(drawn)),
        "drawn_reward": float(np.mean([part.rewards for part in drawn])),
        "drawn_zero_variance_fraction": float(1 - np.mean(differ)),
    }
    return dataclasses.replace(whole, metrics=metrics), draw


def _over_rounds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds are summed, everything else is averaged over the rounds that have it."""
    values = {name: [one[name] for one in metrics if name in one] for name in {n: None for one in metrics for n in one}}
    return {name: float((np.sum if name.endswith("_seconds") else np.mean)(found)) for name, found in values.items()}


def _checked(rollout: Rollout, config: GRPOConfig) -> Rollout:
    rows = config.batch_size
    if rollout.mask.ndim != 2 or len(rollout.mask) != rows:
        raise ValueError(f"rollout.mask: expected prompts_per_step * num_generations = {rows} rows of tokens, "
                         f"got shape {rollout.mask.shape}")  # fmt: skip
    expected = {"logps": rollout.mask.shape, "rewards": (rows,), "truncated": (rows,)}
    for name, shape in expected.items():
        if getattr(rollout, name).shape != shape:
            raise ValueError(f"rollout.{name}: expected shape {shape}, got {getattr(rollout, name).shape}")
    for leaf in jax.tree.leaves(rollout.inputs):
        if np.shape(leaf)[:1] != (rows,):
            raise ValueError(f"rollout.inputs: expected arrays of {rows} rows, got shape {np.shape(leaf)}")
    if not np.isfinite(rollout.rewards).all():
        bad = int(np.argmin(np.isfinite(rollout.rewards)))
        raise ValueError(f"rollout.rewards: expected finite numbers, got {rollout.rewards[bad]} in row {bad}")
    for name in _TAKEN:
        if name in rollout.metrics:
            raise ValueError(f"rollout.metrics: the name {name!r} is taken by the log")
    return rollout
