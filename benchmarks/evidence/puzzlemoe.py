"""Mixtures of experts really trained, then compressed by every method: loss on held-out text, and questions of it."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import FOLDER, Item

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "puzzlemoe"
"""Trained models, each under a hash of its settings."""

# Name -> training config and overrides: the two shapes as X-MoE's study trains them, and the first five times longer.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "8 experts, 2 a token": ("configs/xmoe/top2.yaml", ()),
    "64 experts, 6 a token, 2 shared": ("configs/xmoe/fine_grained.yaml", ()),
    "8 experts, 3000 steps": ("configs/xmoe/top2.yaml", ("steps=3000",)),
}
RATIOS = (0.25, 0.5)
SEEDS = (0, 1, 2)
TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
NORMS = ("sum", "tokens", "calls", "magnitude")
LENGTH, CALIBRATION, BATCHES, QUESTIONS = 128, 128, 32, 200


def items() -> Iterator[Item]:
    """For each model: every method, then PuzzleMoE's threshold, its norms, its pairings and its forms of storage."""
    from jaxlab.puzzlemoe.study import LABELS, RANDOM

    for name in MODELS:
        common = {"model": _settings(name), "rows": [LENGTH, CALIBRATION, BATCHES, QUESTIONS]}
        yield Item(f"{name}, as it is", _METHODS, common, functools.partial(_full, name), seeds=(0,))
        for ratio in reversed(RATIOS):
            for method in LABELS:
                if method == "wanda_2_4" and ratio != max(RATIOS):
                    continue
                yield Item(
                    f"{name}, {method}, {ratio:g}",
                    _METHODS,
                    {**common, "method": method, "ratio": ratio},
                    functools.partial(_method, name, method, ratio),
                    seeds=SEEDS if method in RANDOM else SEEDS[:1],
                )
        for tau in TAUS:
            yield Item(
                f"{name}, tau {tau:g}",
                _TAU,
                {**common, "tau": tau},
                functools.partial(_variant, name, {"tau": tau}),
                seeds=SEEDS,
            )
        for norm in NORMS:
            yield Item(
                f"{name}, norm {norm}",
                _NORM,
                {**common, "norm": norm},
                functools.partial(_variant, name, {"norm": norm}),
                seeds=SEEDS,
            )
        for bits in (16, 8, 6):
            yield Item(
                f"{name}, {bits} bits",
                _BITS,
                {**common, "bits": bits},
                functools.partial(_stored, name, bits),
                seeds=SEEDS,
            )
        yield Item(
            f"{name}, entropy", _ENTROPY, {"model": common["model"]}, functools.partial(_entropy, name), seeds=(0,)
        )
    name = next(iter(MODELS))
    yield Item(
        f"{name}, pairs",
        _PAIRS,
        {"model": _settings(name), "rows": [LENGTH, CALIBRATION, BATCHES]},
        functools.partial(_pairings, name),
        seeds=tuple(range(16)),
    )


_METHODS = (
    "Cross-entropy on held-out text (nats a byte) and rightly answered questions made of it (four choices, up to 200 "
    "of each kind); methods that draw pairs or experts: mean and standard deviation over three seeds"
)
_TAU = "The threshold tau, all experts paired, mean of three pairings"
_NORM = "How calibration statistics become norms, all experts paired, mean of three pairings"
_BITS = "How the merged pairs are stored, all experts paired, mean of three pairings"
_ENTROPY = "What packed words carry, bits of 16 a position: no code of single positions can store them in less"
_PAIRS = "Sixteen random pairings, and pairs searched from each of three of them"


def pages() -> None:
    """Draws the pictures of the system's page from the outcome."""
    import json

    from jaxlab.puzzlemoe import pictures

    content = json.loads((FOLDER / "puzzlemoe.json").read_text())["items"]
    rows = {name: item["row"] for name, item in content.items()}
    for index, name in enumerate(MODELS):
        full = rows[f"{name}, as it is"]["loss"]
        made = [
            (method, ratio, row["loss"], row.get("std"))
            for method, ratio, row in (
                (key.removeprefix(f"{name}, ").split(", ")[0], float(key.split(", ")[-1]), row)
                for key, row in rows.items()
                if key.startswith(f"{name}, ") and "method" in content[key]["settings"]
            )
        ]
        picture = pictures.losses(made, full)
        picture.savefig(FOLDER / f"puzzlemoe_methods_{index}.png", dpi=100, bbox_inches="tight")
    name = next(iter(MODELS))
    curve = [
        (tau, row["loss"], row["similar"], row["relative error of weights"])
        for tau in TAUS
        for row in [rows[f"{name}, tau {tau:g}"]]
    ]
    drawn = pictures.thresholds(curve, rows[f"{name}, as it is"]["loss"])
    drawn.savefig(FOLDER / "puzzlemoe_tau.png", dpi=100, bbox_inches="tight")


