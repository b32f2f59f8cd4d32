"""Measured iterations: of a real engine, at clocks of a GPU and at simulated ones, and tables fitted to them."""

import dataclasses

import numpy as np
import pytest

from jaxlab.voltanallm import LatencyTable, SimulatedGPU
from jaxlab.voltanallm.control_loop import slowdown
from jaxlab.voltanallm.profiling import Samples, profile_decode, profile_prefill


def staircase(seed=0, count=400):
    """Iterations of a known plane, with some noise."""
    generator = np.random.default_rng(seed)
    batch = generator.integers(1, 17, count).astype(float)
    tokens = batch * generator.integers(1, 500, count)
    ms = (5 + 0.5 * np.ceil(batch / 8) * 8 + 0.002 * tokens) * np.exp(0.02 * generator.standard_normal(count))
    return Samples("decode", np.full(count, 1410), batch, tokens, ms)


def test_a_table_predicts_what_it_has_not_seen():
    fitted, held = staircase().split(share=0.5, seed=1)
    assert len(fitted) == len(held) == 200
    assert set(zip(fitted.tokens, fitted.ms)).isdisjoint(zip(held.tokens, held.ms))
    table = fitted.fit(boundaries=(8, 16))
    assert table.segments == ((1, 8), (9, 16))
    assert held.error(table) < 0.04 < held.error(fitted.fit(boundaries=(16,)))
    larger = dataclasses.replace(held, batch=held.batch + 100)
    with pytest.raises(ValueError, match="predicts some"):
        larger.error(table)
    with pytest.raises(ValueError, match=r"share: .* got 1"):
        held.split(share=1.0)


def test_simulated_clocks_stretch_what_the_highest_took():
    samples = staircase(count=10).at_clocks((1005, 1410))
    low, high = samples.ms[:10], samples.ms[10:]
    np.testing.assert_allclose(low / high, slowdown("decode", 1005, 1410))
    assert samples.freq.tolist() == [1005] * 10 + [1410] * 10


def test_samples_are_kept(tmp_path):
    samples = staircase(count=5)
    samples.to_csv(tmp_path / "samples.csv")
    header, *rows = (tmp_path / "samples.csv").read_text().splitlines()
    assert header == "freq,batch,tokens,ms"
    assert [float(cell) for cell in rows[2].split(",")] == [1410, samples.batch[2], samples.tokens[2], samples.ms[2]]


def test_an_engine_is_timed_at_every_batch_and_fill(engine):
    pages = engine.free_pages
    profile_decode(engine, batches=(2, 8), fills=(0.1, 0.8), steps=5)  # compiles
    samples = profile_decode(engine, SimulatedGPU((1005, 1410)), batches=(2, 8), fills=(0.1, 0.8), steps=5)
    assert set(samples.freq) == {1005, 1410}
    assert set(samples.batch) == {2, 8}
    assert (samples.ms > 0).all()
    for size in (2, 8):
        tokens = samples.tokens[(samples.batch == size) & (samples.freq == 1410)]
        assert tokens.max() > 3 * tokens.min()
        assert len(tokens) >= 8
    assert not engine.has_work
    assert engine.free_pages == pages
    table = samples.fit(boundaries=(8,))
    assert isinstance(table, LatencyTable)
    assert table.predict(1005, 4, 100) > 0


def test_answers_that_would_end_are_timed_to_the_last(engine):
    """A trained model ends its answers soon; iterations without requests must not be taken for fast ones."""
    wanted = []
    add = engine.add_request

    def asked(ids, sampling):
        wanted.append(sampling)
        return add(ids, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "add_request", asked)
        profile_decode(engine, batches=(2,), fills=(0.1,), steps=3)
        profile_prefill(engine, lengths=(4,), repeats=1)
    assert wanted
    assert all(sampling.ignore_eos for sampling in wanted)


def test_prompts_are_timed_by_length(engine):
    profile_prefill(engine, lengths=(4, 12), repeats=1)  # compiles
    samples = profile_prefill(engine, lengths=(4, 12), repeats=3)
    assert samples.tokens.tolist() == [4] * 3 + [12] * 3
    assert set(samples.batch) == {1}
    assert samples.freq.tolist() == [1] * 6
    assert not engine.has_work


class RealGPU:
    """A GPU whose clocks are real as far as the profiler can tell: it has no `set_load`."""

    def __init__(self):
        self.told = []

    def supported_clocks(self):
        return (900, 1200)

    def set_clock(self, mhz):
        self.told.append(mhz)

    def reset(self):
        self.told.append("reset")


def test_a_real_gpu_is_measured_at_each_clock_and_handed_back(engine):
    gpu = RealGPU()
    samples = profile_prefill(engine, gpu, lengths=(4,), repeats=2)
    assert gpu.told == [900, 1200, "reset"]
    assert samples.freq.tolist() == [900, 900, 1200, 1200]
    with pytest.raises(ValueError, match="lengths"):
        profile_prefill(engine, gpu, lengths=(10_000,))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"batches": (9,)}, "batches: .* 8"), ({"batches": ()}, "batches"), ({"fills": (1.0,)}, "fills")],
)
def test_what_cannot_be_measured_is_refused(engine, options, told):
    with pytest.raises(ValueError, match=told):
        profile_decode(engine, **options)
