"""The `jaxlab` command: help, exit codes, one-line errors, and each verb run once at the smallest size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab import cli, recipes
from jaxlab.core import find_config, load_config

TINY = """
system: foundation
model: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1, max_position_embeddings: 64}
steps: 3
batch_size: 2
length: 16
checkpoint_every: 2
"""


@pytest.fixture
def tiny(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a small text" for number in range(300)))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}data: {text}\n")
    return path


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def call(*args):
        capsys.readouterr()
        try:
            cli.main([str(arg) for arg in args])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


VERBS = ("train", "generate", "plan", "doctor", "launch", "tour", *recipes.SYSTEMS)


@pytest.mark.latest
@pytest.mark.parametrize("args", [(), *[(verb,) for verb in VERBS], *[(name, "run") for name in recipes.SYSTEMS]])
def test_help(run, args):
    code, out, _ = run(*args, "--help")
    assert code == 0
    assert "Usage: jaxlab" in out


def test_help_lists_systems_and_verbs(run):
    _, out, _ = run("--help")
    assert all(verb in out for verb in VERBS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from jaxlab.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('jax', 'numpy', 'torch', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_version(run):
    assert run("--version")[1].startswith("jaxlab ")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("train",),
        ("train", "configs/foundation/laptop.yaml"),
        ("generate", "only-a-source"),
        ("plan", "configs/foundation/plan_8b.yaml", "--topology"),
        ("plan", "--nonsense", "x"),
        ("doctor", "surplus"),
        ("tour", "--only", "nonsense"),
        ("foundation", "nonsense"),
    ],
)
def test_bad_usage_exits_2(run, args):
    code, out, err = run(*args)
    assert code == 2
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("absent.yaml", "out"), "configs/foundation/laptop.yaml"),
        (("{tiny}", "out", "stpes=4"), "steps"),
        (("{tiny}", "out", "steps=many"), "steps"),
        (("{tiny}", "out", "model.hidden_sizes=4"), "hidden_size"),
        (("{broken}", "out"), "YAML"),
        (("{other}", "out"), "unknown system 'unheard-of'"),
    ],
)
def test_bad_config_is_a_usage_error(run, tiny, tmp_path, args, says):
    broken, other = tmp_path / "broken.yaml", tmp_path / "other.yaml"
    broken.write_text("steps: [1,")
    other.write_text("system: unheard-of")
    code, out, err = run("train", *(arg.format(tiny=tiny, broken=broken, other=other) for arg in args))
    assert code == 2
    # Typer draws a box round the text and breaks its lines.
    assert says in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in out + err


def test_what_fails_while_running_is_one_line(run, monkeypatch):
    code, out, err = run("generate", "/nowhere/at-all", "Hello")
    assert code == 1
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    monkeypatch.setenv("JAXLAB_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "/nowhere/at-all", "Hello"])


def test_interrupt_is_clean(run, monkeypatch):
    from jaxlab import doctor

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stop)
    code, _, err = run("doctor")
    assert code == 130
    assert err.strip() == "interrupted"


def test_a_system_registers_by_one_entry(run, monkeypatch, tmp_path):
    package = tmp_path / "made_up_system"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "recipe.py").write_text(
        "import dataclasses\nfrom jaxlab.core import Report\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    size: int = 1\n"
        "def run(config: Config) -> Report:\n    return Report('made-up', 'Made up', {'size': config.size})\n"
    )
    (package / "commands.py").write_text(
        "import typer\napp = typer.Typer()\n@app.callback()\ndef _(): ...\n"
        "@app.command()\ndef greet():\n    print('greetings')\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text("system: made-up\nsize: 2")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(recipes.SYSTEMS, "made-up", recipes.System("made_up_system", "One line.", str(config)))
    assert "One line." in run("--help")[1]
    assert run("made-up", "greet")[1].strip() == "greetings"
    code, out, _ = run("made-up", "run", "size=3", "--folder", tmp_path / "out")
    assert code == 0
    assert "3" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == {"size": 3}
    code, _, err = run("train", config, tmp_path / "out2")
    assert code == 2
    assert "made-up run" in " ".join(err.replace("│", " ").split())


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "What will work" in out
    found = json.loads(run("doctor", "--json")[1])
    assert found["versions"]["jax"]
    assert {extra["name"] for extra in found["extras"]} >= {"aot", "cuda", "serving", "parity"}
    assert any("cpu" in device for device in found["devices"])
    assert {ability["works"] for ability in found["abilities"]} <= {True, False}


def test_doctor_sees_through_extras(monkeypatch):
    from jaxlab import doctor

    lines = {
        "jaxlab": ['absent-one>=1; extra == "a"', "jaxlab[a]; extra == 'b'", "numpy[c]>2 ; extra == 'b'", "rich"],
        "numpy": ["absent-two ; extra == 'c'", "absent-three"],
    }
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines.get(name))
    assert doctor._required("jaxlab", "b") == {"absent-one", "numpy", "absent-two"}


def test_train_and_train_again(run, tiny, tmp_path):
    folder = tmp_path / "out"
    code, out, err = run("train", tiny, folder)
    assert code == 0, err
    assert "report" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert json.loads((folder / "report.json").read_text())["system"]
    code, _, err = run("train", tiny, folder)  # all steps are done
    assert code == 0, err


def test_generate(run, tmp_path):
    import jax

    from jaxlab.models import ByteTokenizer, save_pretrained
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

    model = Decoder(DecoderConfig(258, 16, 24, 1, 2, 1, max_position_embeddings=64))
    save_pretrained(tmp_path / "m", model, init_params(model, jax.random.key(0)), tokenizer=ByteTokenizer())
    code, _, err = run("generate", tmp_path / "m", "ab", "--max-tokens", 4)
    assert code == 0, err
    assert err.startswith("loaded in")
    hot = ("generate", tmp_path / "m", "ab", "--max-tokens", 4, "--temperature", 1.0, "--seed", 3)
    assert run(*hot)[1] == run(*hot)[1]
    for wrong in (("--max-tokens", 100), ("--top-p", 0), ("--temperature", -1), ("--chat",)):
        code, out, err = run("generate", tmp_path / "m", "ab", *wrong)
        assert code in (1, 2), wrong
        assert "Traceback" not in out + err


@pytest.mark.latest
def test_plan(run, tiny, monkeypatch):
    from jaxlab.core.plan import Plan

    code, out, err = run("plan", tiny, "--gpu", "cpu", "--mesh", "data=2,fsdp=4", "batch_size=8")
    assert code == 0, err
    assert "fits" in out
    monkeypatch.setattr(Plan, "fits", property(lambda self: False))
    code, out, err = run("plan", tiny, "--gpu", "cpu", "--topology", "1x1x2", "--json", "--strict")
    assert code == 1, err
    content = json.loads(out)
    assert content["fits"] is False
    assert {"parameters", "optimizer", "input", "temporaries", "total"} <= content["bytes"].keys()
    for wrong in ("--gpu=abacus", "--topology=8", "--mesh=data", "--mesh=data=3", "--mesh=up=8"):
        code, _, err = run("plan", tiny, "--gpu", "cpu", wrong)
        assert code == 2, (wrong, err)


@pytest.mark.parametrize("system", [name for name in recipes.SYSTEMS if name not in ("foundation", "pipeline")])
def test_a_systems_configs_load(system):
    """As `jaxlab <system> run` and `jaxlab plan` load them."""
    recipe = recipes.recipe_of(system)
    recipes.load(recipe.run, recipes.SYSTEMS[system].config)
    paper = Path(recipes.SYSTEMS[system].config).with_name("paper.yaml")
    recipes.load(recipe.plan, paper)
    assert recipes.system_of(find_config(paper)) == system


def test_the_library_configs_load():
    from jaxlab.training import TrainConfig

    for name in ("laptop", "plan_8b"):
        config = load_config(TrainConfig, find_config(f"configs/foundation/{name}.yaml"))
        assert config.steps > 0
    assert Path(find_config("configs/foundation/laptop.yaml")).is_file()
