"""Reward functions of TRL's and Tunix's shape, how several become one, and a guard for those that cannot be trusted.

A reward function is `fn(prompts, completions, **columns) -> one number or None a row`. Columns are those of the data
set, one entry a row; a function gets the columns its parameters name, or all if it takes `**kwargs`. None means that
the function does not apply to the row. Options are bound beforehand: `functools.partial(math_reward, timeout_s=1.0)`.
"""

import functools
import importlib
import inspect
import math
import pickle
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxlab.core import tasks
from jaxlab.core.errors import require
from jaxlab.rl import answers

if TYPE_CHECKING:  # worker processes import this file, and need no JAX
    import jax

RewardFn = Callable[..., Sequence[float | None]]

_LARGEST = float(np.finfo(np.float32).max)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def math_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[Any], timeout_s: float = 5.0
) -> list[float | None]:
    r"""1.0 where a completion's final answer is mathematically the right one, else 0.0.

    The final answer of both is the last `\boxed{}`, else the line after the last `####`, else the whole text; they are
    compared by `jaxlab.rl.answers.compare`. A comparison that hangs or crashes gives 0.0 and is told in a warning.

    Args:
      prompts: not looked at.
      completions: [B] texts.
      answer: [B] right answers, texts or numbers; None: the row has no reward by this function.
      timeout_s: limit for one comparison.

    Raises:
      ValueError: different lengths, `timeout_s` not above 0, or an answer that is empty.
      MissingExtra: math-verify is not installed.
    """
    _check_rows("math_reward", prompts, completions, {"answer": answer})
    golds = {row: answers.extract(str(gold)) for row, gold in enumerate(answer) if gold is not None}
    for row, gold in golds.items():
        if not gold:
            raise ValueError(f"math_reward: answer: expected an answer in each row, got {answer[row]!r} in row {row}")
    predictions = [answers.extract(completions[row]) for row in golds]
    verdicts = answers.compare(predictions, list(golds.values()), timeout_s=timeout_s)
    answers.warn_of_errors("math_reward", verdicts)
    rewards: list[float | None] = [None] * len(completions)
    for row, verdict in zip(golds, verdicts):
        rewards[row] = float(verdict.equal)
    return rewards


def exact_match(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str]) -> list[float]:
    """1.0 where a completion is the answer, outer white space aside, else 0.0."""
    _check_rows("exact_match", prompts, completions, {"answer": answer})
    return [float(completion.strip() == right.strip()) for completion, right in zip(completions, answer)]


def format_reward(pattern: str) -> RewardFn:
    """A reward function: 1.0 where the pattern is found in the completion (`re.search`), else 0.0.

    Raises:
      ValueError: the pattern is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: expected a regular expression, got {pattern!r}: {error}") from error
    return _Format(pattern)


class _Format:
    """What `format_reward` returns: an object, so that it pickles."""

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern)
        self.__name__ = "format_reward"

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        _check_rows(self.__name__, prompts, completions, {})
        return [float(self._pattern.search(completion) is not None) for completion in completions]


def reasoning_gym_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    entry: Sequence[Mapping[str, Any]],
    threshold: float | None = None,
    timeout_s: float = 5.0,
) -> list[float]:
    """The score that reasoning-gym's own data set gives to a completion's answer.

    The answer is the last `<answer>...</answer>`, else the last box, else the whole text. Scores run from 0 to 1, often
    with partial credit, also for nonsense: 0.01 for any text in `countdown`, a share for a text that contains the right
    answer. Scorers run in worker processes; one that hangs or crashes gives 0.0 and is told in a warning.

    Args:
      prompts: not looked at.
      completions: [B] texts.
      entry: [B] items of reasoning-gym data sets, whole: `metadata["source_dataset"]` names the scorer.
      threshold: None: the score as it is; else 1.0 for scores of at least this, and 0.0 below.
      timeout_s: limit for one score.

    Raises:
      ValueError: different lengths, `timeout_s` not above 0, or an entry of no known data set.
      MissingExtra: reasoning-gym is not installed.
    """
    _check_rows("reasoning_gym_reward", prompts, completions, {"entry": entry})
    require("reasoning_gym", "rl")
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    for row, item in enumerate(entry):
        name = item.get("metadata", {}).get("source_dataset")
        if name not in known:
            raise ValueError(
                'reasoning_gym_reward: entry: expected metadata["source_dataset"] to name a data set of reasoning-gym, '
                f"got {name!r} in row {row}"
            )
    items = [(_tagged(completion), item) for completion, item in zip(completions, entry)]
    scores, errors = [], {}
    for row, result in enumerate(tasks.map(_Scorer(), items, timeout_s=timeout_s, retries=0)):
        score = 0.0 if result.value is None else result.value
        scores.append(score if threshold is None else float(score >= threshold))
        if result.error is not None:
            errors[row] = result.error
    _warn("reasoning_gym_reward", errors, "0.0")
    return scores


def _tagged(completion: str) -> str:
    tags = _ANSWER_TAG.findall(completion)
    return tags[-1].strip() if tags else answers.boxed(completion) or completion.strip()


class _Scorer:
    """Scores one answer in a worker. Unpickling it imports reasoning-gym, which so takes no part of a score's time."""

    def __reduce__(self):
        return _scorer, ()

    def __call__(self, item: tuple[str, Mapping[str, Any]]) -> float:
        answer, entry = item
        return float(_score_function(entry["metadata"]["source_dataset"])(answer, entry))


