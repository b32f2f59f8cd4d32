"""Reinforcement learning over all devices of all hosts: rows over `data` and `fsdp`, parameters over `fsdp`.

    jaxlab launch -n 2 --devices 2 -- python examples/several_hosts/grpo.py out/grpo

Started again in the same folder it goes on from its checkpoint, to the same numbers.
"""

import argparse

import jax

from jaxlab import core
from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.rl import GRPOConfig, GRPOTrainer, SFPOConfig


def vowels(prompts, completions):
    """A reward that anyone can check: the share of vowels."""
    return [sum(character in "aeiou" for character in text) / max(len(text), 1) for text in completions]


def main() -> None:
    """Trains from the checkpoint in the folder, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    core.distributed.initialize()
    mesh = core.make_mesh({"data": -1, "fsdp": 2})
    model = Decoder(
        DecoderConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    config = GRPOConfig(
        prompts_per_step=4,
        num_generations=4,
        max_prompt_length=16,
        max_completion_length=8,
        mini_batch_size=8,
        learning_rate=3e-3,
        steps=options.steps,
        checkpoint_every=2,
        sfpo=SFPOConfig(inner_steps=2),
    )
    data = [{"prompt": f"word {number}: "} for number in range(16)]
    params = init_params(model, jax.random.key(0))
    trainer = GRPOTrainer(model, params, [vowels], config, data, ByteTokenizer(), mesh=mesh, folder=options.folder)
    _, history = trainer.train()
    for row in history if core.distributed.is_main() else ():
        print(f"step {row['step']}: reward {row['reward']:.6f}, loss {row['loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
