"""The paged engine beside transformers and beside static batching of its own, on a random Llama-shaped model.

Greedy, without stop ids on either side: all make exactly the tokens asked for.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Case, interleaved

SYSTEM = "voltanallm"
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
REQUESTS, NEW, PROMPTS, OUTPUTS = 32, 64, (8, 128), (8, 256)


def _torch_model() -> Any:
    """The same sizes as random float32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=0)).float().eval()


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    stream = np.random.default_rng(seed)
    lengths = stream.integers(PROMPTS[0], PROMPTS[1] + 1, count)
    return [stream.integers(1, SIZES["vocab_size"], length).tolist() for length in lengths]


def _engine(rows: int, buckets: tuple[int, ...] | None = None) -> Any:
    import jax

    from jaxlab.inference import Engine, EngineConfig
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

    model = Decoder(DecoderConfig(**SIZES))
    config = EngineConfig(1024, max_running=rows, batch_buckets=buckets, kv_dtype="float32", prefix_cache=False)
    return Engine(model, init_params(model, jax.random.key(0)), config)


def _run(engine: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Callable[[], int]:
    """Serves all prompts to their ends; gives the number of tokens."""
    from jaxlab.inference import SamplingParams

    sampling = [SamplingParams(max_tokens=length, temperature=0.0) for length in lengths]
    return lambda: sum(len(output.token_ids) for output in engine.generate(prompts, sampling))


def _in_batches(engine: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int], rows: int) -> Callable[[], int]:
    """Static batching: a batch is served to its last token before the next begins."""
    batches = [
        _run(engine, prompts[first : first + rows], lengths[first : first + rows])
        for first in range(0, len(prompts), rows)
    ]
    return lambda: sum(batch() for batch in batches)


def cases(quick: bool) -> Iterator[Case]:
    """Bars of the specification's section 7 that concern the engine."""
    repeats = 3 if quick else 5
    yield from _beside_transformers(_engine(REQUESTS), _prompts(REQUESTS), 16 if quick else NEW, repeats)
    rows, count = (8, 64) if quick else (16, 128)
    prompts = _prompts(count, seed=2)
    lengths = np.random.default_rng(1).integers(OUTPUTS[0], OUTPUTS[1] + 1, count).tolist()
    engine = _engine(rows, (rows,))  # a batch keeps its size to its end, on both sides
    ours, peer = interleaved(
        _run(engine, prompts, lengths), _in_batches(engine, prompts, lengths, rows), repeats=repeats
    )
    yield Case(
        SYSTEM, f"{count} requests of {OUTPUTS[0]}-{OUTPUTS[1]} new tokens, {rows} rows", "tokens/s",
        sum(lengths) / ours, sum(lengths) / peer, "static batches of the same engine", 1.5, higher_is_better=True,
    )  # fmt: skip


def _beside_transformers(engine: Any, prompts: list[list[int]], new: int, repeats: int) -> Iterator[Case]:
    import torch
    from transformers import GenerationConfig

    model = _torch_model()
    longest = max(map(len, prompts))
    ids, mask = torch.zeros((len(prompts), longest), dtype=torch.long), torch.zeros((len(prompts), longest))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    greedy = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    def padded():
        with torch.no_grad():
            return model.generate(ids, attention_mask=mask, generation_config=greedy).shape[1]

    def continuous():
        with torch.no_grad():
            return model.generate_batch(prompts, generation_config=greedy, progress_bar=False)

    run = functools.partial(_run, engine, prompts, [new] * len(prompts))
    label = f"Llama-shaped 4 x 256 f32, {len(prompts)} prompts of {PROMPTS[0]}-{PROMPTS[1]}, {new} new"
    for name, peer_run, bar in (("generate, padded", padded, 1.5), ("generate_batch", continuous, 3.0)):
        ours, peer = interleaved(run(), peer_run, repeats=repeats)
        made = len(prompts) * new
        yield Case(
            SYSTEM, label, "tokens/s", made / ours, made / peer, f"torch transformers {name}", bar,
            higher_is_better=True,
        )  # fmt: skip
