"""jaxlab: ten published systems as one JAX library.

Import the package you need: `jaxlab.models`, `jaxlab.inference`, `jaxlab.training`, ...
"""

__version__ = "0.1.0.dev0"
