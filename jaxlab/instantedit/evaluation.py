"""Editors compared on a set of edits: every result is kept in a file at once, means come with intervals.

    cases = [case_of(edit) for edit in read_pie_bench("data")]
    editors = {"copy": lambda case, seed: case.source_image(), "ours": lambda case, seed: edit(case, seed).image}
    evaluation = evaluate(cases, editors, metrics=MetricSet(), results="work/edits.jsonl", pictures="work/pictures")
    print(evaluation.markdown())

An evaluation that was killed goes on where it stopped. Cases are the independent observations: seeds of one case are
drawn together in the bootstrap.
"""

import dataclasses
import hashlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core import jsonl, progress
from jaxlab.core.statistics import Interval, bootstrap_ci, paired_bootstrap_ci
from jaxlab.instantedit.image_io import to_uint8, write_image
from jaxlab.instantedit.metrics import MetricSet, kind_of, label_of
from jaxlab.instantedit.pie_bench import EDIT_TYPES, PieEdit

_FORMAT = "jaxlab.edits/1"
_NAME = re.compile(r"\w[\w.+ -]{0,99}")

Load = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class EditCase:
    """An edit to be made.

    Attributes:
      id: its name: letters, digits, dots, dashes.
      source: uint8 `[H,W,3]`, or what gives it when it is needed.
      source_prompt: describes it.
      target_prompt: describes what is wanted.
      blend_word: the target's word for the object, if there is one.
      mask: bool `[H,W]`, True where the image is to be edited, or what gives it; None: not known.
      target: the true result, uint8 `[H,W,3]`, or what gives it; None: not known.
      kind: by which results are grouped.
    """

    id: str
    source: np.ndarray | Load
    source_prompt: str
    target_prompt: str
    blend_word: str | None = None
    mask: np.ndarray | Load | None = None
    target: np.ndarray | Load | None = None
    kind: str = ""

    def source_image(self) -> np.ndarray:
        """The source image."""
        return _loaded(self.source)

    def target_image(self) -> np.ndarray | None:
        """The true result."""
        return _loaded(self.target)

    def edit_mask(self) -> np.ndarray | None:
        """The mask."""
        return _loaded(self.mask)


def _loaded(value: Any) -> Any:
    return value() if callable(value) else value


def case_of(edit: PieEdit) -> EditCase:
    """An edit of PIE-Bench; its image is read when needed."""
    return EditCase(
        edit.id,
        edit.image,
        edit.source_prompt,
        edit.target_prompt,
        edit.blend_word,
        edit.mask,
        kind=f"{edit.edit_type} {EDIT_TYPES[edit.edit_type]}",
    )


Editor = Callable[[EditCase, int], Any]
"""From a case and a seed to the edited image, uint8 or in [0, 1], or to an object whose `image` that is."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
      editor: its name.
      case: the case's id.
      seed: given to the editor.
      kind: the case's.
      seconds: that the editor took.
      values: metric -> value; "..._to_target" compares with the true result, others with the source.
    """

    editor: str
    case: str
    seed: int
    kind: str
    seconds: float
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Mean:
    """A metric of an editor over cases.

    Attributes:
      mean: over all finite results; infinite where there is no other.
      interval: of the bootstrap over cases; None with fewer than two of them.
      results: how many there are.
      infinite: results left out of them: the PSNR of equal images.
    """

    mean: float
    interval: Interval | None
    results: int
    infinite: int


