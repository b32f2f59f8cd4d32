"""Studies in simulation: ways by name, arrivals, rows; and the compiled plan of the engine's step."""

import dataclasses

import numpy as np
import pytest

from jaxlab import core
from jaxlab.core import plan
from jaxlab.models.decoder import DecoderConfig
from jaxlab.voltanallm import study
from jaxlab.voltanallm.compiled import PlanConfig, compile_phase
from jaxlab.voltanallm.study import SimulationConfig, Way
from tests import aot


@pytest.mark.parametrize(
    ("text", "way", "told"),
    [
        ("1410", Way("static", "rr", 1410), "1410 MHz, rr"),
        ("ecofreq/state_space", Way("ecofreq", "state_space"), "ecofreq, state_space"),
        ("ecofreq/ln/pool", Way("ecofreq", "ln", pooled=True), "ecofreq, ln, one pool"),
        ("1005/pool", Way("static", "rr", 1005, True), "1005 MHz, rr, one pool"),
    ],
)
def test_ways_have_a_short_form(text, way, told):
    assert Way.read(text) == way
    assert str(way) == told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ways": ()}, "ways"),
        ({"ways": ("luck",)}, "ways: .*ecofreq.*luck"),
        ({"ways": ("1234",)}, "static_freq.*1200 MHz and 1305 MHz"),
        ({"seeds": ()}, "seeds"),
        ({"rates": (0.0,)}, "rates"),
        ({"seconds": -1.0}, "seconds"),
    ],
)
def test_what_cannot_be_simulated_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        SimulationConfig(**changes)


def test_low_clocks_save_energy_and_ecofreq_knows_when():
    config = SimulationConfig(rates=(20.0,), seconds=8.0, ways=("1410", "1005", "ecofreq/state_space"), seeds=(0, 1))
    outcomes, _ = study.study(config)
    base, low, eco = outcomes
    assert [len(each.results) for each in outcomes] == [2, 2, 2]
    assert low.saving(base) > 0.2
    assert eco.saving(base) > 0.2
    rows = [dict(zip(study.COLUMNS, row)) for row in study.rows(outcomes)]
    assert [row["saved"] for row in rows] == [0.0, low.saving(base), eco.saving(base)]
    assert all(row["TTFT"] == 1 for row in rows)
    pooled = dataclasses.replace(config, ways=("1410/pool",), seeds=(0,))
    assert len(study.study(pooled)[0][0].results[0].energy_per_gpu_j) == 4


def test_arrivals_come_from_files_and_by_seed(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"{0.1 * row},{10 + row},{1 + row % 3}" for row in range(50)]
    path.write_text("\n".join(["arrived_at_s,num_prefill_tokens,num_decode_tokens", *lines]) + "\n")
    config = SimulationConfig(trace=str(path), rates=(), seconds=2.0)
    trace, made_up = study.arrivals(config, None, 0)
    assert len(trace) == 20
    assert not made_up
    later, _ = study.arrivals(config, None, 3)
    assert later.prompt_tokens[0] > trace.prompt_tokens[0]
    faster, _ = study.arrivals(config, 20.0, 0)
    assert faster.rate == pytest.approx(20, rel=0.1)
    a, b = (study.arrivals(SimulationConfig(seconds=5.0), 10.0, seed)[0] for seed in (0, 1))
    assert not np.array_equal(a.arrival_s, b.arrival_s)
    with pytest.raises(ValueError, match="rates"):
        study.arrivals(SimulationConfig(), None, 0)
    with pytest.raises(ValueError, match=r"trace: .*sharegpt"):
        study.arrivals(SimulationConfig(trace="no_such_file.csv"), 1.0, 0)


TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


@aot.needs_aot
@pytest.mark.parametrize(("phase", "kernel"), [("decode", "paged_attention"), ("prefill", "flash_attention")])
def test_a_step_compiles_for_a_gpu_with_its_kernel(phase, kernel):
    config = PlanConfig(model=TINY, phase=phase, batch=8, context=256, prefill_tokens=128)
    made = compile_phase(config, plan.target("h100"))
    pool = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * config.pages * 16 * TINY.head_dim * 2
    assert made.bytes["cache"] == pool
    assert made.bytes["outputs"] < 2**20  # the pool is updated in place
    assert any(kernel in found.name for found in made.kernels)
    assert made.bytes["temporaries"] < 16 * 2**20


def test_plans_are_checked():
    for changes, told in (({"batch": 0}, "batch"), ({"context": 1024}, "context")):
        with pytest.raises(ValueError, match=told):
            PlanConfig(**{"model": TINY, "context": 256, **changes})
    config = PlanConfig(model=TINY, context=256)
    with pytest.raises(ValueError, match="divides 2 key and value heads, got 4"):
        compile_phase(config, plan.target("h100", "1x1x4", {"tensor": 4}))
    assert core.load_config(PlanConfig, core.find_config("configs/voltanallm/paper.yaml")).batch == 128
