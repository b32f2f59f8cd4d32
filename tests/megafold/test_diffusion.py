import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import diffusion
from jaxlab.megafold.geometry import weighted_rigid_align

KEY = jax.random.key(0)


def test_schedule_falls_from_160_sigma_to_0():
    levels = np.asarray(diffusion.noise_schedule(200))
    i = np.arange(201)
    want = 16 * (160 ** (1 / 7) + i / 200 * (4e-4 ** (1 / 7) - 160 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels[:-1], want[:-1], rtol=1e-6)
    assert levels[0] == 2560
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()
    np.testing.assert_array_equal(diffusion.noise_schedule(1, sigma_data=1.0), [160, 0])
    with pytest.raises(ValueError, match="num_steps: expected a value >= 1, got 0"):
        diffusion.noise_schedule(0)


def test_training_noise_is_log_normal():
    logs = np.log(np.asarray(diffusion.sample_training_sigma(KEY, (20000,))) / 16)
    assert abs(logs.mean() + 1.2) < 0.05
    assert abs(logs.std() - 1.5) < 0.05
    np.testing.assert_allclose(
        diffusion.sample_training_sigma(KEY, (3, 2), sigma_data=1.0) * 16, diffusion.sample_training_sigma(KEY, (3, 2))
    )


def test_preconditioning_and_both_weights():
    sigma = np.array([0.0064, 0.5, 16.0, 2560.0])
    total = sigma**2 + 256
    want = 256 / total, sigma * 16 / np.sqrt(total), 1 / np.sqrt(total), np.log(sigma / 16) / 4
    for got, expected in zip(diffusion.precondition(sigma), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(diffusion.edm_loss_weight(sigma), total / (sigma * 16) ** 2, rtol=1e-5)
    printed = diffusion.edm_loss_weight(sigma, loss_weighting="af3_text")
    np.testing.assert_allclose(printed, total / (sigma + 16) ** 2, rtol=1e-5)
    with pytest.raises(ValueError, match="loss_weighting: expected one of"):
        diffusion.edm_loss_weight(sigma, loss_weighting="karras")


def test_rotations_are_proper_and_in_every_direction():
    rotations = np.asarray(diffusion.random_rotation(KEY, (4000,)))
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(1, 2), np.broadcast_to(np.eye(3), (4000, 3, 3)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-5)
    assert np.abs(rotations.mean(0)).max() < 0.05  # a uniform rotation has mean 0 and entries of variance 1/3
    np.testing.assert_allclose(rotations.var(0), 1 / 3, atol=0.03)


def test_augmentation_is_rigid_about_the_centre_of_what_exists():
    rng = np.random.default_rng(0)
    mask = np.arange(9) < 7
    x = rng.normal(size=(9, 3)).astype(np.float32) * 4 + 100
    many = np.asarray(diffusion.random_augmentation(KEY, jnp.broadcast_to(x, (500, 9, 3)), mask))
    assert (many[:, 7:] == 0).all()

    def distance(y):
        return np.linalg.norm(y[..., :7, None, :] - y[..., None, :7, :], axis=-1)

    def handed(y):
        return np.linalg.det(y[..., 1:4, :] - y[..., :1, :])

    np.testing.assert_allclose(distance(many), np.broadcast_to(distance(x), (500, 7, 7)), atol=1e-4)
    centres = many[:, :7].mean(1)
    assert abs(centres.mean()) < 0.1
    assert abs(centres.std() - 1) < 0.1
    np.testing.assert_allclose(handed(many), handed(x), rtol=1e-3)


@pytest.mark.latest
def test_sampling_with_a_perfect_denoiser_gives_the_structure():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(12, 3)).astype(np.float32) * 8
    mask = np.arange(12) < 10
    weight = mask.astype(np.float32)

    def denoise(x, sigma):
        assert sigma.shape == ()
        return weighted_rigid_align(truth, x, jnp.asarray(weight))

    run = jax.jit(lambda key: diffusion.sample(denoise, key, (3, 12, 3), mask=mask, num_steps=40))
    x = run(KEY)
    np.testing.assert_array_equal(x, run(KEY))
    assert (np.asarray(x)[:, 10:] == 0).all()
    back = np.asarray(weighted_rigid_align(x, truth, weight))
    np.testing.assert_allclose(back[:, :10], np.broadcast_to(truth[:10], (3, 10, 3)), atol=0.05)
    assert np.abs(np.asarray(x[0] - x[1])).max() > 1  # each in a frame of its own
    assert np.abs(np.asarray(run(jax.random.key(1)) - x)).max() > 1


def test_sampling_solves_the_equation_of_a_gaussian():
    """For normal data the best denoiser is sigma_d^2 / (sigma_d^2 + sigma^2) x, and samples have that deviation."""

    def denoise(x, sigma):
        return x * 256 / (sigma**2 + 256)

    x = diffusion.sample(denoise, KEY, (2, 2000, 3), num_steps=200, gamma_0=0.0, step_scale=1.0)
    np.testing.assert_allclose(np.std(np.asarray(x), axis=(1, 2)), 16, rtol=0.05)


def test_steps_follow_the_algorithm():
    """One step, from noise to the target level 0: no noise added, the slope overshot by the step's scale."""
    seen = []

    def denoise(x, sigma):
        jax.debug.callback(lambda x, sigma: seen.append((x, sigma)), x, sigma, ordered=True)
        return jnp.full_like(x, 2.0)

    x = diffusion.sample(denoise, KEY, (1, 5, 3), num_steps=1, step_scale=1.5)
    jax.effects_barrier()
    ((noisy, sigma),) = seen
    assert sigma == 2560
    np.testing.assert_allclose(x, noisy - 1.5 * (noisy - 2), rtol=1e-3, atol=1e-2)
    seen.clear()
    diffusion.sample(denoise, KEY, (1, 5, 3), num_steps=40, gamma_0=0.8, gamma_min=1.0)
    jax.effects_barrier()
    levels = np.asarray(diffusion.noise_schedule(40))
    raised = levels[:-1] * np.where(levels[1:] > 1, 1.8, 1.0)
    np.testing.assert_allclose([sigma for _, sigma in seen], raised, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs():
    def identity(x, sigma):
        return x

    with pytest.raises(ValueError, match=r"shape: expected \[T, A, 3\], got \(3, 4\)"):
        diffusion.sample(identity, KEY, (3, 4))
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(2, 4\), got \(5,\)"):
        diffusion.sample(identity, KEY, (2, 4, 3), mask=np.ones(5, bool))
    with pytest.raises(ValueError, match="num_steps"):
        diffusion.sample(identity, KEY, (2, 4, 3), num_steps=0)
