"""A decoder small enough to train in a test, and batches of it."""

import numpy as np

from jaxlab.models.decoder import DecoderConfig
from jaxlab.training import OptimizerConfig, TokenBatch, TrainConfig

MODEL = DecoderConfig(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def batch(seed=0, rows=8, length=12) -> TokenBatch:
    """Random tokens, two segments a row, the second row shorter, some targets masked."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 258, (rows, length + 1)).astype(np.int32)
    segments = np.where(np.arange(length) < 5, 1, 2) * np.ones((rows, 1), int)
    segments[1, 9:] = 0
    weights = (segments > 0) & (random.random((rows, length)) < 0.8)
    weights[:, 4] = False
    positions = np.where(np.arange(length) < 5, np.arange(length), np.arange(length) - 5) * np.ones((rows, 1), int)
    return TokenBatch(
        tokens[:, :-1], tokens[:, 1:], positions.astype(np.int32), segments.astype(np.int32), weights.astype(np.float32)
    )


def config(data, **changes) -> TrainConfig:
    """A run of twelve steps."""
    settings = {
        "model": MODEL,
        "data": str(data),
        "steps": 12,
        "batch_size": 4,
        "length": 16,
        "checkpoint_every": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2),
    }
    return TrainConfig(**(settings | changes))


def corpus(folder):
    """A folder of thirty short texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"The number {index} comes after the number {index - 1}.\n" * 3)
    return folder
