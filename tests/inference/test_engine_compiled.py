"""The engine's programs compiled for GPUs that are absent: the pool is used in place, heads are spread over a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxlab.core import DEFAULT_RULES, plan
from jaxlab.core.mesh import shardings
from jaxlab.inference import SamplingArrays, programs
from jaxlab.inference.paged import Packing
from jaxlab.models.decoder import Decoder, DecoderConfig
from jaxlab.models.decoder.model import abstract_params
from tests.aot import needs_aot

MODEL = Decoder(
    DecoderConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
)
OPTIONS = {"xla_backend_optimization_level": 0}
POOL = (3, 2, 512, 16, 64)


@needs_aot
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["decode", "read"])
def test_the_pool_is_used_in_place(kind):
    over = plan.target("h100", "1x1x2", {"tensor": 2})
    place = functools.partial(jax.NamedSharding, over.mesh)

    def array(dtype, *shape, spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(jax.P(*spec)))

    ints = functools.partial(array, jnp.int32)
    params = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
        nn.meta.unbox(abstract_params(MODEL)),
        shardings(abstract_params(MODEL), over.mesh, DEFAULT_RULES),
    )
    pool = (array(jnp.bfloat16, *POOL, spec=(None, "tensor")),) * 2
    if kind == "decode":
        sampling = SamplingArrays(array(jnp.float32, 8), ints(8), array(jnp.float32, 8), array(jnp.float32, 8))
        rest = ints(8), ints(8), ints(8, 32), programs.Draws(ints(8), sampling, array(jnp.bool_))
    else:
        rest = (
            ints(1, 64),
            ints(1, 64),
            ints(1, 16),
            Packing(ints(1, 64), ints(1, 64), ints(1, 16), ints(1, 16)),
            ints(1, 4),
        )
    program = getattr(programs, kind)
    made = plan.compile(
        lambda params, pool, *rest: program(MODEL, params, pool, *rest, replicated=place(jax.P())),
        params,
        pool,
        *rest,
        target=over,
        labels=("parameters", "cache", *["input"] * len(rest)),
        donate_argnums=1,
        options=OPTIONS,
        read_kernels=False,
    )
    held = 2 * math.prod(POOL) * 2
    assert made.bytes["cache"] == held // 2  # half the heads on each device
    assert made.bytes["temporaries"] < held // 4
    assert made.bytes["outputs"] < 64 * 1024
    assert ("paged_attention" if kind == "decode" else "flash_attention") in made.hlo
    assert {item.op for item in made.collectives} <= {"all-reduce", "all-gather"}
    assert max(item.bytes for item in made.collectives) < held // 16
