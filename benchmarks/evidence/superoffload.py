"""Speculation is exact, and overlaps: a real training run held bit to bit, and steps timed over a slow link."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "superoffload"
"""Metrics and checkpoints of the runs, and timelines; a killed one goes on from here."""

LONG = (
    "model.hidden_size=192",
    "model.intermediate_size=512",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=6",
    "steps=300",
    "length=128",
    "optimizer.warmup_steps=30",
    "optimizer.learning_rate=3e-3",
    "checkpoint_every=100",
    "loss_scale={window: 25, hysteresis: 2}",
    "nan_at=[40, 41, 155, 250]",
    "inf_at=[90, 201]",
    "link_bw=null",
)
RUNNING = ("synchronous", "copies", "residuals", "by itself")

# A decoder whose Adam takes about as long as its backward pass: few tokens, one layer a bucket.
LAYERS, HIDDEN, TOKENS = 8, 512, 32
STEPS, WARM = 40, 5
BATCHES, LENGTH = (2, 4, 8, 16), 1024
LINKS = {"faster than the backward pass": 2e9, "as fast": 1e9, "slower": 6e8}


def items() -> Iterator[Item]:
    """One row a run, and one a link and way."""
    from jaxlab import core

    config = _config()
    for way in RUNNING:
        yield Item(
            name=f"way {way}",
            table=(
                f"{config.steps} steps of {config.batch_size} x {config.length} bytes of the Python standard library, "
                "float16 with a loss scaler, clipped at 1.0, losses made NaN at "
                f"{', '.join(map(str, config.nan_at))} and infinite at {', '.join(map(str, config.inf_at))}: bits of "
                "p, m, v, count and loss scale against the synchronous run (measured)"
            ),
            settings=core.to_dict(config),
            run=lambda way=way: _way_row(way),
            seeds=(config.seed,),
        )
    for link in LINKS:
        for way in ("synchronous", "speculative"):
            yield Item(
                name=f"overlap {link}, {way}",
                table=(
                    f"A step of {LAYERS} layers of {HIDDEN} on {TOKENS} tokens, ms; one thread is the accelerator, "
                    "one the host, sleeps are the link. Lanes: what each was busy, medians of "
                    f"{STEPS} interleaved steps (measured). Predicted: by the simulator, from these "
                    "rates, and from the synchronous steps' (modelled)"
                ),
                settings={"layers": LAYERS, "hidden": HIDDEN, "tokens": TOKENS, "steps": STEPS, "link": LINKS[link]},
                run=lambda link=link, way=way: _overlap_row(link, way),
                seeds=(0,),
            )

    for rows in BATCHES:
        yield Item(
            name=f"ablation, {rows} rows",
            table=f"TFLOP/s of the 5B model on a GH200, {LENGTH} tokens a row, technique by technique (modelled)",
            settings={"size": "5B", "rows": rows, "length": LENGTH},
            run=lambda rows=rows: _ablation_row(rows),
        )


def pages() -> None:
    """Draws the pictures of the system's page, from runs made on this machine."""
    from jaxlab.superoffload import pictures, schedule

    rows = _rows("residuals")
    if rows:
        _save(pictures.losses(rows), "loss")
        _save(pictures.rollbacks(rows, 20), "rollbacks")
    told = WORK / "overlap as fast.json"
    if told.exists():
        content = json.loads(told.read_text())
        for way in ("synchronous", "speculative", "predicted"):
            _save(schedule.Schedule(**content["timelines"][way]).figure(), f"timeline_{way}")
    found = {link: WORK / f"overlap {link}.json" for link in LINKS}
    if all(path.exists() for path in found.values()):
        _save(
            pictures.overlap([(link, _bars(json.loads(path.read_text()))) for link, path in found.items()]), "overlap"
        )


def _save(drawn: Any, name: str) -> None:
    drawn.savefig(FOLDER / f"superoffload_{name}.png", dpi=100, bbox_inches="tight")


def _config() -> Any:
    from jaxlab import core
    from jaxlab.superoffload.study import StudyConfig

    return core.load_config(StudyConfig, core.find_config("configs/superoffload/laptop.yaml"), LONG)