def evaluate(
    cases: Sequence[EditCase],
    editors: Mapping[str, Editor],
    *,
    metrics: MetricSet | None = None,
    seeds: Sequence[int] = (0,),
    results: str | os.PathLike[str] | None = None,
    pictures: str | os.PathLike[str] | None = None,
) -> "Evaluation":
    """Runs every editor on every case with every seed, and measures.

    Args:
      cases: with different ids.
      editors: name -> editor; a name stands for one setting: results kept under it are taken for its own.
      metrics: default `MetricSet()`.
      seeds: given to the editors.
      results: a file that keeps what was measured; an evaluation with the same file measures only what is missing.
      pictures: a folder for the edited images, `<editor>/<case>-<seed>.png`.

    Raises:
      ValueError: nothing to do, repeated or odd names, a file of other metrics or other cases, or an edited image of
        another size than its source.
    """
    metrics = metrics or MetricSet()
    for name, values in (("cases", [case.id for case in cases]), ("editors", list(editors)), ("seeds", list(seeds))):
        if not values:
            raise ValueError(f"{name}: expected at least one, got none")
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            raise ValueError(f"{name}: expected different ones, got {repeated[0]!r} twice")
        if odd := [value for value in values if isinstance(value, str) and not _NAME.fullmatch(value)]:
            raise ValueError(f"{name}: expected letters, digits and inside '.+ -', got {odd[0]!r}")
    kept = _kept(results, metrics)
    rows = []
    for case in progress(cases, "edits"):
        fingerprint = _fingerprint(case)
        for name, editor in editors.items():
            for seed in seeds:
                found = kept.get((name, case.id, seed))
                if found is None:
                    row = _measured(name, editor, case, seed, metrics, pictures)
                    if results is not None:
                        jsonl.append(results, dataclasses.asdict(row) | {"fingerprint": fingerprint})
                elif found["fingerprint"] != fingerprint:
                    raise ValueError(f"results: {results} has results of another case of id {case.id!r}")
                else:
                    row = Row(**{field.name: found[field.name] for field in dataclasses.fields(Row)})
                rows.append(row)
    return Evaluation(tuple(rows), dict(metrics.unavailable))


