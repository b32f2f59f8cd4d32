"""A small AlphaFold3 overfitted on crops of real structures, sampled, and held to the truth; fed by the cache."""

import dataclasses
from typing import Any

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.megafold.network import Network
from jaxlab.megafold.study import Outcome, Study, StudyConfig, opened
from jaxlab.megafold.train import TrainSettings

__all__ = ["PlanConfig", "StudyConfig", "plan", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A training step to compile.

    Attributes:
      network: whose; its sizes are the batch's.
      training: optimiser and losses.
      batch_size: structures, over all devices.
      mesh: axes over the devices, `data` and `pair`; empty: `jaxlab plan --mesh` says, or all along `data`.
    """

    network: Network = dataclasses.field(default_factory=Network)
    training: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    batch_size: int = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles the step for a target, which need not be there; see `jaxlab.megafold.compiled.compile_step`."""
    from jaxlab.megafold.compiled import compile_step

    return compile_step(config.network.config, target, batch_size=config.batch_size, settings=config.training)


def run(config: StudyConfig) -> core.Report:
    """Samples the structures, trains on them, samples again; tells lDDT, RMSD and confidence, with pictures.

    Needs nothing but a CPU. A run with a folder goes on where it was killed.
    """
    with opened(config) as study:
        return _run(config, study)


def _run(config: StudyConfig, study: Study) -> core.Report:
    import jax

    from jaxlab.megafold import pictures
    from jaxlab.megafold.study import initial_state

    state = initial_state(config)
    before = study.sampled(state.params)
    state = study.train(state)
    after = study.sampled(state.ema_params)
    study.save(after)
    stall = study.stall(state, config.stall_steps) if config.stall_steps else {}
    rows = core.jsonl.read(study.folder / "metrics.jsonl")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    best, worst = after[0], before[0]
    note = (
        "Samples are those of the averaged weights; the first is the one that the network itself trusts most. lDDT is "
        "over all resolved atoms, without distances inside a residue; the RMSD is after one rigid alignment; samples "
        "nearer to the mirror image of the truth, which lDDT cannot tell from it, are counted as mirrored. The "
        "network has seen nothing but these crops: this shows that everything trains, not that it predicts."
    )
    return core.Report(
        system="megafold",
        title=f"AlphaFold3 of {parameters / 1e6:.1f} M parameters, overfitted on {', '.join(x.name for x in after)}",
        metrics={
            "parameters": parameters,
            "steps": int(state.step),
            "first_loss": rows[0]["loss"],
            "final_loss": _last(rows, "loss"),
            "lddt_before": worst.lddt[0],
            "lddt": best.lddt[0],
            "rmsd_before": worst.rmsd[0],
            "rmsd": best.rmsd[0],
            "plddt": float(best.predictions[0].plddt.mean()),
            **{f"iterations_per_s, {way}": rate for way, rate in stall.items()},
        },
        tables=(
            (
                f"{config.samples} samples each, {config.sampling_steps} steps (measured)",
                (
                    *("structure", "tokens", "atoms", "lDDT before", "lDDT", "best lDDT", "RMSD before, Å", "RMSD, Å"),
                    *("mirrored", "mean pLDDT", "pTM", "ipTM"),
                ),
                [_row(*pair) for pair in zip(before, after)],
            ),
            *(
                (
                    (
                        "Training steps a second on this CPU, which also reads (measured)",
                        ("features", "iterations/s", "of read ahead"),
                        [(way, rate, rate / stall["cache, read ahead"]) for way, rate in stall.items()],
                    ),
                )
                if stall
                else ()
            ),
        ),
        plots=(
            *(plot for pair in zip(before, after) for plot in _plots(*pair)),
            ("Losses", pictures.losses(rows)),
            *((("Data stall", pictures.stall(stall)),) if stall else ()),
        ),
        notes=(*(("Made-up structures: the library's data is not here.",) if study.synthetic else ()), note),
        synthetic=study.synthetic,
    )


def _row(before: Outcome, after: Outcome) -> tuple[Any, ...]:
    first = after.predictions[0]
    return (
        after.name,
        len(after.features["restype"]),
        len(after.features["resolved"]),
        before.lddt[0],
        after.lddt[0],
        max(after.lddt),
        before.rmsd[0],
        after.rmsd[0],
        f"{sum(after.mirrored)} of {len(after.mirrored)}",
        float(first.plddt.mean()),
        first.ptm,
        first.iptm,
    )


def _plots(before: Outcome, after: Outcome) -> list[tuple[str, Any]]:
    from jaxlab.megafold import pictures

    return [
        (f"{after.name}: structure", pictures.structures(before, after)),
        (f"{after.name}: distances", pictures.distances(after)),
        (f"{after.name}: aligned error", pictures.aligned_error(after)),
    ]


def _last(rows: list[dict[str, float]], name: str) -> float:
    """The median of the last twentieth: noise levels are drawn anew in every step."""
    values = sorted(row[name] for row in rows[-max(1, len(rows) // 20) :])
    return values[len(values) // 2]
