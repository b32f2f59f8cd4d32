"""Training of AlphaFold3's network with pairs over all devices of all hosts.

    jaxlab launch -n 2 --devices 2 -- python examples/several_hosts/fold.py out/fold

Started again in the same folder it goes on from its checkpoint, to the same numbers.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import core
from jaxlab.megafold import AF3Config, create_train_state, train_step
from jaxlab.megafold.data import synthetic_batch


def main() -> None:
    """Trains from the checkpoint in the folder, if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    core.distributed.initialize()
    mesh = core.make_mesh({"pair": -1})
    config = dataclasses.replace(AF3Config.tiny(), max_tokens=16, max_atoms=96, template_blocks=0, msa_blocks=0)
    key = jax.random.key(0)
    batch, whole = synthetic_batch(config, key), NamedSharding(mesh, PartitionSpec())
    checkpointer = core.Checkpointer(options.folder / "checkpoints")
    with jax.set_mesh(mesh):  # the modules' operations on pairs lie over the axis `pair`
        state = jax.device_put(create_train_state(config, key, batch), whole)
        if checkpointer.latest() is not None:
            state, _ = checkpointer.restore(state)
        while int(state.step) < options.steps:
            step = int(state.step)
            state, metrics = train_step(state, jax.device_put(batch, whole), jax.random.fold_in(key, step))
            checkpointer.save(step + 1, state)
            if core.distributed.is_main():
                print(f"step {step + 1}: loss {float(metrics['loss']):.6f}", flush=True)


if __name__ == "__main__":
    main()
