"""What trains what: a machine and a model as the few numbers that plans and schedules need."""

import dataclasses
from collections.abc import Mapping

from jaxlab.core.plan import GPUS


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Machine:
    """One accelerator and the part of a host that belongs to it.

    Attributes:
        name: of the preset, or any.
        hbm_bytes: device memory.
        host_bytes: host memory.
        gpu_flops: dense bfloat16 FLOP/s.
        link_bw: bytes/s between the two memories, each way.
        hbm_bw: bytes/s of device memory.
        dram_bw: bytes/s of host memory.
        host_flops: float32 FLOP/s of all cores.
        cores: of the host.

    Raises:
        ValueError: a number that is not positive.
    """

    name: str
    hbm_bytes: int
    host_bytes: int
    gpu_flops: float
    link_bw: float
    hbm_bw: float
    dram_bw: float
    host_flops: float
    cores: int

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            _positive(field.name, getattr(self, field.name))


# Grace: 72 cores, 480 GB of LPDDR5X at 500 GB/s, about 3 TFLOP/s; NVLink-C2C 450 GB/s each way (paper). PCIe 4 x16:
# 32 GB/s each way (paper's comparison). The rest is from data sheets; shares of a chip are an equal part of it.
_MACHINES: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("gh200", GPUS["gh200"].memory_bytes, 480 * 10**9, 990e12, 450e9, 4e12, 500e9, 3e12, 72),
        # Two GPUs share one Grace and its C2C link.
        Machine("gb200", GPUS["b200"].memory_bytes, 240 * 10**9, 2500e12, 225e9, 8e12, 250e9, 1.5e12, 36),
        # One GPU beside one 56-core Xeon with eight channels of DDR5-4800.
        Machine("h100_pcie", GPUS["h100"].memory_bytes, 512 * 10**9, 756e12, 32e9, 2e12, 307e9, 7e12, 56),
        # One memory of 128 GB, here half "device", half "host"; a copy within it reads and writes.
        Machine("mi300a", 64 * 10**9, 64 * 10**9, 980e12, 2.65e12, 5.3e12, 5.3e12, 2.8e12, 24),
        # Two cores that play both parts (ours, for runs without an accelerator).
        Machine("cpu2", 8 * 10**9, 16 * 10**9, 2e11, 1e10, 4e10, 4e10, 1e11, 2),
    )
}  # fmt: skip


def get_machine(name: str) -> Machine:
    """A preset: "gh200", "gb200", "h100_pcie", "mi300a" or "cpu2", per accelerator.

    Raises:
        ValueError: no such preset.
    """
    if name not in _MACHINES:
        raise ValueError(f"machine: got {name!r}, expected one of {', '.join(_MACHINES)}")
    return _MACHINES[name]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A GPT decoder (hidden -> 4 hidden MLP, tied embedding, no learned positions) and the batch of one step.

    Attributes:
        layers: L.
        hidden: h.
        batch: sequences of a step, over all devices.
        seq: tokens of a sequence.
        vocab: V.

    Raises:
        ValueError: a size below 1.
    """

    layers: int
    hidden: int
    batch: int
    seq: int
    vocab: int = 50257

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _positive(field.name, getattr(self, field.name))

    @property
    def layer_params(self) -> int:
        """Parameters of one layer: twelve square matrices' worth, biases and two norms."""
        return 12 * self.hidden**2 + 13 * self.hidden

    @property
    def n_params(self) -> int:
        """All parameters: layers, embedding, last norm."""
        return self.layers * self.layer_params + self.vocab * self.hidden + 2 * self.hidden

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq

    @property
    def forward_flops(self) -> float:
        """Of one pass over a step's tokens: two a parameter and token, and causal attention."""
        attention = 2 * self.layers * self.hidden * self.seq**2 * self.batch
        return 2.0 * self.n_params * self.tokens + attention

    @property
    def train_flops(self) -> float:
        """Model FLOPs of a step: three forward passes; recomputation does not count."""
        return 3 * self.forward_flops
