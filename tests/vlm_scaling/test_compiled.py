"""Sampling compiled and never run: bytes against arithmetic, what fits, and the published model's plan and evidence."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest
from flax import linen as nn

from jaxlab import core
from jaxlab.core import plan
from jaxlab.models.cost import kv_cache_bytes, parameter_count
from jaxlab.models.qwen2_5_vl import abstract_params
from jaxlab.vlm_scaling import compiled
from jaxlab.vlm_scaling.compiled import PlanConfig, cache_bytes, compile_phase, image_grid, model_of, prompt_tokens
from tests.aot import needs_aot
from tests.models.checkpoints import vlm_golden

OPTIONS = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    (folder / "config.json").write_text(json.dumps(vlm_golden()["config"]))
    sizes = {"image_height": 60, "image_width": 80, "text_tokens": 10, "max_new_tokens": 64}
    return PlanConfig(model=str(folder), questions=2, n=4, **sizes)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def row_bytes(config, length):
    return kv_cache_bytes(model_of(config.model).config.text, 1, length, "bfloat16")


def test_caches_are_prompt_and_samples(tiny):
    assert image_grid(tiny) == (1, 4, 6)
    assert prompt_tokens(tiny) == 6 + 10
    expected = 2 * (row_bytes(tiny, 16) + 4 * row_bytes(tiny, 64))
    assert expected < cache_bytes(tiny) <= expected + 2 * 4  # and how long two prompts are
    apart = dataclasses.replace(tiny, shared=False)
    assert cache_bytes(apart) == 2 * 4 * row_bytes(tiny, 16 + 64)


@needs_aot
def test_a_compiled_program_holds_them_once(tiny):
    over = plan.target("h100")
    weights = bytes_of(nn.meta.unbox(abstract_params(model_of(tiny.model))))
    decode, prompt = (
        compile_phase(dataclasses.replace(tiny, phase=phase), over, options=OPTIONS, read_kernels=False)
        for phase in compiled.PHASES
    )
    assert decode.bytes["cache"] == pytest.approx(2 * (row_bytes(tiny, 16) + 4 * row_bytes(tiny, 64)), rel=0.1)
    assert prompt.bytes["cache"] == row_bytes(tiny, 16)
    for made in (decode, prompt):
        assert made.bytes["parameters"] == weights
        assert made.bytes["outputs"] < 1024  # ids or logits; the cache that comes out is the one that went in
        assert made.fits
    assert "shared_prefix_attention_suffix" in decode.hlo
    assert "varlen_attention" in prompt.hlo


def test_the_most_that_fits_is_found(tiny, monkeypatch, unchecked):
    """Of programs that take half their cache again."""
    weights, asked = bytes_of(nn.meta.unbox(abstract_params(model_of(tiny.model)))), []

    def pretended(config, over, *, options, read_kernels):
        assert (config.phase, options, read_kernels) == ("decode", OPTIONS, False)
        asked.append((config.questions, config.n))
        return SimpleNamespace(bytes={"total": weights + int(1.5 * cache_bytes(config))})

    def most(over, name, **changes):
        asked.clear()
        return compiled.most(dataclasses.replace(tiny, **changes), over, name, options=OPTIONS)

    monkeypatch.setattr(compiled, "compile_phase", pretended)
    taken = weights + int(1.5 * cache_bytes(dataclasses.replace(tiny, n=9)))
    room = SimpleNamespace(memory_bytes=2 * taken + 100, memory_factor=0.5)
    assert most(room, "n", phase="prompt") == (9, taken)
    assert {(2, 9), (2, 10)} <= set(asked)
    assert len(asked) < 8
    count, taken = most(room, "questions")
    assert taken == weights + int(1.5 * cache_bytes(dataclasses.replace(tiny, questions=count)))
    assert {(count, 4), (count + 1, 4)} <= set(asked)
    assert most(SimpleNamespace(memory_bytes=weights, memory_factor=1.0), "n") == (0, 0)
    assert asked == []


def test_bad_plans(tiny, tmp_path):
    for name in ("questions", "n", "text_tokens", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            PlanConfig(**{name: 0})
    with pytest.raises(ValueError, match="image_height: expected at least 1, got -1"):
        PlanConfig(image_height=-1)
    with pytest.raises(ValueError, match="target: expected one device, got 2"):
        compile_phase(tiny, plan.target("cpu", "1x1x2"))
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        prompt_tokens(PlanConfig(model="absent.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected 'qwen2_5_vl', got 'llama'"):
        prompt_tokens(PlanConfig(model=str(tmp_path)))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_phase():
    with pytest.raises(ValueError, match="phase: expected one of decode, prompt, got 'train'"):
        PlanConfig(phase="train")


def test_the_published_model_and_its_evidence():
    from benchmarks.evidence import vlm_scaling_plans as evidence

    config = core.load_config(PlanConfig, core.find_config("configs/vlm_scaling/paper.yaml"))
    text = model_of(config.model).config.text
    assert parameter_count(text).total == 7_615_616_512  # Qwen2.5-7B's
    assert prompt_tokens(config) == 35 * 35 + 100
    items = list(evidence.items())
    assert len({item.name for item in items}) == len(items) == len(evidence.SAMPLES) + 3 + 4
    for item in items:
        assert json.loads(json.dumps(item.settings))["sizes"]["max_new_tokens"] == 1024
    rows = [item.run() for item in items[: len(evidence.SAMPLES)]]
    for row in rows:
        assert row["shared"] == pytest.approx(row["prompt + samples x new tokens"], rel=1e-3)
        assert row["times less"] == pytest.approx(row["a copy a sample"] / row["shared"])
    assert [row["times less"] > 2 for row in rows] == [False, False, True, True, True]
    assert rows[0]["times less"] == pytest.approx(1.0, abs=1e-3)
