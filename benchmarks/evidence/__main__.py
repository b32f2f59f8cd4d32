"""`python -m benchmarks.evidence` without importing JAX before its platform is chosen."""

from benchmarks import evidence
from jaxlab import _platform

_platform.prefer_cpu_without_gpu()
_platform.quiet_compiler()
evidence.main()
