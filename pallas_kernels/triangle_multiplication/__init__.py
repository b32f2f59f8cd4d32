"""Triangle multiplication of a pair representation (AlphaFold), with memory of a few channel-major arrays."""

from pallas_kernels.triangle_multiplication.api import triangle_multiplication

__all__ = ["triangle_multiplication"]
