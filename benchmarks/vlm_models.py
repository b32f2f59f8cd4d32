"""A small Qwen2.5-VL beside torch transformers, and samples that share their prompt beside separate ones, on this CPU.

The bars are those of the specification, section 7. Sizes are ours: random weights, enough of them that products and not
dispatch take the time.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import vlm_parity
from benchmarks.harness import Case, interleaved
from jaxlab.inference import SamplingParams, SharedPrefixCache, generate, prefill
from jaxlab.models.decoder import Decoder, DecoderConfig, KVCache, init_params
from jaxlab.models.qwen2_5_vl import init_params as vlm_init
from jaxlab.vlm_scaling import ModelReader, Sample, visual_math
from jaxlab.vlm_scaling.inputs import build
from jaxlab.vlm_scaling.small_model import Sizes, tokenizer_of_words

SYSTEM = "vlm-scaling"
SAMPLES, PROMPT, NEW = 16, 256, 32
BATCH, GRID = 8, np.array([[1, 12, 8]])
TEXT = DecoderConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def cases(quick: bool) -> Iterator[Case]:
    """Shared prefixes always; beside torch where it is installed."""
    repeats = 3 if quick else 5
    yield from shared_prefix(repeats)
    yield from verification(repeats)
    if importlib.util.find_spec("torch") is not None:
        yield from beside_torch(repeats)


def shared_prefix(repeats: int) -> Iterator[Case]:
    """N samples of one prompt against N generations, N prefills, and the memory both parts need."""
    model = Decoder(TEXT)
    params = init_params(model, jax.random.key(0))
    prompt = np.random.default_rng(0).integers(1, TEXT.vocab_size, PROMPT).tolist()
    sampling, key = SamplingParams(max_tokens=NEW), jax.random.key(1)

    def separate() -> Any:
        return [generate(model, params, [prompt], sampling, rng=key).tokens for _ in range(SAMPLES)]

    label = f"{SAMPLES} samples, prompt {PROMPT}"
    mine, other = interleaved(
        lambda: generate(model, params, [prompt], sampling, n=SAMPLES, rng=key).tokens, separate, repeats=repeats
    )
    yield Case(SYSTEM, f"{label}, {NEW} new", "s", mine, other, "separate generations", 3.0)

    def prompts(rows: int) -> Callable[[], Any]:
        tokens = jnp.asarray([prompt] * rows)
        positions = jnp.broadcast_to(jnp.arange(PROMPT), tokens.shape)
        return lambda: prefill(model, params, KVCache.create(TEXT, rows, PROMPT), tokens, positions)[0]

    mine, other = interleaved(prompts(1), prompts(SAMPLES), repeats=repeats)
    yield Case(SYSTEM, f"{label}, prefill", "s", mine, other, "of separate requests", 1 / 0.35)

    positions = jnp.arange(PROMPT)[None]
    _, prefix = prefill(model, params, KVCache.create(TEXT, 1, PROMPT), jnp.asarray([prompt]), positions)
    cache = SharedPrefixCache.create(TEXT, prefix, jnp.asarray([PROMPT]), SAMPLES, NEW)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    a_token = 2 * TEXT.num_hidden_layers * TEXT.num_key_value_heads * (TEXT.head_dim or 0) * 4
    for rows, name, bar in (
        (PROMPT + SAMPLES * NEW, "prefix + N * suffix", 1 / 1.1),
        (SAMPLES * (PROMPT + NEW), "separate caches", None),
    ):
        yield Case(SYSTEM, f"{label}, {NEW} new, KV cache", "bytes", held, rows * a_token, name, bar)


def verification(repeats: int) -> Iterator[Case]:
    """The candidates of a question judged in one pass against one by one, prompts and pictures made ready each time."""
    tokenizer = tokenizer_of_words()
    model = Sizes().model(tokenizer)
    reader = ModelReader(model, vlm_init(model, jax.random.key(0)), tokenizer)
    small = visual_math.questions("bars", 1)[0]
    picture = np.repeat(np.repeat(small.images[0], 4, axis=0), 4, axis=1)  # 96 tokens
    question = dataclasses.replace(small, images=(picture,))
    random = np.random.default_rng(0)
    said = [visual_math.solution(question, mistaken=visual_math.misreading(question, random)) for _ in range(SAMPLES)]
    requests = build(question, [Sample(text) for text in said])
    mine, other = interleaved(
        lambda: reader.yes_probabilities(requests, seed=0),
        lambda: [reader.yes_probabilities([request], seed=0) for request in requests],
        repeats=repeats,
    )
    yield Case(SYSTEM, f"verdicts on {SAMPLES} candidates", "s", mine, other, "one by one", 5.0)


def beside_torch(repeats: int) -> Iterator[Case]:
    """One forward pass with an image a row, and decoding of text, of the same weights."""
    import torch
    import transformers

    from jaxlab.models.qwen2_5_vl import load

    settings = vlm_parity.SETTINGS | {
        "text_config": vlm_parity.SETTINGS["text_config"]
        | {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
           "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024,
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}},
        "vision_config": vlm_parity.SETTINGS["vision_config"]
        | {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256},
    }  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**settings)).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(Path(folder))
        model, params = load(folder)
    rng = np.random.default_rng(0)
    image = [vlm_parity.START, *[vlm_parity.IMAGE] * (int(GRID.prod()) // 4), vlm_parity.END]
    ids = np.array([image + rng.integers(60, 1000, 30).tolist() for _ in range(BATCH)], np.int32)
    grid = np.repeat(GRID, BATCH, axis=0)
    pixels = rng.normal(size=(int(grid.prod(axis=1).sum()), 1176)).astype(np.float32)
    forward = jax.jit(lambda params, ids, pixels: model.apply({"params": params}, ids, None, pixels, grid)[0])
    given = {
        "input_ids": torch.from_numpy(ids).long(),
        "pixel_values": torch.from_numpy(pixels),
        "image_grid_thw": torch.from_numpy(grid),
        "mm_token_type_ids": torch.from_numpy(ids == vlm_parity.IMAGE).int(),
    }
    with torch.inference_mode():
        mine, other = interleaved(
            lambda: forward(params, ids, pixels), lambda: peer(**given).logits.shape, repeats=repeats
        )
        yield Case(
            SYSTEM, f"small Qwen2.5-VL, {BATCH} rows of an image and text", "s", mine, other, "transformers", 1.0
        )

        text = ids[:, len(image) :]
        words, sampling = torch.from_numpy(text).long(), SamplingParams(max_tokens=NEW, temperature=0.0)
        language = model.text_model()
        mine, other = interleaved(
            lambda: generate(language, params["language"], list(text), sampling).tokens,
            lambda: peer.generate(
                input_ids=words, attention_mask=torch.ones_like(words), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0,
            ).shape,
            repeats=repeats,
        )  # fmt: skip
    new = BATCH * NEW
    yield Case(SYSTEM, f"decoding, batch {BATCH}", "tokens/s", new / mine, new / other, "transformers", 1.5, True)
