"""A mixture of experts trained, improved, compressed, served under energy control, and put to work by a planner."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlab import core
from jaxlab.pipeline.config import PipelineConfig

__all__ = ["PipelineConfig", "run"]


def run(config: PipelineConfig) -> core.Report:
    """Goes through all stages. Needs nothing but a CPU and the extras `serving` and `agents`.

    With a folder every stage is kept: a run goes on where it was killed, and one with other settings makes only the
    stages anew that these concern.

    Raises:
      MissingExtra: an extra is not installed.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: PipelineConfig, folder: Path) -> core.Report:
    from jaxlab.pipeline import Pipeline, pictures

    line = Pipeline(config, folder)
    trained, improved, packed, profiled, worked = (
        getattr(line, name) for name in ("trained", "improved", "packed", "profiled", "worked")
    )
    moe = config.model.moe
    assert moe is not None  # the config has seen to it
    runs = worked.told["runs"]
    by_run = {(run["controller"], run["planned"]): run for run in runs}
    last = config.server.controllers[-1]
    helped, alone = by_run[last, True], by_run[last, False]
    stages = (
        ("trained\n(X-MoE)", trained.told),
        ("improved\n(SFPO)", improved.told),
        ("packed\n(PuzzleMoE)", packed.told),
        ("pairs averaged\ninstead", packed.told["averaged"]),
    )
    before, after = packed.told["expert_bytes_before"], packed.told["expert_bytes_after"]
    share = after / before
    saved = {}
    if set(config.server.controllers) == {"static", "ecofreq"}:
        saved = {"energy_saved, simulated": 1 - by_run["ecofreq", True]["joules"] / by_run["static", True]["joules"]}
    return core.Report(
        system="pipeline",
        title=f"One model through five systems: {moe.num_experts} experts, {moe.top_k} a token",
        metrics={
            "accuracy_trained": trained.told["planned"][0],
            "accuracy_improved": improved.told["planned"][0],
            "accuracy_packed": packed.told["planned"][0],
            "expert_bytes_packed": share,
            "success_with_plans": helped["success"][0],
            "success_without": alone["success"][0],
            "joules_a_solved_task, simulated": helped["joules"] / helped["solved"]
            if helped["solved"]
            else "none was solved",
            **saved,
        },
        tables=(
            (
                f"The model, stage by stage: right commands in {config.quest.rows} held-out situations (measured)",
                ("stage", "next step of a plan shown", "95 %", "no plan", "95 %", "experts, bytes", "seconds"),
                [
                    _model_row("trained to do as a teacher does (X-MoE)", trained.told, before, trained.seconds),
                    _model_row(
                        f"{config.improve.steps} updates by rewards (SFPO)", improved.told, before, improved.seconds
                    ),
                    _model_row("packed in pairs (PuzzleMoE)", packed.told, after, packed.seconds),
                    _model_row("the same pairs averaged instead", packed.told["averaged"], after, None),
                ],
            ),
            (
                f"The agent: {len(config.agent.seeds)} x {config.agent.tasks} held-out tasks over HTTP "
                f"({config.server.num_prefill} + {config.server.num_decode} workers; joules simulated, else measured)",
                WORK,
                [work_row(pictures.label(run), run) for run in runs],
            ),
        ),
        plots=(
            ("Learning to act", pictures.learning(trained.told["curve"], improved.told["curve"])),
            ("Right commands, stage by stage", pictures.accuracies([_bars(*stage) for stage in stages])),
            (
                "Load of the experts",
                pictures.loads({"trained": trained.told["load"], "improved": improved.told["load"]}),
            ),
            ("The agent at work", pictures.work(runs)),
            (
                "Power while the agent works with plans (simulated)",
                pictures.power([run for run in runs if run["planned"]]),
            ),
        ),
        notes=(
            "Every stage hands on a Hugging Face folder, and knows the others by public names alone. A command is "
            "right if it brings what is next in the task nearer, or does it; the situations are a teacher's, with "
            "detours, in tasks that were not trained on; four commands are drawn in each, as the agent draws them. The "
            "reward of the reinforcement is the same, three times in four with the next step of a plan.",
            f"The agent draws at temperature {config.agent.temperature:g}. Its plans are the package's planner's "
            "(jaxlab.eaglet.Planner.load), of which it is shown one step at a time. Iterations were measured on this "
            "machine and stretched by a model at the lower clock; joules are a power model's; no GPU is there. They "
            "include the idle time between requests, and so change with the speed of this machine. EcoFreq was to keep "
            "iterations within "
            + " and ".join(f"{value:.1f} ms ({phase})" for phase, value in worked.told["objectives_ms"].items())
            + "; its tables erred by "
            + " and ".join(f"{each['error']:.0%} ({phase})" for phase, each in profiled.told.items())
            + " on iterations held out.",
        ),
    )


def _model_row(stage: str, told: Mapping[str, Any], size: int, seconds: float | None) -> tuple[Any, ...]:
    planned, plain = told["planned"], told["plain"]
    return (stage, planned[0], _interval(planned), plain[0], _interval(plain), size, seconds)


def _bars(name: str, told: Mapping[str, Any]) -> tuple[str, Any, Any]:
    return name, told["planned"], told["plain"]


WORK = (
    *("clocks and plans", "solved", "95 %", "steps", "actions/s", "prompt tokens", "written tokens"),
    *("first token, ms", "seconds", "J", "J a solved task", "clock changes"),
)


def work_row(label: str, run: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row of the table `WORK`."""
    return (
        label,
        run["success"][0],
        _interval(run["success"]),
        run["steps"][0],
        run["actions"] / run["seconds"],
        int(run["prompt_tokens"]),
        int(run["written_tokens"]),
        run["ttft_ms"],
        run["seconds"],
        run["joules"],
        run["joules"] / run["solved"] if run["solved"] else None,
        int(run["switches"]),
    )


def _interval(found: Any) -> str:
    _, low, high = found
    return f"{low:.2f} to {high:.2f}" if low == low else ""
