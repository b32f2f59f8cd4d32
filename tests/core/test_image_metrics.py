import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import image_metrics
from tests.oracles import image_metrics as oracle


def _images(height=17, width=14, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    a = 0.5 + 0.4 * np.sin(rows[..., None] / 3 + columns[..., None] / 4 + np.arange(channels))
    return a.astype(np.float32), np.clip(a + generator.normal(0, 0.1, a.shape), 0, 1).astype(np.float32)


@pytest.mark.latest
@pytest.mark.parametrize("border", ["zero", "reflect", "valid"])
def test_ssim_is_the_formula(border):
    a, b = _images()
    np.testing.assert_allclose(image_metrics.ssim(a, b, border=border), oracle.ssim(a, b, border=border), rtol=2e-6)
    np.testing.assert_allclose(
        image_metrics.ssim(255 * a, 255 * b, border=border, data_range=255.0),
        oracle.ssim(a, b, border=border),
        rtol=2e-6,
    )
    assert image_metrics.ssim(a, a, border=border) == pytest.approx(1.0, abs=1e-6)


def test_ssim_of_bright_flat_images():
    a = np.full((12, 12, 1), 0.9, np.float32)
    b = a + np.float32(1e-3) * np.indices((12, 12)).sum(0)[..., None].astype(np.float32) % 2
    np.testing.assert_allclose(image_metrics.ssim(a, b, border="valid"), oracle.ssim(a, b, border="valid"), rtol=1e-5)


def test_psnr_is_the_formula():
    a, b = _images()
    np.testing.assert_allclose(image_metrics.psnr(a, b), oracle.psnr(a, b), rtol=1e-5)
    np.testing.assert_allclose(image_metrics.psnr(255 * a, 255 * b, data_range=255.0), oracle.psnr(a, b), rtol=1e-5)
    channels = np.mean([oracle.psnr(a[..., channel], b[..., channel]) for channel in range(3)])
    np.testing.assert_allclose(image_metrics.psnr(a, b, per_channel=True), channels, rtol=1e-5)
    np.testing.assert_allclose(image_metrics.mse(a, b), np.mean((np.float64(a) - b) ** 2), rtol=1e-5)


def test_psnr_clamps_jointly_only():
    a, b = _images()
    over = a + 3 * (a > 0.8)
    np.testing.assert_allclose(image_metrics.psnr(over, b), oracle.psnr(np.clip(over, 0, 1), b), rtol=1e-5)
    channels = np.mean([oracle.psnr(over[..., channel], b[..., channel]) for channel in range(3)])
    np.testing.assert_allclose(image_metrics.psnr(over, b, per_channel=True), channels, rtol=1e-5)


def test_identical_images():
    a, _ = _images()
    assert image_metrics.psnr(a, a) == 100.0
    assert image_metrics.psnr(a, a, cap=None) == np.inf
    assert image_metrics.psnr(a, a, per_channel=True) == np.inf


def test_numbers_of_scikit_image():
    """scikit-image 0.26: `structural_similarity(gaussian_weights=True, use_sample_covariance=False)` leaves a border of
    5 out, as "valid" does; `peak_signal_noise_ratio`. Images as in `_images(24, 20)`."""
    a, b = _images(24, 20)
    np.testing.assert_allclose(image_metrics.ssim(a, b, border="valid"), 0.8327263941859826, rtol=1e-5)
    np.testing.assert_allclose(image_metrics.psnr(a, b), 20.27244086135058, rtol=1e-5)


def test_masked_pixels_are_zero_and_count():
    a, b = _images()
    mask = np.arange(17)[:, None] + np.arange(14) < 12
    zeroed = a * mask[..., None], b * mask[..., None]
    for metric in (image_metrics.mse, image_metrics.psnr, image_metrics.ssim):
        np.testing.assert_allclose(metric(a, b, mask=mask), metric(*zeroed), rtol=1e-6)


def test_leading_axes_jit_and_gradients():
    pairs = [_images(seed=seed) for seed in range(4)]
    a, b = (jnp.stack(images).reshape(2, 2, 17, 14, 3) for images in zip(*pairs))
    for metric in (image_metrics.mse, image_metrics.psnr, image_metrics.ssim):
        alone = [metric(*pair) for pair in pairs]
        np.testing.assert_allclose(jax.jit(metric)(a, b), np.reshape(alone, (2, 2)), rtol=1e-5)
    gradient = jax.grad(lambda x: image_metrics.ssim(x, b).mean())(a)
    direction = jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
    ahead, behind = (image_metrics.ssim(a + step * direction, b).mean() for step in (1e-2, -1e-2))
    np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / 2e-2, rtol=2e-2)
    assert np.isfinite(jax.grad(lambda x: image_metrics.ssim(x, b[0, 0]))(b[0, 0])).all()


def test_other_dtypes():
    a, b = _images()
    half = image_metrics.psnr(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, oracle.psnr(a, b), rtol=1e-2)
    whole = image_metrics.psnr((255 * a).astype(np.uint8), (255 * b).astype(np.uint8), data_range=255.0)
    np.testing.assert_allclose(whole, oracle.psnr(a, b), rtol=1e-2)


@pytest.mark.parametrize("metric", [image_metrics.mse, image_metrics.psnr, image_metrics.ssim])
def test_bad_input(unchecked, metric):
    a, b = _images()
    with pytest.raises(ValueError, match=r"b: expected the shape of a, \(17, 14, 3\), got \(16, 14, 3\)"):
        metric(a, b[1:])
    with pytest.raises(ValueError, match=r"a: expected images"):
        metric(a[0], b[0])
    with pytest.raises(ValueError, match=r"mask: expected shape \(17, 14\), got \(14,\)"):
        metric(a, b, mask=np.ones(14, bool))


def test_bad_settings(unchecked):
    a, b = _images()
    with pytest.raises(ValueError, match="border: expected 'zero', 'reflect' or 'valid', got 'wrap'"):
        image_metrics.ssim(a, b, border="wrap")
    with pytest.raises(ValueError, match="at least 11"):
        image_metrics.ssim(a[:9], b[:9], border="valid")
    for metric in (image_metrics.psnr, image_metrics.ssim):
        with pytest.raises(ValueError, match="data_range"):
            metric(a, b, data_range=0.0)
