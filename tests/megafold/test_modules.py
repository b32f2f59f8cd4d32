import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.megafold import modules, ops
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.data import synthetic_batch
from jaxlab.megafold.modules import atoms, confidence, diffusion, distances, msa, pair, templates, weights
from pallas_kernels.transition import transition
from pallas_kernels.triangle_multiplication import triangle_multiplication
from tests.megafold.parameters import quick_jit, random_weights

PLAIN = Kernels("reference", "reference", "reference", "reference")
FUSED = Kernels("xla", "xla", "xla", "xla")
CONFIG = dataclasses.replace(
    AF3Config.tiny(), max_tokens=16, max_atoms=96, max_msa_rows=4, max_templates=2, kernels=PLAIN, remat=False
)
N, C_S, C_Z = CONFIG.max_tokens, CONFIG.c_s, CONFIG.c_z


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights_of(module, *args, seed=0):
    return random_weights(jax.eval_shape(module.init, jax.random.key(0), *args), seed)


def run(module, variables, *args, rngs=None):
    return quick_jit(functools.partial(module.apply, rngs=rngs))(variables, *args)


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(np.abs(expected).max(), 1.0), rtol=0)


Z, M, S = normal(0, 1, 6, 6, 16), normal(1, 1, 3, 6, 8), normal(2, 1, 6, 16)


@pytest.mark.parametrize(
    ("module", "op", "args", "static"),
    [
        (modules.TriangleAttention(2, 4, "ending"), ops.triangle_attention, (Z,), {"node": "ending"}),
        (modules.TriangleMultiplication("incoming"), triangle_multiplication, (Z,), {"direction": "incoming"}),
        (modules.AttentionPairBias(4), ops.attention_pair_bias, (S, Z), {}),
        (modules.Transition(2), transition, (Z,), {}),
        (modules.OuterProductMean(3, 16), ops.outer_product_mean, (M,), {}),
        (modules.PairWeightedAveraging(2, 4), ops.pair_weighted_averaging, (M, Z), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, weights.Weights) else "",
)
def test_weights_have_the_names_of_the_ops_arguments(module, op, args, static):
    args = jax.tree.map(jnp.asarray, args)
    variables = weights_of(module, *args)
    assert variables["params"].keys() <= inspect.signature(op).parameters.keys()
    close(run(module, variables, *args), quick_jit(functools.partial(op, **static))(*args, **variables["params"]))


def test_blocks_repeat_with_weights_of_their_own():
    s, z, mask = normal(0, 1, N, C_S), normal(1, 1, N, N, C_Z), jnp.arange(N)[None] < N - 3
    stack = modules.PairformerStack(CONFIG)
    variables = weights_of(stack, s, z, mask)
    out = run(stack, variables, s, z, mask)
    block = quick_jit(modules.PairformerBlock(CONFIG).apply)
    for index in range(CONFIG.pairformer_blocks):
        s, z = block({"params": jax.tree.map(lambda w, i=index: w[i], variables["params"]["blocks"])}, s, z, mask)
    jax.tree.map(close, out, (s, z))


def test_fused_and_remat_give_the_same_gradients():
    """Of the diffusion module's token blocks: samples share the pairs' bias."""
    a, condition, z = normal(0, 1, 3, N, CONFIG.c_token), normal(1, 1, 3, N, C_S), normal(2, 1, N, N, C_Z)
    mask, cotangent = jnp.arange(N)[None] < N - 3, normal(3, *a.shape)

    class Blocks(nn.Module):
        config: AF3Config

        @nn.compact
        def __call__(self, a, condition, z):
            block = diffusion.TokenBlock(self.config, name="blocks")
            return weights.repeated(block, 2, a, condition, z, mask, remat=self.config.remat)

    @functools.partial(quick_jit, static_argnums=0)
    def both(config, *args):
        out, pull = jax.vjp(Blocks(config).apply, *args)
        return out, pull(jnp.where(mask[:, None, :, None], cotangent, 0))

    args = weights_of(Blocks(CONFIG), a, condition, z), a, condition, z
    fused = both(dataclasses.replace(CONFIG, kernels=FUSED, remat=True), *args)
    jax.tree.map(functools.partial(close, tolerance=1e-4), fused, both(CONFIG, *args))


class Dropped(weights.Weights):
    """Drops out along an axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        return weights.drop(self, x, 0.25, self.axis)


class Repeated(nn.Module):
    """Three times."""

    @nn.compact
    def __call__(self, x):
        return weights.repeated(Dropped(1), 3, x, remat=True)


def test_dropout_where_there_is_a_key():
    x = jnp.ones((1, 50, 60, 4))
    np.testing.assert_array_equal(Dropped(1).apply({}, x), x)
    for axis in (1, 2):
        dropped = np.asarray(Dropped(axis).apply({}, x, rngs={"dropout": jax.random.key(0)}))
        np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
        assert (dropped == dropped.take([0], axis)).all()
        assert abs(dropped.mean() - 1) < 0.15
    first, again, other = (
        np.asarray(Repeated().apply({}, x, rngs={"dropout": jax.random.key(seed)})) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert abs((first > 0).mean() - 0.75**3) < 0.1  # blocks have keys of their own
    np.testing.assert_array_equal(Repeated().apply({}, x), x)


def test_parts_and_dropout_of_the_blocks(monkeypatch):
    """Rows share a mask, the columns of the ending node's attention do; transitions have none."""
    calls = []

    def drop(module, x, rate, axis):
        calls.append((rate, axis))
        return x

    for file in (pair, msa):
        monkeypatch.setattr(file, "drop", drop)
    s, z, mask = normal(0, 1, N, C_S), normal(1, 1, N, N, C_Z), jnp.ones((1, N), bool)
    shapes = jax.eval_shape(modules.PairformerBlock(CONFIG).init, jax.random.key(0), s, z, mask)["params"]
    updates = [(0.25, 1), (0.25, 1), (0.25, 1), (0.25, 2)]
    assert calls == updates
    assert shapes.keys() == {"pair", "attention", "transition"}
    assert shapes["pair"].keys() == {"outgoing", "incoming", "starting", "ending", "transition"}
    calls.clear()
    rows = normal(0, 1, 4, N, CONFIG.c_m), z, jnp.ones((1, 4, N), bool), mask
    shapes = jax.eval_shape(msa.MSABlock(CONFIG).init, jax.random.key(0), *rows)["params"]
    assert calls == [(0.15, 1), *updates]
    assert shapes.keys() == {"outer_product_mean", "averaging", "transition", "pair"}


def test_atom_transformer_takes_samples_one_by_one():
    blocks, c, width = CONFIG.max_atoms // 32, CONFIG.c_atom, CONFIG.c_atompair
    q, conditioning = (
        normal(0, 1, 3, 96, c),
        atoms.AtomConditioning(*map(jnp.asarray, (normal(1, 1, 96, c), normal(2, 1, blocks, 32, 128, width)))),
    )
    mask = jnp.arange(96)[None] < 90
    module = modules.AtomTransformer(CONFIG)
    variables = weights_of(module, q, conditioning, mask)
    out = run(module, variables, q, conditioning, mask)
    close(run(module, variables, q[:, 1], conditioning, mask), out[:, 1])
    # Atoms see at most 48 behind and 79 before the first of their block: 94 is out of reach of 0.
    moved = run(
        module,
        variables,
        q + np.eye(96, dtype=np.float32)[94][:, None] * normal(3, c),
        conditioning,
        jnp.ones((1, 96), bool),
    )
    whole = run(module, variables, q, conditioning, jnp.ones((1, 96), bool))
    changed = np.abs(np.asarray(moved - whole)).max(axis=(0, 1, 3)) > 1e-6
    assert not changed[:32].any()
    assert changed[32:].all()


def test_atoms_and_tokens():
    token = jnp.array([[0, 0, 1, 2, 2, 2, 0]])  # the last is padding
    mask = jnp.array([[1, 1, 1, 1, 1, 0, 0]], bool)
    x = jnp.arange(14.0).reshape(1, 1, 7, 2)
    np.testing.assert_allclose(atoms.to_tokens(x, token, mask, 4)[0, 0], [[1, 2], [4, 5], [7, 8], [0, 0]])
    np.testing.assert_allclose(atoms.from_tokens(x[0, :, :3], token)[0, :, 0], [0, 0, 2, 4, 4, 4, 0])
    long = jnp.repeat(jnp.array([[0, 1, 2]]), jnp.array([3, 1, 30]), axis=1)
    expected = [0, 1, 2, 0, *range(24), *[23] * 6]
    np.testing.assert_array_equal(confidence.place_in_token(long)[0], expected)


def test_distance_bins():
    x = jnp.array([[0.0, 0, 0], [3.0, 0, 0], [3.3, 0, 0], [0, 10.0, 0], [0, 0, 1000.0]])
    bins = np.asarray(distances.distance_bins(x))
    assert bins.shape == (5, 5, 39)
    assert [list(np.flatnonzero(row)) for row in bins[0]] == [[], [], [0], [5], [38]]  # bins of 1.25 Å from 3.25 Å


def test_template_directions():
    frame = normal(0, 1, 5, 3, 3)
    out = np.asarray(templates.directions(jnp.asarray(frame)))
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1)[0], 1 - np.eye(5), atol=1e-5)
    turn = np.linalg.qr(normal(1, 3, 3))[0]
    turn *= np.sign(np.linalg.det(turn))
    moved = frame @ turn + 7
    np.testing.assert_allclose(templates.directions(jnp.asarray(moved)), out, atol=1e-4)
    # N, CA, C in the plane z = 0: x runs from CA to C, and N lies at positive y.
    plane = jnp.array([[[[1.0, 2, 0], [0, 0, 0], [3, 0, 0]], [[0.0, 0, 0], [0, -5, 0], [1, 0, 0]]]])
    np.testing.assert_allclose(templates.directions(plane)[0, 0, 1], [0, -1, 0], atol=1e-6)


