import jax
import numpy as np
import pytest

from jaxlab.instantedit import blend_mask, rle_to_mask
from tests.oracles import instantedit_parts as oracle

RNG = np.random.default_rng(2)
PROBS = RNG.random((3, 6, 7)).astype(np.float32)
WEIGHTS = np.float32([1, 0, 1, 1, 0, 1, 1])  # the first, and those from 5 on, are not words
SIZE = (8, 12)


@pytest.mark.latest
@pytest.mark.parametrize("alpha_bar", [0.99, 0.0566])
def test_mask_equals_the_formula(alpha_bar):
    for threshold in (0.0, 0.4, 0.9):
        got = blend_mask(PROBS, WEIGHTS, 6, alpha_bar, threshold=threshold, size=SIZE)
        expected = oracle.blend_mask(PROBS.astype(np.float64), WEIGHTS, 6, alpha_bar, threshold, SIZE)
        np.testing.assert_array_equal(got, expected)


def test_words_are_averaged_over_maps_before_the_largest_is_taken():
    probs = np.zeros((2, 4, 4), np.float32)
    probs[0, 0, 1] = probs[1, 0, 2] = 1.0  # two words, one map each: mean 0.5, not 1
    probs[:, 3, 1] = 0.6
    mask = blend_mask(probs, np.float32([0, 1, 1, 0]), 4, 0.9, threshold=0.9, size=(2, 2))
    assert np.asarray(mask).tolist() == [[False, False], [False, True]]


def test_equal_to_the_threshold_is_outside_and_no_word_is_no_mask():
    probs = np.zeros((1, 4, 3), np.float32)
    probs[0, :, 1] = [1, 0.5, 0.25, 0.75]
    half = blend_mask(probs, np.float32([0, 1, 0]), 3, 0.9, threshold=0.5, size=(2, 2))
    assert np.asarray(half).tolist() == [[True, False], [False, True]]
    for weights in (np.zeros(3, np.float32), np.float32([1, 0, 1])):
        assert not blend_mask(probs, weights, 3, 0.9, threshold=0.0, size=(2, 2)).any()


def test_lengths_and_thresholds_may_be_traced():
    made = jax.jit(
        lambda length, alpha, threshold: blend_mask(PROBS, WEIGHTS, length, alpha, threshold=threshold, size=SIZE)
    )
    expected = oracle.blend_mask(PROBS.astype(np.float64), WEIGHTS, 5, 0.3, 0.7, SIZE)
    np.testing.assert_array_equal(made(5, 0.3, 0.7), expected)


def test_bad_masks(unchecked):
    with pytest.raises(ValueError, match=r"6 query tokens .* 9x9"):
        blend_mask(PROBS, WEIGHTS, 6, 0.5, size=(9, 9))
    with pytest.raises(ValueError, match=r"threshold.*-0\.1"):
        blend_mask(PROBS, WEIGHTS, 6, 0.5, threshold=-0.1, size=SIZE)
    with pytest.raises(ValueError, match=r"threshold.*-1"):
        blend_mask(PROBS, WEIGHTS, 6, 0.5, threshold=np.float32(-1), size=SIZE)
    for weights in (WEIGHTS[:1], WEIGHTS[:6]):
        with pytest.raises(ValueError, match="word_weights: expected one for each of 7 words"):
            blend_mask(PROBS, weights, 6, 0.5, size=SIZE)
    with pytest.raises(ValueError, match=r"probs: expected \[L, T, S\], got \(6, 7\)"):
        blend_mask(PROBS[0], WEIGHTS, 6, 0.5, size=SIZE)


def test_runs():
    mask = rle_to_mask([1, 2, 4, 0, 5, 1, 5, 1], shape=(2, 3))
    assert mask.tolist() == [[False, True, True], [False, False, True]]
    assert rle_to_mask([]).shape == (512, 512)
    assert rle_to_mask([512 * 512 - 1, 1])[-1, -1]
    assert not rle_to_mask([], shape=(2, 2)).any()


@pytest.mark.parametrize("runs", [[0], [5, 2], [-1, 1], [0, -1], [[0, 1]], [0.0, 1.0]])
def test_bad_runs(unchecked, runs):
    with pytest.raises(ValueError, match="runs"):
        rle_to_mask(runs, shape=(2, 3))
