"""How good a policy is: samples of a data set's prompts, scored by reward functions."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from jaxlab import core
from jaxlab.core import statistics
from jaxlab.inference import SamplingParams, generate
from jaxlab.rl.prompts import PromptSet
from jaxlab.rl.rewards import RewardFn, factors_of


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found for Q prompts with n samples each.

    Attributes:
        pass_at_1: mean reward (pass@1 where it is 0 or 1) over all samples, with the 95 % interval of a bootstrap that
            draws whole prompts, for samples of one prompt are not independent. One prompt has no interval: NaN.
        rewards: `[Q,n]` float32.
        completions: n texts of each prompt.
        truncated_fraction: samples that were cut off at their maximum length.
    """

    pass_at_1: statistics.Interval
    rewards: Float[np.ndarray, "Q n"]
    completions: tuple[tuple[str, ...], ...]
    truncated_fraction: float


def evaluate(
    model: Any,
    params: PyTree,
    data: Sequence[Mapping[str, Any]],
    reward_fns: Sequence[RewardFn],
    tokenizer: Any,
    *,
    n: int = 4,
    temperature: float = 1.0,
    top_p: float = 0.7,
    max_tokens: int,
    batch_size: int = 32,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> EvalResult:
    """Samples every prompt n times and scores the completions; n, temperature and top_p are those of SFPO's scripts.

    All batches, the last one filled up, run the same programs. A sample is a function of seed, batch size and its place
    in the data.

    Args:
        model: a `Decoder`.
        params: its parameters.
        data: dicts with "prompt", a text or a list of chat messages, and the columns that rewards read.
        reward_fns: as in `combine_rewards`; rewards of several are added.
        tokenizer: reads prompts, writes completions, and gives the id that ends them.
        n: samples of each prompt.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus of sampling.
        max_tokens: of a completion.
        batch_size: prompts sampled at a time.
        seed: of the samples.
        mesh: as for `generate`; every process of it makes the same call and gets the same result.

    Raises:
        ValueError: no reward function, a count below 1, sampling values out of range, data without rows or with a
            prompt that does not fit, or rewards that `combine_rewards` refuses.
        RuntimeError: a reward function raised.
    """
    for name, value in (("n", n), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    factors = factors_of(None, len(reward_fns))
    if not reward_fns:
        raise ValueError("reward_fns: expected at least one function, got none")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    prompts = PromptSet("data", data, model, tokenizer, max_tokens=max_tokens)
    count = len(prompts)
    size = min(batch_size, count)
    key = core.named_key(jax.random.key(seed), "evaluation")
    texts: list[str] = []
    truncated: list[bool] = []
    for index in core.progress(range(-(-count // size)), "evaluation"):
        rows = itertools.islice(itertools.cycle(range(count)), index * size, (index + 1) * size)
        out = generate(
            model,
            params,
            [prompts.ids[row] for row in rows],
            sampling,
            n=n,
            rng=jax.random.fold_in(key, index),
            tokenizer=tokenizer,
            mesh=mesh,
            prompt_length=prompts.longest,
        )
        assert out.text is not None  # there is a tokenizer
        texts += out.text
        truncated += [reason == "length" for reason in out.finish_reason]
    texts, truncated = texts[: count * n], truncated[: count * n]
    rewards, _ = prompts.rewards(reward_fns, factors, [row for row in range(count) for _ in range(n)], texts)
    rewards = rewards.reshape(count, n)
    return EvalResult(
        pass_at_1=_interval(rewards),
        rewards=rewards,
        completions=tuple(tuple(texts[start : start + n]) for start in range(0, count * n, n)),
        truncated_fraction=float(np.mean(truncated)),
    )


def _interval(rewards: np.ndarray) -> statistics.Interval:
    """A prompt's samples are as many as every other's, so that to draw prompts is to draw their means."""
    means = rewards.mean(axis=1, dtype=np.float64)
    if len(means) == 1:
        return statistics.Interval(float(means[0]), float("nan"), float("nan"))
    return statistics.bootstrap_ci(means)
