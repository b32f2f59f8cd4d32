import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models.sd import AutoencoderKL, VAEConfig, init_params, load_vae
from jaxlab.models.sd.save_diffusers import save_network


def test_saved_networks_come_back(tmp_path):
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2))
    params = jax.tree.map(lambda leaf: leaf + 0.1, init_params(vae, jax.random.key(0)))
    save_network(tmp_path, vae, params)
    module, loaded = load_vae(tmp_path)
    assert module.config == vae.config
    jax.tree.map(np.testing.assert_array_equal, dict(loaded), params)

    save_network(tmp_path, vae, params, dtype="float16")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), dict(load_vae(tmp_path)[1]), params)


def test_other_parameters_are_refused(tmp_path):
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2))
    with pytest.raises(KeyError, match="decoder/conv_in/bias"):
        save_network(tmp_path, vae, {"conv_in": jnp.ones(1)})
