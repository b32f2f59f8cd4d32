"""What moved between JAX 0.10.2 and 0.12: all of `pallas_kernels.compat`, under the name that `jaxlab` uses."""

from pallas_kernels.compat import *  # noqa: F403