def test_templates():
    batch = {name: jnp.asarray(value) for name, value in synthetic_batch(CONFIG, jax.random.key(1)).items()}
    z, module = normal(3, 1, N, N, C_Z), modules.TemplateEmbedder(CONFIG)
    variables = weights_of(module, batch, z)
    apply = quick_jit(module.apply)
    real = np.asarray(batch["token_mask"][0])

    def out(**changed):
        return np.asarray(apply(variables, batch | changed, z))[0][np.ix_(real, real)]

    one = out()
    unused = jax.random.normal(jax.random.key(0), batch["template_pos"].shape)
    second = jnp.where(batch["template_mask"][..., None, None], batch["template_pos"], unused)
    close(out(template_pos=second), one)  # a template that is masked
    twice = {name: jnp.repeat(batch[name][:, :1], 2, axis=1) for name in batch if name.startswith("template_")}
    close(out(**twice), one)  # the mean of two equal ones
    turn = np.linalg.qr(normal(1, 3, 3))[0]
    turn *= np.sign(np.linalg.det(turn))
    turned = {name: batch[name] @ turn + 3 for name in ("template_pos", "template_frame")}
    close(out(**turned), one, 1e-3)
    assert np.abs(out(template_pos=batch["template_pos"] * 2) - one).max() > 1e-2
    assert (out(template_mask=jnp.zeros_like(batch["template_mask"])) == 0).all()
