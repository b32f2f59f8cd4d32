import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import data
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.diffusion import precondition
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.modules import AlphaFold3, Trunk, initial_params
from jaxlab.megafold.modules.trunk import TrunkCycle
from tests.megafold.parameters import padded, quick_jit, random_weights

PLAIN = Kernels("reference", "reference", "reference", "reference")
FUSED = Kernels("xla", "xla", "xla", "xla")
SIZES = {"max_tokens": 24, "max_atoms": 128, "max_msa_rows": 8, "max_templates": 2}
# The confidence head's blocks are the trunk's.
SMALL = dataclasses.replace(AF3Config.tiny(), **SIZES, kernels=PLAIN, remat=False, confidence_blocks=0)
LARGE = dataclasses.replace(
    SMALL, max_tokens=32, max_atoms=192, max_msa_rows=12, max_templates=3, kernels=FUSED, remat=True, sample_chunk=2
)
# What is left without blocks: the paths around them.
EMPTY = dataclasses.replace(
    SMALL, pairformer_blocks=0, msa_blocks=0, template_blocks=0, token_blocks=0, atom_blocks=0, confidence_blocks=0
)
SAMPLES = 4


def batch_of(config):
    return jax.tree.map(jnp.asarray, data.synthetic_batch(config, jax.random.key(1)))


def shapes_of(config):
    x = jax.ShapeDtypeStruct((1, SAMPLES, config.max_atoms, 3), jnp.float32)
    sigma = jax.ShapeDtypeStruct((1, SAMPLES), jnp.float32)
    init = functools.partial(AlphaFold3(config).lazy_init, jax.random.key(0))
    return jax.eval_shape(lambda: init(abstract_batch(config), x, sigma))["params"]


@functools.partial(quick_jit, static_argnums=(0, 5))
def everything(config, params, batch, x, sigma, recycles):
    return AlphaFold3(config).apply({"params": params}, batch, x, sigma, recycles=recycles)


@pytest.fixture(scope="module")
def small():
    """Weights, batch, noisy samples, and what the network of plain JAX makes of them."""
    rng = np.random.default_rng(0)
    params = random_weights(shapes_of(SMALL))
    batch = batch_of(SMALL)
    x = np.float32(rng.normal(size=(1, SAMPLES, SMALL.max_atoms, 3)) * 20)
    sigma = np.float32([[0.5, 4.0, 16.0, 100.0]])
    return params, batch, x, sigma, everything(SMALL, params, batch, x, sigma, 1)


def same(actual, expected, tolerance=1e-4):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(np.abs(expected).max(), 1.0), rtol=0)


def test_outputs(small):
    _, batch, _, _, out = small
    n, a = SMALL.max_tokens, SMALL.max_atoms
    shapes = {"plddt": (1, a, 50), "pae": (1, n, n, 64), "pde": (1, n, n, 64), "resolved": (1, a, 2)}
    assert {name: logits.shape for name, logits in out["confidence"].items()} == shapes
    assert out["denoised"].shape == (1, SAMPLES, a, 3)
    assert out["distogram"].shape == (1, n, n, 64)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() and np.std(leaf) > 0 for leaf in jax.tree.leaves(out))
    for logits in (out["distogram"], out["confidence"]["pde"]):
        same(logits, np.swapaxes(logits, 1, 2), 1e-6)
    assert np.abs(out["confidence"]["pae"] - np.swapaxes(out["confidence"]["pae"], 1, 2)).max() > 0.1
    assert (np.asarray(out["denoised"])[:, :, ~np.asarray(batch["atom_mask"])[0]] == 0).all()


def test_padding_kernels_remat_and_chunks_of_samples_change_nothing(small):
    """The same weights, fused and in chunks, on larger arrays with rubbish in the padding."""
    params, batch, x, sigma, expected = small
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(LARGE))
    tokens, atoms = np.flatnonzero(batch["token_mask"][0]), np.flatnonzero(batch["atom_mask"][0])
    noisy = np.random.default_rng(1).normal(size=(1, SAMPLES, LARGE.max_atoms, 3)).astype(np.float32)
    noisy[:, :, : SMALL.max_atoms] = x
    actual = everything(LARGE, params, padded(batch, LARGE), noisy, sigma, 1)
    of_tokens, of_pairs, of_atoms = np.s_[:, tokens], np.s_[:, tokens[:, None], tokens], np.s_[:, atoms]

    def real(out):
        parts = {"s_inputs": out["trunk"].s_inputs[of_tokens], "s": out["trunk"].s[of_tokens]}
        parts |= {"z": out["trunk"].z[of_pairs], "distogram": out["distogram"][of_pairs]}
        parts |= {f"sample {t}": out["denoised"][:, t][of_atoms] for t in range(SAMPLES)}
        parts |= {name: out["confidence"][name][of_atoms] for name in ("plddt", "resolved")}
        return parts | {name: out["confidence"][name][of_pairs] for name in ("pae", "pde")}

    expected = real(expected)
    for name, value in real(actual).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4 * np.abs(expected[name]).max(), err_msg=name)