def _rows(way: str) -> list[dict[str, float]]:
    from jaxlab import core

    path = WORK / way.replace(" ", "_") / "metrics.jsonl"
    return [row for row in core.jsonl.read(path) if "skipped" in row] if path.exists() else []


def _way_row(way: str) -> dict[str, Any]:
    from jaxlab.superoffload.study import Study, different_bits

    study = Study(_config())
    run, reference = (study.run(each, WORK / each.replace(" ", "_")) for each in (way, RUNNING[0]))
    parts = [run.rows[i : i + len(run.rows) // 3] for i in range(0, len(run.rows), len(run.rows) // 3)]
    parameters = sum(x.size for name, x in run.state.items() if name.startswith("p "))
    undo = sorted(row["undo_bytes"] / parameters for row in run.rows)
    return {
        "way": way,
        "parameters": parameters,
        "different bits": different_bits(reference, run),
        "first loss": run.rows[0]["loss"],
        "last loss": run.rows[-1]["loss"],
        "updates": int(run.state["count"]),
        "clipped": int(sum(row["clipped"] for row in run.rows)),
        "skipped": int(sum(row["skipped"] for row in run.rows)),
        **{f"rolled back, third {i + 1}": int(sum(row["rolled_back"] for row in part)) for i, part in enumerate(parts)},
        "undo bytes a parameter, median": undo[len(undo) // 2],
    }


def _overlap_row(link: str, way: str) -> dict[str, Any]:
    """From a process of its own, in which every operation has one thread."""
    path = WORK / f"overlap {link}.json"
    if way == "synchronous" or not path.exists():
        flags = "--xla_cpu_multi_thread_eigen=false"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        subprocess.run([sys.executable, "-m", __name__, link], cwd=ROOT, env=environment, check=True)
    told = json.loads(path.read_text())["measured"][way]
    ideal = max(told["accelerator"], told["host"], told["to the host"], told["from the host"])
    return {
        "link": link,
        "way": way,
        **told,
        "largest of them": ideal,
        "their sum": told["accelerator"] + told["host"] + told["to the host"] + told["from the host"],
        "predicted / measured": told["predicted"] / told["step"],
    }


def _ablation_row(rows: int) -> dict[str, Any]:
    from jaxlab.superoffload import ModelShape, get_machine
    from jaxlab.superoffload.recipe import SIZES, ablation

    found = ablation(ModelShape(*SIZES["5B"], rows, LENGTH), get_machine("gh200"))
    gain = found[-1][1] / found[0][1]
    return {"rows": rows, **{name: tflops for name, tflops, _ in found}, "in all": gain}


def _bars(told: dict[str, Any]) -> dict[str, float]:
    measured = told["measured"]
    return {
        "synchronous, measured": measured["synchronous"]["step"],
        "synchronous, predicted": measured["synchronous"]["predicted"],
        "speculative, measured": measured["speculative"]["step"],
        "speculative, predicted": measured["speculative"]["predicted"],
    }


def time_overlap(link_bw: float, *, layers: int = LAYERS, hidden: int = HIDDEN, steps: int = STEPS) -> dict[str, Any]:
    """Steps in both ways, in turn: medians of each lane in ms, the simulator's predictions, and a timeline each."""
    import jax
    import numpy as np

    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
    from jaxlab.superoffload import AdamHyper, ModelShape, SuperOffloadConfig
    from jaxlab.superoffload.pieces import decoder_pieces
    from jaxlab.superoffload.timeline import TimedSuperOffload
    from jaxlab.training import TokenBatch, lm_loss

    model = Decoder(
        DecoderConfig(
            vocab_size=258,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )
    pieces = decoder_pieces(lm_loss(model))
    random = np.random.default_rng(0)

    def batch() -> TokenBatch:
        ids = random.integers(0, 258, (1, TOKENS)).astype(np.int32)
        ones = np.ones_like(ids)
        return TokenBatch(ids, ids, np.arange(TOKENS, dtype=np.int32)[None], ones, ones.astype(np.float32))

    engines = {}
    for way, speculation in (("synchronous", "never"), ("speculative", "always")):
        settings = SuperOffloadConfig(
            bucket_bytes=1 << 30, compute_dtype="float32", clip_norm=None, speculation=speculation, cpu_cores_share=0.5
        )
        engine = TimedSuperOffload(pieces.loss, AdamHyper(1e-4), settings, link_bw=link_bw)
        engines[way] = engine, engine.init(pieces.split(init_params(model, jax.random.key(0)))), []
    for step in range(WARM + steps):
        for way, (engine, state, seen) in engines.items():
            state, _ = engine.train_step(state, batch())
            engines[way] = engine, state, seen
            if step >= WARM:
                seen.append(engine.timeline())
    shape = ModelShape(layers, hidden, 1, TOKENS, vocab=2 * 258)
    taken = {way: _medians(seen) for way, (_, _, seen) in engines.items()}
    told: dict[str, Any] = {"measured": {}, "timelines": {}}
    for way, (engine, _, seen) in engines.items():
        predicted, blind = (
            _predicted(shape, taken[rates], link_bw, speculation=way == "speculative") for rates in (way, "synchronous")
        )
        median = sorted(seen, key=lambda timeline: timeline.step_time)[len(seen) // 2]
        told["measured"][way] = {
            **taken[way],
            "predicted": 1e3 * predicted.step_time,
            "predicted from synchronous rates": 1e3 * blind.step_time,
        }
        told["timelines"][way] = dataclasses.asdict(median)
        told["timelines"]["predicted"] = dataclasses.asdict(predicted)
        engine.close()
    return told


def _medians(seen: list[Any]) -> dict[str, float]:
    def busy(lane: str, kind: str = "") -> float:
        each = sorted(
            sum(end - start for label, start, end in timeline.lanes[lane] if label.startswith(kind))
            for timeline in seen
        )
        return 1e3 * each[len(each) // 2]

    steps = sorted(1e3 * timeline.step_time for timeline in seen)
    return {
        "step": steps[len(steps) // 2],
        "accelerator": busy("gpu"),
        "host": busy("host", "adam"),
        "to the host": busy("d2h"),
        "from the host": busy("h2d"),
        "verdict": busy("validator"),
        "no lane": 1e3 * sorted(map(_idle, seen))[len(seen) // 2],
    }


def _idle(timeline: Any) -> float:
    """Seconds of a step in which no lane works: the loop in Python, memory given back."""
    rest, at = timeline.step_time, 0.0
    for start, end in sorted((start, end) for lane in timeline.lanes.values() for _, start, end in lane):
        rest -= max(0.0, end - max(start, at))
        at = max(at, end)
    return rest


def _predicted(shape: Any, taken: dict[str, float], link_bw: float, *, speculation: bool) -> Any:
    """The simulator's step on a machine with the measured rates; a layer is a bucket."""
    from jaxlab.superoffload import Machine, simulate
    from jaxlab.superoffload.simulation import ADAM_SHARE, GPU_SHARE, adam_bytes

    computed_s, adam_s = taken["accelerator"] / 1e3, taken["host"] / 1e3
    machine = Machine(
        name="measured",
        hbm_bytes=1 << 40,
        host_bytes=1 << 42,
        gpu_flops=4 * shape.forward_flops / computed_s / GPU_SHARE,  # forward, again, and twice that backward
        link_bw=link_bw,
        hbm_bw=1e18,  # casts are in what was measured
        dram_bw=adam_bytes(speculation) * shape.n_params / adam_s / ADAM_SHARE["fast"],
        host_flops=1e18,
        cores=1,
    )
    return simulate(
        shape,
        machine,
        speculation=speculation,
        repartition=False,
        bucket_bytes=4 * shape.layer_params,
        cast="gpu",
        verdict_s=(taken["verdict"] + taken["no lane"]) / 1e3,
    )


def _write(link: str) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    told = time_overlap(LINKS[link])
    (WORK / f"overlap {link}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    _write(sys.argv[1])
