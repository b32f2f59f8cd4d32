"""SFPO's update: the GRPO loss beside torch, slow-fast steps beside single passes, and programs compiled by a run.

Decoding, loading and logits of the same model are in `inference.py`, the log-probabilities alone in `sfpo_kernel.py`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.inference import SOURCE, torch_model

SYSTEM = "sfpo"
MIB = 2**20
ROWS, PROMPT, COMPLETION = 8, 64, 64
EPSILON = 0.2
# Bars of the specification, section 7.
LOSS_BAR, PASSES_BAR, COPIES_BAR = 1.0, 1 / 4.1, 1.02
LAYERS, PASSES = 6, 3  # of SmolLM2-135M's shape, where layers do not matter; K


def cases(quick: bool) -> Iterator[Case]:
    """The loss on real weights, time and memory of a step on fewer layers, compilations of a run."""
    yield _loss(2 if quick else ROWS, 3 if quick else 5)
    yield from _steps(3 if quick else 7)
    yield _compilations()


def _batch(rows: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Random completions, and log-probabilities around which some ratios are clipped."""
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(3, vocabulary, (rows, PROMPT + COMPLETION)).astype(np.int32),
        "starts": np.full(rows, PROMPT, np.int32),
        "mask": (np.arange(COMPLETION) < rng.integers(COMPLETION // 2, COMPLETION + 1, (rows, 1))).astype(np.float32),
        "advantages": rng.normal(size=rows).astype(np.float32),
        "noise": 0.3 * rng.normal(size=(rows, COMPLETION)).astype(np.float32),
    }


def _loss_function(model: Any) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """(params, batch) -> the clipped objective, as the trainer computes it."""
    from jaxlab.rl.logps import TextInputs, text_logps
    from jaxlab.rl.losses import policy_terms

    def loss(params, batch):
        out = text_logps(model, params, TextInputs(batch["tokens"], batch["starts"]), length=COMPLETION)
        return policy_terms(
            out.logp, jax.lax.stop_gradient(out.logp) + batch["noise"], batch["advantages"], batch["mask"],
            epsilon=EPSILON, entropy=out.entropy,
        )  # fmt: skip

    return loss


def _loss(rows: int, repeats: int) -> Case:
    """Forward and backward, float32; torch without the entropy, which we have along the way."""
    import torch

    from jaxlab.models import load_pretrained
    from jaxlab.models.sources import find_model

    torch.set_num_threads(os.cpu_count() or 1)
    model, params = load_pretrained(SOURCE)
    peer = torch_model(find_model(SOURCE))
    batch = _batch(rows, model.config.vocab_size)
    given = {name: torch.from_numpy(array) for name, array in batch.items()}
    function = _loss_function(model)
    ours = jax.jit(jax.value_and_grad(lambda params, batch: function(params, batch)[0].value))

    def theirs():
        peer.zero_grad(set_to_none=True)
        tokens = given["tokens"].long()
        logits = peer(tokens, logits_to_keep=COMPLETION + 1).logits[:, :-1]
        target = logits.gather(2, tokens[:, PROMPT:, None])[..., 0]
        logp = target - torch.logsumexp(logits, dim=-1)
        ratio, advantages = torch.exp(logp - logp.detach() - given["noise"]), given["advantages"][:, None]
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
        loss = -(surrogate * given["mask"]).sum() / given["mask"].sum()
        loss.backward()
        return loss.detach()

    difference = abs(float(ours(params, batch)[0]) - float(theirs()))
    if difference > 1e-4:
        raise ValueError(f"the two losses differ by {difference}")
    seconds = interleaved(lambda: ours(params, batch), theirs, repeats=repeats)
    title = f"GRPO loss with gradients, SmolLM2-135M f32, {rows} x {PROMPT + COMPLETION}"
    return Case(SYSTEM, title, "s", *seconds, "torch transformers", LOSS_BAR)


def _steps(repeats: int) -> Iterator[Case]:
    """A slow-fast step of K = 3 and one pass, AdamW, in two mini-batches of two micro-batches."""
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
    from jaxlab.models.gguf import GgufFile, hf_config
    from jaxlab.models.sources import find_model
    from jaxlab.rl import GRPOConfig, make_pass, sfpo_update
    from jaxlab.rl.loop import default_optimizer

    whole = DecoderConfig.from_hf(hf_config(GgufFile(find_model(SOURCE))))
    model = Decoder(dataclasses.replace(whole, num_hidden_layers=LAYERS))
    params = init_params(model, jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / MIB
    tx, batch = default_optimizer(GRPOConfig()), jax.device_put(_batch(ROWS, model.config.vocab_size))
    one_pass = make_pass(_loss_function(model), tx, mini_batches=2, micro_batches=2)
    programs = [
        jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), batch).compile()
        for step in (functools.partial(sfpo_update, one_pass, inner_steps=PASSES, alpha=0.8), one_pass)
    ]
    title = f"slow-fast step, K = {PASSES}, {LAYERS} layers of SmolLM2-135M's shape, {ROWS} x {PROMPT + COMPLETION}"
    more, less = (_bytes(program) / MIB for program in programs)
    yield Case(SYSTEM, title, "MiB more", more - less, COPIES_BAR * size, "a copy of the parameters + 2 %", 1.0)

    def stepping(program):
        state = [jax.tree.map(jnp.copy, params), tx.init(params)]

        def run():
            state[0], state[1], metrics = program(*state, batch)
            return metrics

        return run

    seconds = interleaved(*map(stepping, programs), repeats=repeats)
    yield Case(SYSTEM, title, "s", *seconds, "a single pass", PASSES_BAR)


def _bytes(program: Any) -> int:
    """Of arguments, temporaries and results that take no argument's place."""
    analysis = program.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + results


def _compilations() -> Case:
    """Steps 2 to 6 of a run whose slow-fast phase ends after its second step and that draws some batches again."""
    from jaxlab.models import ByteTokenizer
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
    from jaxlab.rl import GRPOConfig, GRPOTrainer, SFPOConfig, format_reward

    model = Decoder(DecoderConfig(258, 64, 128, 2, 4, 2, max_position_embeddings=128))
    config = GRPOConfig(
        num_generations=4, prompts_per_step=4, max_completion_length=16, dynamic_sampling=2, steps=6,
        learning_rate=1e-3, sfpo=SFPOConfig(window=2, threshold=-1e9),
    )  # fmt: skip
    data = [{"prompt": f"{number} + {number} ="} for number in range(20)]
    params = init_params(model, jax.random.key(0))
    history = GRPOTrainer(model, params, [format_reward("[a-f]")], config, data, ByteTokenizer()).train().history
    compiled = sum(row["compilations"] for row in history[1:])
    title = "steps 2 to 6 of a run, the first of them slow-fast"
    return Case(SYSTEM, title, "compilations", compiled, 0, "none", 1.0)
