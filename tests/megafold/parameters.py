"""Weights and batches for tests: nothing is zero, so that everything matters."""

import functools

import jax
import numpy as np

from jaxlab.megafold.features import FEATURES, abstract_batch

# Sooner compiled, slower run, the better bargain at a test's sizes.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_weights(shapes, seed=0):
    """Weights of a tree of shapes: scales about 1, the rest such that variances stay."""
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        last, noise = path[-1], rng.normal(size=leaf.shape)
        pair = isinstance(last, jax.tree_util.SequenceKey)
        name = "scale" if pair and last.idx == 0 else "offset" if pair else last.key
        if name.startswith("scale"):
            return np.float32(1 + 0.2 * noise)
        return np.float32(noise * (leaf.shape[-2] ** -0.5 if name.startswith("w") else 0.2))

    return jax.tree_util.tree_map_with_path(make, shapes)


def padded(batch, config, seed=0):
    """The batch in the sizes of a larger configuration, with rubbish where masks say that nothing is."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in abstract_batch(config).items():
        if FEATURES[name].dtype == np.bool_:
            array = np.zeros(shape.shape, np.bool_) if name.endswith("mask") else rng.random(shape.shape) < 0.5
        elif name.startswith(("ref_space", "asym", "entity", "sym", "residue")):
            array = rng.integers(0, 5, shape.shape)
        elif np.issubdtype(shape.dtype, np.integer):
            array = rng.integers(0, 20, shape.shape)
        else:
            array = rng.normal(size=shape.shape) * 5
        array = array.astype(shape.dtype)
        array[tuple(slice(size) for size in batch[name].shape)] = batch[name]
        out[name] = array
    return out
