import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.core import make_mesh
from jaxlab.models.decoder import MoEPolicy, MoESpec
from jaxlab.puzzlemoe import PackedMoE, PackedPolicy, PuzzleConfig, compress_experts
from jaxlab.puzzlemoe.compression import unpack_experts
from tests.puzzlemoe.conftest import D, F, K, N
from tests.puzzlemoe.decoders import CONFIG

PAIRS = np.array([[0, 3], [5, 1]])
# The sigmoid router and the scale of DeepSeek-V3, which need a router function.
SPECIAL = MoESpec(N, K, F, renormalise=True, scoring="sigmoid", scale=2.5, shared_ffn_size=8)


@pytest.fixture(scope="module")
def params(layer):
    return {
        "router": {"kernel": layer.router},
        "experts": compress_experts(layer.gate, layer.up, layer.down, None, PAIRS, PuzzleConfig()),
    }


def decoded(params):
    names = zip(("gate", "up", "down"), unpack_experts(params["experts"]))
    return {name: leaf for name, leaf in params.items() if name != "experts"} | {
        name: w.astype(jnp.float32) for name, w in names
    }


@pytest.mark.latest
@pytest.mark.parametrize(("tokens", "renormalise"), [(20, True), (1, False)])
def test_the_layer_is_xmoes_over_decoded_experts(params, x, tokens, renormalise):
    config = dataclasses.replace(CONFIG, moe=MoESpec(N, K, F, renormalise=renormalise))
    ours, theirs = PackedPolicy(2)(config, True), MoEPolicy()(config, True)
    expected, _ = jax.jit(theirs.apply)({"params": decoded(params)}, x[:, :tokens])
    np.testing.assert_allclose(ours.apply({"params": params}, x[:, :tokens]), expected, rtol=1e-5, atol=1e-5)


def test_fresh_parameters_special_routers_and_shared_experts(x):
    config = dataclasses.replace(CONFIG, moe=SPECIAL)
    for unmerged, slots in (("bf16", 2), ("packed", 4)):
        ours = PackedPolicy(2, unmerged)(config, True)
        fresh = nn.meta.unbox(jax.jit(ours.init)(jax.random.key(0), x)["params"])
        assert fresh["experts"].gate.shape == (slots, D, F)
        expected, _ = jax.jit(MoEPolicy()(config, True).apply)({"params": decoded(fresh)}, x)
        np.testing.assert_allclose(ours.apply({"params": fresh}, x), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens(params, x):
    moe = PackedMoE(N, K)
    assert moe.apply({"params": params}, x[:, :0]).shape == (2, 0, D)
    assert moe.apply({"params": params}, x[:0]).shape == (0, 20, D)


def test_bfloat16_rows_stay_bfloat16(params, x):
    y = PackedMoE(N, K).apply({"params": params}, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = PackedMoE(N, K).apply({"params": params}, x)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("singles", [False, True])
def test_slots_over_four_devices_and_width_over_two_give_the_same(x, singles):
    pairs, total = 4, 12 if singles else 8
    moe = PackedMoE(total, K, num_pairs=pairs, ffn_size=F)
    params = nn.meta.unbox(jax.jit(moe.init)(jax.random.key(0), x)["params"])
    assert (params["experts"].dense_gate is not None) == singles
    expected = moe.apply({"params": params}, x)
    with jax.set_mesh(make_mesh({"expert": 4, "tensor": 2})):
        compiled = jax.jit(lambda params, x: moe.apply({"params": params}, x)).lower(params, x).compile()
        np.testing.assert_allclose(compiled(params, x), expected, rtol=1e-5, atol=1e-6)
    assert "all-reduce" in compiled.as_text()


def test_wrong_layers_are_refused(params, x, unchecked):
    def apply(change, moe=None):
        experts = params["experts"].replace(**change)
        return (moe or PackedMoE(N, K)).apply({"params": {**params, "experts": experts}}, x)

    experts = params["experts"]
    with pytest.raises(ValueError, match="num_experts=5"):
        apply({}, PackedMoE(5, K))
    with pytest.raises(ValueError, match="slot_of must have shape"):
        apply({"slot_of": experts.slot_of[:3]})
    with pytest.raises(ValueError, match=r"slot_of must be in 0\.\.3, got 9 for expert 0"):
        apply({"slot_of": experts.slot_of.at[0].set(9)})
    with pytest.raises(ValueError, match=r"pos_of must be in 0\.\.1"):
        apply({"pos_of": experts.pos_of.at[1].set(2)})
    with pytest.raises(TypeError, match="uint16"):
        apply({"gate": experts.gate.astype(jnp.int32)})
    with pytest.raises(ValueError, match=r"down \[S, f, d\]"):
        apply({"down": experts.down.swapaxes(1, 2)})
    with pytest.raises(ValueError, match="ffn_size must be given"):
        PackedMoE(N, K).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"num_pairs must be in 1\.\.3"):
        PackedMoE(N, K, num_pairs=4, ffn_size=F).init(jax.random.key(0), x)
