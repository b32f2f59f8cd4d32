"""Training of language models: batches of real text, losses as sums, the step, the loop, and a whole run.

Example:
    import jax
    from jaxlab.models import ByteTokenizer
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
    from jaxlab.training import OptimizerConfig, TrainState, fit, lm_loss, make_train_step, optimizer, text_batches

    model = Decoder(DecoderConfig(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2))
    tx = optimizer(OptimizerConfig(learning_rate=3e-3))
    state = TrainState.create(init_params(model, jax.random.key(0)), tx, jax.random.key(1))
    batches = text_batches("python-stdlib", ByteTokenizer(), batch_size=8, length=64)
    state = fit(state, make_train_step(lm_loss(model), tx), batches, steps=20)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.training.adamw import OptimizerConfig, decay_mask, learning_rate_schedule, optimizer
    from jaxlab.training.loop import fit
    from jaxlab.training.loss import Loss, LossOutput, cross_entropy, lm_loss, perplexity
    from jaxlab.training.run import TrainConfig, Trainer, plan, train, trained
    from jaxlab.training.step import TrainState, make_train_step
    from jaxlab.training.supervised import CompletionBatches, RowBatches, SFTConfig, Supervised, TrainingRun
    from jaxlab.training.text import TextBatches, TokenBatch, documents, split_documents, text_batches

__all__ = [
    "CompletionBatches",
    "Loss",
    "LossOutput",
    "OptimizerConfig",
    "RowBatches",
    "SFTConfig",
    "Supervised",
    "TextBatches",
    "TokenBatch",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "TrainingRun",
    "cross_entropy",
    "decay_mask",
    "documents",
    "fit",
    "learning_rate_schedule",
    "lm_loss",
    "make_train_step",
    "optimizer",
    "perplexity",
    "plan",
    "split_documents",
    "text_batches",
    "train",
    "trained",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "adamw": ("OptimizerConfig", "decay_mask", "learning_rate_schedule", "optimizer"),
        "loop": ("fit",),
        "loss": ("Loss", "LossOutput", "cross_entropy", "lm_loss", "perplexity"),
        "run": ("TrainConfig", "Trainer", "plan", "train", "trained"),
        "step": ("TrainState", "make_train_step"),
        "supervised": ("CompletionBatches", "RowBatches", "SFTConfig", "Supervised", "TrainingRun"),
        "text": ("TextBatches", "TokenBatch", "documents", "split_documents", "text_batches"),
    },
)
