"""One study small enough for tests; all of them share its compiled programs."""

from jaxlab import core
from jaxlab.sfpo.study import StudyConfig

CHANGES = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "family=chain_sum",
    "problems=64",
    "held_out=16",
    "warm={accuracy: 0.9, max_steps: 6, check_every: 3, batch_size: 8}",
    "rl.prompts_per_step=2",
    "rl.num_generations=4",
    "rl.mini_batch_size=null",
    "rl.max_completion_length=4",
    "rl.steps=4",
    "rl.checkpoint_every=2",
    "eval_every=2",
    "smooth=2",
)


def config(*changes: str) -> StudyConfig:
    """The laptop's config, made small."""
    return core.load_config(StudyConfig, core.find_config("configs/sfpo/laptop.yaml"), (*CHANGES, *changes))