def _settings(name: str) -> dict[str, Any]:
    from jaxlab import core
    from jaxlab.puzzlemoe.recipe import training_config

    return core.to_dict(training_config(*MODELS[name]))


@functools.cache
def _study(name: str) -> Any:
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.puzzlemoe.recipe import training_config
    from jaxlab.puzzlemoe.study import Study
    from jaxlab.training import trained

    config = training_config(*MODELS[name])
    folder = trained(config, WORK)
    return Study(
        *load_pretrained(folder),
        load_tokenizer(folder),
        config.data,
        length=LENGTH,
        calibration=CALIBRATION,
        batches=BATCHES,
        questions=QUESTIONS,
    )


def _quality_row(name: str, found: list[Any]) -> dict[str, Any]:
    losses = [quality.loss for quality in found]
    row: dict[str, Any] = {
        "loss": float(np.mean(losses)),
        "std": float(np.std(losses)) if len(losses) > 1 else None,
        "added": float(np.mean(losses)) - _study(name).full.loss,
    }
    for kind in found[0].accuracy:
        row[f"{kind}, %"] = round(100 * float(np.mean([quality.accuracy[kind] for quality in found])), 1)
    return row


def _full(name: str) -> dict[str, Any]:
    return {"model": name, "method": "as it is", "experts that go": "none", **_quality_row(name, [_study(name).full])}


def _method(name: str, method: str, ratio: float) -> dict[str, Any]:
    from jaxlab.puzzlemoe.study import LABELS, RANDOM

    study = _study(name)
    made = [study.compressed_by(method, ratio, seed) for seed in (SEEDS if method in RANDOM else SEEDS[:1])]
    row = {
        "model": name,
        "method": LABELS[method],
        "experts that go": "none; half the weights" if method == "wanda_2_4" else f"{ratio:.0%}",
    }
    if None in made:
        return row | {"loss": None, "note": "too many subsets to enumerate"}
    return row | _quality_row(name, [study.quality(*pair) for pair in made])


def _variant(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    from jaxlab.puzzlemoe import PuzzleConfig

    study = _study(name)
    made = [study.merged_loss(PuzzleConfig(seed=seed, **changes)) for seed in SEEDS]
    loss = float(np.mean([loss for loss, _ in made]))
    reports = [report for _, report in made]
    return {
        "model": name,
        **changes,
        "loss": loss,
        "added": loss - study.full.loss,
        "similar": float(np.mean([report.sim_fraction for report in reports])),
        "relative error of weights": float(np.mean([report.rel_mse for report in reports])),
    }


def _stored(name: str, bits: int) -> dict[str, Any]:
    from jaxlab.puzzlemoe import PuzzleConfig

    study = _study(name)
    losses, sizes = zip(*(study.stored_loss(PuzzleConfig(seed=seed), bits) for seed in SEEDS))
    loss = float(np.mean(losses))
    return {
        "model": name,
        "bits a position": bits,
        "bits a weight": sizes[0],
        "loss": loss,
        "added": loss - study.full.loss,
    }


def _entropy(name: str) -> dict[str, Any]:
    from jaxlab.puzzlemoe import PuzzleConfig, packed_entropy

    _, params, _ = _study(name).packed(PuzzleConfig())
    experts = [tree["mlp"]["experts"] for key, tree in params.items() if key.startswith("blocks_")]
    words = [np.asarray(getattr(one, matrix)).reshape(-1) for one in experts for matrix in ("gate", "up", "down")]
    return {"model": name, **packed_entropy(np.concatenate(words))._asdict()}


def _pairings(name: str) -> dict[str, Any]:
    from jaxlab.puzzlemoe import PuzzleConfig

    study = _study(name)
    drawn = [study.merged_loss(PuzzleConfig(seed=seed))[0] for seed in range(16)]
    searched = [study.merged_loss(PuzzleConfig(seed=seed, pairing="search"))[0] for seed in SEEDS]
    return {
        "model": name,
        "best": min(drawn),
        "mean": float(np.mean(drawn)),
        "worst": max(drawn),
        "std": float(np.std(drawn)),
        "searched, mean": float(np.mean(searched)),
        "the three they started from": float(np.mean(drawn[: len(SEEDS)])),
    }
