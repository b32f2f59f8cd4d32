import dataclasses
import json
import math

import numpy as np
import pytest

from jaxlab.core import MissingExtra
from jaxlab.instantedit import metrics as metrics_module
from jaxlab.instantedit.evaluation import EditCase, case_of, evaluate
from jaxlab.instantedit.grid import picture_grid
from jaxlab.instantedit.metrics import MetricSet
from jaxlab.instantedit.pie_bench import PieEdit


@pytest.fixture
def judges(monkeypatch):
    """Without weights: pixels only."""

    def absent(net, path):
        raise MissingExtra("no weights")

    monkeypatch.setattr(metrics_module, "load_lpips", absent)
    return MetricSet()


def _cases(number=4):
    rng = np.random.default_rng(0)
    mask = np.zeros((12, 12), bool)
    mask[3:6, 3:6] = True
    return [
        EditCase(
            f"case{index}",
            rng.integers(0, 256, (12, 12, 3), np.uint8),
            "a cat",
            "a dog | cow",
            mask=mask if index % 2 else None,
            target=rng.integers(0, 256, (12, 12, 3), np.uint8),
            kind="odd" if index % 2 else "even",
        )
        for index in range(number)
    ]


def _noisy(case, seed):
    noise = np.random.default_rng(seed).integers(-9, 10, case.source_image().shape)
    return np.clip(case.source_image() + noise, 0, 255).astype(np.uint8)


def _never(case, seed):
    raise AssertionError("edited again")


class _Made:
    """What a pipeline returns."""

    def __init__(self, image):
        self.image = image


EDITORS = {"copy": lambda case, seed: case.source_image(), "noisy": lambda case, seed: _Made(_noisy(case, seed))}


def test_rows_means_and_tables(judges):
    cases = _cases()
    found = evaluate(cases, EDITORS, metrics=judges, seeds=(0, 1))
    assert len(found.rows) == 4 * 2 * 2
    assert found.editors == ("copy", "noisy")
    assert found.kinds == ("even", "odd")
    row = next(row for row in found.rows if (row.editor, row.case, row.seed) == ("noisy", "case1", 1))
    unit = [image.astype(np.float32) / 255 for image in (_noisy(cases[1], 1), cases[1].source, cases[1].target)]
    assert row.values["mse"] == pytest.approx(metrics_module.mse(unit[0], unit[1]), rel=1e-5)
    assert row.values["ssim_background"] == pytest.approx(
        metrics_module.ssim(unit[0], unit[1], mask=~cases[1].mask), rel=1e-4
    )
    assert row.values["psnr_to_target"] == pytest.approx(metrics_module.psnr(unit[0], unit[2]), rel=1e-5)
    mean = found.mean("noisy", "mse")
    values = [row.values["mse"] for row in found.rows if row.editor == "noisy"]
    assert mean.mean == pytest.approx(np.mean(values))
    assert mean.results == 8
    assert mean.interval.low < mean.mean < mean.interval.high
    assert found.mean("noisy", "mse_edit").results == 4  # cases with a mask alone
    infinite = found.mean("copy", "psnr")
    assert (infinite.mean, infinite.interval, infinite.results, infinite.infinite) == (math.inf, None, 0, 8)
    assert found.mean("noisy", "mse", kind="odd").results == 4
    assert found.mean("noisy", "mse", kind="absent") is None
    difference = found.difference("noisy", "copy", "mse")
    assert difference.mean == pytest.approx(mean.mean)
    with pytest.raises(ValueError, match="editor: expected one of copy, noisy, got 'ours'"):
        found.mean("ours", "mse")
    [(title, columns, rows), by_kind] = found.tables(["mse"], n_resamples=100)
    assert title == "All edits"
    assert columns == ["editor", "MSE x1e4 ↓", "seconds, median"]
    assert rows[0][1] == "0.00 [0.00, 0.00]"
    assert by_kind[1] == ["kind", "copy", "noisy"]
    assert [row[0] for row in by_kind[2]] == ["even", "odd"]
    text = found.markdown(n_resamples=100)
    assert "| copy | inf |" in text
    assert "PSNR (dB): 8 results of equal images are infinite and left out." in text
    assert "LPIPS x1e3: not available (no weights)." in text


