"""The recipe at toy size, the verbs, and worker processes that serve under a controller."""

import json

import httpx
import jax
import pytest
from typer.testing import CliRunner

from jaxlab import core, tour
from jaxlab.cli import app
from jaxlab.inference import EngineConfig, SamplingParams
from jaxlab.models import save_pretrained
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.voltanallm import Clocks, ServeConfig, launch, recipe, served
from jaxlab.voltanallm.launching import open_gpu
from tests.inference.multiprocess_cases import CONFIG
from tests.voltanallm import servers


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


CHANGES = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_position_embeddings=128",
    "num_pages=65",
    "max_running=4",
    "prefill_chunk=32",
    "requests=6",
    "seconds=0.5",
    "ways=['1410', ecofreq]",
    "simulation={rates: [40], seconds: 3, ways: ['1410', ecofreq]}",
)


def test_measures_serves_and_simulates(tmp_path):
    path = core.find_config("configs/voltanallm/laptop.yaml")
    config = core.load_config(recipe.ServingConfig, path, (*CHANGES, f"folder={tmp_path / 'work'}"))
    report = recipe.run(config)
    assert report.metrics["requests with generate's tokens"] == 1.0
    assert report.metrics["failed requests"] == 0
    assert report.metrics["KV bytes moved"] > 0
    live, simulated = (table[2] for table in report.tables)
    assert [row[0] for row in live] == ["1410 MHz, rr", "ecofreq, rr"]
    assert all(row[1] > 0 and row[-1] == 0 for row in live)
    assert simulated[1][3] > 0.2
    assert len(report.plots) == 3
    report.save(tmp_path / "report")
    assert {"decode.csv", "prefill.csv", "answers_1.jsonl", "answers_2.jsonl"} <= {
        file.name for file in (tmp_path / "work").iterdir()
    }
    assert tour.RECIPES["voltanallm"].endswith("configs/voltanallm/laptop.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk, with tables of it."""
    folder = tmp_path_factory.mktemp("served")
    model = Decoder(CONFIG)
    save_pretrained(folder / "model", model, init_params(model, jax.random.key(0)))
    return folder


SIZES = ("--num-pages", 64, "--page-size", 8, "--max-running", 2, "--prefill-chunk", 32)


def test_profile_serve_bench_and_report(folder, tmp_path):
    tables = tmp_path / "tables"
    told = run("voltanallm", "profile", folder / "model", tables, *SIZES, "--gpu", "simulated", "--freqs", "1005,1410")
    assert "error on iterations held out" in told
    assert "simulated" in told
    assert {file.name for file in tables.iterdir()} == {
        *(f"{phase}{part}.csv" for phase in ("decode", "prefill") for part in ("", "_samples")),
        "decode.png",
    }
    clocks = Clocks("simulated", (1005, 1410), "ecofreq", tables, 1000.0, 1000.0)
    sizes = EngineConfig(64, page_size=8, max_running=2, prefill_chunk=32, kv_dtype="float32")
    settings = ServeConfig(str(folder / "model"), sizes, clocks=clocks)
    with launch(settings) as launched, served(launched.app("toy", warm=False)) as url:
        args = ("--rate", 5, "--seconds", 0.4, "--max-tokens", 12, "--vocab-size", 64, "--model", "toy")
        told = run("voltanallm", "bench", f"{url}/v1", "--folder", tmp_path / "out", *args)
        assert "failed 0" in told
        (worker,) = httpx.get(f"{url}/control/freq", trust_env=False).json()["workers"]
        assert (worker["mode"], worker["freq_mhz"]) == ("auto", 1005)
        run("voltanallm", "bench", f"{url}/v1", "--folder", tmp_path / "bad", *args[:-1], "other", code=1)
    told = run("voltanallm", "report", tmp_path / "out", "--picture", tmp_path / "latencies.png")
    assert "time to first piece, p95" in told
    assert (tmp_path / "latencies.png").stat().st_size
    assert "answers of a load test" in run("voltanallm", "report", tmp_path / "none", code=2)


def test_workers_of_one_process(folder):
    sizes = EngineConfig(64, page_size=8, max_running=4, prefill_chunk=32, batch_buckets=(4,), kv_dtype="float32")
    clocks = Clocks("simulated", (1005, 1410), "aimd", prefill_slo_ms=1000.0, decode_slo_ms=1000.0)
    settings = ServeConfig(str(folder / "model"), sizes, num_prefill=1, processes=False, warm=False, clocks=clocks)
    with launch(settings) as launched:
        assert set(launched.controllers) == {"prefill-0", "decode-0"}
        (output,) = launched.engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0))
        assert len(output.token_ids) == 4
        assert launched.engine.kv_bytes_moved > 0


def test_worker_processes_serve_under_controllers(folder):
    sizes = EngineConfig(64, page_size=8, max_running=4, prefill_chunk=32, batch_buckets=(4,), kv_dtype="float32")
    clocks = Clocks("simulated", (1005, 1410), "aimd", prefill_slo_ms=1000.0, decode_slo_ms=1000.0)
    settings = ServeConfig(str(folder / "model"), sizes, num_prefill=1, num_decode=1, clocks=clocks, warm=False)
    with launch(settings) as launched:
        assert set(launched.gpus) == set(launched.controllers) == {"prefill-0", "decode-0"}
        with (
            served(launched.app(servers.MODEL, warm=False)) as url,
            httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client,
        ):
            answer = servers.ask(client, [1, 2, 3], max_tokens=5).json()
            assert answer["usage"]["completion_tokens"] == 5
        assert launched.engine.kv_bytes_moved > 0


def test_simulate_from_the_command_line(tmp_path):
    args = ("rates=[30]", "seconds=3", "ways=['1410', '1005']", "--picture", tmp_path / "savings.png")
    assert "1005" in run("voltanallm", "simulate", *args)
    assert (tmp_path / "savings.png").stat().st_size
    rows = json.loads(run("voltanallm", "simulate", *args[:3], "--json"))
    assert rows[0]["saved"] == 0 < rows[1]["saved"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("simulate", "ways=[luck]"), "ecofreq"),
        (("serve", "model", "--gpu", "abacus"), "nvml"),
        (("serve", "model", "--controller", "ecofreq"), "gpu"),
        (("serve", "model", "--gpu", "simulated", "--controller", "ecofreq"), "tables"),
        (("serve", "model", "--decode", 0), "num_decode"),
        (("profile", "model", "out", "--freqs", "fast"), "--freqs"),
        (("bench", "ftp://here", "--model", "m", "--folder", "out"), "base_url"),
    ],
)
def test_bad_usage_ends_with_two(args, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in run("voltanallm", *args, code=2)


def test_backends_are_opened_by_name():
    assert open_gpu("none") is None
    assert open_gpu("simulated").supported_clocks() == (1005, 1095, 1200, 1305, 1410)
    with pytest.raises(ValueError, match="abacus"):
        open_gpu("abacus")
