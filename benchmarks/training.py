"""A training step of a 10M-parameter decoder beside torch's, and what the chunked loss saves.

Both sides: the same architecture and sizes, f32, 2048 tokens a step, forward, backward, clip by global norm, AdamW, the
same threads, in one process.
"""

import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.training import (
    OptimizerConfig,
    TokenBatch,
    TrainState,
    cross_entropy,
    lm_loss,
    make_train_step,
    optimizer,
)

BATCH, LENGTH = 8, 256
MODEL = DecoderConfig(
    vocab_size=258,
    hidden_size=320,
    intermediate_size=864,
    num_hidden_layers=8,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=LENGTH,
    scan=False,  # unrolled layers are faster on a CPU; torch's are, too
)


def our_step(config: DecoderConfig = MODEL) -> Callable[[], float]:
    """One update a call, on the same random batch."""
    model, tx = Decoder(config), optimizer(OptimizerConfig())
    state = TrainState.create(init_params(model, jax.random.key(0)), tx, jax.random.key(1))
    step = make_train_step(lm_loss(model), tx)
    ids = np.random.default_rng(0).integers(0, 258, (BATCH, LENGTH + 1)).astype(np.int32)
    ones = np.ones((BATCH, LENGTH), np.int32)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], ones * np.arange(LENGTH, dtype=np.int32), ones, ones.astype(np.float32))
    batch = jax.tree.map(jnp.asarray, batch)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def torch_step(attention: str, config: DecoderConfig = MODEL) -> Callable[[], float]:
    """The same with transformers' Llama and torch's fused AdamW."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        attn_implementation=attention,
        use_cache=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = transformers.LlamaForCausalLM(llama).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 258, (BATCH, LENGTH + 1)))

    def run() -> float:
        adamw.zero_grad()
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return float(loss.detach())

    return run


def _loss_memory() -> Case:
    """Temporaries of value and gradients of the loss for 2048 tokens of a vocabulary of 49152."""
    shapes = (
        ((2, 1024, 576), jnp.float32),
        ((576, 49152), jnp.float32),
        ((2, 1024), jnp.int32),
        ((2, 1024), jnp.float32),
    )
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def plain(hidden, head, targets, weights):
        logps = jax.nn.log_softmax(hidden @ head)
        return -jnp.sum(jnp.take_along_axis(logps, targets[..., None], -1)[..., 0] * weights)

    def chunked(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, 8)[0]

    def mib(loss) -> float:
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    return Case(
        "foundation", "loss, 2048 tokens, V 49152", "temporary MiB", mib(chunked), mib(plain), "log_softmax", bar=2.0
    )


def cases(quick: bool) -> Iterator[Case]:
    """The cases of `python -m benchmarks training`."""
    yield _loss_memory()
    tokens, repeats = BATCH * LENGTH, 5 if quick else 15
    try:
        peers = {name: torch_step(name) for name in (("sdpa",) if quick else ("sdpa", "eager"))}
    except ImportError:
        return
    ours = our_step()
    for name, peer in peers.items():
        mine, theirs = interleaved(ours, peer, repeats=repeats, warmup=2)
        yield Case(
            "foundation",
            "training step of a 10M-parameter decoder, f32",
            "tokens/s",
            tokens / mine,
            tokens / theirs,
            f"torch, {name}, fused AdamW",
            bar=1.2,
            higher_is_better=True,
        )
