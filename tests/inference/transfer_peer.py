"""A process that offers pages: `python -m tests.inference.transfer_peer SECRET`, and tells its offers on one line.

It lives until its input ends.
"""

import json
import sys

import numpy as np


def pages(name: str):
    """The pages that go by a name, in this process and in the peer."""
    import jax.numpy as jnp

    from jaxlab.inference.paged import KVPages

    rng = np.random.default_rng(len(name))
    dtype = jnp.bfloat16 if "bf16" in name else np.float32
    k, v = rng.standard_normal((2, 2, 1, 3, 4, 8)).astype(dtype)
    return KVPages([5, 6, 7, 8, 9, 10, 11, 12, 13], [14], [-0.5], [{14: -0.5, 3: -2.25}], 17, 12.5, k, v)


def main(secret: str) -> None:
    """Offers the same pages by every backend."""
    from jaxlab.inference.transfer import open_transfer

    ends = {name: open_transfer(name, token=bytes.fromhex(secret)) for name in ("tcp", "jax_transfer")}
    names = ("f32", "a bf16", "dropped", "never fetched")
    offers = {backend: {name: end.send(name, pages(name)) for name in names} for backend, end in ends.items()}
    for end in ends.values():
        end.drop("dropped")
    print(json.dumps(offers), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
