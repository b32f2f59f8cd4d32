"""Who sets the clocks: controllers fed by an engine's iterations, operators by HTTP, nobody where a GPU refuses."""

import time

import pytest

pytest.importorskip("fastapi", reason="the extra 'serving' is not installed")

import httpx

from jaxlab.inference import DisaggregatedEngine, IterationMetrics, SamplingParams
from jaxlab.voltanallm import EcoFreq, LatencyTable, SimulatedGPU, StaticClock
from jaxlab.voltanallm.control_loop import ControlLoop, slowdown
from jaxlab.voltanallm.predictor import Plane
from jaxlab.voltanallm.worker_controls import WorkerControls
from tests.voltanallm.servers import MODEL, SIZES, ask, live, until

CLOCKS = (1005, 1200, 1410)


def controller(slo_ms=20.0, phase="decode"):
    """Feasible up to 2 requests at 1005 MHz, 4 at 1200 and 8 at 1410, with an objective of 20 ms and no margin."""
    most = {1005: 2, 1200: 4, 1410: 8}
    planes = [Plane(clock, tokens=0.0, intercept=0.0, batch=20 / most[clock], start=1, end=64) for clock in CLOCKS]
    if phase == "prefill":
        planes = [Plane(clock, tokens=1410 / clock, intercept=0.0) for clock in CLOCKS]
    return EcoFreq(LatencyTable(phase, planes), CLOCKS, slo_ms, margin=0.0)


def metrics(running, waiting=0):
    return IterationMetrics(0.0, running, running + waiting, 10 * running, waiting)


class Counting(SimulatedGPU):
    """A simulated GPU that counts its orders."""

    def __init__(self, *arguments, **options):
        self.orders = []
        super().__init__(*arguments, **options)

    def set_clock(self, mhz):
        self.orders.append(mhz)
        super().set_clock(mhz)


@pytest.mark.latest
def test_a_loop_obeys_its_controller_and_drops_repeats():
    gpu = Counting(CLOCKS, switch_ms=0.0)
    loop = ControlLoop("w", "decode", gpu, controller())
    assert (loop.view.mode, loop.view.freq_mhz, loop.view.slo_ms, loop.pace) == ("auto", 1410, 20.0, 1.0)
    for batch in (1, 2, 3, 4, 4, 8, 9, 1):
        loop.tick([metrics(batch)], (), 0.0)
    assert gpu.orders == [1005, 1200, 1410, 1005]
    assert (loop.view.freq_mhz, loop.view.switches, loop.view.running) == (1005, 3, 1)
    assert loop.pace == pytest.approx(slowdown("decode", 1005, 1410))
    assert 1 < loop.pace < slowdown("prefill", 1005, 1410) == pytest.approx(1410 / 1005)

    loop.command("slo", None, 5.0)
    loop.tick([metrics(2)], (), 0.0)
    assert (loop.view.slo_ms, gpu.clock()) == (5.0, 1410)
    loop.command("set", 1200, None)
    loop.tick([metrics(1)], (), 0.0)
    assert (loop.view.mode, gpu.clock()) == ("set", 1200)
    loop.command("unset", None, None)
    loop.tick([metrics(1)], (), 0.0)
    assert (loop.view.mode, gpu.clock(), loop.view.freq_mhz) == ("unset", 1410, 1410)
    loop.command("auto", None, None)
    loop.tick([metrics(1)], (), 0.0)
    assert gpu.clock() == 1200  # 5 ms are still the objective
    loop.command("set", 1005, None)
    loop.close()
    assert gpu.clock() == 1410


def test_energy_and_power_are_counted_from_the_start():
    now = [0.0]
    gpu = SimulatedGPU(CLOCKS, time_fn=lambda: now[0])
    gpu.set_load("decode", 1.0)
    now[0] = 10.0
    loop = ControlLoop("w", "decode", gpu)
    assert loop.view.energy_j == 0
    assert loop.view.power_w > 300
    loop.load(False)
    assert gpu.power_w() == pytest.approx(62)


