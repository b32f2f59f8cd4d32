"""The study in simulation: its first steps, and its pictures from made-up numbers."""

import pytest

from benchmarks.evidence import voltanallm as study
from jaxlab import core
from jaxlab.voltanallm.sim import pictures


@pytest.fixture(scope="module")
def trace():
    try:
        study._models()
        return study._trace("ShareGPT", 20, 0, seconds=2)
    except core.DataUnavailable as error:
        pytest.skip(str(error))


def test_the_study_begins(trace):
    items = list(study.items())
    assert len({item.name for item in items}) == len(items)
    runs = [study._simulator(way, trace, 0).run() for way in (study.HIGHEST, study.ECO_ROUTE, study.OURS)]
    assert runs[0].energy_j > runs[1].energy_j > runs[2].energy_j
    assert {run.num_done for run in runs} == {40}


def test_pictures(trace):
    curve = [(10, 30.0, 29.0, 31.0, True), (50, 20.0, 19.0, 21.0, False)]
    figure = pictures.savings({"a": curve, "b": curve}, "late", "theirs", {50: 25.0})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b", "late", "theirs"]
    figure = pictures.attainments({"TTFT": {"a": curve}, "ITL": {"a": curve}})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["TTFT", "ITL"]
    figure = pictures.frontier(
        {"a": [(90.0, 30.0), (99.0, 20.0)]}, {"a": (95.0, 25.0, True), "b": (80.0, 10.0, False)}, "late"
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "1  b", "late"]
    result = study._simulator(study.ECO_ROUTE, trace, 0).run(record=True)
    figure = pictures.clocks(trace, result, start=1.0, stop=2.0, tile=64)
    assert [axes.get_ylabel() for axes in figure.axes] == ["arrivals/s", "requests in the batch", "clock, MHz"]
    figure.canvas.draw()
