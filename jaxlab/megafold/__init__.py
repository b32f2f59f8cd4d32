"""MegaFold (arXiv:2506.20686): training of AlphaFold3, faster and in less memory, with the same mathematics.

Fused kernels with exact gradients, every block of AlphaFold3 as a Flax module, a training step, and a cache of the
deterministic half of the data pipeline.

Example:
    import jax
    from jaxlab import megafold as mf
    from jaxlab.megafold.data import synthetic_batch

    config, key = mf.AF3Config.tiny(), jax.random.key(0)
    batch = synthetic_batch(config, key)
    state = mf.create_train_state(config, key, batch)
    state, metrics = mf.train_step(state, batch, jax.random.fold_in(key, 0))

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.megafold.config import AF3Config, Kernels
    from jaxlab.megafold.data import FeatureCache, featurize, parse_a3m, read_mmcif
    from jaxlab.megafold.diffusion import sample
    from jaxlab.megafold.folding import Prediction, fold
    from jaxlab.megafold.modules import AlphaFold3
    from jaxlab.megafold.train import TrainSettings, TrainState, create_train_state, train_step

__all__ = [
    "AF3Config",
    "AlphaFold3",
    "FeatureCache",
    "Kernels",
    "Prediction",
    "TrainSettings",
    "TrainState",
    "create_train_state",
    "featurize",
    "fold",
    "parse_a3m",
    "read_mmcif",
    "sample",
    "train_step",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "config": ("AF3Config", "Kernels"),
        "data": ("FeatureCache", "featurize", "parse_a3m", "read_mmcif"),
        "diffusion": ("sample",),
        "folding": ("Prediction", "fold"),
        "modules": ("AlphaFold3",),
        "train": ("TrainSettings", "TrainState", "create_train_state", "train_step"),
    },
)
