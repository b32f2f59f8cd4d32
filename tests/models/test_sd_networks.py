import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sd_parity
from jaxlab.models.sd import (
    AutoencoderKL,
    ControlNet,
    ControlNetConfig,
    UNet2DCondition,
    UNetConfig,
    VAEConfig,
    abstract_params,
    init_params,
    load_controlnet,
    load_unet,
)
from jaxlab.models.sd.blocks import conv, group_norm
from tests.models.checkpoints import FOLDER

LATEST = ("sd-unet",)


def folder_of(name, folder):
    return sd_parity.folder_of(folder, sd_parity.golden(FOLDER / f"{name}.npz"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.latest] * (n in LATEST)) for n in sd_parity.NETWORKS]
)
def test_outputs_maps_and_gradients_equal_diffusers(name, tmp_path):
    made = sd_parity.golden(FOLDER / f"{name}.npz")
    found = sd_parity.differences(name, made, sd_parity.folder_of(tmp_path, made))
    assert set(found) >= {"sd-unet": {"eps", "maps"}, "sd-vae": {"mean", "logvar", "image"}}.get(name, set())
    assert max(found.values()) <= sd_parity.BOUND, found


def test_sizes_of_stable_diffusion():
    for module, millions in ((UNet2DCondition(), 859.521), (ControlNet(), 361.279), (AutoencoderKL(), 83.654)):
        leaves = jax.tree.leaves(abstract_params(module))
        assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e6, 3) == millions


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    return load_unet(folder_of("sd-unet", tmp_path_factory.mktemp("unet")))


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    return load_controlnet(folder_of("sd-controlnet", tmp_path_factory.mktemp("controlnet")))


def quick(module, **static):
    """`apply`, compiled without optimisation: these programs run once."""
    run = functools.partial(module.apply, **static)
    return jax.jit(
        lambda params, *args, **named: run({"params": params}, *args, **named),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def test_text_given_as_keys_and_values(unet):
    module, params = unet
    given = sd_parity.inputs("sd-unet")
    pairs = quick(module, method="text_keys_values")(params, given["text"])
    assert [keys.shape for keys, _ in pairs] == [(2, 7, 4, 4)] * 2 + [(2, 7, 4, 8)] + [(2, 7, 4, 4)] * 3
    eps, maps = quick(module, capture=sd_parity.CAPTURE)(params, *arguments(given, pairs))
    made = sd_parity.golden(FOLDER / "sd-unet.npz")
    np.testing.assert_allclose(eps, made["eps"], atol=sd_parity.BOUND)
    np.testing.assert_allclose(maps, made["maps"], atol=sd_parity.BOUND)
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def arguments(given, text):
    residuals = tuple(given[f"down{index}"] for index in range(6))
    return given["latents"], given["time"], text, residuals, given["mid"]


def test_hint_given_as_features_and_the_scale(controlnet):
    module, params = controlnet
    given = sd_parity.inputs("sd-controlnet")
    args = given["latents"], given["time"], given["text"]
    features = quick(module, method="hint_features")(params, given["hint"])
    assert features.shape == (2, 8, 12, 16)
    direct = quick(module)(params, *args, given["hint"], 0.5)
    ahead = quick(module)(params, *args, None, 1.0, hint_features=features)
    for half, whole in zip(jax.tree.leaves(direct), jax.tree.leaves(ahead), strict=True):
        np.testing.assert_allclose(2 * half, whole, rtol=1e-5, atol=1e-5)


def test_fresh_controlnet_changes_nothing():
    config = ControlNetConfig(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=6,
        conditioning_embedding_out_channels=(4, 4),
    )
    module = ControlNet(config)
    params = init_params(module, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    z, hint = jnp.ones((1, 4, 4, 4)), jnp.ones((1, 8, 8, 3))
    down, mid = quick(module)(params, z, jnp.ones(1), jnp.ones((1, 3, 6)), hint, 1.0)
    assert [x.shape for x in (*down, mid)] == [(1, 4, 4, 8)] * 4
    assert not any(np.any(x) for x in (*down, mid))


def test_narrow_computation(unet):
    module, params = unet
    given = sd_parity.inputs("sd-unet")
    narrow = quick(dataclasses.replace(module, dtype="bfloat16"))(params, *arguments(given, given["text"]))
    assert narrow.dtype == jnp.float32
    assert 1e-3 < np.abs(narrow - sd_parity.golden(FOLDER / "sd-unet.npz")["eps"]).max() < 0.1


# 256 places and fewer go through patches on a CPU, more through XLA's convolution.
@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(4, 1, (1, 1)), (7, 2, (1, 1)), (8, 2, (0, 1)), (17, 1, (1, 1))]
)
def test_convolution_and_its_gradients(side, stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, side, side + 1, 3)), rng.normal(size=(3, 3, 3, 2))
    padded = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
    expected = np.einsum("byxcij,ijco->byxo", windows, kernel)
    weight = rng.normal(size=expected.shape)

    def loss(x, kernel):
        y = conv(x, kernel, stride=stride, padding=(padding, padding))
        return jnp.sum(y * weight), y

    x32, k32 = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    (_, y), (dx, dk) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x32, k32)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(dk, np.einsum("byxcij,byxo->ijco", windows, weight), atol=1e-3)
    direction = rng.normal(size=x.shape)
    moved = np.pad(direction, ((0, 0), padding, padding, (0, 0)))
    moved = np.lib.stride_tricks.sliding_window_view(moved, (3, 3), (1, 2))[:, ::stride, ::stride]
    slope = np.sum(np.einsum("byxcij,ijco->byxo", moved, kernel) * weight)
    np.testing.assert_allclose(np.sum(dx * direction), slope, rtol=1e-4, atol=1e-3)


