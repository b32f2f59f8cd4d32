"""What moved in JAX between 0.10.2 and 0.12, in one place; the kernels themselves read the same on every version."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import compute_on as _compute_on
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh


def silence_triton_deprecation() -> None:
    """Hides what JAX >= 0.11 says at every lowering of a Triton kernel (no user can act on it), and nothing else."""
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


silence_triton_deprecation()

# What a kernel is traced for when neither a device nor a plan says otherwise.
DEFAULT_DEVICE_KIND = {"cuda": "NVIDIA H100 80GB HBM3", "rocm": "gfx90a"}


@contextlib.contextmanager
def tracing_for(
    device_kind: str | None = None, *, platform: str = "cuda", mesh: jax.sharding.Mesh | None = None
) -> Iterator[None]:
    """Traces and lowers GPU kernels for a device that need not be there.

    From JAX 0.11 a Pallas-Triton kernel asks for its device while it is lowered. Inside this context the answer is
    `device_kind`; 0.10.2, which does not ask, is not disturbed.

    Args:
      device_kind: as JAX names it ("NVIDIA H100 80GB HBM3"); by default the kind of `mesh`'s devices, else
        `DEFAULT_DEVICE_KIND[platform]`.
      platform: "cuda" or "rocm".
      mesh: the mesh over which the traced program is sharded, so that the context agrees with it.
    """
    if mesh is not None:
        abstract = mesh.abstract_mesh
        if device_kind is not None:
            abstract = abstract.update(abstract_device=AbstractDevice(device_kind, num_cores=None, platform=platform))
    else:
        kind = device_kind or DEFAULT_DEVICE_KIND[platform]
        # A mesh without axes: it says what the device is and leaves every sharding alone.
        abstract = AbstractMesh((), (), abstract_device=AbstractDevice(kind, num_cores=None, platform=platform))
    with use_abstract_mesh(abstract):
        yield


@contextlib.contextmanager
def default_device_for(platform: str | None) -> Iterator[None]:
    """Like `tracing_for(platform=platform)`, but only where nothing else (a real GPU, a mesh) names the device."""
    ambient = get_abstract_mesh()
    if platform not in DEFAULT_DEVICE_KIND or not ambient.empty or ambient.abstract_device is not None or _has_gpu():
        yield
    else:
        with tracing_for(platform=platform):
            yield


@functools.cache
def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def compute_on(
    fn: Callable[..., Any], *, compute_type: str, out_memory_spaces: Any = jax.memory.Space.Host
) -> Callable[..., Any]:
    """Runs `fn` on "device_host" (the CPU beside a GPU) or "device" within a jitted program.

    Args:
      fn: a function of arrays.
      compute_type: "device_host" or "device".
      out_memory_spaces: a pytree prefix of `jax.memory.Space` for the outputs.

    Returns:
      The wrapped function. (A context manager in 0.10, where `compute_on2` had today's signature.)
    """
    wrap: Any = getattr(_compute_on, "compute_on2", _compute_on.compute_on)
    return wrap(fn, compute_type=compute_type, out_memory_spaces=out_memory_spaces)
