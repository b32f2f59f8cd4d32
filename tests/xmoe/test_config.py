import dataclasses

import pytest

from jaxlab.xmoe import MoEConfig, Topology

SIZES = {"num_experts": 8, "top_k": 2, "hidden_size": 16, "ffn_size": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k must be in 1..num_experts=8, got 9"),
        ({"top_k": 0}, "top_k must be in 1..num_experts=8, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"ffn_size": 0}, "ffn_size must be at least 1, got 0"),
        ({"capacity_factor": 0}, "capacity_factor must be positive, got 0"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor must be positive, got -1.0"),
        ({"min_capacity": -1}, "min_capacity must be at least 0, got -1"),
        ({"recv_buffer_factor": 0.0}, "recv_buffer_factor must be positive or None, got 0.0"),
        ({"jitter_eps": 1.0}, r"jitter_eps must be in \[0, 1\), got 1.0"),
        ({"activation": "relu"}, "activation must be one of swiglu, silu, gelu, got 'relu'"),
        ({"drop_policy": "random"}, "drop_policy must be one of none, probs, position, got 'random'"),
        ({"combine_weight": "sum"}, "combine_weight must be one of .*, got 'sum'"),
        ({"dispatch": "magic"}, "dispatch must be one of local, pft, rbd, .*, got 'magic'"),
        ({"pilot": "last"}, "pilot must be one of random, first, rail, got 'last'"),
        ({"implementation": "cuda"}, "implementation must be of .*, got 'cuda'"),
        ({"node_size": 0}, "node_size must be at least 1, got 0"),
        ({"shared_gate": True}, "shared_gate needs a shared expert: num_shared_experts is 0"),
        ({"expert_axes": ("a", "a")}, "expert_axes must be distinct"),
        ({"expert_axes": ("a", "b"), "tp_axis": "a"}, "tp_axis must be the last of expert_axes"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**(SIZES | changes))


def test_fields():
    config = MoEConfig(**SIZES, expert_axes=["node", "tensor"], tp_axis="tensor", implementation=["ragged", "triton"])
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.expert_axes == ("node", "tensor")
    assert (config.sequence_axis, config.width_axis) == ("tensor", None)
    assert config.kernel_implementation == ("triton",)
    assert config.exchange_implementation == "ragged"
    assert MoEConfig(**SIZES, expert_axes="expert").expert_axes == ("expert",)
    assert MoEConfig(**SIZES).kernel_implementation is None
    assert MoEConfig(**SIZES).exchange_implementation is None
    sliced = MoEConfig(**SIZES, expert_axes="expert", tp_axis="tensor")
    assert (sliced.sequence_axis, sliced.width_axis) == (None, "tensor")
    assert MoEConfig(**SIZES, num_shared_experts=2).shared_width == 16
    assert MoEConfig(**SIZES, num_shared_experts=2, shared_ffn_size=5).shared_width == 5


def test_topology():
    assert Topology(8, 4).num_nodes == 2
    assert Topology(4, 8).devices_per_node == 4
    assert Topology.of_axes((8,), 2) == Topology(8, 2)
    assert Topology.of_axes((2, 2, 2), 8) == Topology(8, 4)
    with pytest.raises(ValueError, match="got 8 devices in nodes of 3"):
        Topology(8, 3)
