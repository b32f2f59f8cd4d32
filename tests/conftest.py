"""What every test runs under: 8 CPU devices, a compile cache shared between runs, shapes and dtypes checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import jax
import jaxtyping

import tests.typechecker  # noqa: F401  the hook below finds it by name

# Shapes in the signatures are promises: tests hold the code to them, users pay nothing.
_hook = jaxtyping.install_import_hook(["jaxlab", "pallas_kernels"], "tests.typechecker.check")

import pytest  # noqa: E402


@pytest.fixture
def unchecked():
    """Bad-input tests run as users do, without run-time shape checks, so that the library's own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forgets compiled programs when they have taken half of the memory maps that Linux grants a process (65,530).

    Where none is left the compiler crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