def _kept(results: str | os.PathLike[str] | None, metrics: MetricSet) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What the file holds; a new file gets its first line."""
    if results is None:
        return {}
    lines = jsonl.read(results)
    header = {"format": _FORMAT, "metrics": metrics.description}
    if not lines:
        jsonl.append(results, header)
        return {}
    if lines[0] != header:
        raise ValueError(f"results: {results} is not of format {_FORMAT} with {metrics.description}; got {lines[0]}")
    return {(line["editor"], line["case"], line["seed"]): line for line in lines[1:]}


def _fingerprint(case: EditCase) -> str:
    digest = hashlib.sha256(repr((case.source_prompt, case.target_prompt, case.blend_word, case.kind)).encode())
    for array in (case.source_image(), case.edit_mask(), case.target_image()):
        digest.update(b"none" if array is None else f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _measured(
    name: str,
    editor: Editor,
    case: EditCase,
    seed: int,
    metrics: MetricSet,
    pictures: str | os.PathLike[str] | None,
) -> Row:
    started = time.perf_counter()
    made = editor(case, seed)
    image = np.asarray(getattr(made, "image", made))
    seconds = time.perf_counter() - started
    source, target = case.source_image(), case.target_image()
    if image.shape != source.shape:
        raise ValueError(f"editor {name!r}: expected an image of shape {source.shape}, got {image.shape}")
    image = image if image.dtype == np.uint8 else to_uint8(image)
    if pictures is not None:
        folder = Path(pictures) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{case.id}-{seed}.png", image)
    values = metrics.measure(image, source, mask=case.edit_mask(), prompt=case.target_prompt)
    if target is not None:
        values |= {f"{metric}_to_target": value for metric, value in metrics.measure(image, target).items()}
    return Row(name, case.id, seed, case.kind, seconds, values)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
      rows: one a case, editor and seed.
      unavailable: metric -> why it was not measured.
    """

    rows: tuple[Row, ...]
    unavailable: Mapping[str, str]

    @property
    def editors(self) -> tuple[str, ...]:
        """Their names, in the order given."""
        return tuple(dict.fromkeys(row.editor for row in self.rows))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of the cases, sorted."""
        return tuple(sorted({row.kind for row in self.rows}))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Whatever was measured, in the order met."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.values))

    def mean(self, editor: str, metric: str, *, kind: str | None = None, **options: Any) -> Mean | None:
        """A metric of an editor; None where no result has it.

        Args:
          editor: its name.
          metric: its name.
          kind: of cases; None: all.
          **options: of `bootstrap_ci`.
        """
        rows = [row for row in self._of(editor, metric) if kind in (None, row.kind)]
        finite = [row for row in rows if math.isfinite(row.values[metric])]
        if not finite:
            return Mean(math.inf, None, 0, len(rows)) if rows else None
        values, clusters = [row.values[metric] for row in finite], [row.case for row in finite]
        interval = bootstrap_ci(values, clusters=clusters, **options) if len(set(clusters)) > 1 else None
        return Mean(float(np.mean(values)), interval, len(values), len(rows) - len(finite))

    def difference(self, editor: str, other: str, metric: str, **options: Any) -> Interval:
        """The mean of `editor - other` on the same cases and seeds, with its interval.

        Args:
          editor: its name.
          other: its name.
          metric: its name.
          **options: of `bootstrap_ci`.

        Raises:
          ValueError: fewer than two cases where both have finite values.
        """
        a, b = (
            {(row.case, row.seed): row.values[metric] for row in self._of(name, metric)} for name in (editor, other)
        )
        both = [key for key in a if key in b and math.isfinite(a[key]) and math.isfinite(b[key])]
        values = [[side[key] for key in both] for side in (a, b)]
        return paired_bootstrap_ci(*values, clusters=[case for case, _ in both], **options)

    def _of(self, editor: str, metric: str) -> list[Row]:
        if editor not in self.editors:
            raise ValueError(f"editor: expected one of {', '.join(self.editors)}, got {editor!r}")
        return [row for row in self.rows if row.editor == editor and metric in row.values]

    def tables(
        self, metrics: Sequence[str] | None = None, **options: Any
    ) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, rows) each, as `jaxlab.core.Report` takes them: all cases, then a table a metric by kind.

        Args:
          metrics: names; default all.
          **options: of `bootstrap_ci`.
        """
        names = list(metrics or self.metrics)
        columns = ["editor", *(f"{label_of(name)} {_arrow(name)}" for name in names), "seconds, median"]
        rows = []
        for editor in self.editors:
            cells = [_cell(self.mean(editor, name, **options), name) for name in names]
            seconds = float(np.median([row.seconds for row in self.rows if row.editor == editor]))
            rows.append([editor, *cells, f"{seconds:.3g}"])
        found = [("All edits", columns, rows)]
        if len(self.kinds) > 1:
            for name in names:
                rows = [
                    [kind, *(_cell(self.mean(editor, name, kind=kind, **options), name) for editor in self.editors)]
                    for kind in self.kinds
                ]
                found.append((f"{label_of(name)} {_arrow(name)}", ["kind", *self.editors], rows))
        return found

    def notes(self, metrics: Iterable[str] | None = None) -> list[str]:
        """What a reader of the tables must know."""
        cases, seeds = ({getattr(row, name) for row in self.rows} for name in ("case", "seed"))
        notes = [
            f"{len(cases)} edits, {len(seeds)} seed{'s' * (len(seeds) > 1)}; in brackets 95% intervals of the mean, by "
            "bootstrap over edits."
        ]
        for name in metrics or self.metrics:
            infinite = sum(math.isinf(row.values.get(name, 0.0)) for row in self.rows)
            if infinite:
                notes.append(f"{label_of(name)}: {infinite} results of equal images are infinite and left out.")
        return notes + [f"{kind_of(name).label}: not available ({why})." for name, why in self.unavailable.items()]

    def markdown(self, metrics: Sequence[str] | None = None, *, title: str = "Edits", **options: Any) -> str:
        """A report: `tables` and `notes`.

        Args:
          metrics: names; default all.
          title: of the report.
          **options: of `bootstrap_ci`.
        """
        lines = [f"# {title}", ""]
        for name, columns, rows in self.tables(metrics, **options):
            lines += [f"## {name}", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes(metrics)), ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _arrow(name: str) -> str:
    return "↑" if kind_of(name).higher_is_better else "↓"


def _cell(mean: Mean | None, name: str) -> str:
    if mean is None:
        return "-"
    scale = kind_of(name).scale
    if mean.interval is None:
        return f"{scale * mean.mean:.2f}"
    return f"{scale * mean.mean:.2f} [{scale * mean.interval.low:.2f}, {scale * mean.interval.high:.2f}]"
