"""Blending of Gaussians: against the dense form and for its gradient on this CPU, bytes of a large scene on an H100.

The scene is PLAYBOT's level of 31,000 Gaussians, or one made up where its file is not there.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, interleaved
from benchmarks.kernels import MIB
from jaxlab.core.errors import DataUnavailable, MissingExtra
from pallas_kernels.splat_rasterize import ordering, reference, splat_rasterize

SYSTEM = "flexgaussian"
WIDTH, HEIGHT, COUNT = 256, 192, 31_000
LARGE = {"count": 6_000_000, "width": 1920, "height": 1080}
LARGE_PAIRS = 2**25

Args = tuple[jax.Array, ...]


def playbot(width: int = WIDTH, height: int = HEIGHT) -> Args:
    """What the projection makes of PLAYBOT's level 3, seen from the front.

    Raises:
      DataUnavailable: its file is not there.
    """
    from jaxlab.core import data_path
    from jaxlab.flexgaussian.cameras import orbit_cameras
    from jaxlab.flexgaussian.formats import load_scene
    from jaxlab.flexgaussian.projection import project

    scene = load_scene(data_path("splats/playbot_lod3.sog"))
    camera = orbit_cameras(scene, 1, width, height)[0]
    seen = jax.jit(lambda scene: project(scene, camera))(scene)
    return seen.means2d, seen.conics, jax.nn.sigmoid(scene.opacity_logit), seen.rgb, seen.depths, seen.radii


def made_up(count: int = COUNT, width: int = WIDTH, height: int = HEIGHT, pixels: float = 1.5) -> Args:
    """Gaussians of about so many pixels, turned any way, half of them in the middle ninth of the image."""
    rng = np.random.default_rng(0)
    turn, sizes = rng.uniform(0, np.pi, count), pixels * np.exp(rng.uniform(-0.7, 0.7, (count, 2)))
    axes = np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], 1).reshape(-1, 2, 2)
    inverse = axes @ (sizes[:, :, None] ** -2.0 * np.eye(2)) @ axes.transpose(0, 2, 1)
    where = 0.5 + (rng.random((count, 2)) - 0.5) * np.where(np.arange(count)[:, None] % 2, 1, 1 / 3)
    floats = (
        where * (width, height),
        np.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], 1),
        rng.uniform(0, 1, count),
        rng.uniform(0, 1, (count, 3)),
        rng.uniform(1, 9, count),
    )
    return *(jnp.asarray(x, jnp.float32) for x in floats), jnp.full(count, 20, jnp.int32)


def rasterize(*args: Any, width: int, height: int, max_pairs: int, implementation: Any = None) -> jax.Array:
    """The image with the transmittance as a fourth channel."""
    made = splat_rasterize(*args, width=width, height=height, max_pairs=max_pairs, implementation=implementation)
    return jnp.concatenate([made.image, made.transmittance[..., None]], axis=2)


def dense(*args: jax.Array) -> jax.Array:
    """The same by the reference, whose bound on pairs does not hold here."""
    *columns, depths, _ = args
    rows = jnp.concatenate([x.reshape(len(depths), -1) for x in columns], axis=1)
    y, x = (z.astype(jnp.float32) for z in jnp.mgrid[:HEIGHT, :WIDTH] + 0.5)
    image, transmittance, _ = reference.composite(rows, depths, x, y)
    return jnp.concatenate([image, transmittance[..., None]], axis=2)


def cases(quick: bool) -> Iterator[Case]:
    """Time and largest difference against the dense form, backward against forward, orders, bytes on an H100."""
    try:
        args, scene = playbot(), "PLAYBOT"
    except DataUnavailable:
        args, scene = made_up(), "made-up scene"
    title = f"splat_rasterize, {scene}, {COUNT} Gaussians, {WIDTH}x{HEIGHT}, CPU"
    forward = functools.partial(rasterize, width=WIDTH, height=HEIGHT, max_pairs=2**17)
    tiled, whole = (jax.jit(program).lower(*args).compile() for program in (forward, dense))
    ours, peer = interleaved(lambda: tiled(*args), lambda: whole(*args), repeats=1 if quick else 5)
    yield Case(SYSTEM, title, "ms", ours * 1e3, peer * 1e3, "all pixels, all Gaussians", 10.0)
    difference = float(jnp.abs(tiled(*args) - whole(*args)).max())
    yield Case(SYSTEM, title, "largest difference", difference, 1e-4, "its bound", 1.0)

    def with_gradients(cotangent, *args):
        value, pullback = jax.vjp(lambda *floats: forward(*floats, *args[4:]), *args[:4])
        return value, pullback

    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(HEIGHT, WIDTH, 4)), jnp.float32)
    _, pullback = jax.jit(with_gradients)(cotangent, *args)
    backward = jax.jit(lambda pullback, cotangent: pullback(cotangent))
    times = interleaved(lambda: backward(pullback, cotangent), lambda: tiled(*args), repeats=5 if quick else 15)
    yield Case(SYSTEM, f"{title}, backward", "ms", *(1e3 * time for time in times), "forward", 1 / 4)

    keys = jnp.asarray(np.random.default_rng(2).integers(0, 192, 2**17), jnp.uint32)
    orders = [jax.jit(program) for program in (lambda keys: ordering.by_counting(keys, 8), ordering.by_sorting)]
    times = interleaved(*(functools.partial(order, keys) for order in orders), repeats=5 if quick else 15)
    yield Case(SYSTEM, "stable order of 131072 keys of 8 bits, CPU", "ms", *(1e3 * t for t in times), "lax.sort", 2.0)
    if not quick:
        yield from _on_gpus()


def gradients(cotangent: Any, *args: Any, width: int, height: int, max_pairs: int) -> tuple[jax.Array, ...]:
    """Of the four arguments that have some."""
    program: Callable[..., jax.Array] = functools.partial(rasterize, width=width, height=height, max_pairs=max_pairs)
    return jax.vjp(lambda *floats: program(*floats, *args[4:]), *args[:4])[1](cotangent)


def abstract(count: int, width: int, height: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments, and last the cotangent of `rasterize`, not there."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    floats = (array(shape) for shape in ((count, 2), (count, 3), (count,), (count, 3), (count,)))
    return *floats, jax.ShapeDtypeStruct((count,), jnp.int32), array((height, width, 4))


def _on_gpus() -> Iterator[Case]:
    """All bytes of a large scene's programs, arguments and results among them."""
    from jaxlab.core import plan

    *args, cotangent = abstract(**LARGE)
    size = {"width": LARGE["width"], "height": LARGE["height"], "max_pairs": LARGE_PAIRS}
    try:
        target = plan.target("h100")
    except MissingExtra:
        return
    programs = {"forward": (rasterize, args), "gradients": (gradients, [cotangent, *args])}
    for what, (program, given) in programs.items():
        made = plan.compile(
            functools.partial(program, **size), *given, target=target, labels=["input"] * len(given), read_kernels=False
        )
        title = f"splat_rasterize, 6 million Gaussians, 1920x1080, 33.5 million pairs, {what}, H100"
        bytes_ = made.bytes["total"] / MIB, target.memory_bytes / MIB
        yield Case(SYSTEM, title, "MiB in all", *bytes_, "the GPU's memory", 10.0)
