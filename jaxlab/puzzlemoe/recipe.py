"""A mixture of experts trained, compressed in every way, and run from its packed words."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlab import core
from jaxlab.core.plan import Plan, Target

if TYPE_CHECKING:
    from jaxlab.puzzlemoe.study import Study

__all__ = ["ServingConfig", "StudyConfig", "plan", "run"]

_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A mixture to compress, and how its forms are compared; every default is ours, where the paper is not named.

    Attributes:
      model: a training config (YAML), whose model is trained where it is absent, or the folder of a trained model.
      changes: dotted overrides of the training config.
      data: text of calibration and evaluation; default: the training config's, or the Python standard library.
      length: tokens of a row.
      methods: of `baselines.METHODS`, beside PuzzleMoE.
      ratios: fractions of the experts that go (paper: 0.25 and 0.5).
      taus: for the curve of similarity thresholds (paper: 0.4).
      calibration: rows that calibrate (paper: 128 of 2048 tokens).
      batches: held-out batches of 16 rows; 0: all.
      questions: of each kind.
      beside: a language model whose exponents are shown beside this one's, as `load_pretrained` takes it.
      prompt: what both forms of the model go on from.
      tokens: how much they write.
      seed: of pairs, calibration rows and questions.
      folder: keeps trained models and packed folders; none: a temporary one, so that every run starts anew.
    """

    model: str = "configs/xmoe/top2.yaml"
    changes: tuple[str, ...] = ()
    data: str | None = None
    length: int = 128
    methods: tuple[str, ...] = ("wanda", "wanda_2_4", "naee", "hc_smoe", "m_smoe", "average", "drop")
    ratios: tuple[float, ...] = (0.25, 0.5)
    taus: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 1.0)
    calibration: int = 64
    batches: int = 16
    questions: int = 100
    beside: str | None = None
    prompt: str = "import os\n\ndef "
    tokens: int = 64
    seed: int = 0
    folder: str | None = None

    def __post_init__(self):
        from jaxlab.puzzlemoe.baselines import METHODS
        from jaxlab.puzzlemoe.config import check_name, check_ratio, check_tau

        for method in self.methods:
            check_name("methods", method, tuple(METHODS))
        if not self.ratios:
            raise ValueError("ratios: expected at least one, got none")
        for ratio in self.ratios:
            check_ratio(ratio)
        for tau in self.taus:
            check_tau(tau)
        for name, least in (("calibration", 8), ("length", 2), ("tokens", 1), ("questions", 1), ("batches", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a value >= {least}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """A model on one GPU.

    Attributes:
      model: one of `serving.MODELS`, or the path of a `config.json`.
      ratio: fraction of the experts that is gone; 0: bfloat16 experts.
      phase: "decode" or "prefill".
      batch: rows.
      context: positions of each row (paper: 1024 prompt tokens and 512 new ones).
    """

    model: str = "mixtral-8x7b"
    ratio: float = 0.5
    phase: str = "decode"
    batch: int = 1
    context: int = 1536


def plan(config: ServingConfig, target: Target) -> Plan:
    """Compiles a step of serving the model; nothing of it runs. See `serving.serving_plan`."""
    from jaxlab.puzzlemoe.serving import hf_config, serving_plan

    return serving_plan(
        hf_config(config.model),
        target,
        ratio=config.ratio,
        phase=config.phase,
        batch=config.batch,
        context=config.context,
    )


def run(config: StudyConfig) -> core.Report:
    """Compresses a trained mixture by every method; tells loss, answers, bytes on disk, and what became of the weights.

    Needs nothing but a CPU: the model is trained here, on the Python standard library's own source.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> core.Report:
    from jaxlab.puzzlemoe import PuzzleConfig, pictures, unpack_moe
    from jaxlab.puzzlemoe.study import LABELS, by_method

    study, source = _study(config, folder)
    moe = study.model.config.moe
    methods = ("puzzle", *config.methods)
    rows = by_method(study, config.ratios, methods, seeds=(config.seed,))
    packed = {
        ratio: study.packed(PuzzleConfig(ratio=ratio, seed=config.seed))
        for ratio in sorted(config.ratios, reverse=True)
    }
    ratio, (model, params, report) = next(iter(packed.items()))
    sizes = [_on_disk(folder, ratio, *made) for ratio, made in packed.items()]
    alike = _writes_the_same(config, study, folder / f"packed-{ratio:g}")
    quality = study.quality(*unpack_moe(model, params))
    curve = [(tau, *_at(study, config, ratio, tau)) for tau in config.taus]
    forms = [
        (f"{bits} bits a position", *study.stored_loss(PuzzleConfig(ratio=ratio, seed=config.seed), bits)[::-1])
        for bits in (16, 8, 6)
    ]
    losses = {(method, share): loss for method, share, loss, _ in rows}
    return core.Report(
        system="puzzlemoe",
        title=f"{moe.num_experts} experts, {moe.top_k} a token: two in the space of one, without training",
        metrics={
            "loss_full": study.full.loss,
            "loss_packed": quality.loss,
            **{f"loss_{method}": losses.get((method, ratio)) or "infeasible" for method in config.methods},
            "expert_bytes_on_disk": sizes[0][3],
            "same_tokens_as_decoded": alike,
            "mask_density": float(report.mask_density.mean()),
            "relative_error_of_weights": float(report.rel_mse.mean()),
            "exponent_coverage": float(report.exponent_coverage.mean()),
        },
        tables=(
            (
                "Cross-entropy on held-out text, nats a token; the model as it is: " + f"{study.full.loss:.4f}",
                ("method", "experts that go", "loss", "added"),
                [
                    (LABELS[method], "none; half the weights" if method == "wanda_2_4" else f"{share:.0%}", loss, added)
                    for method, share, loss, _ in rows
                    for added in [None if loss is None else loss - study.full.loss]
                ],
            ),
            (
                f"Questions made of held-out text, {config.questions} of each kind, four choices",
                ("kind", "as it is", f"packed, {ratio:.0%}"),
                [(kind, study.full.accuracy[kind], quality.accuracy[kind]) for kind in quality.accuracy],
            ),
            (
                "Packed folders: routed experts, bytes",
                ("experts that go", "bfloat16", "on disk", "share", "after loading"),
                sizes,
            ),
            (
                f"How the pairs are stored, {ratio:.0%} of the experts gone",
                ("form", "bits a weight", "loss"),
                forms,
            ),
            (
                f"Threshold of similarity, {ratio:.0%} of the experts gone",
                ("tau", "loss", "similar", "relative squared error of the weights"),
                curve,
            ),
            (
                "Real models in GB, from their configurations (arithmetic)",
                ("model", "bfloat16", "25 % gone", "50 % gone"),
                _real_models(),
            ),
        ),
        plots=(
            ("What compression costs, by method", pictures.losses(rows, study.full.loss)),
            (
                "Exponents of the weights, before and after merging",
                pictures.exponents(_histograms(config, study, params)),
            ),
            ("Weights that are kept, by layer", pictures.by_layer(report.mask_density, "share not masked")),
            ("Error of the merged weights, by layer", pictures.by_layer(report.rel_mse, "relative squared error")),
            ("The threshold tau", pictures.thresholds(curve, study.full.loss)),
        ),
        notes=(
            f"The model: {source}; calibrated on {config.calibration} x {config.length} training tokens, judged on "
            "held-out text. Wanda masks weights and saves no bytes here; merged baselines are tied as copies.",
            "Losses and answers are those of decoded weights, one program for all. The packed folder, opened by path, "
            f"computes from words, and wrote {'the same' if alike else 'other'} {config.tokens} greedy tokens.",
        ),
    )


def _study(config: StudyConfig, folder: Path) -> "tuple[Study, str]":
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.puzzlemoe.study import Study

    path, data = Path(config.model), config.data
    told = config.model
    if path.suffix in (".yaml", ".yml"):
        from jaxlab.training import trained

        settings = training_config(config.model, config.changes)
        data = data or settings.data
        told = f"{settings.steps} steps of {core.find_config(config.model).name}"
        path = trained(settings, folder / "trained")
    model, params = load_pretrained(path)
    return Study(
        model,
        params,
        load_tokenizer(path),
        data or "python-stdlib",
        length=config.length,
        calibration=config.calibration,
        batches=config.batches,
        questions=config.questions,
        seed=config.seed,
    ), told


def training_config(path: str, changes: Sequence[str] = ()) -> Any:
    """The training settings of a YAML file, for `jaxlab.training.trained`.

    Raises:
      ValueError: the file is no training config; the message names it.
    """
    from jaxlab.training import TrainConfig

    try:
        return core.load_config(TrainConfig, core.find_config(path), changes)
    except ValueError as error:
        raise ValueError(f"model: {path} is no training config: {error}") from error


def _on_disk(folder: Path, ratio: float, model: Any, params: Any, report: Any) -> tuple[Any, ...]:
    """Saves the packed model; its routed experts in bytes, as bfloat16, in the files, and loaded again."""
    from jaxlab.models import load
    from jaxlab.puzzlemoe import load_packed, save_packed
    from jaxlab.puzzlemoe.study import expert_bytes

    where = folder / f"packed-{ratio:g}"
    save_packed(where, model, params, report)
    with load.open_tensors(where) as tensors:
        stored = sum(tensors[name].nbytes for name in tensors if ".puzzlemoe." in name)
    loaded = expert_bytes(load_packed(where)[1])
    return f"{ratio:.0%}", report.expert_bytes_before, stored, stored / report.expert_bytes_before, loaded


def _writes_the_same(config: StudyConfig, study: "Study", packed: Path) -> bool:
    """Whether greedy tokens of the folder, opened by path, are those of the decoded weights."""
    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import load_pretrained
    from jaxlab.puzzlemoe import unpack_moe

    model, params = load_pretrained(packed)
    greedy = SamplingParams(max_tokens=config.tokens, temperature=0.0)
    ours, theirs = (
        generate(*made, [config.prompt], greedy, tokenizer=study.tokenizer)
        for made in ((model, params), unpack_moe(model, params))
    )
    return bool((ours.tokens == theirs.tokens).all())


def _at(study: "Study", config: StudyConfig, ratio: float, tau: float) -> tuple[float, float, float]:
    from jaxlab.puzzlemoe import PuzzleConfig

    loss, report = study.merged_loss(PuzzleConfig(ratio=ratio, tau=tau, seed=config.seed))
    return loss, float(report.sim_fraction.mean()), float(report.rel_mse.mean())


def _histograms(config: StudyConfig, study: "Study", packed: Any) -> dict[str, Any]:
    """Exponents of the experts' weights, of the packed magnitudes, and of the MLPs of the model beside."""
    import jax.numpy as jnp

    from jaxlab.models import load_pretrained
    from jaxlab.puzzlemoe import exponent_histogram, unpack

    blocks = [name for name in packed if name.startswith("blocks_") and "experts" in packed[name]["mlp"]]
    found = {}
    if config.beside is not None:
        _, other = load_pretrained(config.beside)
        mlps = [tree["mlp"] for name, tree in other.items() if name.startswith("blocks_")]
        found[f"MLPs of {config.beside.rpartition(':')[2]}"] = exponent_histogram(mlps)
    found["this model's experts"] = exponent_histogram(
        [study.params[name]["mlp"][matrix] for name in blocks for matrix in ("gate", "up", "down")]
    )
    words = [getattr(packed[name]["mlp"]["experts"], matrix) for name in blocks for matrix in ("gate", "up", "down")]
    # Every position with both masks set: the magnitude.
    magnitudes = [unpack(jnp.asarray(w) | jnp.uint16(0x3000), 0) for w in words]
    found["their pairs, merged"] = exponent_histogram(magnitudes)
    return found


def _real_models() -> list[tuple[Any, ...]]:
    from jaxlab.puzzlemoe import estimate_memory
    from jaxlab.puzzlemoe.serving import MODELS, hf_config

    return [
        (name, *(estimate_memory(hf_config(name), ratio).total_bytes / _GB for ratio in (0.0, 0.25, 0.5)))
        for name in MODELS
    ]
