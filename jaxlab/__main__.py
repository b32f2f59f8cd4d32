"""`python -m jaxlab` is the `jaxlab` command."""

from jaxlab.cli import main

main()