def test_few_places_go_through_patches_on_a_cpu_only():
    def lowered(side, platform):
        run = jax.jit(lambda x, kernel: conv(x, kernel, padding=((1, 1), (1, 1))))
        arrays = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, side, side, 8), (3, 3, 8, 8)))
        return run.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()

    found = {
        (side, kind): "stablehlo.convolution" in lowered(side, kind) for side in (16, 17) for kind in ("cpu", "cuda")
    }
    assert found == {(16, "cpu"): False, (17, "cpu"): True, (16, "cuda"): True, (17, "cuda"): True}


def test_group_norm_far_from_zero():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(2, 3, 5, 8)) + 300, rng.normal(size=8), rng.normal(size=8)
    groups = x.reshape(2, 15, 4, 2)
    normal = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = normal.reshape(x.shape) * scale + bias
    found = group_norm(*(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)), 4, 1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def fails(module, argument, *args, **named):
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **named))


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit(unet, controlnet):
    z, t, text = (np.zeros(shape, np.float32) for shape in ((2, 8, 12, 4), (2,), (2, 7, 24)))
    fails(unet[0], "latents", z[..., :3], t, text)
    fails(unet[0], "time", z, t[:1], text)
    fails(unet[0], "text", z, t, text[..., :8])
    fails(unet[0], "text", z, t, text[:1])
    fails(unet[0], "text", z, t, ((text, text),))
    fails(unet[0], "down_residuals", z, t, text, (z,))
    fails(unet[0], "mid_residual", z, t, text, None, z)
    fails(unet[0], "capture", z, t, text, capture=7)
    fails(controlnet[0], "hint", z, t, text)
    fails(controlnet[0], "hint", z, t, text, np.zeros((2, 8, 12, 3), np.float32))
    fails(controlnet[0], "hint", z, t, text, np.zeros((2, 30, 48, 3), np.float32))
    fails(AutoencoderKL(VAEConfig(block_out_channels=(32, 32))), "image", np.zeros((1, 7, 8, 3), np.float32))
    fails(AutoencoderKL(VAEConfig(block_out_channels=(32, 32))), "latents", z[..., :3], method="decode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: expected one for each of the 4 blocks"),
        ({"up_block_types": ["AttnUpBlock2D"] * 4}, "up_block_types: expected one of CrossAttnUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type: expected one of"),
        ({"norm_num_groups": 7}, "norm_num_groups: 7 does not divide"),
        ({"attention_head_dim": 7}, "attention_head_dim: 7 heads do not divide the 320 channels"),
        ({"act_fn": "gelu"}, "not supported: act_fn='gelu'"),
        ({"class_embed_type": "timestep"}, "not supported: class_embed_type='timestep'"),
    ],
)
def test_configurations_that_are_not_here(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(change)