def _scorer() -> _Scorer:
    require("reasoning_gym", "rl")
    return _Scorer()


@functools.cache
def _score_function(name: str) -> Callable[[str, Mapping[str, Any]], float]:
    return importlib.import_module("reasoning_gym").get_score_answer_fn(name)


def guarded(
    reward_fn: RewardFn, *, timeout_s: float = 5.0, on_failure: float | Literal["raise"] | None = None
) -> RewardFn:
    """A reward function that cannot hang or kill the run: `reward_fn` in worker processes, one row a call.

    What happens to a row is then one of three things:

    - its call returns a number or None: the row's reward;
    - its call does not end within the limit, or its process dies: `on_failure`, and one warning for the batch;
    - its call raises, or returns anything else: that is a fault of the function, and is raised as if unguarded.

    Args:
      reward_fn: a function at the top of a module that a fresh process can import, or another picklable object. It sees
        one row at a time. As a decorator `guarded` cannot work: the name would no longer lead to the function.
      timeout_s: limit for one row.
      on_failure: None: the row has no reward by this function, and needs one by another; a number such as 0.0: its
        reward; "raise": a RuntimeError.

    Raises:
      TypeError: `reward_fn` cannot be pickled.
      ValueError: `timeout_s` not above 0, or another `on_failure`.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s}")
    if on_failure not in (None, "raise") and not _is_reward(on_failure):
        raise ValueError(f'on_failure: expected None, a finite number or "raise", got {on_failure!r}')
    try:
        pickle.dumps(reward_fn)
    except Exception as error:
        raise TypeError(
            f"reward_fn: expected a function that pickles (defined at the top of a module, not a lambda, a closure or "
            f"what a decorator replaces), got {reward_fn!r}: {error}"
        ) from error
    return _Guarded(reward_fn, timeout_s, on_failure)


class _Guarded:
    """What `guarded` returns."""

    def __init__(self, fn: RewardFn, timeout_s: float, on_failure: float | str | None):
        self._fn, self._timeout_s, self._on_failure = fn, timeout_s, on_failure
        self.__name__ = function_name(fn)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float | None]:
        _check_rows(self.__name__, prompts, completions, columns)
        columns = _columns_for(self._fn, columns)
        rows = [
            (row, prompt, completion, {name: column[row] for name, column in columns.items()})
            for row, (prompt, completion) in enumerate(zip(prompts, completions))
        ]
        rewards, errors = [], {}
        call = functools.partial(_call_row, self._fn)
        results = list(tasks.map(call, rows, timeout_s=self._timeout_s, retries=0))
        for row, result in enumerate(results):
            reward, raised = (self._on_failure, None) if result.value is None else result.value
            if raised is not None:
                raise raised
            if result.error is not None:
                errors[row] = result.error
                if self._on_failure == "raise":
                    raise RuntimeError(f"{self.__name__}: row {row}: {result.error}")
            rewards.append(reward)
        _warn(self.__name__, errors, "no reward" if self._on_failure is None else f"{self._on_failure}")
        return rewards


def _call_row(fn: RewardFn, item: tuple[int, str, str, dict[str, Any]]) -> tuple[float | None, Exception | None]:
    """One row's reward, or what the function raised, in a form that the caller's process can load."""
    row, prompt, completion, columns = item
    try:
        rewards = fn([prompt], [completion], **{name: [value] for name, value in columns.items()})
        return _checked(function_name(fn), rewards, 1, first=row)[0], None
    except Exception as error:
        error.add_note(f"In row {row}, in a worker process:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{error!r}\n{error.__notes__[-1]}")
        return None, error


def combine_rewards(
    reward_fns: Sequence[RewardFn],
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    **columns: Sequence,
) -> "jax.Array":
    """The weighted sum of several reward functions, [B] float32; where one gives None, the others' sum.

    Args:
      reward_fns: the functions.
      prompts: [B] texts.
      completions: [B] texts.
      weights: a factor for each function; None: 1 each.
      **columns: of the data set, [B] entries each; a function gets those that its parameters name.

    Raises:
      RuntimeError: a function raised; the message names it, the cause is what it raised.
      ValueError: different lengths, a column that a function needs and the data lack, rewards of the wrong number or
        that are NaN or infinite, or a row for which all functions return None. The message names the function.
    """
    factors = factors_of(weights, len(reward_fns))
    table = reward_table(reward_fns, prompts, completions, **columns)
    import jax.numpy as jnp

    return jnp.asarray(np.nansum(table * factors[:, None], axis=0), jnp.float32)


def factors_of(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """The factors of `count` reward functions, 1 each where there are no weights.

    Raises:
      ValueError: another number of them, or one that is not finite.
    """
    factors = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if factors.shape != (count,) or not np.isfinite(factors).all():
        raise ValueError(f"weights: expected a finite number for each of {count} functions, got {weights}")
    return factors


def reward_table(
    reward_fns: Sequence[RewardFn], prompts: Sequence[str], completions: Sequence[str], **columns: Sequence
) -> np.ndarray:
    """What each function gives each row, `[F,B]`, NaN for None; takes and raises what `combine_rewards` does."""
    _check_rows("combine_rewards", prompts, completions, columns)
    if not reward_fns:
        raise ValueError("reward_fns: expected at least one reward function, got none")
    rows = [_rewards(fn, prompts, completions, columns) for fn in reward_fns]
    table = np.array([[np.nan if reward is None else reward for reward in row] for row in rows], np.float64)
    missing = np.isnan(table).all(axis=0)
    if missing.any():
        names = ", ".join(function_name(fn) for fn in reward_fns)
        raise ValueError(f"row {np.argmax(missing)}: no reward, for every reward function returned None ({names})")
    return table


def function_name(fn: Any) -> str:
    """What errors call a reward function."""
    if isinstance(fn, functools.partial):
        return function_name(fn.func)
    return getattr(fn, "__name__", type(fn).__name__)


class _Fault(ValueError):
    """What is wrong with a reward function, its name included; passed on as it is through a guard."""


def _rewards(
    fn: RewardFn, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence]
) -> list[float | None]:
    columns = _columns_for(fn, columns)
    try:
        rewards = fn(prompts, completions, **columns)
    except _Fault:
        raise
    except Exception as error:
        raise RuntimeError(f"reward function {function_name(fn)} raised {error!r}") from error
    return _checked(function_name(fn), rewards, len(completions))


def _columns_for(fn: RewardFn, columns: Mapping[str, Sequence]) -> dict[str, Sequence]:
    """The columns that a function takes after prompts and completions."""
    parameters = list(inspect.signature(fn).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(columns)
    named = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in columns:
            raise _Fault(
                f"{function_name(fn)}: needs the column {parameter.name!r}; "
                f"the data have {', '.join(columns) or 'none'}"
            )
    return {parameter.name: columns[parameter.name] for parameter in named if parameter.name in columns}


def _checked(name: str, rewards: Any, number: int, *, first: int = 0) -> list[float | None]:
    """The rewards as floats.

    Raises:
      ValueError: another number of them, or something that is neither a finite number nor None.
    """
    try:
        rewards = list(rewards)
    except TypeError as error:
        raise _Fault(f"{name}: expected a list of {number} rewards, got {rewards!r}") from error
    if len(rewards) != number:
        raise _Fault(f"{name}: expected {number} rewards, one a row, got {len(rewards)}")
    for row, reward in enumerate(rewards, first):
        if reward is not None and not _is_reward(reward):
            raise _Fault(f"{name}: expected a finite number or None for each row, got {reward!r} in row {row}")
    return [None if reward is None else float(reward) for reward in rewards]


def _is_reward(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    if isinstance(value, str | bytes):
        return False
    try:
        return math.fabs(float(value)) <= _LARGEST
    except (TypeError, ValueError, OverflowError):
        return False


def _check_rows(name: str, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]) -> None:
    for argument, column in {"prompts": prompts, "completions": completions, **columns}.items():
        if isinstance(column, str) or not hasattr(column, "__len__"):
            raise ValueError(f"{name}: {argument}: expected a list with one entry a row, got {column!r}")
        if len(column) != len(completions):
            raise ValueError(f"{name}: {argument}: expected one for each of {len(completions)} rows, got {len(column)}")


def _warn(name: str, errors: Mapping[int, str], instead: str) -> None:
    """Warns of the rows that failed, if any."""
    if errors:
        row, error = next(iter(errors.items()))
        warnings.warn(
            f"{name}: {len(errors)} rows failed and get {instead}; row {row}: {error.strip().splitlines()[-1]}",
            RuntimeWarning,
            stacklevel=3,
        )
