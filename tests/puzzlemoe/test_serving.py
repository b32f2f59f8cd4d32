"""Plans of serving: bytes against arithmetic, and no copies of what a step only reads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import plan
from jaxlab.models.cost import kv_cache_bytes
from jaxlab.models.decoder import DecoderConfig
from jaxlab.puzzlemoe import PackedExperts, estimate_memory, serving
from tests.aot import needs_aot

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
}
EXPERT = 3 * 256 * 1024 * 2
SPEC = {
    "mixtral-8x7b": (93.4, 70.9, 48.3),
    "deepseek-moe-16b": (32.8, 25.3, 17.8),
    "qwen1.5-moe-a2.7b": (28.6, 22.4, 16.2),
    "qwen3-30b-a3b": (61.1, 46.6, 32.1),
}


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", serving.MODELS)
def test_parameters_are_those_of_the_estimate(name):
    """The spec's table in 10^9 bytes, and the tree that is compiled to the byte: 8 more for an expert's address."""
    hf = serving.hf_config(name)
    config = DecoderConfig.from_hf(hf)
    addresses = 8 * config.moe.num_experts * sum(map(config.is_sparse, range(config.num_hidden_layers)))
    assert tuple(round(estimate_memory(hf, ratio).total_bytes / 1e9, 1) for ratio in serving.RATIOS) == SPEC[name]
    for ratio, unmerged in ((0.25, "bf16"), (0.0, "bf16"), (0.5, "packed"))[: 3 if name.startswith("deepseek") else 1]:
        _, (params, cache, *_) = serving._step(serving._model(hf, ratio, unmerged), "decode", 1, 128, 128)
        expected = estimate_memory(hf, ratio).total_bytes + (addresses if ratio else 0)
        assert bytes_of(params) == expected
    assert bytes_of(cache) == kv_cache_bytes(config, 1, 128, "bfloat16")


@needs_aot
@pytest.mark.parametrize("phase", serving.PHASES)
def test_a_step_copies_neither_experts_nor_cache(phase):
    over = plan.target("h100")
    sizes = {"context": 512, "prompt": 128}
    made = serving.serving_plan(TINY, over, ratio=0.25, phase=phase, **sizes, read_kernels=False)
    assert made.bytes["parameters"] == estimate_memory(TINY, 0.25).total_bytes + 4 * 16 * 8
    assert made.bytes["cache"] == 2 * 4 * 512 * 2 * 64 * 2
    # Ids, log-probabilities; the cache that comes out is the one that went in.
    assert made.bytes["outputs"] <= 64
    # A scan that cut its layers out would hold all experts of one; and one row's products transpose no weights.
    assert made.bytes["temporaries"] < (2 * EXPERT if phase == "prefill" else EXPERT // 4)
    assert made.fits
    assert ('name = "packed_gemv"' if phase == "decode" else 'name = "packed_gmm"') in made.hlo


def test_a_layer_of_a_pool_is_that_layer():
    rng = np.random.default_rng(0)

    def words(*shape):
        return jnp.asarray(rng.integers(0, 2**16, shape), jnp.uint16)

    layers, pairs, rest = 3, 2, 2
    weights = jnp.asarray(rng.normal(size=(layers, rest, 4, 4)), jnp.bfloat16)
    dense = {"dense_gate": weights, "dense_up": -weights, "dense_down": 2 * weights}
    slot_of = jnp.asarray([[0, 0, 1, 1, 2, 3], [1, 0, 2, 0, 1, 3], [3, 4, -1, 0, 1, 2]], jnp.int32)
    pos_of = jnp.asarray(rng.integers(0, 2, slot_of.shape), jnp.int32)
    stacked = PackedExperts(
        gate=words(layers, pairs, 4, 4), up=words(layers, pairs, 4, 4), down=words(layers, pairs, 4, 4),
        slot_of=slot_of, pos_of=pos_of, **dense,
    )  # fmt: skip
    cut, joined = stacked.over_layers()
    for layer in range(layers):
        one = joined(jax.tree.map(lambda leaf: leaf[layer], cut))  # noqa: B023
        np.testing.assert_array_equal(one.pos_of, pos_of[layer])
        for expert, slot in enumerate(slot_of[layer].tolist()):
            at = int(one.slot_of[expert])
            if not 0 <= slot < pairs + rest:
                assert at == -1  # nobody's, also among all layers' slots
            elif slot < pairs:
                np.testing.assert_array_equal(one.down[at], stacked.down[layer, slot])
            else:
                np.testing.assert_array_equal(one.dense_up[at - layers * pairs], dense["dense_up"][layer, slot - pairs])


def test_largest_batch_and_longest_context(monkeypatch):
    """From plans of which a row takes its cache and a tenth of it, beside a tenth of the weights."""
    weights = estimate_memory(TINY, 0.5).total_bytes

    def pretended(hf, over, *, batch, context, ratio, phase, **_):
        assert (ratio, phase) == (0.5, "decode")
        cache = kv_cache_bytes(DecoderConfig.from_hf(hf), batch, context, "bfloat16")
        return SimpleNamespace(bytes={"total": int(1.1 * (weights + cache))})

    monkeypatch.setattr(serving, "serving_plan", pretended)
    position = kv_cache_bytes(DecoderConfig.from_hf(TINY), 1, 1, "bfloat16")
    over = SimpleNamespace(memory_bytes=int(2.2 * (weights + 5120.5 * position)), memory_factor=0.5)
    how = {"ratio": 0.5, "phase": "decode"}
    assert serving.largest_batch(TINY, over, context=1024, **how) == 5
    assert serving.longest_context(TINY, over, **how) == 5120
    assert serving.longest_context(TINY, over, batch=3, **how) == 1664
    assert serving.largest_batch(TINY, SimpleNamespace(memory_bytes=weights, memory_factor=0.9), **how) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"phase": "training"}, "phase must be one of decode, prefill"),
        ({"unmerged": "fp8"}, "unmerged"),
        ({"batch": 0}, "at least 1"),
        ({"phase": "prefill", "context": 8, "prompt": 9}, "at most context"),
        ({"ratio": 0.6}, "ratio"),
        ({"ratio": 0.01}, "no pair"),
    ],
)
def test_wrong_settings_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        serving.serving_plan(TINY, plan.target("cpu"), **settings)


def test_wrong_models_are_named():
    with pytest.raises(ValueError, match=r"mixtral-8x7b.*got 'gpt-2'"):
        serving.hf_config("gpt-2")
    dense = {name: value for name, value in TINY.items() if "moe" not in name} | {"model_type": "qwen3"}
    with pytest.raises(ValueError, match="no MoE layers"):
        serving.serving_plan(dense, plan.target("cpu"))


def test_table_says_what_fits():
    sizes = {"parameters": 5 * 2**30, "cache": 2**30, "temporaries": 2**29, "total": 6 * 2**30 + 2**29}
    packed = serving.Fit("m", "h100", 0.5, "decode", 1, 64, sizes, 2**30, 7 * 2**30, 3, 2048, 8192)
    whole = serving.Fit("m", "h100", 0.0, "prefill", 1, 64, sizes, 2**30, 3 * 2**30)
    assert (packed.fits, packed.gpus, whole.fits, whole.gpus) == (True, 1, False, 3)
    limit, _, first, second = serving.table([packed, whole]).splitlines()
    assert limit == "GiB on one h100, of which 7.0 can be used"
    assert first.split()[1:3] == ["50%", "packed"]
    assert first.endswith("6.50  yes; at most 3 rows of 2048, or one of 8192")
    assert second.endswith("no: 3 at least")
