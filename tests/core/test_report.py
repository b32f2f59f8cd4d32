import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxlab.core import Report


def _report():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return Report(
        system="foundation",
        title="A run",
        metrics={"loss": 1.5, "steps": 3, "best": math.inf, "device": "cpu", "jax": jnp.float32(0.25)},
        tables=[("Table", ["name", "value", "ok"], [["a", np.float32(0.5), True], ["b", None, np.bool_(False)]])],
        plots=[("Loss", figure), ("Ready", b"\x89PNG ready")],
        notes=["measured on 2 cores"],
        synthetic=True,
    )


def test_saved_is_read_back(tmp_path):
    path = _report().save(tmp_path / "out")
    assert path == tmp_path / "out" / "report.json"
    text = path.read_text()
    content = json.loads(text, parse_constant=pytest.fail)  # strict JSON: browsers read it
    assert content["plots"] == [{"title": "Loss", "file": "plot_00.png"}, {"title": "Ready", "file": "plot_01.png"}]
    loaded = Report.load(tmp_path / "out")
    assert loaded.metrics == {"loss": 1.5, "steps": 3, "best": math.inf, "device": "cpu", "jax": 0.25}
    assert loaded.tables == (("Table", ("name", "value", "ok"), (("a", 0.5, True), ("b", None, False))),)
    assert loaded.plots[0][1].startswith(b"\x89PNG\r\n")
    assert loaded.plots[1] == ("Ready", b"\x89PNG ready")
    assert (loaded.system, loaded.title, loaded.notes, loaded.synthetic) == (
        "foundation", "A run", ("measured on 2 cores",), True)  # fmt: skip
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "report.json").read_text() == text


def test_a_failed_save_leaves_the_old_report(tmp_path):
    _report().save(tmp_path)
    with pytest.raises(TypeError, match="matplotlib Figure or PNG bytes, got str"):
        Report("x", "y", {}, plots=[("bad", "text")]).save(tmp_path)
    with pytest.raises(TypeError, match="numbers, text"):
        Report("x", "y", {"a": np.zeros(3)}).save(tmp_path)
    assert Report.load(tmp_path).title == "A run"


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="rows of 2 cells, got 1"):
        Report("x", "y", {}, tables=[("T", ["a", "b"], [[1]])])
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path)
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report\.json"):
            Report.load(tmp_path)
