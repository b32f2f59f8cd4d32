import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.inference import SamplingParams, generate
from jaxlab.models.decoder import Decoder, MoESpec
from jaxlab.puzzlemoe import (
    PuzzleConfig,
    collect_expert_stats,
    compress_moe,
    expert_stats,
    random_pairs,
    unpack_moe,
)
from jaxlab.puzzlemoe.baselines import METHODS, apply_method
from jaxlab.puzzlemoe.calibration import layer_inputs
from jaxlab.xmoe import MoEConfig
from jaxlab.xmoe.router import top_k_gating
from tests.puzzlemoe.decoders import CONFIG, TOKENS, compressed, logits, original, same, statistics

N, L, D, F = 8, 2, 16, 24


def test_statistics_are_those_of_each_layers_own_inputs():
    model, params = original()
    stats = statistics()
    assert [leaf.shape for leaf in jax.tree.leaves(stats)] == [(L, N, D), (L, N, F), (L, N), (L, N)]
    np.testing.assert_array_equal(stats.calls, 2)
    assert int(stats.tokens.sum()) == L * 2 * TOKENS.size
    mlp = params["blocks_1"]["mlp"]
    config = MoEConfig(num_experts=N, top_k=2, hidden_size=D, ffn_size=F)
    inputs = [layer_inputs(model, params, tokens) for tokens in TOKENS]
    for layer in range(L):
        expected = None
        for x in inputs:
            ids = top_k_gating(x[layer] @ mlp["router"]["kernel"][layer], config, train=False).expert_ids
            one = expert_stats(x[layer], mlp["gate"][layer], mlp["up"][layer], ids)
            expected = one if expected is None else expected + one
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats.layer(layer), expected)


def test_calibration_refuses(unchecked):
    model, params = original()
    with pytest.raises(ValueError, match="at least one batch"):
        collect_expert_stats(model, params, [])
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\.63, got 64"):
        collect_expert_stats(model, params, [np.full((1, 2), 64)])
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        collect_expert_stats(model, params, [np.zeros(3, np.int32)])
    with pytest.raises(TypeError, match="float"):
        collect_expert_stats(model, params, [np.zeros((1, 3))])
    with pytest.raises(ValueError, match="no MoE layers found"):
        collect_expert_stats(Decoder(dataclasses.replace(CONFIG, moe=None)), params, TOKENS)
    with pytest.raises(ValueError, match="packed already"):
        collect_expert_stats(*compressed()[:2], TOKENS)


@pytest.mark.parametrize(
    ("ratio", "unmerged"),
    [(0.5, "bf16"), pytest.param(0.25, "bf16", marks=pytest.mark.latest), (0.25, "packed")],
)
def test_a_packed_model_computes_what_its_decoded_one_does(ratio, unmerged):
    model, params, report = compressed(ratio, unmerged)
    plain, decoded = unpack_moe(model, params)
    assert plain == original()[0]
    np.testing.assert_allclose(
        logits(model, params, TOKENS[0]), logits(plain, decoded, TOKENS[0]), rtol=1e-5, atol=1e-5
    )
    experts = params["blocks_1"]["mlp"]["experts"]
    assert experts.gate.dtype == jnp.uint16
    expert_bytes = L * 3 * N * D * F * 2
    assert report.expert_bytes_before == expert_bytes
    assert report.expert_bytes_after == (1 - ratio) * expert_bytes
    other = sum(leaf.nbytes for leaf in jax.tree.leaves(original()[1])) - 2 * expert_bytes
    assert (report.bytes_before, report.bytes_after) == (other + expert_bytes, other + (1 - ratio) * expert_bytes)
    for layer in range(L):
        key = jax.random.fold_in(jax.random.key(0), layer)
        np.testing.assert_array_equal(report.pairs[layer], random_pairs(key, N, ratio))
    content = json.loads(json.dumps(report.to_dict()))
    assert np.array(content["mask_density"]).shape == (L, 3)
    assert np.array(content["exponent_coverage"]).shape == (L, 3)


def test_generation_gives_the_same_tokens_as_the_decoded_model():
    model, params, _ = compressed()
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    prompts = [[1, 2, 3], [4, 5]]
    packed = generate(model, params, prompts, sampling)
    same(packed.tokens, generate(*unpack_moe(model, params), prompts, sampling).tokens)
    assert len(np.unique(packed.tokens)) > 2


