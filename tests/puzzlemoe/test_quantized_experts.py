import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.core import make_mesh
from jaxlab.inference import SamplingParams, generate
from jaxlab.models import load_pretrained
from jaxlab.models.decoder import MoEPolicy, MoESpec
from jaxlab.puzzlemoe import (
    PackedMoE,
    PackedPolicy,
    PuzzleConfig,
    compress_checkpoint,
    compress_experts,
    dual_mask_merge,
    load_hf_moe,
    load_packed,
    pack_pair,
    quantize_experts,
    quantize_moe,
    save_packed,
    unpack_moe,
)
from jaxlab.puzzlemoe.compression import MATRICES, PackedExperts, unpack_experts
from jaxlab.puzzlemoe.whole_model import compress_moe
from tests.models.checkpoints import write
from tests.puzzlemoe.conftest import D, F, K, N
from tests.puzzlemoe.decoders import CONFIG, TOKENS, compressed, logits, same

PAIRS = np.array([[0, 3], [5, 1]])


def one_pair(words):
    return PackedExperts(words[None], words[None], words.T[None], jnp.zeros(2, jnp.int32), jnp.arange(2))


def squared_error(magnitude, used, scale, top):
    """Of a group `[G]` at a scale, over both members, float64."""
    level = np.clip(np.rint(magnitude / scale), 0, top) if scale else 0 * magnitude
    return np.sum(used * (magnitude - level * scale) ** 2)


@pytest.mark.parametrize("bits", [8, 6])
def test_groups_take_the_best_of_sixteen_scales(bits):
    rng = np.random.default_rng(0)
    w_i, w_j = (jnp.asarray(0.02 * rng.normal(size=(64, 32)) * (rng.uniform(size=(64, 32)) > 0.1)) for _ in range(2))
    w_i, w_j = (w.at[:16, 3].set(0) for w in (w_i, w_j))  # a group of nothing but zeros
    packed = one_pair(pack_pair(dual_mask_merge(w_i.astype(jnp.bfloat16), w_j.astype(jnp.bfloat16))))
    quantised = quantize_experts(packed, bits=bits, group_size=16)
    top = 2 ** (bits - 3) - 1
    words, codes = (np.asarray(unpack_experts(one)[0], float) for one in (packed, quantised))
    scales = np.asarray(quantised.scale_gate[0], float)
    step = np.repeat(scales, 16, 0)
    for word, code in zip(words, codes):
        level = np.rint(np.abs(code) / np.where(step > 0, step, 1))
        # Rounded once more: what is decoded is bfloat16.
        error = np.abs(code - word) - np.abs(code) / 256
        assert (error[level < top] <= step[level < top] / 2).all()
        assert (np.abs(word)[level == top] >= step[level == top] * (top - 0.5) * (1 - 2**-8)).all()
        assert (code * word >= 0).all()
        assert (code[word == 0] == 0).all()
    magnitude, used = np.abs(words).max(0), (words != 0).sum(0)
    for group, column in np.ndindex(4, 32):
        at = slice(16 * group, 16 * group + 16), column
        tried = magnitude[at].max() * (1 - np.arange(16) / 32) / top
        errors = [squared_error(magnitude[at], used[at], float(s), top) for s in tried.astype(ml_dtypes.bfloat16)]
        chosen = squared_error(magnitude[at], used[at], scales[group, column], top)
        assert chosen <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize(("bits", "added", "gain"), [(8, 0.0006, 0.96), (6, 0.0091, 0.78)])
def test_error_that_quantising_adds_to_gaussian_pairs(gaussians, bits, added, gain):
    w_i, w_j = (w[:896, :256] for w in gaussians)
    packed = one_pair(pack_pair(dual_mask_merge(w_i, w_j)))
    words = np.asarray(unpack_experts(packed)[0], float)
    quantised = quantize_experts(packed, bits=bits)
    assert quantised.bits == bits
    # A bfloat16 weight of an original expert has 4.0625 or 3.0625 bits.
    stored = quantised.gate.nbytes + quantised.scale_gate.nbytes
    assert 8 * stored / (2 * w_i.size) == bits / 2 + 16 / 128 / 2
    squares = sum(np.sum(np.asarray(w, float) ** 2) for w in (w_i, w_j))
    found = np.sum((np.asarray(unpack_experts(quantised)[0], float) - words) ** 2) / squares
    assert found <= added
    top = 2 ** (bits - 3) - 1
    groups, used = np.abs(words).max(0).reshape(7, 128, 256), (words != 0).sum(0).reshape(7, 128, 256)
    scale = (groups.max(1, keepdims=True) / top).astype(ml_dtypes.bfloat16).astype(float)
    plain = np.sum(used * (groups - np.rint(groups / scale).clip(0, top) * scale) ** 2) / squares
    assert found <= gain * plain


