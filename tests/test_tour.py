"""The tour: sections that fail lose nobody, finished ones are kept, the page needs nothing but itself."""

import html.parser
import json
import re

import pytest

from jaxlab import recipes, tour

SECTION = """
import dataclasses
from jaxlab.core import Report
from jaxlab.core.figures import figure

RUNS = []

@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 1

def run(config: Config) -> Report:
    RUNS.append(config.size)
    if config.size > 8:
        raise RuntimeError("too large & <loud>")
    drawn, axes = figure(3.0, 2.0)
    axes.plot([1, 2], [2, 1])
    return Report("made-up", "A made-up <section>", {"size": config.size, "share": 0.5, "words": "long " * 20},
                  tables=[("Table", ("what", "is"), [("a", 1.25), ("b", None), ("c", True)])],
                  plots=[("A falling line", drawn)], notes=["A note & more."], synthetic=True)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A tour of three sections, the second of which fails."""
    module = tmp_path / "made_up_section.py"
    module.write_text(SECTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, size in (("good", 1), ("bad", 9), ("last", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"size: {size}")
    sections = {name: f"made_up_section:{tmp_path / name}.yaml" for name in ("good", "bad", "last")}
    monkeypatch.setattr(tour, "RECIPES", sections)
    import made_up_section

    made_up_section.RUNS.clear()
    return made_up_section


def read(folder):
    return json.loads((folder / "report.json").read_text())


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_failing_section_loses_no_other(made_up, tmp_path, capsys):
    folder = tmp_path / "out"
    assert tour.run(folder) is False
    sections = read(folder)["sections"]
    assert [(section["name"], section["state"]) for section in sections] == [
        ("good", "done"),
        ("bad", "failed"),
        ("last", "done"),
    ]
    assert sections[1]["error"] == "RuntimeError: too large & <loud>"
    assert "Traceback" in (folder / "bad" / "error.txt").read_text()
    assert sections[0]["report"]["metrics"]["size"] == 1
    assert "2 of 3 sections" in capsys.readouterr().err


def test_page_is_whole_and_needs_nothing_else(made_up, tmp_path):
    tour.run(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links.found)
    assert sum(link.startswith("data:") for link in links.found) == 2
    assert not re.search(r"<script|@import|url\(", page)
    assert "A made-up &lt;section&gt;" in page
    assert "too large &amp; &lt;loud&gt;" in page
    assert "synthetic input" in page


def test_finished_sections_are_kept_until_something_changes(made_up, tmp_path):
    folder = tmp_path / "out"
    tour.run(folder)
    assert made_up.RUNS == [1, 9, 2]
    (tmp_path / "bad.yaml").write_text("size: 3")
    assert tour.run(folder) is True
    assert made_up.RUNS == [1, 9, 2, 3]
    assert [section["state"] for section in read(folder)["sections"]] == ["reused", "done", "reused"]
    assert not (folder / "bad" / "error.txt").exists()
    assert tour.run(folder, ("good",), fresh=True) is True
    assert made_up.RUNS == [1, 9, 2, 3, 1]
    assert len(read(folder)["sections"]) == 3  # the others are still told
    (folder / "last" / "section.json").write_text("{torn")
    tour.run(folder)
    assert made_up.RUNS == [1, 9, 2, 3, 1, 2]


def test_only_what_is_asked_for(made_up, tmp_path):
    assert tour.run(tmp_path / "out", ("last",)) is True
    assert [section["name"] for section in read(tmp_path / "out")["sections"]] == ["last"]
    with pytest.raises(ValueError, match="unknown section 'nonsense'; known: good, bad, last"):
        tour.choose(("nonsense",))


def test_stopping_keeps_what_is_done(made_up, tmp_path, monkeypatch):
    original = made_up.run

    def stop(config: made_up.Config):
        if config.size == 9:
            raise KeyboardInterrupt
        return original(config)

    monkeypatch.setattr(made_up, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        tour.run(tmp_path / "out")
    assert [section["name"] for section in read(tmp_path / "out")["sections"]] == ["good"]


def test_every_registered_section_loads():
    for name in tour.RECIPES:
        function, config = tour._load(name)
        assert callable(function)
        assert config


@pytest.mark.latest
def test_kernel_section_at_the_smallest_size():
    from jaxlab.foundation import kernel

    report = kernel.run(kernel.KernelConfig(tokens=16, top_k=2, experts=4, width=8, ffn=8, repeats=1, gpu=None))
    assert report.metrics["ms"] > 0
    assert {row[0] for row in report.tables[0][2]} == {"ours (xla)", "lax.ragged_dot", "reference"}
    assert all(row[3] < 1e-4 for row in report.tables[0][2])


def test_language_model_section_at_the_smallest_size(tmp_path):
    from jaxlab.foundation import recipe

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a small text" for number in range(300)))
    small = "{vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
    config = recipes.load(
        recipe.run,
        None,
        [
            f"model={small}num_key_value_heads: 1, max_position_embeddings: 64}}",
            *("steps=3", "batch_size=2", "length=16", f"data={text}", "sample_tokens=8", f"folder={tmp_path / 'run'}"),
        ],
    )
    report = recipe.run(config)
    (_, columns, rows), *_ = report.tables
    assert columns == ("when", "text")
    assert [row[0] for row in rows] == ["before", "after"]
    assert all(row[1].startswith(config.prompt) for row in rows)
    report.save(tmp_path / "report")


def test_answer_section_at_the_smallest_size(tmp_path):
    import jax

    from jaxlab.foundation import answer
    from jaxlab.models import ByteTokenizer, save_pretrained
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

    model = Decoder(DecoderConfig(258, 16, 24, 1, 2, 1, max_position_embeddings=64))
    save_pretrained(tmp_path / "m", model, init_params(model, jax.random.key(0)), tokenizer=ByteTokenizer())
    report = answer.run(answer.AnswerConfig(str(tmp_path / "m"), "Why?", max_tokens=4, batch=2))
    assert report.metrics["tokens_per_s"] > 0
    assert "Why?" in report.metrics
    report.save(tmp_path / "report")