def test_a_gpu_that_refuses_does_not_stop_the_serving(caplog):
    class Refusing(SimulatedGPU):
        def set_clock(self, mhz):
            raise PermissionError("not without root")

        def reset(self):
            pass

    loop = ControlLoop("w", "decode", Refusing(CLOCKS), controller())
    loop.tick([metrics(1)], (), 0.0)
    loop.tick([metrics(1)], (), 0.0)
    assert (loop.view.mode, loop.view.trouble) == ("unset", "not without root")
    loop.command("set", 1005, None)
    assert (loop.view.mode, loop.view.trouble) == ("unset", "not without root")
    assert len(caplog.records) == 2


def test_a_loop_starts_at_its_first_clock():
    for chooser, clock in ((controller(), 1005), (StaticClock(CLOCKS, 1200), 1200), (None, 1410)):
        gpu = SimulatedGPU(CLOCKS, switch_ms=0.0)
        ControlLoop("w", "decode", gpu, chooser).start()
        assert gpu.clock() == clock


def test_workers_of_an_engine_are_told_their_pace():
    class Workers:
        """Workers that keep what they are told; what a real one does with it is its own test."""

        def __init__(self):
            self.told, self.batch = [], 4

        def workers(self):
            return [
                type("Status", (), {"id": name, "mode": name[:-2], "in_flight": 1})()
                for name in ("prefill-0", "decode-0")
            ]

        def drain_metrics(self, worker):
            return [metrics(self.batch)]

        def set_pace(self, worker, factor):
            self.told.append((worker, round(factor, 3)))

        def status_freq(self, worker, mhz):
            self.told.append((worker, mhz))

    engine = Workers()
    gpus = {name: SimulatedGPU(CLOCKS, switch_ms=0.0) for name in ("prefill-0", "decode-0")}
    controls = WorkerControls(engine, gpus, {"decode-0": controller()})
    controls.arrived(5)
    assert controls.after_step(1.0) == 0
    pace = round(slowdown("decode", 1200, 1410), 3)
    assert engine.told == [("prefill-0", 1.0), ("prefill-0", 1410), ("decode-0", pace), ("decode-0", 1200)]
    controls.command("set", 1005, worker="prefill-0")
    assert engine.told[4:] == [("prefill-0", round(1410 / 1005, 3)), ("prefill-0", 1005)]
    assert [view.mode for view in controls.states()] == ["set", "auto"]
    with pytest.raises(ValueError, match="worker prefill-0 has no controller"):
        controls.command("auto")
    controls.close()
    assert {gpu.clock() for gpu in gpus.values()} == {1410}

    for arguments, message in (
        ((SimulatedGPU(CLOCKS),), "expected one for each of the workers prefill-0, decode-0"),
        (({"decode-7": SimulatedGPU(CLOCKS)},), "decode-7"),
        ((None, {"decode-0": controller()}), "gpu: expected one for worker decode-0"),
    ):
        with pytest.raises(ValueError, match=message):
            WorkerControls(engine, *arguments)