@pytest.mark.latest
@pytest.mark.parametrize(("bits", "unmerged"), [(8, "bf16"), (6, "packed")])
def test_the_layer_is_xmoes_over_decoded_experts(layer, x, bits, unmerged):
    experts = compress_experts(layer.gate, layer.up, layer.down, None, PAIRS, PuzzleConfig(unmerged=unmerged))
    experts = quantize_experts(experts, bits=bits)
    # Groups of gcd(16, 128) and gcd(24, 128) inputs.
    assert (experts.scale_gate.shape[1], experts.scale_down.shape[1]) == (1, 3)
    router = {"router": {"kernel": layer.router}}
    decoded = router | {name: w.astype(jnp.float32) for name, w in zip(MATRICES, unpack_experts(experts))}
    config = dataclasses.replace(CONFIG, moe=MoESpec(N, K, F, renormalise=True))
    expected, _ = jax.jit(MoEPolicy()(config, True).apply)({"params": decoded}, x)
    got = PackedPolicy(2, unmerged)(config, True).apply({"params": {**router, "experts": experts}}, x)
    # Decoded weights are rounded to bfloat16, which the product does not do.
    np.testing.assert_allclose(got, expected, atol=0.01 * float(jnp.abs(expected).max()))


# Six groups of the inner width split in two; three do not, and the width stays whole.
@pytest.mark.parametrize(("bits", "group_size", "groups"), [(8, 4, 6), (6, 128, 3)])
def test_slots_over_four_devices_and_groups_over_two_give_the_same(x, bits, group_size, groups):
    moe = PackedMoE(12, K, num_pairs=4, ffn_size=F, bits=bits, group_size=group_size)
    params = nn.meta.unbox(jax.jit(moe.init)(jax.random.key(0), x)["params"])
    experts = params["experts"]
    assert (experts.bits, experts.gate.shape, experts.scale_down.shape) == (bits, (4, D * bits // 8, F), (4, groups, D))
    expected = moe.apply({"params": params}, x)
    with jax.set_mesh(make_mesh({"expert": 4, "tensor": 2})):
        compiled = jax.jit(lambda params, x: moe.apply({"params": params}, x)).lower(params, x).compile()
        np.testing.assert_allclose(compiled(params, x), expected, rtol=1e-5, atol=1e-6)
    assert "all-reduce" in compiled.as_text()


@pytest.mark.parametrize(("bits", "format"), [(8, "safetensors"), (6, "orbax")])
def test_a_quantised_model_runs_and_is_stored(tmp_path, bits, format):
    words, params, _ = compressed(0.25)
    model, quantised = quantize_moe(words, params, bits=bits)
    assert (model.mlp.bits, model.mlp.group_size) == (bits, 16)
    save_packed(tmp_path / "out", model, quantised, format=format)
    for again, loaded in (load_packed(tmp_path / "out"), load_pretrained(tmp_path / "out")):
        assert again == model
        same(quantised, loaded)
    plain, decoded = unpack_moe(model, quantised)
    if bits == 8:
        ours, theirs = (np.asarray(logits(*one, TOKENS[0])) for one in ((again, loaded), (plain, decoded)))
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
        assert generate(again, loaded, [[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0)).tokens.shape == (
            1,
            4,
        )
    with pytest.raises(ValueError, match=f"quantised already, to {bits} bits"):
        quantize_moe(model, quantised)
    with pytest.raises(ValueError, match="no packed experts to quantise"):
        quantize_moe(plain, decoded)


@pytest.mark.parametrize("bits", [8, 6])
def test_a_folder_streams_to_the_codes_of_memory(tmp_path, bits):
    source = write(tmp_path / "in", "mixtral")
    report = compress_checkpoint(source, tmp_path / "out", PuzzleConfig(ratio=0.25), bits=bits)
    model, params, words = compress_moe(*load_hf_moe(source), None, PuzzleConfig(ratio=0.25))
    model, params = quantize_moe(model, params, bits=bits)
    loaded, streamed = load_packed(tmp_path / "out")
    same(jax.tree.leaves(params), jax.tree.leaves(streamed))
    assert loaded.mlp == model.mlp
    leaves = jax.tree_util.tree_flatten_with_path(streamed)[0]
    stored = sum(leaf.nbytes for path, leaf in leaves if "experts" in str(path) and "_of" not in str(path))
    assert report.expert_bytes_after == stored < words.expert_bytes_after
    assert (report.rel_mse > words.rel_mse).all()
    assert report.mask_density.tolist() == words.mask_density.tolist()


def test_wrong_arguments(layer, unchecked):
    packed = compress_experts(layer.gate, layer.up, layer.down, None, PAIRS, PuzzleConfig())
    for settings, match in (
        ({"bits": 16}, "bits must be 8 or 6, got 16"),
        ({"group_size": 0}, "multiple of 4 inputs, got 0"),
        ({"group_size": 6}, "multiple of 4 inputs, got 2: group_size 6, 16 inputs"),
    ):
        with pytest.raises(ValueError, match=match):
            quantize_experts(packed, **settings)
    good, params = quantize_experts(packed, bits=6), {"router": {"kernel": layer.router}}
    with pytest.raises(ValueError, match=r"down \[S, f, d\]"):
        PackedMoE(N, K).apply({"params": {**params, "experts": good.replace(up=packed.up)}}, jnp.ones((1, 2, D)))
    wrong = good.replace(gate=good.gate.astype(jnp.int32))
    with pytest.raises(TypeError, match="uint8"):
        PackedMoE(N, K).apply({"params": {**params, "experts": wrong}}, jnp.ones((1, 2, D)))
