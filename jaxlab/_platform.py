"""Which backend JAX may look for; decided before JAX is imported."""

import importlib.util
import os
from pathlib import Path

_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def has_gpu() -> bool:
    """Whether this machine shows a GPU to its processes (NVIDIA, AMD, or WSL's), without asking any driver."""
    return any(Path(file).exists() for file in _GPU_FILES)


def prefer_cpu_without_gpu() -> None:
    """Sets `JAX_PLATFORMS=cpu` where the GPU compiler is installed but no GPU is there.

    Deviceless compilation needs the CUDA plugin; with it installed and no driver, JAX's own start would print a long
    stack trace. Must run before `import jax`; a value the user has set is left alone, and so are other accelerators.
    """
    plugins = importlib.util.find_spec("jax_plugins")
    installed = plugins is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{major}") is not None for major in (12, 13)
    )
    if installed and not has_gpu() and not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"


def quiet_compiler() -> None:
    """Keeps XLA's C++ warnings (choices of its partitioner and scheduler) off the terminal; errors still show.

    Must run before `import jax`; a level the user has set is left alone. What came of those choices is in the plan.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
