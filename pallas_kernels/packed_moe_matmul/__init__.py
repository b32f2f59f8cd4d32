"""Rows times the experts of bit-packed pairs (PuzzleMoE, arXiv 2511.04805): weights are decoded as they are multiplied.

Two experts live in one `uint16` word a position: sign and mask bits of both, one shared magnitude. Or in 8 or 6 bits:
three for signs and masks, a level of the magnitude, and a scale that a group of inputs shares.

>>> import jax.numpy as jnp
>>> from pallas_kernels.packed_moe_matmul import packed_moe_matmul, unpack
>>> words = jnp.full((1, 2, 1), 0x2700, jnp.uint16)  # 0.5 for the first member, and masked for the second
>>> [float(unpack(words, pos)[0, 0, 0]) for pos in (0, 1)]
[0.5, 0.0]
>>> slot_of, pos_of = jnp.array([0, 0]), jnp.array([0, 1])
>>> [float(row[0]) for row in packed_moe_matmul(jnp.ones((3, 2)), words, jnp.array([1, 1]), slot_of, pos_of)]
[1.0, 0.0, 0.0]
>>> levels = jnp.full((1, 4, 1), 31)  # of 31 in a byte; both members, the second one negative
>>> codes = pack_codes(levels // 31, -levels // 31, levels, bits=8, group_size=4)
>>> [float(unpack_codes(codes, jnp.full((1, 1, 1), 0.5), pos, bits=8)[0, 0, 0]) for pos in (0, 1)]
[15.5, -15.5]
"""

from pallas_kernels.packed_moe_matmul.api import packed_moe_matmul
from pallas_kernels.packed_moe_matmul.bits import unpack
from pallas_kernels.packed_moe_matmul.codes import pack_codes, unpack_codes

__all__ = ["pack_codes", "packed_moe_matmul", "unpack", "unpack_codes"]