def test_unmerged_experts_and_everything_else_stay_as_they_are():
    model, params, report = compressed(0.25)
    before, after = original()[1], unpack_moe(model, params)[1]
    for layer in range(L):
        rest = np.setdiff1d(np.arange(N), report.pairs[layer])
        for name in ("gate", "up", "down"):
            kept = before["blocks_1"]["mlp"][name][layer, rest].astype(jnp.bfloat16).astype(jnp.float32)
            np.testing.assert_array_equal(after["blocks_1"]["mlp"][name][layer, rest], kept)
    same(params["blocks_0"], before["blocks_0"])
    same(params["blocks_1"]["mlp"]["shared"], before["blocks_1"]["mlp"]["shared"])


def test_given_and_searched_pairs():
    model, params = original()
    given = np.array([[[0, 1], [2, 3]], [[4, 5], [7, 6]]])
    assert compress_moe(model, params, None, PuzzleConfig(), pairs=given)[2].pairs.tolist() == given.tolist()
    one = compress_moe(model, params, None, PuzzleConfig(), pairs=given[0])[2]
    assert one.pairs.tolist() == [given[0].tolist()] * 2
    searched = [
        compress_moe(model, params, statistics(), PuzzleConfig(ratio=0.25, pairing="search"))[2] for _ in range(2)
    ]
    np.testing.assert_array_equal(searched[0].pairs, searched[1].pairs)


def test_a_starved_expert_is_told_with_its_layer():
    stats = statistics()
    starved = stats.replace(tokens=stats.tokens.at[1, 3].set(0))
    with pytest.warns(UserWarning, match=r"layer 2: experts \[3\] saw fewer than 1") as caught:
        report = compress_moe(*original(), starved, PuzzleConfig())[2]
    assert len(caught) == len(report.warnings) == 1


def test_compression_refuses(unchecked):
    model, params = original()
    stats = statistics()
    with pytest.raises(ValueError, match="packed already"):
        compress_moe(*compressed()[:2], stats, PuzzleConfig())
    with pytest.raises(ValueError, match="no MoE layers found"):
        compress_moe(Decoder(dataclasses.replace(CONFIG, moe=None)), params, None, PuzzleConfig())
    with pytest.raises(ValueError, match="no packed experts"):
        unpack_moe(model, params)
    with pytest.raises(ValueError, match="statistics of another model"):
        compress_moe(model, params, jax.tree.map(lambda leaf: leaf[:1], stats), PuzzleConfig())
    with pytest.raises(ValueError, match="statistics of another model"):
        compress_moe(model, params, stats.replace(sum_sq_in=stats.sum_sq_in[..., :5]), PuzzleConfig())
    with pytest.raises(ValueError, match=r"\[L=2, P, 2\]"):
        compress_moe(model, params, None, PuzzleConfig(), pairs=np.zeros((3, 1, 2), int))
    with pytest.raises(ValueError, match="makes no pair"):
        compress_moe(model, params, None, PuzzleConfig(ratio=0.01))
    with pytest.raises(ValueError, match="two different experts"):
        compress_moe(model, params, None, PuzzleConfig(), pairs=np.array([[1, 1]]))
    mlp = params["blocks_1"]["mlp"]
    broken = {**params, "blocks_1": {**params["blocks_1"], "mlp": {**mlp, "up": mlp["up"].at[1, 2].set(jnp.nan)}}}
    with pytest.raises(ValueError, match=r"layer 2: up.*finite.*\{2: 384\}"):
        compress_moe(model, broken, None, PuzzleConfig())
    two = Decoder(dataclasses.replace(CONFIG, moe=MoESpec(8, 2, 24, activation="silu")))
    with pytest.raises(ValueError, match="gated"):
        compress_moe(two, params, None, PuzzleConfig())


@pytest.mark.parametrize("name", ["average", "naee", "puzzle", "wanda_2_4"])
def test_a_method_on_every_layer(name):
    model, params = apply_method(name, *original(), TOKENS, ratio=0.5, seed=0)
    spec = model.config.moe
    assert spec.num_experts == (4 if name in ("drop", "naee") else N)
    assert np.isfinite(logits(model, params, TOKENS[0])).all()
    if name == "puzzle":
        decoded = unpack_moe(*compressed()[:2])[1]
        same(params, decoded)


def test_methods_refuse(unchecked):
    with pytest.raises(ValueError, match="|".join(METHODS)):
        apply_method("best", *original(), TOKENS, ratio=0.5)
    with pytest.raises(ValueError, match="one shape"):
        apply_method("drop", *original(), [TOKENS[0], TOKENS[1][:1]], ratio=0.5)
    with pytest.raises(ValueError, match="ratio"):
        apply_method("drop", *original(), TOKENS, ratio=0.7)