def test_a_fresh_network_returns_its_input_scaled():
    """What ends a residual branch begins with zeros, and so does the denoiser's step."""
    config = dataclasses.replace(EMPTY, pairformer_blocks=1)
    model, batch = AlphaFold3(config), batch_of(config)
    params = initial_params(config, jax.random.key(3))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(config))
    rng = np.random.default_rng(0)
    x, sigma = np.float32(rng.normal(size=(1, 2, config.max_atoms, 3)) * 20), np.float32([[0.5, 16.0]])
    out = everything(config, params, batch, x, sigma, 1)
    start = quick_jit(functools.partial(model.apply, method=lambda model, batch: Trunk(*model.input_embedder(batch))))
    jax.tree.map(same, out["trunk"], start({"params": params}, batch))
    assert out["trunk"].z.std() > 0.1
    same(out["denoised"], precondition(sigma)[0][..., None, None] * x * batch["atom_mask"][:, None, :, None], 1e-6)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((out["distogram"], out["confidence"])))


def test_gradient_goes_through_the_last_pass_alone():
    model, batch = AlphaFold3(EMPTY), batch_of(EMPTY)
    params = random_weights(shapes_of(EMPTY))
    rng = np.random.default_rng(2)
    s, z = rng.normal(size=(1, 24, EMPTY.c_s)), rng.normal(size=(1, 24, 24, EMPTY.c_z))

    def weighed(trunk):
        return jnp.sum(trunk.s * s) + jnp.sum(trunk.z * z)

    def recycled(params, recycles):
        trunk = functools.partial(model.apply, {"params": params}, batch, recycles=recycles, method="trunk")
        return weighed(trunk())

    def by_hand(params, recycles):
        def cycle(start, last, params):
            return TrunkCycle(EMPTY).apply({"params": params["trunk_cycle"]}, batch, start, last)

        start = Trunk(*model.apply({"params": params}, method=lambda model: model.input_embedder(batch)))
        last = jax.tree.map(jnp.zeros_like, start)
        for _ in range(recycles - 1):
            last = jax.lax.stop_gradient(cycle(start, last, params))
        return weighed(cycle(start, last, params))

    gradient = quick_jit(jax.value_and_grad(recycled))
    hand = quick_jit(jax.value_and_grad(by_hand), static_argnums=1)
    value, grads = gradient(params, 3)
    expected, expected_grads = hand(params, 3)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for part in ("trunk_cycle", "input_embedder"):
        jax.tree.map(same, grads[part], expected_grads[part])
    assert abs(value - gradient(params, 1)[0]) > 1


def test_confidence_gives_no_gradient_to_what_it_judges():
    model, batch = AlphaFold3(EMPTY), batch_of(EMPTY)
    params = random_weights(shapes_of(EMPTY))
    rng = np.random.default_rng(2)
    shapes = {"s_inputs": (1, 24, EMPTY.c_inputs), "s": (1, 24, EMPTY.c_s), "z": (1, 24, 24, EMPTY.c_z)}
    trunk = Trunk(**{name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()})
    x = np.float32(rng.normal(size=(1, EMPTY.max_atoms, 3)))

    @quick_jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, trunk, x):
        logits = model.apply({"params": params}, batch, trunk, x, method="confidence")
        return sum(jnp.sum(jnp.square(part)) for part in logits.values())

    weights, *judged = gradient(params, trunk, x)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(judged))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(weights["confidence_head"]))


@pytest.mark.latest
def test_size_of_the_papers_network():
    """AlphaFold3's reproductions count 368 million weights (Protenix: 368.48)."""
    config = dataclasses.replace(AF3Config.af3(), sample_chunk=16)
    x = jax.ShapeDtypeStruct((1, 48, config.max_atoms, 3), jnp.float32)
    sigma = jax.ShapeDtypeStruct((1, 48), jnp.float32)
    init = functools.partial(AlphaFold3(config).init_with_output, jax.random.key(0))
    out, variables = jax.eval_shape(init, abstract_batch(config), x, sigma)
    leaves = jax.tree.leaves(variables["params"])
    assert abs(sum(leaf.size for leaf in leaves) / 368.48e6 - 1) < 0.005
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    trunk = out.pop("trunk")
    assert {leaf.dtype for leaf in jax.tree.leaves(trunk)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    assert trunk.s_inputs.shape == (1, 384, 449)
    assert out["denoised"].shape == x.shape
