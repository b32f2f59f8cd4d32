"""Edits over eight devices, in any number of processes, against those of one device."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather

from jaxlab.core import make_mesh
from jaxlab.instantedit.edit import Knobs, Prompts, decode_program, edit_program, source_program
from jaxlab.instantedit.inversion import invert_program
from jaxlab.instantedit.sharding import decode_sharded, edit_sharded, invert_sharded, replicated
from tests.instantedit import toys

IMAGES, SIDE, SCALE = 4, 8, np.float32(0.6)
NETWORK = toys.pipeline().network
KNOBS = Knobs(np.float32(1.3), np.float32(2.0), np.float32(0.5), SCALE, np.bool_(True))


@functools.cache
def given():
    """Latents, edges and prompts: a source and a target for each image, a word weighted in all but the last."""
    rng = np.random.default_rng(3)
    z0 = rng.normal(size=(IMAGES, SIDE, SIDE, 4)).astype(np.float32)
    edges = rng.random((IMAGES, 8 * SIDE, 8 * SIDE)) < 0.2
    null, source, other = rng.normal(size=(3, IMAGES, toys.WORDS, toys.WIDTH)).astype(np.float32)
    weights = np.zeros((IMAGES, toys.WORDS), np.float32)
    weights[: IMAGES - 1, 3:6] = 1
    target = np.where(weights[..., None] > 0, other, source)
    target[-1] = source[-1]
    return z0, edges, Prompts(null[:1], source, target, weights, np.full(IMAGES, 8, np.int32))


@functools.cache
def of_one_device():
    z0, edges, prompts = given()
    trajectory, features = invert_program(NETWORK, z0, edges, prompts.null, SCALE, num_steps=4, mode="exact")
    source = source_program(NETWORK, trajectory, features, SCALE, prompts.null, prompts.source)
    result = edit_program(NETWORK, trajectory, features, prompts, KNOBS, source)
    return jax.tree.map(np.asarray, (trajectory, result, decode_program(NETWORK, result.latents)))


def check_close(a, b):
    """The toys give latents of up to 34."""
    a, b = a.astype(float), b.astype(float)
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def check_mesh(shape):
    mesh = make_mesh(shape)
    network, (z0, edges, prompts) = replicated(NETWORK, mesh), given()
    trajectory, features = invert_sharded(network, z0, edges, prompts.null, SCALE, num_steps=4, mode="exact", mesh=mesh)
    result = edit_sharded(network, trajectory, features, prompts, KNOBS, mesh=mesh)
    assert result.latents.sharding.spec[0] == "data"
    images = decode_sharded(network, result.latents, mesh=mesh)
    got = jax.tree.map(lambda leaf: process_allgather(leaf, tiled=True), (trajectory, result, images))
    want = of_one_device()
    assert 0 < want[1].masks.mean() < 1
    jax.tree.map(check_close, got[:2], want[:2])
    assert np.abs(got[2].astype(int) - want[2]).max() <= 1
    np.testing.assert_array_equal(got[1].latents[-1], z0[-1])


def case_four_branches_over_four_devices(folder):
    check_mesh({"data": 2, "view": 4})


def case_four_branches_over_two_devices(folder):
    check_mesh({"data": 4, "view": 2})


def case_meshes_that_do_not_fit(folder):
    z0, edges, prompts = given()
    for shape, message in (
        ({"data": 8}, "expected the axes data and view, got data"),
        ({"data": 1, "view": 8}, "at most 4 along view, got 8"),
        ({"data": 8, "view": 1}, "8 along data do not divide 4 images"),
    ):
        with pytest.raises(ValueError, match=message):
            invert_sharded(NETWORK, z0, edges, prompts.null, SCALE, num_steps=4, mode="exact", mesh=make_mesh(shape))
