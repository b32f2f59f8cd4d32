"""An edit with Stable Diffusion 1.5's networks, compiled for GPUs that are not here: bytes, kernels, what is exchanged.

from jaxlab.core import plan
from jaxlab.instantedit.compiled import PlanConfig, compile_phase
print(compile_phase(PlanConfig(phase="edit"), plan.target("h100")).table())
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.instantedit import sharding
from jaxlab.instantedit.config import MAX_TOKENS, check_choice
from jaxlab.instantedit.edit import Knobs, Prompts, Source, decoded, edited, source_branch
from jaxlab.instantedit.inversion import inverted
from jaxlab.instantedit.network import EditorNetwork
from jaxlab.instantedit.scheduler import PeRFlowSchedule

Phase = Literal["invert", "source", "edit", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to compile.

    Attributes:
      phase: "invert": N steps up of encoded images; "source": the source prompt's branch; "edit": N steps down, with a
        source branch made before on one device, and with all four branches on several; "decode": latents to images.
      images: edited together; on several devices a multiple of those along `data`.
      height: pixels.
      width: pixels.
      num_steps: N.
      dtype: of weights and computation.
    """

    phase: Phase = "edit"
    images: int = 1
    height: int = 512
    width: int = 512
    num_steps: int = 4
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_choice("phase", self.phase, Phase)
        for name, least in (("images", 1), ("num_steps", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("height", "width"):
            if getattr(self, name) < 64 or getattr(self, name) % 64:
                raise ValueError(f"{name}: expected a multiple of 64, got {getattr(self, name)}")


PHASES = get_args(Phase)


def abstract_network(dtype: str = "bfloat16") -> EditorNetwork:
    """Stable Diffusion 1.5 with a ControlNet, its weights as shapes."""
    from jaxlab.models import sd

    modules = {
        "unet": sd.UNet2DCondition(sd.UNetConfig(), dtype),
        "controlnet": sd.ControlNet(sd.ControlNetConfig(), dtype),
        "vae": sd.AutoencoderKL(sd.VAEConfig(), dtype),
        "text_encoder": sd.CLIPTextEncoder(sd.CLIPTextConfig(), dtype),
    }
    params = {name: _abstract(module, dtype) for name, module in modules.items()}
    return EditorNetwork(params=params, schedule=PeRFlowSchedule(), **modules)


def _abstract(module: nn.Module, dtype: str) -> Any:
    from jaxlab.models import sd

    if isinstance(module, sd.CLIPTextEncoder):
        ids = jax.ShapeDtypeStruct((1, MAX_TOKENS), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), ids)["params"]
    else:
        shapes = sd.abstract_params(module)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), nn.meta.unbox(shapes))


def compile_phase(
    config: PlanConfig, target: plan.Target, *, options: Mapping[str, Any] | None = None, read_kernels: bool = True
) -> plan.Plan:
    """Compiles one phase for a target; nothing runs.

    All weights lie on every device in every phase.

    Args:
      config: sizes and phase.
      target: from `jaxlab.core.plan.target`: one device, or a mesh of `data` and `view`.
      options: of XLA's compiler.
      read_kernels: whether the plan lists kernels.

    Raises:
      ValueError: a mesh that does not fit, see `sharding`, or the phase "source" on several devices.
    """
    mesh = target.mesh if target.mesh.size > 1 else None
    if mesh is not None and config.phase == "source":
        raise ValueError("phase: expected another than source on several devices, which evaluate it in each step")
    network = abstract_network(config.dtype)
    fn, given = _PROGRAMS[config.phase](config, _Shapes(config, mesh))
    return plan.compile(
        fn,
        network,
        *given,
        target=target,
        labels=("parameters", *("input",) * len(given)),
        options=options,
        read_kernels=read_kernels,
    )


def shapes(config: PlanConfig) -> dict[str, tuple[Any, ...]]:
    """Phase -> what its program takes after the network, on one device, as shapes."""
    return {phase: program(config, _Shapes(config, None))[1] for phase, program in _PROGRAMS.items()}


class _Shapes:
    """Abstract arrays of a config, placed over a mesh if there is one."""

    def __init__(self, config: PlanConfig, mesh: Any):
        self.config, self.mesh = config, mesh
        self.latents = (config.images, config.height // 8, config.width // 8, 4)
        self.number = jax.ShapeDtypeStruct((), jnp.float32)
        self.null = jax.ShapeDtypeStruct((1, MAX_TOKENS, 768), jnp.float32)

    def of(self, *shape: int, images: int | None = 0, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """An array whose axis `images` lies over the devices along `data`."""
        place = None
        if self.mesh is not None and images is not None:
            place = NamedSharding(self.mesh, PartitionSpec(*[None] * images, sharding.IMAGES))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    @property
    def states(self) -> jax.ShapeDtypeStruct:
        return self.of(self.config.images, MAX_TOKENS, 768)

    @property
    def trajectory(self) -> jax.ShapeDtypeStruct:
        return self.of(self.config.num_steps + 1, *self.latents, images=1)

    @property
    def features(self) -> jax.ShapeDtypeStruct:
        return self.of(*self.latents[:3], 320)


def _invert(config: PlanConfig, shapes: _Shapes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    edges = shapes.of(config.images, config.height, config.width, dtype=jnp.bool_)
    given = (shapes.of(*shapes.latents), edges, shapes.null, shapes.number)
    steps: dict[str, Any] = {"num_steps": config.num_steps, "mode": "exact"}
    if shapes.mesh is not None:
        return lambda *args: sharding.invert_sharded(*args, **steps, mesh=shapes.mesh), given

    def program(network, z0, edges, null, scale):
        features = network.hint(edges)
        return inverted(network, z0, null, features, scale, **steps), features

    return program, given


def _source(config: PlanConfig, shapes: _Shapes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return source_branch, (shapes.trajectory, shapes.features, shapes.number, shapes.null, shapes.states)


def _edit(config: PlanConfig, shapes: _Shapes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    words, lengths = shapes.of(config.images, MAX_TOKENS), shapes.of(config.images, dtype=jnp.int32)
    prompts = Prompts(shapes.null, shapes.states, shapes.states, words, lengths)
    number = shapes.number
    knobs = Knobs(number, number, number, number, masked=jax.ShapeDtypeStruct((), jnp.bool_))
    given = (shapes.trajectory, shapes.features, prompts, knobs)
    if shapes.mesh is not None:
        return lambda *args: sharding.edit_sharded(*args, mesh=shapes.mesh), given
    source = jax.eval_shape(source_branch, abstract_network(config.dtype), *_source(config, shapes)[1])
    return edited, (*given, Source(source.eps_null, source.eps, source.maps))


def _decode(config: PlanConfig, shapes: _Shapes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    given = (shapes.of(*shapes.latents),)
    if shapes.mesh is not None:
        return lambda *args: sharding.decode_sharded(*args, mesh=shapes.mesh), given
    return decoded, given


_PROGRAMS: Mapping[str, Callable[..., Any]] = {
    "invert": _invert,
    "source": _source,
    "edit": _edit,
    "decode": _decode,
}
