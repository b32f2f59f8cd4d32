import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxlab.core import load_config, save_config, to_dict


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Model:
    hidden_size: int
    windows: tuple[int | None, ...] | None = None
    remat: Literal["none", "block"] = "none"
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {self.hidden_size}")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = dataclasses.field(default_factory=lambda: Model(4, windows=(1, None)))
    optimizer: Optimizer | None = dataclasses.field(default_factory=lambda: Optimizer(learning_rate=5e-3))
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": 1})
    name: str = "run"
    folder: Path | None = None
    source: str | int = "x"
    colour: Colour = Colour.RED
    debug: bool = False
    tags: Sequence[str] = ()
    rest: Any = None
    options: Mapping[str, float] | None = None


def _write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.latest
def test_defaults_then_file_then_overrides(tmp_path):
    path = _write(tmp_path, "system: foundation\nmodel:\n  hidden_size: 8\n  shapes: [[1, 2], []]\nname: file\n")
    config = load_config(Config, path, ["model.remat=block", "optimizer.betas.1=1", "mesh.tensor=2", "folder=/x"])
    assert config.model == Model(8, windows=(1, None), remat="block", shapes=[(1, 2), ()])
    assert config.optimizer == Optimizer(5e-3, (0.9, 1.0))
    assert config.mesh == {"data": 1, "tensor": 2}
    assert (config.name, config.folder) == ("file", Path("/x"))


def test_everything_by_default():
    assert load_config(Config) == Config()


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("name=12", "name", "12"),
        ("name=null", "name", "null"),
        ("name=", "name", ""),
        ("name=a=b", "name", "a=b"),
        ("name=[1", "name", "[1"),
        ("name=x: y", "name", "x: y"),
        ("source=12", "source", 12),
        ("source=abc", "source", "abc"),
        ("folder=null", "folder", None),
        ("optimizer=null", "optimizer", None),
        ("optimizer={learning_rate: 1}", "optimizer", Optimizer(1.0)),
        ("optimizer.learning_rate=1e-4", "optimizer", Optimizer(1e-4)),
        ("colour=BLUE", "colour", Colour.BLUE),
        ("debug=true", "debug", True),
        ("tags=[a,b]", "tags", ("a", "b")),
        ("mesh={tensor: 2}", "mesh", {"tensor": 2}),
        ("rest={a: [1, null]}", "rest", {"a": [1, None]}),
        ("options.x=1", "options", {"x": 1.0}),
        ("model.windows=[4,null,-1]", "model", Model(4, windows=(4, None, -1))),
        ("model.windows.0=7", "model", Model(4, windows=(7, None))),
    ],
)
def test_override(override, field, value):
    got = getattr(load_config(Config, None, [override]), field)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("model.hiden_size=3", ValueError, ["model.hiden_size", "did you mean 'model.hidden_size'"]),
        ("optimzer.learning_rate=1", ValueError, ["optimzer", "did you mean 'optimizer'"]),
        ("model={hidden: 3}", ValueError, ["model.hidden", "model.hidden_size"]),
        ("model.hidden_size=3.5", TypeError, ["model.hidden_size", "3.5", "int"]),
        ("model.hidden_size=true", TypeError, ["model.hidden_size", "True", "int"]),
        ("optimizer.learning_rate=fast", TypeError, ["optimizer.learning_rate", "fast", "float"]),
        ("optimizer.betas=[1]", TypeError, ["optimizer.betas", "1 values", "expected 2"]),
        ("model.windows=[a]", TypeError, ["model.windows.0", "'a'", "int | None"]),
        ("model.windows=3", TypeError, ["model.windows", "3", "tuple[int | None, ...] | None"]),
        ("mesh.data=many", TypeError, ["mesh.data", "many", "int"]),
        ("debug=1", TypeError, ["debug", "bool"]),
        ("name.x=1", TypeError, ["name", "{'x': 1}", "str"]),
        ("model=3", TypeError, ["model", "3", "Model"]),
        ("model.remat=blok", ValueError, ["model.remat", "blok", "'none', 'block'"]),
        ("colour=GREEN", ValueError, ["colour", "GREEN", "RED"]),
        ("model.windows.5=1", ValueError, ["model.windows.5", "index below 2"]),
        ("model.hidden_size=0", ValueError, ["hidden_size", "at least 1"]),
        ("mesh=[1", TypeError, ["mesh", "'[1'", "dict[str, int]"]),
        ("name", ValueError, ["name", "a.b=value"]),
        ("=1", ValueError, ["=1"]),
        ("a..b=1", ValueError, ["a..b"]),
    ],
)
def test_bad_override(override, error, words):
    with pytest.raises(error) as caught:
        load_config(Config, None, [override])
    for word in words:
        assert word in str(caught.value)


def test_bad_files(tmp_path):
    for text, error, words in [
        ("optimiser:\n  learning_rate: 1", ValueError, ["optimiser", "optimizer"]),
        ("model:\n  system: x", ValueError, ["model.system"]),
        ("model:\n  hidden_size: [1]", TypeError, ["model.hidden_size", "[1]", "int"]),
        ("model:\n  hidden_size: ???", ValueError, ["model.hidden_size"]),
        ("name: ${nope}", ValueError, ["nope"]),
        ("- 1", TypeError, ["mapping"]),
        ("a: [1", ValueError, ["YAML"]),
    ]:
        with pytest.raises(error) as caught:
            load_config(Config, _write(tmp_path, text))
        for word in words:
            assert word in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load_config(Config, tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        load_config(Model)


def test_interpolation_sees_overrides(tmp_path):
    path = _write(tmp_path, "model:\n  hidden_size: ${mesh.data}\nmesh: {data: 3}\n")
    assert load_config(Config, path).model.hidden_size == 3
    assert load_config(Config, path, ["mesh.data=5"]).model.hidden_size == 5


def test_a_config_may_have_its_own_system(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        system: str = ""

    assert load_config(Own, _write(tmp_path, "system: mine")).system == "mine"


_text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    windows=st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=3).map(tuple),
    rate=st.floats(allow_nan=False),
    name=_text | st.sampled_from(["1e3", "null", "true", "${x}", "a: b", "12", "???x", "0x1f", "1_0", "~", ""]),
    tags=st.lists(_text, max_size=2).map(tuple),
    mesh=st.dictionaries(st.sampled_from(["data", "tensor"]), st.integers()),
)
def test_saved_is_read_back(tmp_path, windows, rate, name, tags, mesh):
    config = Config(Model(2, windows), Optimizer(rate), mesh, name, Path("a/b"), colour=Colour.BLUE, tags=tags)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config


def test_to_dict_is_plain():
    config = Config(folder=Path("a"), colour=Colour.BLUE)
    assert to_dict(config)["model"] == {"hidden_size": 4, "windows": [1, None], "remat": "none", "shapes": []}
    assert to_dict(config)["folder"] == "a"
    assert to_dict(config)["colour"] == "BLUE"
    with pytest.raises(TypeError, match="'rest'"):
        to_dict(Config(rest=object()))
    with pytest.raises(TypeError, match="dataclass"):
        to_dict({"a": 1})
