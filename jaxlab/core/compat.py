"""What moved between JAX 0.10.2 and 0.12: `pallas_kernels.compat`, under the name that `jaxlab` uses."""

from pallas_kernels.compat import DEFAULT_DEVICE_KIND, compute_on, default_device_for, tracing_for

__all__ = ["DEFAULT_DEVICE_KIND", "compute_on", "default_device_for", "tracing_for"]
