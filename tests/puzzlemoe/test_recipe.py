"""The recipe at toy size: trained, compressed, saved, opened by path."""

import dataclasses
import math

import pytest

from jaxlab import core, tour
from jaxlab.core import plan as planning
from jaxlab.puzzlemoe.recipe import ServingConfig, StudyConfig, plan, run, training_config

TRAINING = (
    "model.hidden_size=64",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.moe={num_experts: 4, top_k: 2, ffn_size: 64, renormalise: true}",
    "steps=3",
    "batch_size=4",
    "length=16",
    "eval_batches=2",
)
CODE = '''
def number_{0}(stream, encoding):
    """The {0}th of the functions that are held out, or not."""
    for line in stream:
        header = decode(line, encoding)
        if header is None:
            return stream
        while header and encoding:
            stream, header = advance(stream, header)
    with stream as handle:
        return number_{0}(handle, encoding)
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzlemoe")
    text = folder / "text"
    text.mkdir()
    for index in range(30):
        (text / f"{index}.py").write_text(CODE.format(index))
    return StudyConfig(
        changes=(*TRAINING, f"data={text}"),
        length=16,
        methods=("wanda_2_4",),
        taus=(0.0, 0.4),
        calibration=8,
        batches=1,
        questions=4,
        tokens=8,
        folder=str(folder / "work"),
    )


def _table(report, start):
    return next(rows for title, _, rows in report.tables if title.startswith(start))


def test_trains_compresses_and_runs_from_words(config, tmp_path):
    report = run(config)
    assert report.system == "puzzlemoe"
    assert report.metrics["same_tokens_as_decoded"]
    losses = {(method, share): loss for method, share, loss, _ in _table(report, "Cross-entropy")}
    assert len(losses) == 3  # 2:4 prunes half, whatever the ratio
    assert losses["PuzzleMoE", "50%"] == report.metrics["loss_packed"]
    assert all(abs(loss - report.metrics["loss_full"]) < 0.1 for loss in losses.values())
    assert report.metrics["loss_full"] == pytest.approx(math.log(258), abs=0.5)  # hardly trained
    for (share, before, stored, part, loaded), bar in zip(_table(report, "Packed folders"), (0.505, 0.755)):
        assert share in ("50%", "25%")
        assert stored == loaded
        assert part == stored / before <= bar
    curve = {tau: rest for tau, *rest in _table(report, "Threshold")}
    assert curve[0.4][0] == losses["PuzzleMoE", "50%"]
    assert curve[0.0][2] > curve[0.4][2] > 0
    forms = _table(report, "How the pairs")
    assert [round(bits) for _, bits, _ in forms] == [8, 4, 3]
    assert forms[0][2] == report.metrics["loss_packed"]
    assert {name for name, *_ in _table(report, "Questions")} == {"line", "name", "keyword"}
    report.save(tmp_path)
    assert len(list(tmp_path.glob("plot_*.png"))) == 5

    # The model is there already, and a folder of it is as good as its config.
    model = next((tmp_path.parent / config.folder).glob("trained/*/model"))
    text = next(change for change in config.changes if change.startswith("data="))
    again = run(dataclasses.replace(config, model=str(model), changes=(), data=text.removeprefix("data=")))
    assert again.metrics == report.metrics


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("best",)}, "methods must be one of"),
        ({"ratios": (0.7,)}, "ratio must be in"),
        ({"ratios": ()}, "ratios"),
        ({"taus": (1.5,)}, "tau must be in"),
        ({"calibration": 4}, "calibration"),
        ({"tokens": 0}, "tokens"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**change)


def test_what_is_no_training_config():
    with pytest.raises(ValueError, match=r"puzzlemoe/laptop\.yaml"):
        training_config("configs/puzzlemoe/laptop.yaml")


def test_the_papers_config_is_planned(monkeypatch):
    """With a toy model in Mixtral's place."""
    from jaxlab.puzzlemoe import serving

    hf = {
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = core.load_config(ServingConfig, core.find_config("configs/puzzlemoe/paper.yaml"))
    assert (config.model, config.ratio, config.context) == ("mixtral-8x7b", 0.5, 1024 + 512)
    assert serving.hf_config(config.model)["num_local_experts"] == 8
    monkeypatch.setattr(serving, "hf_config", lambda name: hf)
    sizes = [
        plan(dataclasses.replace(config, ratio=ratio, context=128), planning.target("cpu")).bytes["parameters"]
        for ratio in (0.0, 0.5)
    ]
    experts = 4 * 3 * 64 * 64 * 2
    assert sizes[0] - sizes[1] == pytest.approx(experts / 2, abs=8 * 4)


def test_the_laptops_config_is_the_tours():
    loaded = core.load_config(StudyConfig, core.find_config("configs/puzzlemoe/laptop.yaml"))
    assert training_config(loaded.model, loaded.changes).model.moe.num_experts == 8
    assert tour.RECIPES["puzzlemoe"] == "jaxlab.puzzlemoe.recipe:configs/puzzlemoe/laptop.yaml"
