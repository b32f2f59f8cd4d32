"""The machines a program can be compiled for without having them: GPU presets, topologies, the local CPU."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxlab.core.errors import MissingExtra, require
from jaxlab.core.mesh import make_mesh

FITS_FACTOR = 0.92
"""The share of a device's memory that a program may take; the rest is the runtime's (ours)."""

_GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """What XLA's GPU compiler wants to know of a device, and how much memory it has.

    `memory_bytes` is what CUDA shows a process (data sheets round differently), bandwidth is the data sheet's.
    """

    device_kind: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    cores: int
    bandwidth: float
    """Bytes per second of device memory."""
    l2_bytes: int
    clock_ghz: float
    shared_per_core: int = 233472
    shared_per_block: int = 232448
    fpus_per_core: int = 128
    note: str = ""

    def description(self) -> str:
        """XLA's `GpuTargetConfigProto` in text form."""
        major, minor = self.compute_capability
        return f"""gpu_device_info {{
          threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
          shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_per_core}
          shared_memory_per_block_optin: {self.shared_per_block}
          core_count: {self.cores}  fpus_per_core: {self.fpus_per_core}
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          memory_bandwidth: {int(self.bandwidth)}  l2_cache_size: {self.l2_bytes}  clock_rate_ghz: {self.clock_ghz}
          device_memory_size: {self.memory_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "{self.device_kind}"
        """


_H100 = GPU("NVIDIA H100 80GB HBM3", 84_978_434_048, (9, 0), 132, 3.35232e12, 50 * 2**20, 1.98)

GPUS: dict[str, GPU] = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", 85_031_714_816, (8, 0), 108, 2.039e12, 40 * 2**20, 1.41,
        shared_per_core=167936, shared_per_block=166912, fpus_per_core=64,
    ),
    # Memory as CUDA tells it of the 40 GB card; bandwidth by the data sheet; the rest is the 80 GB card's.
    "a100_40": GPU(
        "NVIDIA A100-SXM4-40GB", 42_405_855_232, (8, 0), 108, 1.555e12, 40 * 2**20, 1.41,
        shared_per_core=167936, shared_per_block=166912, fpus_per_core=64,
    ),
    "h100": _H100,
    "h200": GPU("NVIDIA H200", 150_110_011_392, (9, 0), 132, 4.8e12, 50 * 2**20, 1.98),
    "gh200": GPU("NVIDIA GH200 480GB", int(94.5 * _GIB), (9, 0), 132, 4.0e12, 50 * 2**20, 1.98),
    "b200": GPU("NVIDIA B200", int(178.35 * _GIB), (10, 0), 148, 7.7e12, 126 * 2**20, 1.965),
    "mi250x": GPU(
        _H100.device_kind, 64 * _GIB, (9, 0), 132, 3.35232e12, 50 * 2**20, 1.98,
        note="mi250x is the H100 target with 64 GB a device: AMD GPUs cannot be compiled for without ROCm, so kernels "
        "and temporaries are the H100's.",
    ),
}  # fmt: skip
"""The presets. `gh200` is the 96 GB version; `mi250x` counts one of the card's two dies as a device."""

PRESETS = (*GPUS, "cpu")


@dataclass(frozen=True)
class Target:
    """Where a plan is compiled for: a mesh over devices that need not exist, and the memory of one of them."""

    gpu: str
    topology: str
    mesh: jax.sharding.Mesh
    memory_bytes: int
    memory_factor: int | float = FITS_FACTOR
    device_kind: str = "cpu"
    note: str = field(default="", repr=False)

    @property
    def platform(self) -> str:
        """What XLA compiles for, "cuda" or "cpu"."""
        return "cpu" if self.gpu == "cpu" else "cuda"


def target(
    gpu: str = "h100",
    topology: str = "1x1x1",
    mesh: Mapping[str, int] | None = None,
    *,
    memory_factor: int | float = FITS_FACTOR,
) -> Target:
    """A machine to compile for.

    Args:
      gpu: one of `PRESETS`. "cpu" stands for this process's CPU devices, sharing the host's memory.
      topology: partitions x hosts x devices a host: "1x128x8" is 128 nodes of 8 GPUs. For "cpu", "1x1x1" means all
        local devices.
      mesh: axis sizes as in `make_mesh`, the last axis over neighbours; by default `{"data": all}`.
      memory_factor: the share of the memory a plan may fill and still fit.

    Raises:
      ValueError: an unknown preset, a malformed topology, a factor outside (0, 1], or a mesh that does not match.
      MissingExtra: the GPU compiler (extra `aot`) is not installed.
    """
    known = f"presets: {', '.join(PRESETS)}"
    if not isinstance(gpu, str) or gpu not in PRESETS:
        raise ValueError(f"gpu: got {gpu!r}; {known}")
    if not isinstance(topology, str) or not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", topology):
        raise ValueError(
            f"topology: got {topology!r}, expected partitions x hosts x devices per host such as '1x128x8'; {known}"
        )
    if not 0 < memory_factor <= 1:
        raise ValueError(f"memory_factor: got {memory_factor}, expected a share in (0, 1]")
    if gpu == "cpu":
        devices = _cpu_devices(topology)
        mesh_over = make_mesh(mesh or {"data": -1}, devices)
        shared = _host_memory() // len(jax.local_devices(backend="cpu"))
        return Target(gpu, topology, mesh_over, shared, memory_factor)
    preset = GPUS[gpu]
    mesh_over = make_mesh(mesh or {"data": -1}, _gpu_devices(preset, topology))
    _keep_memory_kinds(mesh_over)
    return Target(gpu, topology, mesh_over, preset.memory_bytes, memory_factor, preset.device_kind, preset.note)


def _gpu_devices(preset: GPU, topology: str) -> list[jax.Device]:
    _require_gpu_compiler()
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        "", platform="cuda", target_config=preset.description(), topology=topology
    )
    return list(description.devices)


def _keep_memory_kinds(mesh: jax.sharding.Mesh) -> None:
    """Lets `NamedSharding(mesh, spec, memory_kind="pinned_host")` remember its memory kind.

    Described devices list no memories, so JAX has nothing to check a kind against and silently forgets it: arguments in
    host memory would be planned as if they lay on the GPU. The device list that answers the check is therefore one of
    devices that are here, which know the same kinds; compilation takes the devices from the mesh itself.
    """
    here = jax.local_devices()[0]
    # A cached property in JAX 0.10; from 0.11 a property over this attribute.
    name = "_cached_device_list" if hasattr(mesh, "_cached_device_list") else "_internal_device_list"
    device_list = type(getattr(mesh, name))
    object.__setattr__(mesh, name, device_list((here,) * mesh.size))


def _require_gpu_compiler() -> None:
    """The plugin holds the compiler, its companion lowers Triton kernels; CUDA 12's do as well as 13's."""
    try:
        require("jax_plugins.xla_cuda12", "aot")
        require("jax_cuda12_plugin", "aot")
    except MissingExtra:
        require("jax_plugins.xla_cuda13", "aot")
        require("jax_cuda13_plugin", "aot")


def _cpu_devices(topology: str) -> list[jax.Device]:
    devices = jax.local_devices(backend="cpu")
    count = int(np.prod([int(n) for n in topology.split("x")]))
    if topology == "1x1x1":
        return devices
    if count > len(devices):
        raise ValueError(
            f"topology: {topology} asks for {count} CPU devices, this process has {len(devices)} "
            "(XLA_FLAGS=--xla_force_host_platform_device_count=N makes more)"
        )
    return devices[:count]


def _host_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(machine, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return machine
