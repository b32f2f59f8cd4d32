"""Lookups against the rules written out, files that come back to the last bit, and tables that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.voltanallm import EnergyTable, LatencyTable
from jaxlab.voltanallm.predictor import Plane
from tests.oracles import voltanallm as oracle
from tests.voltanallm import tables

DECODE = "freq,bs_start,bs_end,coef_bs,coef_tokens,coef_intercept,r_2"
PREFILL = "freq,coef_tokens,coef_intercept,r_2"


def ragged():
    """Clocks whose segments differ; the last one's planes are negative."""
    return LatencyTable(
        "decode",
        [
            Plane(1000, 1e-3, 5.0, 0.5, 1, 8),
            Plane(1000, 1e-3, 9.0, 0.25, 9, 16),
            Plane(1200, 1e-3, 4.0, 0.25, 1, 16),
            Plane(1400, -1.0, 0.0, 0.0, 1, 12),
        ],
    )


def test_a_plane_by_hand():
    table = ragged()
    assert table.freqs == (1000, 1200, 1400)
    assert table.segments == ((1, 8), (9, 12), (13, 16))
    assert table.predict(1000, 4, 1000) == 0.5 * 4 + 1 + 5
    assert type(table.predict(1000, np.int64(4), np.float32(1000))) is float
    assert table.predict(1100, 4, 1000) == pytest.approx((8 + 6) / 2)
    assert table.predict(1400, 4, 1000) == 20.0  # the plane says -1000
    assert table.predict(1000, 0, 1000) == table.predict(1000, -2, 1000) == table.predict(1000, 4, 0) == 0.0
    assert math.isnan(table.predict(1000, 17, 1000))
    assert math.isnan(table.predict(1000, 8.5, 1000))
    assert math.isnan(table.predict(1000, math.nan, 1000))
    assert table.predict(1200, 8.5, 1000) == pytest.approx(0.25 * 8.5 + 5)  # within one segment
    assert table.predict(900, 4, 1000, extrapolate=True) == pytest.approx(8 + 1)
    prefill = tables.prefill_table()
    assert prefill.segments == ()
    assert prefill.predict(1410, 0, 1000) == prefill.predict(1410, 99, 1000) == pytest.approx(68.0)
    assert prefill.predict(1410, 1, 0) == 0.0


STATE = st.tuples(
    st.one_of(st.sampled_from((1000, 1200, 1400)), st.floats(900, 1500)),
    st.one_of(st.integers(-2, 20), st.floats(-2, 20)),
    st.integers(-5, 50_000),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(STATE, min_size=1, max_size=6))
def test_lookups_follow_the_rules_one_by_one_and_together(states):
    table = ragged()
    wanted = [oracle.lookup(tables.as_dict(table), *state, extrapolate=True) for state in states]
    np.testing.assert_allclose([table.predict(*state, extrapolate=True) for state in states], wanted, rtol=1e-12)
    together = table.predict(*(np.array(column) for column in zip(*states)), extrapolate=True)
    np.testing.assert_allclose(together, wanted, rtol=1e-12)


def test_arrays_broadcast_over_blocks():
    table = tables.decode_table()
    clocks, batch = np.array(tables.CLOCKS), np.arange(1, 3000) % 256 + 1
    values = table.predict(clocks[:, None], batch, 5000)
    assert values.shape == (5, 2999)
    assert values.dtype == np.float64
    assert values[2, 700] == table.predict(1200, int(batch[700]), 5000)
    assert values[4, 2998] == table.predict(1410, int(batch[2998]), 5000)
    assert table.predict(np.zeros(0, int), 1, 1).shape == (0,)
    single = LatencyTable("decode", [Plane(1000, 0.0, 5.0, 1.0, 1, 8)])
    np.testing.assert_array_equal(single.predict(np.array([1000, 1100]), 3, 1, extrapolate=True), [8.0, 8.0])


@pytest.mark.parametrize("freq", [999, 1401, math.nan])
def test_a_clock_outside_the_table(freq):
    for given_freq in (freq, np.array([1000, freq])):
        with pytest.raises(ValueError, match="1000 to 1400 MHz, got"):
            ragged().predict(given_freq, 4, 1000)


@pytest.mark.latest
def test_files_come_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    planes = [
        Plane(f, *rng.random(3).tolist(), start, end, -rng.random())
        for f in (1005, 1410)
        for start, end in ((1, 4), (5, 9))
    ]
    for kind in (LatencyTable, EnergyTable):
        table = kind("decode", planes[::-1])
        table.to_csv(tmp_path / "a.csv")
        again = kind.from_csv(tmp_path / "a.csv", "decode")
        assert type(again) is kind
        assert again.planes == table.planes
        again.to_csv(tmp_path / "b.csv")
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == DECODE
    tables.prefill_table().to_csv(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == PREFILL
    assert LatencyTable.from_csv(tmp_path / "p.csv", "prefill").planes == tables.prefill_table().planes


@pytest.mark.parametrize(
    ("phase", "text", "message"),
    [
        ("decode", "freq,bs_start,bs_end,coef_bs,coef_intercept,r_2\n1,1,2,1,1,1", "column coef_tokens"),
        ("decode", f"{PREFILL}\n1005,1,1,1", "column bs_start.*prefill table"),
        ("prefill", f"{DECODE}\n1005,1,4,1,1,1,1", "coef_bs of a decode table"),
        ("decode", f"{DECODE}\n1005,1,4,1,1,1,1\n1005,4,8,1,1,1,1", "bs_start at 1005 MHz: segment 4..8 overlaps 1..4"),
        ("decode", f"{DECODE}\n1005,1,4,1,1,1,1\n1005,6,8,1,1,1,1", "6..8 leaves a gap after 1..4"),
        ("decode", f"{DECODE}\n1005,1,4,1,1,1,1\n1005,5,8,nan,1,1,1", "row 3, column coef_bs"),
        ("decode", f"{DECODE}\n1005,1,4,1,1,,1", "row 2, column coef_intercept"),
        ("decode", f"{DECODE}\n1005,1.5,4,1,1,1,1", "row 2, column bs_start: expected a whole"),
        ("decode", f"{DECODE}\n1005,4,1,1,1,1,1", "bs_start <= bs_end"),
        ("decode", f"{DECODE}\n-5,1,4,1,1,1,1", "column freq"),
        ("decode", DECODE, "at least one row"),
        ("prefill", f"{PREFILL}\n1005,1,1,1\n1005,1,1,1", "1005 MHz twice"),
        ("both", f"{PREFILL}\n1005,1,1,1", "phase: expected one of decode, prefill"),
    ],
)
def test_tables_that_are_refused(tmp_path, unchecked, phase, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        LatencyTable.from_csv(path, phase)


def test_columns_nobody_asked_for_are_left_alone(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f",{PREFILL}\n0,1005.0,0.1,1,1\n")
    assert LatencyTable.from_csv(path, "prefill").planes == (Plane(1005, 0.1, 1.0),)
