"""The survey of what can be trained: layouts and states by hand, one training step compiled for absent GPUs."""

import dataclasses
import math

import pytest

from jaxlab.xmoe import trainable
from tests.aot import needs_aot

GIB = 2**30


@pytest.mark.parametrize(
    ("size", "label", "layers"), [("small", 10.1, 28), ("medium", 55.2, 28), ("large", 201.4, 28), ("super", 545.4, 61)]
)
def test_sizes_have_the_papers_labels(size, label, layers):
    model = trainable.training_config("pft", size, 8).model
    moe = model.moe
    assert model.num_hidden_layers == layers
    weights = 2 * moe.num_experts * model.hidden_size * moe.ffn_size + 4 * model.hidden_size**2
    assert layers * weights / GIB == pytest.approx(label, abs=0.05)
    # Routers, norms, embeddings and head come on top.
    parts = layers * (weights + model.hidden_size * (moe.num_experts + 2)) + model.hidden_size * (2 * 50304 + 1)
    assert trainable.parameters(size, layers) == parts


@pytest.mark.parametrize(
    ("system", "experts", "devices", "tensor", "mesh", "axes"),
    [
        ("rbd", 256, 1024, 4, {"data": 4, "node": 32, "expert": 2, "tensor": 4}, ("node", "expert", "tensor")),
        ("pft", 256, 1024, 8, {"data": 4, "node": 32, "tensor": 8}, ("node", "tensor")),
        ("padded", 256, 1024, 4, {"node": 128, "expert": 2, "tensor": 4}, ("node", "expert")),
        ("tutel", 64, 1024, 1, {"data": 16, "node": 8, "expert": 8}, ("node", "expert")),
        ("padded", 256, 1024, 8, {"node": 128, "tensor": 8}, ("node",)),
        ("megablocks", 64, 8, 1, {"expert": 8}, ("expert",)),
        ("ted", 64, 8, 8, {"expert": 1, "tensor": 8}, ("expert",)),
    ],
)
def test_experts_go_as_far_as_they_can(system, experts, devices, tensor, mesh, axes):
    assert trainable.layout(system, experts, devices, tensor) == (mesh, axes)
    assert math.prod(mesh.values()) == devices


def test_systems_differ_in_their_policy_alone():
    ours, theirs = (trainable.training_config(name, "large", 256, 2) for name in ("rbd", "padded"))
    assert ours.model == theirs.model
    assert ours.moe.tp_axis == "tensor"
    assert theirs.moe.tp_axis is None
    assert trainable.training_config("ted", "large", 256, 2).moe.tp_axis == "tensor"
    assert {ours.moe.drop_policy, theirs.moe.drop_policy} == {"probs"}
    assert ours.batch_size == theirs.batch_size == 128
    restored = dataclasses.replace(theirs, moe=ours.moe, mesh=ours.mesh)
    assert restored == ours


@needs_aot
def test_states_that_do_not_fit_are_not_compiled():
    found = trainable.outcome("padded", "super", 8)
    assert not found.compiled
    assert not found.fits("h100")
    experts = 2 * 61 * 256 * 7168 * 2560
    assert found.bytes["parameters"] > 4 * experts / 8
    assert found.total > 16 * experts / 8
    assert trainable.most_layers(found) == 0
    assert "no: states" in trainable.line(found, "mi250x", header=True)
    assert trainable.verdict([found], "mi250x") == "DeepSpeed-MoE on 8 mi250x: none"


@needs_aot
def test_a_step_compiles_and_is_what_was_estimated():
    found = trainable.outcome("pft", "small", 8, 2, layers=2)
    assert found.compiled
    assert found.fits("mi250x")
    assert found.fits("h100")
    assert found.expert_parallel == 8
    assert found.bytes["optimizer"] < found.total < 2 * trainable.estimate("pft", "small", 8, 2, layers=2)
    # Experts over all 8 devices, attention and embeddings over the 2 of a tensor axis; routers and norms everywhere.
    experts, attention, embeddings = 2 * 2 * 64 * 2048 * 1408, 2 * 4 * 2048**2, 2 * 50304 * 2048
    whole = 2048 * (2 * (64 + 2) + 1)
    assert found.bytes["parameters"] == 4 * (experts // 8 + attention // 2 + embeddings // 2 + whole)


def test_unknown_names_and_numbers_are_named():
    with pytest.raises(ValueError, match="size must be one of small, medium, large, super, got 'huge'"):
        trainable.training_config("pft", "huge", 8)
    with pytest.raises(ValueError, match="system must be one of rbd, pft"):
        trainable.training_config("gshard", "small", 8)
    with pytest.raises(ValueError, match=r"tensor must be one of \(1, 2, 4, 8\) and divide the 8 devices, got 3"):
        trainable.layout("pft", 64, 8, 3)
    with pytest.raises(ValueError, match="at most 8 or a multiple of it, got 12"):
        trainable.layout("pft", 64, 12, 1)
    with pytest.raises(ValueError, match="gpu: got 'tpu'"):
        trainable.usable("tpu")
