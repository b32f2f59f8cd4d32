from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import canny_parity
from jaxlab.instantedit import canny
from tests.oracles import instantedit_parts as oracle

GOLDEN = Path(__file__).parent / "goldens" / "canny.npz"


@pytest.mark.latest
def test_photographs_equal_opencv():
    with np.load(GOLDEN) as file:
        for key in file.files:
            photo, low, high, norm = key.split("/")
            edges = canny_parity.ours(photo, int(low), int(high), norm == "L2")
            theirs = np.unpackbits(file[key], count=edges.size).reshape(edges.shape)
            assert np.mean(edges != theirs) <= canny_parity.BOUND, key
            assert edges.any()


@pytest.mark.parametrize("l2_gradient", [False, True])
def test_noise_equals_the_definition(l2_gradient):
    rng = np.random.default_rng(0)
    for shape, smooth in (((13, 37, 3), 2), ((9, 33), 1)):
        coarse = rng.integers(0, 256, (-(-shape[0] // smooth), -(-shape[1] // smooth), *shape[2:]))
        image = coarse.repeat(smooth, 0).repeat(smooth, 1)[: shape[0], : shape[1]].astype(np.uint8)
        for low, high in ((150, 450), (450, 150), (0, 700.5)):
            got = canny(image, low, high, l2_gradient=l2_gradient)
            np.testing.assert_array_equal(got, oracle.canny(image, low, high, l2_gradient))


def test_a_long_faint_line_is_followed_across_words():
    image = np.full((80, 80), 100, np.uint8)
    image[40:, :] = 130  # 4 * 30 = 120 along the whole border
    image[40:, :3] = 200  # strong at its left end
    edges = np.asarray(canny(image, 100, 200))
    assert edges[39:41, 10:].any(axis=0).all()
    assert not np.asarray(canny(image[:, 10:], 100, 200)).any()


def test_one_pixel_and_inside_jit():
    assert not canny(np.zeros((1, 1), np.uint8), 100, 200).any()
    image = np.zeros((9, 37), np.uint8)  # the shape, and so the program, of a test above
    image[:, 18:] = 255
    made = jax.jit(lambda image, low: canny(image, low, 200))(image, jnp.float32(100))
    np.testing.assert_array_equal(made, canny(image, 100, 200))
    assert made.dtype == bool


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((4, 4), np.float32), "uint8, got float32"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((4, 4, 1), np.uint8), r"\(4, 4, 1\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        ([[0.0, 1.0]], "uint8, got float64"),
    ],
)
def test_bad_input(unchecked, image, told):
    with pytest.raises(ValueError, match=told):
        canny(image, 100, 200)
    with pytest.raises(ValueError, match=r"low.*-1"):
        canny(np.zeros((4, 4), np.uint8), -1, 200)