def test_control_by_http(engine):
    gpu = SimulatedGPU(CLOCKS, switch_ms=0.0)
    with live(engine, gpu=gpu, controller=controller()) as (_, client):

        def post(status=200, **fields):
            got = client.post("/control/freq", json=fields)
            assert got.status_code == status, got.text
            return got.json()["workers"][0] if status == 200 else got.json()["error"]

        assert client.get("/control/freq").json() == {
            "workers": [{"id": "engine", "mode": "auto", "freq_mhz": 1005, "slo_ms": 20.0}]
        }
        assert post(mode="set", freq_mhz=1200) == {"id": "engine", "mode": "set", "freq_mhz": 1200, "slo_ms": 20.0}
        assert gpu.clock() == 1200
        assert post(400, mode="set", freq_mhz=1300)["message"] == (
            "freq_mhz: expected a supported clock, the nearest are [1200, 1410], got 1300"
        )
        assert post(400, mode="set")["param"] == "freq_mhz"
        assert post(400, mode="slo", slo_ms=-1)["param"] == "slo_ms"
        assert post(400, mode="fly")["param"] == "mode"
        assert post(400, mode="auto", worker="other")["param"] == "worker"
        assert post(mode="slo", slo_ms=30, worker="engine")["slo_ms"] == 30
        assert post(mode="auto")["mode"] == "auto"
        ask(client)
        until(lambda: gpu.clock() == 1005)  # one request alone
        assert gpu.energy_j() > 0
        told = client.get("/metrics").text
        assert 'jaxlab_sm_clock_mhz{phase="both",worker="engine"} 1005.0' in told
        assert 'jaxlab_energy_joules_total{phase="both",worker="engine"}' in told
        form = {"Content-Type": "text/plain"}  # what another site's page could send
        assert client.post("/control/freq", content=b'{"mode": "unset"}', headers=form).status_code == 400
        assert post(mode="unset")["freq_mhz"] == 1410
        assert post(mode="set", freq_mhz=1005)["freq_mhz"] == 1005
    assert gpu.clock() == 1410

    with live(engine, gpu=SimulatedGPU(CLOCKS), controller=StaticClock([1200], 1200)) as (_, client):
        got = client.post("/control/freq", json={"mode": "slo", "slo_ms": 3})
        assert (got.status_code, got.json()["error"]["param"]) == (400, "mode")


class Timed:
    """An engine, and how long its steps take."""

    def __init__(self, engine):
        self._engine, self.seconds = engine, []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        started = time.monotonic()
        outputs = self._engine.step()
        self.seconds.append(time.monotonic() - started)
        return outputs


def test_a_simulated_clock_takes_its_time(engine):
    timed = Timed(engine)
    with live(timed, gpu=SimulatedGPU((200, 1410), switch_ms=0.0)) as (app, client):
        client.post("/control/freq", json={"mode": "set", "freq_mhz": 200})
        ask(client, [7], max_tokens=10)
        waited = [seconds for _, seconds in app.state.telemetry.itl._values]
    assert len(waited) == 9
    assert sum(waited) >= slowdown("decode", 200, 1410) * sum(timed.seconds[-9:]) > 0


def test_workers_behind_one_server(engine):
    prompts = [[7], [1, 2, 3]]
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    expected = [" ".join(map(str, own.token_ids)) for own in engine.generate(prompts, greedy)]
    gpus = {name: SimulatedGPU(CLOCKS, switch_ms=0.0) for name in ("prefill-0", "decode-0")}
    controllers = {"prefill-0": controller(800.0, "prefill"), "decode-0": controller()}
    with (
        DisaggregatedEngine.local(engine.model, engine.params, SIZES) as workers,
        live(workers, gpu=gpus, controller=controllers) as (app, client),
    ):
        got = ask(client, prompts, max_tokens=6).json()
        assert [choice["text"] for choice in got["choices"]] == expected
        until(lambda: [gpu.clock() for gpu in gpus.values()] == [1005, 1005])
        got = client.post("/control/freq", json={"mode": "set", "freq_mhz": 1200, "worker": "decode-0"}).json()
        assert [worker["id"] for worker in got["workers"]] == ["prefill-0", "decode-0"]
        assert [worker["mode"] for worker in got["workers"]] == ["auto", "set"]
        statuses = app.state.engine_loop.call(workers.workers).result(5)
        assert {status.id: status.freq for status in statuses} == {"prefill-0": 1005, "decode-0": 1200}
        data = client.get("/dashboard/data").json()
        assert data["objectives"] == {"ttft_ms": 800.0, "itl_ms": 20.0}
        assert [worker["phase"] for worker in data["workers"]] == ["prefill", "decode"]
        assert gpus["prefill-0"].energy_j() > 0
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"model": MODEL, "prompt": [7], "max_tokens": 100}, timeout=0.05)
        until(lambda: 'outcome="cancelled"} 1' in client.get("/metrics").text)
        until(lambda: workers.free_pages == SIZES.num_pages - 1)
