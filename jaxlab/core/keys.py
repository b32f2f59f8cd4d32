"""One key per recipe, a named key per purpose."""

import hashlib

import jax
from jax import Array


def named_key(key: Array, name: str) -> Array:
    """Derives the key of one purpose: `fold_in` by a hash of `name` that is the same in every process and version.

    Args:
      key: a typed key, or raw uint32 key data; a scalar key, not an array of keys.
      name: the purpose, for instance "dropout".

    Returns:
      A key of the same form.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {name!r}")
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "little"))
