"""The kernels as docs/kernels.md shows them: inputs for this CPU and for GPUs, oracles, peers."""

from benchmarks.kernel_ops import adam, attention, editing, experts, fusions, logprobs, packed, splats, triangle
from benchmarks.kernel_ops.op import Op

__all__ = ["OPS", "Op"]

OPS = (
    *experts.OPS, *attention.OPS, *editing.OPS, *triangle.OPS, *packed.OPS, *adam.OPS, *logprobs.OPS, *fusions.OPS,
    *splats.OPS,
)  # fmt: skip
