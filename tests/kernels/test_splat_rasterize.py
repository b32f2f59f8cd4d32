"""Blending of Gaussians against float64 numpy: values, counts, gradients; orders; what a GPU would take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab.core import DataUnavailable, data_path, plan
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.formats import load_scene
from jaxlab.flexgaussian.projection import project
from pallas_kernels.splat_rasterize import Rasterized, lists, ordering, reference, splat_rasterize
from tests.aot import needs_aot, needs_ptxas
from tests.oracles import splat_rasterize as oracle

# One size for all cases, so that they share a compilation: no multiple of 16, and lists of several chunks.
WIDTH, HEIGHT, COUNT, PAIRS = 37, 21, 80, 512
NAMES = ("means2d", "conics", "opacities", "colors", "depths", "radii")


def _scene(case):
    """Arguments as a dict of numpy arrays."""
    rng = np.random.default_rng(0)
    turn, sizes = rng.uniform(0, np.pi, COUNT), np.exp(rng.uniform(-0.5, 2, (COUNT, 2)))
    axes = np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], 1).reshape(-1, 2, 2)
    inverse = axes @ (sizes[:, :, None] ** -2.0 * np.eye(2)) @ axes.transpose(0, 2, 1)
    scene = {
        "means2d": rng.uniform((-8, -8), (WIDTH + 8, HEIGHT + 8), (COUNT, 2)),
        "conics": np.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], 1),
        "opacities": rng.uniform(0, 0.6, COUNT),
        "colors": rng.uniform(0, 2, (COUNT, 3)),
        "depths": rng.uniform(0.2, 9, COUNT),
        "radii": np.full(COUNT, 20),
    }
    if case == "mixed":  # culled and broken rows; depths that are equal, zero, negative; opacities at the ends
        scene["radii"][3:50:7] = 0
        scene["means2d"][3] = np.nan
        scene["conics"][10] = np.inf
        scene["colors"][11], scene["depths"][12] = np.nan, np.inf
        scene["depths"][20:40] = np.repeat([2.0, 0.0, -0.0, -3.0], 5)
        scene["opacities"][50:54] = 0, 1, 1 / 255 - 1e-5, 1 / 255 + 1e-5
    if case == "one":
        scene["radii"][1:] = 0
        scene["opacities"][0], scene["means2d"][0] = 0.9, (20, 10)
    if case == "none":
        scene["radii"][:40] = 0
        scene["opacities"][40:] = 0.003
    if case == "opaque":  # everything everywhere: pixels end in the first and in later chunks, alphas are cut to 0.99
        scene["conics"] *= 0.05
        scene["opacities"] = np.tile([1.0, 0.1, 0.2, 0.05], COUNT // 4)
        scene["conics"][5] = 0  # no ellipse: the whole image
        scene["conics"][6] = 0.02, 0.1, 0.02  # nor this: power > 0 in a part of it
    if case == "deep":  # no pixel ends: the whole of every list
        scene["opacities"] *= 0.1
        scene["conics"] *= 0.01
    return {name: x if name == "radii" else x.astype(np.float32) for name, x in scene.items()}


CASES = ("mixed", "one", "none", "opaque", "deep")
COTANGENTS = [np.random.default_rng(1).normal(size=s).astype(np.float32) for s in ((HEIGHT, WIDTH, 3), (HEIGHT, WIDTH))]


@functools.partial(jax.jit, static_argnames="implementation")
def _run(*args, implementation=None):
    """Everything that the op returns, and the gradients of its four first arguments."""

    def of(*floats):
        size = {"width": WIDTH, "height": HEIGHT, "max_pairs": PAIRS}
        made = splat_rasterize(*floats, *args[4:], **size, implementation=implementation)
        return made[:2], made

    _, pullback, made = jax.vjp(of, *args[:4], has_aux=True)
    return made, pullback(tuple(COTANGENTS))


def _close(got, want, tolerance, what):
    error = np.abs(np.asarray(got, np.float64) - want).max() / max(1.0, np.abs(want).max())
    assert error < tolerance, f"{what}: {error}"


@pytest.mark.latest
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", None, "interpret"])
def test_values_and_gradients(case, implementation):
    args = _scene(case).values()
    made, gradients = _run(*args, implementation=implementation)
    image, transmittance, counts, _ = oracle.blend(*args, WIDTH, HEIGHT)
    _close(made.image, image, 2e-6, "image")
    _close(made.transmittance, transmittance, 2e-6, "transmittance")
    np.testing.assert_array_equal(made.pixel_counts, counts)
    wanted = oracle.gradients(*args, WIDTH, HEIGHT, *COTANGENTS)
    for name, got, want in zip(NAMES, gradients, wanted):
        _close(got, want, 2e-5, name)
    if case == "none":
        assert made.num_pairs == 0
        assert not made.image.any()
        assert (made.transmittance == 1).all()
    if case == "opaque":
        assert made.transmittance.min() < 1e-2
        assert counts.min() == 0 < counts.max() < WIDTH * HEIGHT + 1


def test_gradients_of_the_oracle():
    """By differences of its own values, on Gaussians that stay where they are composited."""
    args = list(_scene("deep").values())
    args = [np.float64(x[:6]) for x in args[:5]] + [args[5][:6]]
    args[2] = np.linspace(0.3, 0.8, 6)
    wanted = oracle.gradients(*args, WIDTH, HEIGHT, *COTANGENTS)
    counts = oracle.blend(*args, WIDTH, HEIGHT)[2]

    def value():
        image, light, same, _ = oracle.blend(*args, WIDTH, HEIGHT)
        np.testing.assert_array_equal(same, counts)
        return np.sum(image * COTANGENTS[0]) + np.sum(light * COTANGENTS[1])

    for x, gradient in zip(args, wanted):
        step = 1e-7
        for index in np.ndindex(x.shape):
            kept = x[index]
            x[index] = kept + step
            above = value()
            x[index] = kept - step
            below = value()
            x[index] = kept
            np.testing.assert_allclose((above - below) / (2 * step), gradient[index], rtol=1e-5, atol=1e-4)


def test_pairs_are_those_of_the_ellipses():
    args = _scene("mixed").values()
    assert _run(*args)[0].num_pairs == oracle.pairs(*args, WIDTH, HEIGHT)


def test_too_many_pairs_are_told():
    args = _scene("mixed").values()
    few = splat_rasterize(*args, width=WIDTH, height=HEIGHT, max_pairs=16)
    assert few.num_pairs == _run(*args)[0].num_pairs > 16
    assert np.isfinite(few.image).all()


def test_more_pairs_than_32_bits_count():
    """1100 Gaussians on each of 1024 x 1024 tiles."""
    rows = jnp.zeros((1100, 9)).at[:, 5].set(0.5)
    build = functools.partial(lists.build, width=2**14, height=2**14, max_pairs=64)
    made, pairs = jax.jit(build)(rows, jnp.ones(1100))
    assert pairs == 2**31 - 1
    assert not made.counts.any()


def test_nothing_at_all():
    args = [x[:0] for x in _scene("one").values()]
    made = splat_rasterize(*args, width=3, height=2, max_pairs=1)
    assert made.image.shape == (2, 3, 3)
    assert (made.transmittance == 1).all()
    assert made.num_pairs == 0


def test_dtypes_of_gradients():
    args = [jnp.asarray(x, jnp.bfloat16) for x in list(_scene("one").values())[:5]]
    made, gradients = jax.eval_shape(_run, *args, np.ones(COUNT, np.int8))
    assert made.image.dtype == jnp.float32
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_64_bits(implementation):
    """Arguments of 64 bits, where JAX has them: computed in 32, gradients of 64."""
    with jax.enable_x64(True):
        args = [jnp.asarray(x, x.dtype if x.dtype == np.int64 else np.float64) for x in _scene("one").values()]
        made, gradients = jax.eval_shape(functools.partial(_run, implementation=implementation), *args)
    assert {str(x.dtype) for x in made} == {"float32", "int32"}
    assert {str(x.dtype) for x in gradients} == {"float64"}


def test_views_over_a_mesh():
    """A view a device, and the counts of all: what the score of a scene sums."""
    scenes = [list(_scene(case).values()) for case in ("mixed", "opaque")]
    stacked = [np.stack(x) for x in zip(*scenes)]
    mesh = jax.make_mesh((2,), ("view",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("view"), out_specs=(P("view"), P(), P("view")))
    def score(*args):
        args = [x[0] for x in args]

        def of(opacities):
            made = splat_rasterize(*args[:2], opacities, *args[3:], width=WIDTH, height=HEIGHT, max_pairs=PAIRS)
            return jnp.sum(made.image * COTANGENTS[0]) + jnp.sum(made.transmittance * COTANGENTS[1]), made

        gradient, made = jax.grad(of, has_aux=True)(args[2])
        return made.image[None], jax.lax.psum(made.pixel_counts, "view"), gradient[None]

    images, counts, gradients = score(*stacked)
    alone = [_run(*args) for args in scenes]
    np.testing.assert_array_equal(counts, sum(made.pixel_counts for made, _ in alone))
    for i, (made, (_, _, gradient, _)) in enumerate(alone):
        np.testing.assert_allclose(images[i], made.image, atol=1e-6)
        np.testing.assert_allclose(gradients[i], gradient, atol=1e-4)


@pytest.mark.parametrize("bits", [5, 13, 32])
def test_orders(bits):
    keys = np.random.default_rng(0).integers(0, 2**bits, 777, np.uint32)
    keys[100:300] = keys[7]
    wanted = np.argsort(keys, stable=True)
    counted, sorted_ = jax.jit(lambda keys: (ordering.by_counting(keys, bits), ordering.by_sorting(keys)))(keys)
    np.testing.assert_array_equal(counted, wanted)
    np.testing.assert_array_equal(sorted_, wanted)
    np.testing.assert_array_equal(ordering.inverse(counted)[wanted], np.arange(777))


@functools.cache
def _robot(width, height):
    """PLAYBOT from the front, as the projection sees it."""
    try:
        scene = load_scene(data_path("splats/playbot_lod6.sog", download=False))
    except DataUnavailable as error:
        pytest.skip(str(error).splitlines()[0])
    camera = orbit_cameras(scene, 1, width, height)[0]
    made = jax.jit(lambda scene: project(scene, camera))(scene)
    return made.means2d, made.conics, jax.nn.sigmoid(scene.opacity_logit), made.rgb, made.depths, made.radii


def test_a_real_scene():
    """Equal to the dense form: no tile changes what is seen."""
    size = {"width": 100, "height": 72, "max_pairs": 2**13}
    tiled, dense = (splat_rasterize(*_robot(100, 72), **size, implementation=name) for name in (None, "reference"))
    assert isinstance(tiled, Rasterized)
    assert tiled.num_pairs < size["max_pairs"]
    np.testing.assert_allclose(tiled.image, dense.image, atol=1e-4)
    np.testing.assert_allclose(tiled.transmittance, dense.transmittance, atol=1e-4)
    assert (tiled.pixel_counts != dense.pixel_counts).sum() <= 2  # a compiler may round another way
    assert (tiled.transmittance < 0.5).mean() > 0.05


def _gpu_program(d_image, d_light, *args, width, height, max_pairs):
    def of(*floats):
        return splat_rasterize(*floats, *args[4:], width=width, height=height, max_pairs=max_pairs)[:2]

    return jax.vjp(of, *args[:4])[1]((d_image, d_light))


def _gpu_shapes(count, width, height):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = ((height, width, 3), (height, width), (count, 2), (count, 3), (count,), (count, 3), (count,))
    return *map(array, shapes), jax.ShapeDtypeStruct((count,), jnp.int32)


@needs_aot
@needs_ptxas
def test_compiled_for_an_h100():
    """Three kernels that do not spill; beside the pairs and the Gaussians nothing of size is made."""
    count, pairs, size = 31_000, 2**17, {"width": 256, "height": 192}
    program = functools.partial(_gpu_program, max_pairs=pairs, **size)
    made = plan.compile(program, *_gpu_shapes(count, **size), target=plan.target("h100"), labels=["input"] * 8)
    names = ["splat_rasterize", "splat_rasterize_backward", "splat_rasterize_sum"]
    assert [kernel.name for kernel in made.kernels] == names
    assert all(kernel.spill_bytes == 0 and kernel.registers <= 128 for kernel in made.kernels)
    assert made.bytes["temporaries"] <= 56 * pairs + 48 * count + 20 * 256 * 192


def test_lowers_for_amd():
    program = functools.partial(_gpu_program, width=64, height=48, max_pairs=256)
    text = jax.jit(program).trace(*_gpu_shapes(64, 64, 48)).lower(lowering_platforms=("rocm",)).as_text()
    assert "splat_rasterize_backward" in text


def test_reference_refuses_large_scenes():
    args = [np.zeros((100, *x.shape[1:]), x.dtype) for x in _scene("one").values()]
    with pytest.raises(NotImplementedError, match=r"takes 2e\+08 pairs .* got 100 x 4000000"):
        splat_rasterize(*args, width=2000, height=2000, max_pairs=8, implementation="reference")
    assert reference.MAX_PAIRS == 2e8


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("means2d", np.zeros((COUNT, 3), np.float32), ValueError, r"means2d: expected shape \(80, 2\)"),
        ("conics", np.zeros((COUNT, 2, 2), np.float32), ValueError, r"conics: expected shape \(80, 3\)"),
        ("opacities", np.zeros((COUNT, 1), np.float32), ValueError, r"opacities: expected shape \(80,\)"),
        ("colors", np.zeros((COUNT - 1, 3), np.float32), ValueError, "colors: expected shape"),
        ("depths", np.zeros(COUNT, np.int32), TypeError, "depths: expected a floating dtype"),
        ("radii", np.zeros(COUNT, np.float32), TypeError, "radii: expected integers"),
        ("radii", np.zeros((COUNT, 1), np.int32), ValueError, "radii: expected 1 axis"),
        ("width", 0, ValueError, "width: expected a number from 1"),
        ("height", 2.0, TypeError, "height: expected an int"),
        ("max_pairs", 2**31, ValueError, "max_pairs: expected a number from 1"),
        ("implementation", "cuda", ValueError, "unknown implementation 'cuda'"),
    ],
)
def test_bad_arguments(name, value, error, said):
    given = {**_scene("one"), "width": WIDTH, "height": HEIGHT, "max_pairs": 64, name: value}
    with pytest.raises(error, match=said):
        splat_rasterize(**given)
