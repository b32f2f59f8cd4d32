"""A small vision-language model and the protocol on it: votes against self-verification, with and without the image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.core.statistics import Interval
from jaxlab.vlm_scaling.budget import choose
from jaxlab.vlm_scaling.compiled import PlanConfig, compile_phase
from jaxlab.vlm_scaling.protocol import Findings, ProtocolConfig, investigate, subject
from jaxlab.vlm_scaling.report import Row

__all__ = ["PlanConfig", "ProtocolConfig", "plan", "run", "tables"]


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles reading a question or decoding its samples for a target, which need not be there."""
    return compile_phase(config, target)


def run(config: ProtocolConfig) -> core.Report:
    """Trains the stages that are named, opens or reaches the other models, and runs the protocol on each.

    Needs nothing but a CPU for the small model. With a folder, a run goes on where it was killed: no step, no sample
    and no verdict is made twice.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: ProtocolConfig, folder: Path) -> core.Report:
    from jaxlab.vlm_scaling import pictures

    found = {
        name: investigate(config, name, subject(config, name, folder), folder)
        for name in core.progress(config.models, "models")
    }
    reports = {name: each.report for name, each in found.items()}
    vote, own = f"majority@{config.n}", f"best-of@{config.n}"
    return core.Report(
        system="vlm_scaling",
        title=f"{config.n} samples of {len(next(iter(reports.values())).questions)} questions, by {len(found)} models",
        metrics={
            **{f"greedy, {name}": report.accuracy["greedy"] for name, report in reports.items()},
            **{f"majority, {name}": report.accuracy[vote] for name, report in reports.items()},
            **{f"best-of-N minus majority, {name}": _difference(report.row(own)) for name, report in reports.items()},
        },
        tables=tables(config, found),
        plots=(
            *((f"Accuracy by tokens, {name}", pictures.accuracy_by_tokens(report)) for name, report in reports.items()),
            ("What verdicts rest on", pictures.verdicts(reports, config.modes)),
        ),
        notes=(
            "All of it measured; the small model was trained on other images. Intervals are bootstrapped over "
            f"questions, p-values are exact McNemar tests against {vote}, after Holm's correction. Tokens are those "
            "read and written, a prefix that samples share counted once.",
            "With verdicts a sample is read again: compare accuracies at equal tokens, not at equal N.",
        ),
    )


def tables(config: ProtocolConfig, found: Mapping[str, Findings]) -> tuple[tuple[str, Any, Any], ...]:
    """Strategies of each model, verdicts by input, budgets, and doubts: (title, columns, rows) each."""
    return (
        *((f"Strategies, {name}", STRATEGIES, strategies(each)) for name, each in found.items()),
        ("Verdicts by what the verifier is shown", VERDICTS, verdicts(config, found)),
        ("A strategy chosen on some images, and what it is worth on the others", BUDGETS, budgets(config, found)),
        ("Moments of doubt", DOUBTS, [(name, *doubts(each)) for name, each in found.items()]),
    )


STRATEGIES = ("strategy", "accuracy", "95 %", "minus the vote", "95 % of it", "p", "tokens a question")


def strategies(found: Findings) -> list[tuple[Any, ...]]:
    """Rows of the table `STRATEGIES`."""
    return [
        (
            *(row.strategy, row.accuracy.mean, _interval(row.accuracy)),
            *(_difference(row), _interval(row.difference), row.adjusted, round(row.tokens.total)),
        )
        for row in found.report.table
    ]


VERDICTS = (
    *("model", "shown", "yes", "right", "balanced accuracy", "AUROC", "wrong accepted", "right rejected"),
    *("calibration error", "best of N by it"),
)


def verdicts(config: ProtocolConfig, found: Mapping[str, Findings]) -> list[tuple[Any, ...]]:
    """Rows of the table `VERDICTS`."""
    rows = []
    for name, each in found.items():
        for place, mode in enumerate(config.modes):
            told = each.report.verdicts[mode]
            selected = f"best-of{f'[{mode}]' if place else ''}@{config.n}"
            rows.append(
                (
                    *(name, mode, told.accept_rate, told.base_rate, told.balanced_accuracy, told.auroc),
                    *(told.false_accept, told.false_reject, told.calibration_error, each.report.accuracy[selected]),
                )
            )
    return rows


BUDGETS = (
    *("model", "tokens at most", "chosen", "where chosen", "on the others", "95 %", "minus the next", "95 % of it"),
    *("best in hindsight", "regret"),
)


def budgets(config: ProtocolConfig, found: Mapping[str, Findings]) -> list[tuple[Any, ...]]:
    """Rows of the table `BUDGETS`."""
    return [
        (name, *budget(config, each, tokens))
        for name, each in found.items()
        for tokens in config.budgets
        if any(row.selectable and row.tokens.total <= tokens for row in each.report.table)
    ]


def budget(config: ProtocolConfig, found: Findings, tokens: float) -> tuple[Any, ...]:
    """A row of the table `BUDGETS`, without the model.

    Raises:
      ValueError: no strategy takes so few tokens.
    """
    told = choose(found.report, tokens, share=config.dev, seed=config.seed)
    rival = told.runners_up[0].difference if told.runners_up else None
    return (
        *(tokens, told.strategy, told.chosen.dev, told.accuracy.mean, _interval(told.accuracy)),
        *(None if rival is None else rival.mean, _interval(rival)),
        *(told.hindsight.strategy, told.regret),
    )


DOUBTS = (
    *("model", "samples with one", "right with", "right without", "within questions", "95 %", "questions with both"),
    *("wrong to right", "right to wrong", "wrong to wrong", "unchanged", "one put in: gain", "95 % of it"),
)


def doubts(found: Findings) -> tuple[Any, ...]:
    """A row of the table `DOUBTS`, without the model."""
    told = found.doubts
    seen: Any = told.contrast
    changes = [told.changes.get(kind) for kind in ("wrong->right", "right->wrong", "wrong->wrong'", "unchanged")]
    return (
        *(seen.rate, seen.with_marker, seen.without_marker, None if seen.within is None else seen.within.mean),
        *(_interval(seen.within), seen.questions, *changes),
        *(None if told.inserted is None else told.inserted.mean, _interval(told.inserted)),
    )


def _difference(row: Row) -> float | None:
    return None if row.difference is None else row.difference.mean


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{value.low:.3g} to {value.high:.3g}"
