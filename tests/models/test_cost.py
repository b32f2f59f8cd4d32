import jax
import jax.numpy as jnp
import pytest

from jaxlab.models import cost
from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, abstract_params

DENSE = DecoderConfig(512, 128, 256, 2, 4, 2, scan=False, qkv_bias=True, qk_norm="head")
SPARSE = DecoderConfig(
    97, 32, 48, 3, 4, 2, tie_word_embeddings=True, qk_norm="full",
    moe=MoESpec(8, 2, 16, shared_ffn_size=24, shared_gate=True, sparse_layers=(1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_parameter_count_is_that_of_the_tree(config):
    tree = abstract_params(Decoder(config))
    assert cost.parameter_count(config).total == sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_active_parameters_leave_out_the_experts_not_visited():
    count = cost.parameter_count(SPARSE)
    assert count.total - count.active == 2 * (8 - 2) * 3 * 32 * 16
    assert count.embedding == 97 * 32


@pytest.mark.latest
def test_forward_flops_are_those_of_the_traced_program():
    length = 64
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    model = Decoder(DENSE)
    params = abstract_params(model)
    lowered = jax.jit(lambda p, t: model.apply({"params": p}, t).logits).lower(params, tokens)
    traced = lowered.cost_analysis()["flops"]
    # The program masks keys it need not see, and adds norms, rotations and softmax to the products.
    masked = cost.forward_flops(DENSE, length, causal=False).total
    assert masked <= traced <= 1.05 * masked


def test_causal_attention_counts_the_keys_that_are_seen():
    every, causal = (cost.forward_flops(DENSE, 100, causal=value).attention for value in (False, True))
    assert every == 2 * 2 * 2 * 128 * 100 * 100
    assert causal / every == pytest.approx(101 / 200)
    windowed = DecoderConfig(512, 128, 256, 2, 4, 2, windows=(10, None))
    seen = sum(min(i + 1, 10) for i in range(100)) + sum(i + 1 for i in range(100))
    assert cost.forward_flops(windowed, 100).attention == 2 * 2 * 128 * seen


def test_prefill_and_decode_add_up():
    for config in (DENSE, SPARSE):
        whole = cost.forward_flops(config, 20).total
        steps = sum(cost.forward_flops(config, p + 1, start=p).total for p in range(12, 20))
        assert cost.forward_flops(config, 12).total + steps == pytest.approx(whole)
        assert cost.flops_per_token(config, 20, training=True) == pytest.approx(3 * whole / 20)


def test_cache_bytes_and_mfu():
    assert cost.kv_cache_bytes(DENSE, 3, 50, "bfloat16") == 2 * 2 * 3 * 50 * 2 * 32 * 2
    per_token = cost.flops_per_token(DENSE, 128, training=True)
    assert cost.mfu(DENSE, 1e12 / per_token, 128, peak_flops=1e12, devices=4) == pytest.approx(0.25)


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (-1, 2), (0, 0)])
def test_an_empty_range_is_refused(start, stop):
    with pytest.raises(ValueError, match="expected 0 <= start < stop"):
        cost.forward_flops(DENSE, stop, start=start)
