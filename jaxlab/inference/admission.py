"""What every engine asks of a request before it takes it."""

from typing import Any

from jaxlab.inference.batch import prompt_ids
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.programs import MOST_ALTERNATIVES
from jaxlab.inference.serving import EngineConfig


def checked_ids(
    ids: Any, sampling: SamplingParams, *, tokenizer: Any, model_config: Any, config: EngineConfig
) -> list[int]:
    """The prompt's ids; errors as `Engine.add_request`.

    Args:
        ids: the prompt (or a text, with a tokenizer).
        sampling: how it is to be drawn.
        tokenizer: of the engine.
        model_config: of its decoder.
        config: of the engine.
    """
    if sampling.stop and tokenizer is None:
        raise TypeError(f"tokenizer: expected one, to look for the stop strings {sampling.stop!r}, got None")
    if sampling.logprobs > MOST_ALTERNATIVES:
        raise ValueError(f"logprobs: expected at most {MOST_ALTERNATIVES}, got {sampling.logprobs}")
    tokens = prompt_ids([ids], tokenizer, model_config, sampling.max_tokens)[0].tolist()
    needed = -(-(len(tokens) + max(sampling.max_tokens - 1, 0)) // config.page_size)
    if needed > config.num_pages - 1:
        raise ValueError(
            f"prompt + max_tokens: expected at most the pool's {config.num_pages - 1} pages of "
            f"{config.page_size} tokens, got {len(tokens)} + {sampling.max_tokens}, {needed} pages"
        )
    return tokens