def test_what_was_measured_is_kept(judges, tmp_path):
    cases, path = _cases(), tmp_path / "work" / "edits.jsonl"
    made = []

    def counting(case, seed):
        made.append(case.id)
        if len(made) == 3:
            raise KeyboardInterrupt
        return _noisy(case, seed)

    with pytest.raises(KeyboardInterrupt):
        evaluate(cases, {"noisy": counting}, metrics=judges, results=path)
    with path.open("a") as file:
        file.write('{"editor": "noisy", "cas')  # torn
    found = evaluate(cases, {"copy": EDITORS["copy"], "noisy": counting}, metrics=judges, results=path)
    assert made == ["case0", "case1", "case2", "case2", "case3"]
    again = evaluate(cases, dict.fromkeys(EDITORS, _never), metrics=judges, results=path)
    assert again == found
    assert math.isinf(again.rows[0].values["psnr"])
    changed = [dataclasses.replace(cases[0], target_prompt="a cow"), *cases[1:]]
    with pytest.raises(ValueError, match="results of another case of id 'case0'"):
        evaluate(changed, {"noisy": counting}, metrics=judges, results=path)
    judges.description = "LPIPS vgg"
    with pytest.raises(ValueError, match=r"is not of format jaxlab.edits/1 with LPIPS vgg"):
        evaluate(cases, {"noisy": counting}, metrics=judges, results=path)


def test_pictures(judges, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    cases = _cases(2)
    half = lambda case, seed: case.source_image().astype(np.float32) / 510  # noqa: E731
    evaluate(cases, {"half light": half}, metrics=judges, seeds=(7,), pictures=tmp_path)
    kept = np.asarray(pillow.open(tmp_path / "half light" / "case1-7.png"))
    np.testing.assert_allclose(kept, cases[1].source / 2, atol=0.51)


@pytest.mark.parametrize(
    ("cases", "editors", "seeds", "said"),
    [
        ([], EDITORS, (0,), "cases: expected at least one"),
        (_cases(1) * 2, EDITORS, (0,), "cases: expected different ones, got 'case0' twice"),
        (_cases(1), {}, (0,), "editors: expected at least one"),
        (_cases(1), {"../up": _noisy}, (0,), r"editors: expected letters.*got '\.\./up'"),
        (_cases(1), EDITORS, (1, 1), "seeds: expected different ones"),
        (_cases(1), {"cut": lambda case, seed: case.source_image()[1:]}, (0,), "editor 'cut': expected an image of"),
    ],
)  # fmt: skip
def test_bad_evaluations(judges, cases, editors, seeds, said):
    with pytest.raises(ValueError, match=said):
        evaluate(cases, editors, metrics=judges, seeds=seeds)


def test_one_case_has_no_interval(judges):
    found = evaluate(_cases(1), {"noisy": _noisy}, metrics=judges)
    assert found.mean("noisy", "mse").interval is None
    assert "[" not in found.tables(["mse"])[0][2][0][1]


def test_a_case_of_the_benchmark(tmp_path):
    edit = PieEdit("5", tmp_path / "absent.jpg", "a", "b", 6, "make it red", ("car", "truck"), (513, 2))
    case = case_of(edit)
    assert (case.blend_word, case.kind) == ("truck", "6 change color")
    assert case.edit_mask()[1, 1]
    assert case.target_image() is None


def test_grid():
    cases = _cases(2)
    drawn = picture_grid(cases, {"ours": [case.source_image() for case in cases]})
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles[:4] == ["", "source", "ours", "target"]
    assert len(drawn.axes) == 8
    assert "a dog | cow" in drawn.axes[0].texts[0].get_text().replace("\n", " ")
    untold = [dataclasses.replace(case, target=None) for case in cases]
    assert len(picture_grid(untold, {}).axes) == 4
    with pytest.raises(ValueError, match="edited: expected 2 images of 'ours', got 1"):
        picture_grid(cases, {"ours": [cases[0].source_image()]})
    with pytest.raises(ValueError, match="cases: expected at least one"):
        picture_grid([], {})
    assert json.dumps(titles)
