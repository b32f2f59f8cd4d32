"""The tour's page: one HTML file with everything in it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxlab.core.report import Report

_LONG = 40  # characters from which a text is a quotation, not a figure

_CSS = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

_UNITS = {"_s": "s", "_ms": "ms", "_mib": "MiB", "_gib": "GiB"}

Part = tuple[str, str, float, str, Report | None]  # name, state, seconds, error, report


def render(parts: Sequence[Part], facts: Mapping[str, Any]) -> str:
    """The whole page."""
    good = sum(state != "failed" for _, state, *_ in parts)
    seconds = sum(part[2] for part in parts)
    machine = facts["machine"]
    where = f"{escape(str(machine['cpu']))}, {machine['cores']} cores, Python {machine['python']}"
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>jaxlab: the tour</title>',
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_CSS}</style></head><body>',
            "<header><div><h1>jaxlab: the tour</h1>",
            f"<p>{good} of {len(parts)} sections, {seconds:.0f} s of work &middot; {where} &middot; JAX "
            f"{escape(facts['versions'].get('jax', '?'))} &middot; {escape(facts['date'])}</p></div></header>",
            "<main><nav>",
            *map(_card, parts),
            "</nav>",
            *map(_section, parts),
            "</main><footer>",
            "<p>Every figure on this page was measured by the run that wrote it. Again: "
            "<code>jaxlab tour --fresh</code>; one section: <code>jaxlab tour --only NAME</code>. "
            "The same as data: <code>report.json</code>.</p>",
            _table("Versions", ("package", "version"), list(facts["versions"].items())),
            "</footer></body></html>\n",
        )
    )


def _card(part: Part) -> str:
    name, state, seconds, _, report = part
    title = report.title if report else name.replace("_", " ")
    return f'<a href="#{escape(name)}"><b>{escape(title)}</b><small>{seconds:.0f} s{_badge(state)}</small></a>'


def _section(part: Part) -> str:
    name, state, seconds, error, report = part
    if report is None:
        return (
            f'<section id="{escape(name)}"><h2>{escape(name.replace("_", " "))}{_badge(state)}</h2>'
            f'<p class="error">{escape(error)}</p>'
            f'<p class="about">The whole trace: {escape(name)}/error.txt</p></section>'
        )
    synthetic = '<span class="badge synthetic">synthetic input</span>' if report.synthetic else ""
    texts = {key: value for key, value in report.metrics.items() if isinstance(value, str) and len(value) > _LONG}
    tiles = "".join(
        f"<div><b>{escape(_cell(value))}</b><small>{escape(_label(key))}</small></div>"
        for key, value in report.metrics.items()
        if key not in texts
    )
    quotes = (f"<blockquote><b>{escape(key)}</b>\n{escape(str(value))}</blockquote>" for key, value in texts.items())
    plots = "".join(
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, png in report.plots
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return "\n".join(
        (
            f'<section id="{escape(name)}"><h2>{escape(report.title)}{_badge(state)}{synthetic}</h2>',
            f'<p class="about">{escape(report.system)} &middot; {escape(name)} &middot; {seconds:.1f} s</p>',
            f'<div class="figures">{tiles}</div>',
            *quotes,
            f'<div class="plots">{plots}</div>' if plots else "",
            *(_table(title, columns, rows) for title, columns, rows in report.tables),
            f'<ul class="notes">{notes}</ul>' if notes else "",
            "</section>",
        )
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = list(rows)
    kinds = (_kind(next((row[index] for row in rows if row[index] is not None), "")) for index, _ in enumerate(columns))
    head = "".join(f'<th class="{kind}">{escape(column)}</th>' for column, kind in zip(columns, kinds))
    body = "".join(
        "<tr>" + "".join(f'<td class="{_kind(cell)}">{escape(_cell(cell))}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    caption = f"<caption>{escape(title)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _badge(state: str) -> str:
    return "" if state == "done" else f'<span class="badge {state}">{state}</span>'


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) and len(value) > _LONG else ""


def _label(key: str) -> str:
    """A metric's name as a reader wants it: its unit apart."""
    name = key.replace("_per_s", "/s")
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix):
            name = f"{name.removesuffix(suffix)}, {unit}" if name != suffix else unit
    return name.strip("_").replace("_", " ")


def _cell(value: Any) -> str:
    """A value as a reader wants it: three figures, thousands separated, nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
